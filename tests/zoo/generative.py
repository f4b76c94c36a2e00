"""Networks whose output is an image: super-resolution, autoencoders, generators, style transfer, diffusion."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture, floats, mixed, tokens
from tests.zoo.places import Places
from tests.zoo.units import Add, Dense, Transposed, Unit


def srcnn(places: Places) -> nn.Module:
    unit = partial(Unit, places, norm=None)
    return nn.Sequential(unit(1, 24, 9), unit(24, 16, 1), nn.Conv2d(16, 1, 5, padding=2))


def espcn(places: Places) -> nn.Module:
    unit = partial(Unit, places, norm=None, act=nn.Tanh)
    return nn.Sequential(unit(1, 24, 5), unit(24, 16), nn.Conv2d(16, 9, 3, padding=1), nn.PixelShuffle(3))


class ScaledBlock(nn.Module):
    """EDSR's block: no norms, the branch scaled down."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            Unit(places, channels, channels, norm=None), Unit(places, channels, channels, norm=None, act=None)
        )
        self.add = Add(places, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x).mul(0.1), x)


class EDSR(nn.Module):
    """Mean colours off, a residual body, two pixel shuffles, colours on again."""

    def __init__(self, places: Places, channels: int = 24):
        super().__init__()
        self.register_buffer("colours", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(ScaledBlock(places, channels) for _ in range(3)))
        self.close = Unit(places, channels, channels, norm=None, act=None)
        self.add = Add(places, channels)
        self.tail = nn.Sequential(
            Unit(places, channels, 4 * channels, norm=None, act=None), nn.PixelShuffle(2),
            Unit(places, channels, 4 * channels, norm=None, act=None), nn.PixelShuffle(2),
            nn.Conv2d(channels, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.colours)
        return self.tail(self.add(self.close(self.body(x)), x)) + self.colours


class DnCNN(nn.Module):
    """The noise is predicted and taken off."""

    def __init__(self, places: Places, channels: int = 24):
        super().__init__()
        middle = [Unit(places, channels, channels) for _ in range(3)]
        self.body = nn.Sequential(
            Unit(places, 1, channels, norm=None), *middle, nn.Conv2d(channels, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def autoencoder(places: Places) -> nn.Module:
    return nn.Sequential(
        places.noise("on input", 3), Unit(places, 3, 16, 3, 2), Unit(places, 16, 24, 3, 2), Unit(places, 24, 32, 3, 2),
        Transposed(places, 32, 24, 3, padding=1, extra=1), Transposed(places, 24, 16, 3, padding=1, extra=1),
        nn.ConvTranspose2d(16, 3, 3, 2, 1, 1), nn.Sigmoid(),
    )  # fmt: skip


class VAE(nn.Module):
    """Encoder, two linear heads, decoder; in eval mode the code is its mean."""

    def __init__(self, places: Places, code: int = 16):
        super().__init__()
        leaky = partial(nn.LeakyReLU, 0.2)
        self.encode = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2, leaky), Unit(places, 16, 24, 3, 2, leaky),
            Unit(places, 24, 32, 3, 2, leaky), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_variance = (Dense(places, 512, code, act=None) for _ in range(2))
        self.latent = places.noise("hidden", code)
        self.open = nn.Linear(code, 512)
        self.decode = nn.Sequential(
            Transposed(places, 32, 24, 3, 2, leaky, extra=1), Transposed(places, 24, 16, 3, 2, leaky, extra=1),
            Transposed(places, 16, 16, 3, 2, leaky, extra=1), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encode(x)
        mean, log_variance = self.mean(features), self.log_variance(features)
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean) if self.training else mean
        return self.decode(self.open(self.latent(code)).view(-1, 32, 4, 4)), mean, log_variance


class DCGANGenerator(nn.Module):
    """Noise as a 1x1 image, grown by transposed convolutions."""

    def __init__(self, places: Places):
        super().__init__()
        self.body = nn.Sequential(
            places.noise("on input", 32), Transposed(places, 32, 48, 4, 1, padding=0), Transposed(places, 48, 32),
            Transposed(places, 32, 16), nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z[:, :, None, None])


def dcgan_discriminator(places: Places) -> nn.Module:
    unit = partial(Unit, places, kernel=4, stride=2, act=partial(nn.LeakyReLU, 0.2), padding=1)
    return nn.Sequential(
        places.noise("on input", 3), unit(3, 16, norm=None), unit(16, 24), unit(24, 32),
        nn.Conv2d(32, 1, 4, 1, 0, bias=False), nn.Flatten(), nn.Sigmoid(),
    )  # fmt: skip


class ReflectBlock(nn.Module):
    def __init__(self, places: Places, channels: int):
        super().__init__()
        unit = partial(Unit, places, channels, channels, norm="instance", mode="reflect")
        self.body = nn.Sequential(unit(), unit(act=None))
        self.add = Add(places, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x), x)


class Enlarge(nn.Module):
    """Nearest upsampling, reflection padding, convolution."""

    def __init__(self, places: Places, inputs: int, outputs: int):
        super().__init__()
        self.unit = Unit(places, inputs, outputs, norm="instance", padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(
            F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (1, 1, 1, 1), mode="reflect")
        )


def style_transfer(places: Places) -> nn.Module:
    unit = partial(Unit, places, norm="instance", mode="reflect")
    return nn.Sequential(
        places.noise("on input", 3), unit(3, 16, 9), unit(16, 24, 3, 2), unit(24, 32, 3, 2), ReflectBlock(places, 32),
        ReflectBlock(places, 32), Enlarge(places, 32, 24), Enlarge(places, 24, 16), nn.ReflectionPad2d(4),
        nn.Conv2d(16, 3, 9),
    )  # fmt: skip


class Pix2Pix(nn.Module):
    """A U-Net of strided convolutions; each level's input is put behind its result."""

    def __init__(
        self, places: Places, inputs: int = 3, widths: tuple[int, ...] = (16, 24, 32), outermost: bool = True
    ):
        super().__init__()
        width, *rest = widths
        norm = "batch" if rest and not outermost else None
        self.down = Unit(places, inputs, width, 4, 2, partial(nn.LeakyReLU, 0.2), norm=norm, padding=1)
        self.inner = Pix2Pix(places, width, tuple(rest), outermost=False) if rest else None
        channels = 2 * width if rest else width
        self.up = (
            nn.Sequential(nn.ConvTranspose2d(channels, 3, 4, 2, 1), nn.Tanh())
            if outermost
            else Transposed(places, channels, inputs)
        )
        self.outermost = outermost

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        y = self.up(y if self.inner is None else self.inner(y))
        return y if self.outermost else torch.cat([x, y], 1)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time steps, shape (batch, width)."""
    frequencies = torch.exp(
        torch.arange(width // 2, device=t.device) * (-math.log(10000.0) / (width // 2 - 1))
    )
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimedBlock(nn.Module):
    """Group norm, swish, convolution, twice, with the time added between (DDPM)."""

    def __init__(self, places: Places, inputs: int, outputs: int, time: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), places.noise("after norm", inputs), nn.SiLU())
        self.conv = Unit(places, inputs, outputs, norm=None, act=None)
        self.time = nn.Linear(time, outputs)
        self.second = nn.Sequential(nn.GroupNorm(4, outputs), places.noise("after norm", outputs), nn.SiLU())
        self.last = Unit(places, outputs, outputs, norm=None, act=None)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.add = Add(places, outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv(self.first(x)) + self.time(F.silu(time))[:, :, None, None]
        return self.add(self.last(self.second(y)), self.skip(x))


class Diffusion(nn.Module):
    """A U-Net of timed blocks, one level."""

    def __init__(self, places: Places, width: int = 16, time: int = 32):
        super().__init__()
        self.time = nn.Sequential(Dense(places, width, time, nn.SiLU), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = TimedBlock(places, width, width, time)
        self.middle = TimedBlock(places, width, 2 * width, time)
        self.up = TimedBlock(places, 3 * width, width, time)
        self.head = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(time_features(t, 16))
        fine = self.down(self.stem(x), time)
        coarse = self.middle(F.avg_pool2d(fine, 2), time)
        joined = torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1)
        return self.head(self.up(joined, time))


class VQEncoder(nn.Module):
    """The nearest of a codebook's vectors for each position, decoded again (VQ-VAE)."""

    def __init__(self, places: Places, codes: int = 32, width: int = 16):
        super().__init__()
        self.encode = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 4, 2, padding=1), Unit(places, 16, 24, 4, 2, padding=1),
            nn.Conv2d(24, width, 1),
        )  # fmt: skip
        self.codebook = nn.Embedding(codes, width)
        self.decode = nn.Sequential(
            Unit(places, width, 24), Transposed(places, 24, 16), nn.ConvTranspose2d(16, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        codes = self.codebook.weight
        distances = (flat**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * flat @ codes.t()
        indices = distances.argmin(1)
        quantised = self.codebook(indices).view(z.shape).permute(0, 3, 1, 2).contiguous()
        return self.decode(quantised), indices


def patch_discriminator(places: Places) -> nn.Module:
    """One score for each patch."""
    unit = partial(Unit, places, kernel=4, act=partial(nn.LeakyReLU, 0.2), padding=1)
    return nn.Sequential(
        places.noise("on input", 3), unit(3, 16, stride=2, norm=None), unit(16, 24, stride=2, norm="instance"),
        unit(24, 32, norm="instance"), nn.Conv2d(32, 1, 4, 1, 1),
    )  # fmt: skip


ARCHITECTURES = (
    Architecture("srcnn", "Super-resolution", srcnn, floats((1, 24, 24))),
    Architecture("espcn", "Super-resolution (pixel shuffle)", espcn, floats((1, 16, 16))),
    Architecture("edsr", "Super-resolution (pixel shuffle)", EDSR, floats((3, 12, 12))),
    Architecture("dncnn", "Denoising", DnCNN, floats((1, 24, 24))),
    Architecture("autoencoder", "Autoencoder", autoencoder, IMAGE),
    Architecture("vae", "VAE", VAE, IMAGE),
    Architecture("vq_vae", "VQ-VAE", VQEncoder, IMAGE),
    Architecture("dcgan_generator", "DCGAN", DCGANGenerator, floats((32,))),
    Architecture("dcgan_discriminator", "DCGAN", dcgan_discriminator, IMAGE),
    Architecture("style_transfer", "Style transfer", style_transfer, IMAGE),
    Architecture("pix2pix", "Pix2Pix", Pix2Pix, IMAGE),
    Architecture("patch_discriminator", "PatchGAN", patch_discriminator, IMAGE),
    Architecture("diffusion", "Diffusion", Diffusion, mixed(floats((3, 16, 16)), tokens(1000, ()))),
)
