"""Flows, autoregressive images, vocoders, style transfer and video, as their own repositories write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.zoo.architecture import Architecture, floats, mixed, tokens
from tests.zoo.places import Places
from tests.zoo.units import Dense, Unit


class Coupling(nn.Module):
    """Glow: half of the channels scale and shift the other half; the border is padded with ones."""

    def __init__(self, places: Places, channels: int, hidden: int = 24):
        super().__init__()
        self.body = nn.Sequential(
            Unit(places, channels // 2, hidden, norm=None), Unit(places, hidden, hidden, 1, norm=None)
        )
        self.noise = places.noise("hidden", hidden)
        self.last, self.scale = (
            nn.Conv2d(hidden, channels, 3),
            nn.Parameter(torch.randn(1, channels, 1, 1) * 0.2),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.chunk(2, 1)
        y = self.last(F.pad(self.noise(self.body(left)), [1, 1, 1, 1], value=1)) * torch.exp(self.scale * 3)
        log_scale, shift = y.chunk(2, 1)
        scale = torch.sigmoid(log_scale + 2)
        y = torch.cat([left, (right + shift) * scale], 1)
        return y, torch.sum(torch.log(scale).view(x.shape[0], -1), 1)


class Glow(nn.Module):
    """Squeeze, two steps of flow around one invertible 1x1 convolution, a split with a learned prior."""

    def __init__(self, places: Places, channels: int = 12):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(places, channels) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3)
        self.scale = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.register_buffer("order", torch.eye(channels)[torch.randperm(channels)])
        self.register_buffer("below", torch.tril(torch.ones(channels, channels), -1))
        self.lower, self.upper = (nn.Parameter(torch.randn(channels, channels) * 0.2) for _ in range(2))
        self.diagonal = nn.Parameter(torch.rand(channels) - 0.5)
        self.prior = nn.Conv2d(channels // 2, channels, 3, padding=1)

    def mixing(self) -> Tensor:
        lower = self.lower * self.below + torch.eye(len(self.diagonal))
        upper = self.upper * self.below.T + torch.diag(torch.exp(self.diagonal))
        return (self.order @ lower @ upper).unsqueeze(2).unsqueeze(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = x.contiguous().view(batch, channels * 4, height // 2, width // 2)
        likelihood: Tensor | float = 0.0
        for coupling in self.couplings:
            positions = x.shape[2] * x.shape[3]
            likelihood = likelihood + positions * torch.sum(torch.log(torch.abs(self.scale)))
            x = F.conv2d(self.scale * (x + self.shift), self.mixing())
            likelihood = likelihood + positions * torch.sum(self.diagonal)
            x, more = coupling(x)
            likelihood = likelihood + more
        out, code = x.chunk(2, 1)
        mean, log_deviation = self.prior(out).chunk(2, 1)
        squares = (code - mean) ** 2 / torch.exp(2 * log_deviation)
        density = -0.5 * math.log(2 * math.pi) - log_deviation - 0.5 * squares
        return out, code, likelihood + density.view(batch, -1).sum(1)


class MaskedConv(nn.Conv2d):
    """A convolution that sees what is above and to the left; with `own` the pixel itself as well."""

    def __init__(self, inputs: int, outputs: int, kernel: int, own: bool):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        mask = torch.ones_like(self.weight)
        mask[:, :, kernel // 2, kernel // 2 + int(own) :] = 0
        mask[:, :, kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class GatedLayer(nn.Module):
    """A masked convolution, a class's bias, tanh times sigmoid; what goes on and what goes to the output."""

    def __init__(self, places: Places, channels: int, skipped: int):
        super().__init__()
        self.conv = MaskedConv(channels, 2 * channels, 3, own=True)
        self.before, self.gated = places.noise("before norm", 2 * channels), places.noise("hidden", channels)
        self.residual, self.skip = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, skipped, 1)

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = torch.chunk(self.before(self.conv(x)) + label[:, :, None, None], 2, dim=1)
        y = self.gated(torch.tanh(value) * torch.sigmoid(gate))
        return x + self.residual(y), self.skip(y)


