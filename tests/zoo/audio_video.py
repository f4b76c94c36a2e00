"""Networks over one axis (waveforms, spectra) and over three (video, volumes)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, floats
from tests.zoo.places import Places
from tests.zoo.plain import Flat
from tests.zoo.residual import Residual
from tests.zoo.units import Add, Classifier, Transposed, Unit

Unit1d = partial(Unit, dims=1)
Unit3d = partial(Unit, dims=3)


def m5(places: Places) -> nn.Module:
    """Raw waveforms: a wide strided convolution, then small ones with pooling."""
    unit = partial(Unit1d, places)
    features = [
        unit(1, 16, 16, 4, padding=0), nn.MaxPool1d(4), unit(16, 24, padding=0), nn.MaxPool1d(2),
        unit(24, 32, padding=0), nn.MaxPool1d(2), unit(32, 32, padding=0),
    ]  # fmt: skip
    return nn.Sequential(Classifier(places, features, 32, inputs=1), nn.LogSoftmax(dim=-1))


def wav2letter(places: Places) -> nn.Module:
    """Convolutions only; log probabilities of letters for each step."""
    unit = partial(Unit1d, places, norm=None)
    return nn.Sequential(
        places.noise("on input", 13), unit(13, 24, 11, 2), unit(24, 24, 7), unit(24, 24, 7), unit(24, 48, 9),
        nn.Dropout(0.25), unit(48, 48, 1), nn.Conv1d(48, 12, 1), nn.LogSoftmax(dim=1),
    )  # fmt: skip


class GatedLayer(nn.Module):
    """WaveNet: a dilated causal convolution, tanh times sigmoid, a skip and a residual."""

    def __init__(self, places: Places, channels: int, skips: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.filter, self.gate = (nn.Conv1d(channels, channels, 2, dilation=dilation) for _ in range(2))
        self.before = places.noise("before norm", channels)
        self.after = places.noise("after norm", channels)
        self.gated = places.noise("after activation", channels)
        self.skip = nn.Conv1d(channels, skips, 1)
        self.out = nn.Conv1d(channels, channels, 1)
        self.add = Add(places, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        past = F.pad(x, (self.dilation, 0))
        y = self.gated(
            torch.tanh(self.before(self.filter(past))) * torch.sigmoid(self.after(self.gate(past)))
        )
        return self.add(self.out(y), x), self.skip(y)


class WaveNet(nn.Module):
    def __init__(self, places: Places, channels: int = 16, skips: int = 24):
        super().__init__()
        self.entry = nn.Conv1d(1, channels, 1)
        self.layers = nn.ModuleList(GatedLayer(places, channels, skips, 2**index) for index in range(4))
        self.head = nn.Sequential(
            nn.ReLU(), Unit1d(places, skips, skips, 1, norm=None), nn.Conv1d(skips, 32, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        total: Tensor | int = 0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.head(total)


class SeparationBlock(nn.Module):
    """Conv-TasNet: 1x1, PReLU, global norm, dilated depthwise, PReLU, norm, then residual and skip."""

    def __init__(self, places: Places, channels: int, hidden: int, dilation: int):
        super().__init__()
        unit = partial(Unit1d, places, norm=None, act=nn.PReLU)
        self.body = nn.Sequential(
            unit(channels, hidden, 1), nn.GroupNorm(1, hidden, eps=1e-8),
            unit(hidden, hidden, 3, groups=hidden, dilation=dilation), nn.GroupNorm(1, hidden, eps=1e-8),
        )  # fmt: skip
        self.after = places.noise("after norm", hidden)
        self.residual, self.skip = (nn.Conv1d(hidden, channels, 1) for _ in range(2))
        self.add = Add(places, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.after(self.body(x))
        return self.add(x, self.residual(y)), self.skip(y)


class ConvTasNet(nn.Module):
    """A learned basis, masks of two speakers over it, and the way back by transposed convolution."""

    def __init__(self, places: Places, basis: int = 32, channels: int = 16, speakers: int = 2):
        super().__init__()
        self.speakers, self.basis = speakers, basis
        self.encoder = nn.Conv1d(1, basis, 16, 8, bias=False)
        self.entry = nn.Sequential(
            nn.GroupNorm(1, basis, eps=1e-8), Unit1d(places, basis, channels, 1, act=None, norm=None)
        )
        self.blocks = nn.ModuleList(SeparationBlock(places, channels, 32, 2**index) for index in range(3))
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, speakers * basis, 1))
        self.decoder = nn.ConvTranspose1d(basis, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.relu(self.encoder(x))
        y, total = self.entry(weights), torch.zeros(())
        for block in self.blocks:
            y, skip = block(y)
            total = total + skip
        masks = self.masks(total).view(x.shape[0], self.speakers, self.basis, -1).sigmoid()
        sources = torch.einsum("bsnt,bnt->bsnt", masks, weights)
        return self.decoder(sources.view(x.shape[0] * self.speakers, self.basis, -1)).view(
            x.shape[0], self.speakers, -1
        )


class CausalBlock(nn.Module):
    """TCN: two dilated convolutions padded on both sides and chomped, the input added."""

    def __init__(self, places: Places, inputs: int, outputs: int, dilation: int):
        super().__init__()
        self.chomp = 2 * dilation
        unit = partial(Unit1d, places, kernel=3, dilation=dilation, norm=None, padding=2 * dilation)
        self.first, self.second = unit(inputs, outputs), unit(outputs, outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.add = Add(places, outputs, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[:, :, : -self.chomp].contiguous()
        y = self.second(y)[:, :, : -self.chomp].contiguous()
        return self.add(y, self.skip(x))


class TCN(nn.Module):
    """The last step's channels are classified."""

    def __init__(self, places: Places):
        super().__init__()
        widths = (4, 16, 24, 24)
        blocks = zip(widths, widths[1:], (1, 2, 4), strict=False)
        self.blocks = nn.Sequential(*(CausalBlock(places, a, b, dilation) for a, b, dilation in blocks))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class SqueezeRes2(nn.Module):
    """ECAPA-TDNN's end: attentive mean and deviation over time."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.attend = nn.Sequential(
            Unit1d(places, channels, 16, 1, act=nn.Tanh), nn.Conv1d(16, channels, 1), nn.Softmax(dim=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(x)
        mean = (x * weights).sum(dim=2)
        deviation = ((x**2 * weights).sum(dim=2) - mean**2).clamp(min=1e-6).sqrt()
        return torch.cat([mean, deviation], dim=1)


def xvector(places: Places) -> nn.Module:
    """Time-delay layers, statistics pooling with attention, an embedding."""
    unit = partial(Unit1d, places)
    return nn.Sequential(
        places.noise("on input", 20), unit(20, 24, 5), unit(24, 24, dilation=2), unit(24, 32, dilation=3),
        unit(32, 32, 1), SqueezeRes2(places, 32), nn.BatchNorm1d(64), nn.Linear(64, 24), nn.BatchNorm1d(24),
    )  # fmt: skip


def demucs(places: Places) -> nn.Module:
    """Strided encoder with gated 1x1 convolutions, transposed decoder; without the skips."""
    unit, gated = partial(Unit1d, places, norm=None), partial(nn.GLU, dim=1)
    return nn.Sequential(
        unit(1, 16, 8, 4, padding=2), unit(16, 32, 1, act=gated), unit(16, 32, 3, act=gated),
        Transposed(places, 16, 12, 8, 4, padding=2, norm=None, dims=1), nn.Conv1d(12, 2, 1),
    )  # fmt: skip


def c3d(places: Places) -> nn.Module:
    unit = partial(Unit3d, places, norm=None)
    features = [
        unit(3, 8), nn.MaxPool3d((1, 2, 2), (1, 2, 2)), unit(8, 16), nn.MaxPool3d(2, 2), unit(16, 24), unit(24, 24),
        nn.MaxPool3d(2, 2),
    ]  # fmt: skip
    return Flat(places, features, (192, 48, 10))


def factored(places: Places, inputs: int, outputs: int, stride: int, act: bool = True) -> nn.Module:
    """A spatial and a temporal convolution with a width between them that keeps the parameters equal."""
    middle = (27 * inputs * outputs) // (9 * inputs + 3 * outputs)
    return nn.Sequential(
        Unit3d(places, inputs, middle, (1, 3, 3), (1, stride, stride)),
        Unit3d(places, middle, outputs, (3, 1, 1), (stride, 1, 1), nn.ReLU if act else None),
    )


def r2plus1d(places: Places) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        body = [factored(places, inputs, outputs, stride), factored(places, outputs, outputs, 1, act=False)]
        same = inputs == outputs and stride == 1
        skip = nn.Identity() if same else Unit3d(places, inputs, outputs, 1, stride, None)
        return Residual(places, body, skip, outputs)

    stem = [Unit3d(places, 3, 6, (1, 5, 5), (1, 2, 2)), Unit3d(places, 6, 8, (3, 1, 1))]
    return Classifier(places, [*stem, block(8, 8, 1), block(8, 16, 2)], 16)


class SlowFast(nn.Module):
    """Every fourth frame with many channels, all frames with few; the fast path feeds the slow one."""

    def __init__(self, places: Places):
        super().__init__()
        self.slow = Unit3d(places, 3, 16, (1, 5, 5), (1, 2, 2))
        self.fast = Unit3d(places, 3, 4, (5, 5, 5), (1, 2, 2))
        self.lateral = Unit3d(places, 4, 8, (5, 1, 1), (4, 1, 1))
        self.slow_last = Unit3d(places, 24, 24, (1, 3, 3), (1, 2, 2))
        self.fast_last = Unit3d(places, 4, 8, 3, (1, 2, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = self.slow(x[:, :, ::4]), self.fast(x)
        slow = self.slow_last(torch.cat([slow, self.lateral(fast)], dim=1))
        pooled = [F.adaptive_avg_pool3d(y, 1).flatten(1) for y in (slow, self.fast_last(fast))]
        return self.head(torch.cat(pooled, dim=1))


CLIP = floats((3, 8, 16, 16))

ARCHITECTURES = (
    Architecture("m5", "Audio (M5)", m5, floats((1, 512))),
    Architecture("wav2letter", "Audio (Wav2Letter)", wav2letter, floats((13, 48))),
    Architecture("wavenet", "Audio (WaveNet)", WaveNet, floats((1, 48))),
    Architecture("conv_tasnet", "Audio (Conv-TasNet)", ConvTasNet, floats((1, 264))),
    Architecture("demucs", "Audio (Demucs)", demucs, floats((1, 128))),
    Architecture("xvector", "Audio (x-vector)", xvector, floats((20, 40))),
    Architecture("tcn", "TCN", TCN, floats((4, 32))),
    Architecture("c3d", "Video (C3D)", c3d, CLIP),
    Architecture("r2plus1d", "Video (R(2+1)D)", r2plus1d, CLIP),
    Architecture("slowfast", "Video (SlowFast)", SlowFast, CLIP),
)