class PixelCNN(nn.Module):
    def __init__(self, places: Places, channels: int = 16):
        super().__init__()
        self.first = MaskedConv(1, channels, 7, own=False)
        self.layers = nn.ModuleList(GatedLayer(places, channels, 16) for _ in range(2))
        self.labels = nn.Embedding(5, 2 * channels)
        self.head = nn.Sequential(nn.ReLU(), Unit(places, 16, 24, 1, norm=None), nn.Conv2d(24, 8, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x, total = self.first(x), torch.zeros(1)
        for layer in self.layers:
            x, skipped = layer(x, self.labels(label))
            total = total + skipped
        return self.head(total)


class DilatedBlock(nn.Module):
    """HiFi-GAN: pairs of weight-normed convolutions, the first of each pair dilated."""

    def __init__(self, places: Places, channels: int, kernel: int):
        super().__init__()
        self.pairs, self.noise = nn.ModuleList(), nn.ModuleList()
        for dilation in (1, 3):
            for step, place in ((dilation, "before norm"), (1, "after norm")):
                padding = (kernel - 1) * step // 2
                conv = nn.Conv1d(channels, channels, kernel, 1, padding, step)
                self.pairs.append(weight_norm(conv))
                self.noise.append(places.noise(place, channels))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(0, len(self.pairs), 2):
            y = self.noise[number](self.pairs[number](F.leaky_relu(x, 0.1)))
            x = self.noise[number + 1](self.pairs[number + 1](F.leaky_relu(y, 0.1))) + x
        return x


class HiFiGAN(nn.Module):
    """Spectra to sound: transposed convolutions, and the mean of blocks with kernels of two sizes."""

    def __init__(self, places: Places):
        super().__init__()
        self.first, self.noise = weight_norm(nn.Conv1d(8, 24, 7, padding=3)), places.noise("hidden", 24)
        self.raised = nn.ModuleList(
            (
                weight_norm(nn.ConvTranspose1d(24, 16, 8, 4, 2)),
                weight_norm(nn.ConvTranspose1d(16, 12, 4, 2, 1)),
            )
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(DilatedBlock(places, channels, kernel) for kernel in (3, 5))
            for channels in (16, 12)
        )
        self.last = weight_norm(nn.Conv1d(12, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(self.first(x))
        for raised, (small, large) in zip(self.raised, self.blocks, strict=True):
            x = raised(F.leaky_relu(x, 0.1))
            total = small(x)
            total += large(x)
            x = total / 2
        return torch.tanh(self.last(F.leaky_relu(x)))


class StyledBlock(nn.Module):
    """StarGAN v2: instance norms whose scale and shift come from a style, upsampling, both sides over sqrt(2)."""

    def __init__(self, places: Places, inputs: int, outputs: int, style: int):
        super().__init__()
        self.styles = nn.ModuleList(nn.Linear(style, 2 * channels) for channels in (inputs, outputs))
        self.norms = nn.ModuleList(
            nn.InstanceNorm2d(channels, affine=False) for channels in (inputs, outputs)
        )
        self.first = Unit(places, inputs, outputs, norm=None, act=None)
        self.last = Unit(places, outputs, outputs, norm=None, act=None)
        self.noise, self.skip = places.noise("hidden", inputs), nn.Conv2d(inputs, outputs, 1, bias=False)

    def styled(self, number: int, x: Tensor, style: Tensor) -> Tensor:
        pair = self.styles[number](style)
        scale, shift = torch.chunk(pair.view(pair.size(0), pair.size(1), 1, 1), chunks=2, dim=1)
        return F.leaky_relu((1 + scale) * self.norms[number](x) + shift, 0.2)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = F.interpolate(self.noise(self.styled(0, x, style)), scale_factor=2, mode="nearest")
        y = self.last(self.styled(1, self.first(y), style))
        return (y + self.skip(F.interpolate(x, scale_factor=2, mode="nearest"))) / math.sqrt(2)


class StarGAN(nn.Module):
    """Spectral norms on the way down, styles on the way up, FiLM in front of the output."""

    def __init__(self, places: Places, style: int = 12):
        super().__init__()
        self.down = spectral_norm(nn.Conv2d(3, 16, 4, 2, 1))
        self.encode = Unit(places, 16, 24, 4, 2, padding=1, norm="instance")
        self.style = nn.Sequential(Dense(places, 8, 24), nn.Linear(24, style))
        self.blocks = nn.ModuleList((StyledBlock(places, 24, 16, style), StyledBlock(places, 16, 16, style)))
        self.film, self.last = nn.Linear(style, 32), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        x, style = self.encode(F.leaky_relu(self.down(x), 0.2)), self.style(code)
        for block in self.blocks:
            x = block(x, style)
        scale, shift = self.film(style).unsqueeze(-1).unsqueeze(-1).split(16, dim=1)
        return torch.tanh(self.last(F.relu(x * (scale + 1) + shift)))


class ConvLSTMCell(nn.Module):
    """An LSTM whose gates are one convolution of the image and the state."""

    def __init__(self, places: Places, inputs: int, hidden: int):
        super().__init__()
        self.gates = Unit(places, inputs + hidden, 4 * hidden, norm=None, act=None)
        self.noise, self.hidden = places.noise("hidden", hidden), hidden

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        gates = torch.split(self.gates(torch.cat([x, hidden], dim=1)), self.hidden, dim=1)
        enter, forget, leave = (torch.sigmoid(gate) for gate in gates[:3])
        cell = forget * cell + enter * torch.tanh(gates[3])
        return self.noise(leave * torch.tanh(cell)), cell


class ConvLSTM(nn.Module):
    """Two layers of cells over three frames."""

    def __init__(self, places: Places, hidden: int = 12):
        super().__init__()
        self.hidden = hidden
        self.encode, self.decode = Unit(places, 1, 8), nn.Conv2d(hidden, 1, 1)
        self.cells = nn.ModuleList((ConvLSTMCell(places, 8, hidden), ConvLSTMCell(places, hidden, hidden)))

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, _, height, width = x.size()
        zeros = torch.zeros(batch, self.hidden, height, width, device=x.device)
        states, found = [(zeros, zeros), (zeros, zeros)], []
        for frame in range(frames):
            y = self.encode(x[:, frame, :, :, :])
            for number, cell in enumerate(self.cells):
                states[number] = cell(y, states[number])
                y = states[number][0]
            found.append(self.decode(y))
        return torch.stack(found, dim=1)


ARCHITECTURES = (
    Architecture("glow", "Glow", Glow, floats((3, 8, 8))),
    Architecture("pixelcnn", "PixelCNN", PixelCNN, mixed(floats((1, 10, 10)), tokens(5, ()))),
    Architecture("hifigan", "HiFi-GAN", HiFiGAN, floats((8, 8))),
    Architecture("stargan", "StarGAN v2", StarGAN, mixed(floats((3, 16, 16)), floats((8,)))),
    Architecture("convlstm", "ConvLSTM", ConvLSTM, floats((3, 1, 10, 10))),
)
