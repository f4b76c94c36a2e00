"""Networks for small machines: depthwise convolutions, shuffles, cheap features; ConvNeXt beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.places import Places
from tests.zoo.units import Act, Add, Classifier, Dense, SqueezeExcite, Unit


class Separable(nn.Sequential):
    """A depthwise unit and a pointwise unit."""

    def __init__(
        self,
        places: Places,
        inputs: int,
        outputs: int,
        stride: int = 1,
        act: Act = nn.ReLU,
        middle: Act = None,
    ):
        super().__init__(
            Unit(places, inputs, inputs, 3, stride, middle, groups=inputs),
            Unit(places, inputs, outputs, 1, act=act),
        )


def mobilenet_v1(places: Places) -> nn.Module:
    separable = partial(Separable, places, middle=nn.ReLU)
    features = [
        Unit(places, 3, 16, 3, 2), separable(16, 32), separable(32, 48, 2), separable(48, 48),
        separable(48, 64, 2), separable(64, 64),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation where asked for, projection."""

    def __init__(
        self,
        places: Places,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        expand: int = 3,
        kernel: int = 3,
        act: Callable[[], nn.Module] = nn.ReLU6,
        squeeze: Callable[[Places, int, int], nn.Module] | None = None,
    ):
        super().__init__()
        width = inputs * expand
        self.body = nn.Sequential(
            Unit(places, inputs, width, 1, act=act) if expand > 1 else nn.Identity(),
            Unit(places, width, width, kernel, stride, act, groups=width),
            squeeze(places, width, inputs // 4) if squeeze else nn.Identity(),
            Unit(places, width, outputs, 1, act=None),
        )
        self.add = Add(places, outputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.add is None else self.add(self.body(x), x)


def mobilenet_v2(places: Places) -> nn.Module:
    block = partial(InvertedResidual, places)
    features = [
        Unit(places, 3, 16, 3, 2, nn.ReLU6), block(16, 8, expand=1), block(8, 12, 2, expand=6),
        block(12, 12, expand=6), block(12, 16, 2, expand=6), block(16, 16, expand=6),
        Unit(places, 16, 64, 1, act=nn.ReLU6), nn.Dropout(),
    ]  # fmt: skip
    return Classifier(places, features, 64)


def mobilenet_v3(places: Places) -> nn.Module:
    """Hardswish and hard gates; a hidden layer behind the pooling."""
    squeeze = partial(SqueezeExcite, gate=nn.Hardsigmoid)
    block = partial(InvertedResidual, places)
    return nn.Sequential(
        places.noise("on input", 3), Unit(places, 3, 16, 3, 2, nn.Hardswish),
        block(16, 16, 2, expand=1, act=nn.ReLU, squeeze=squeeze), block(16, 24, expand=3, act=nn.ReLU),
        block(24, 24, expand=3, act=nn.ReLU), block(24, 24, 2, kernel=5, act=nn.Hardswish, squeeze=squeeze),
        block(24, 24, kernel=5, act=nn.Hardswish, squeeze=squeeze), Unit(places, 24, 64, 1, act=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), Dense(places, 64, 80, nn.Hardswish), nn.Dropout(), nn.Linear(80, 10),
    )  # fmt: skip


def efficientnet(places: Places) -> nn.Module:
    squeeze = partial(SqueezeExcite, act=nn.SiLU)
    block = partial(InvertedResidual, places, act=nn.SiLU, squeeze=squeeze)
    features = [
        Unit(places, 3, 16, 3, 2, nn.SiLU), block(16, 8, expand=1), block(8, 12, 2, expand=6), block(12, 12, expand=6),
        block(12, 16, 2, kernel=5, expand=6), block(16, 16, kernel=5, expand=6), Unit(places, 16, 64, 1, act=nn.SiLU),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class Mixed(nn.Module):
    """MixNet: each part of the channels has a depthwise convolution of its own size."""

    def __init__(self, places: Places, channels: int, kernels: tuple[int, ...] = (3, 5, 7)):
        super().__init__()
        self.part = channels // len(kernels)
        self.units = nn.ModuleList(Unit(places, self.part, self.part, k, groups=self.part) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.part, dim=1)
        return torch.cat([unit(part) for unit, part in zip(self.units, parts, strict=True)], dim=1)


def mixnet(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 12, 3, 2), Unit(places, 12, 36, 1), Mixed(places, 36), Unit(places, 36, 24, 1, act=None),
        Unit(places, 24, 48, 1, 2), Mixed(places, 48), Unit(places, 48, 32, 1, act=None),
    ]  # fmt: skip
    return Classifier(places, features, 32)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels (groups, rest) become (rest, groups)."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class ShuffleV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; a strided block concatenates its pooled input."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int, groups: int = 3):
        super().__init__()
        self.groups = groups
        width, grown = outputs // 4, outputs - inputs if stride > 1 else outputs
        self.reduce = Unit(places, inputs, width, 1, groups=groups)
        self.depthwise = Unit(places, width, width, 3, stride, None, groups=width)
        self.expand = Unit(places, width, grown, 1, act=None, groups=groups)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride > 1 else None
        self.out = places.noise("on blocks", outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(shuffle(self.reduce(x), self.groups)))
        y = x + y if self.pool is None else torch.cat([self.pool(x), y], 1)
        return self.out(F.relu(y))


def shufflenet_v1(places: Places) -> nn.Module:
    block = partial(ShuffleV1, places)
    features = [
        Unit(places, 3, 24, 3, 2), block(24, 60, 2), block(60, 60, 1), block(60, 60, 1), block(60, 120, 2),
        block(120, 120, 1),
    ]  # fmt: skip
    return Classifier(places, features, 120)


class ShuffleV2(nn.Module):
    """Half of the channels passes by; with a stride both halves are convolved."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        super().__init__()
        half, self.stride = outputs // 2, stride
        entry = inputs if stride > 1 else half
        self.left = Separable(places, inputs, half, stride) if stride > 1 else nn.Identity()
        self.right = nn.Sequential(Unit(places, entry, half, 1), Separable(places, half, half, stride))
        self.out = places.noise("on blocks", outputs)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        return self.out(shuffle(torch.cat((self.left(left), self.right(right)), dim=1), 2))


def shufflenet_v2(places: Places) -> nn.Module:
    block = partial(ShuffleV2, places)
    features = [
        Unit(places, 3, 16, 3, 2), block(16, 32, 2), block(32, 32, 1), block(32, 32, 1), block(32, 64, 2),
        block(64, 64, 1), Unit(places, 64, 64, 1),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class Ghost(nn.Module):
    """Half of the channels are cheap functions of the other half."""

    def __init__(self, places: Places, inputs: int, outputs: int, act: Act = nn.ReLU):
        super().__init__()
        self.outputs, half = outputs, (outputs + 1) // 2
        self.primary = Unit(places, inputs, half, 1, act=act)
        self.cheap = Unit(places, half, half, 3, act=act, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], dim=1)[:, : self.outputs, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self, places: Places, inputs: int, width: int, outputs: int, stride: int, gate: bool):
        super().__init__()
        down = Unit(places, width, width, 3, stride, None, groups=width) if stride > 1 else nn.Identity()
        squeeze = SqueezeExcite(places, width, width // 4, gate=nn.Hardsigmoid) if gate else nn.Identity()
        self.body = nn.Sequential(
            Ghost(places, inputs, width), down, squeeze, Ghost(places, width, outputs, act=None)
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else Separable(places, inputs, outputs, stride, act=None)
        self.add = Add(places, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x), self.skip(x))


def ghostnet(places: Places) -> nn.Module:
    block = partial(GhostBottleneck, places)
    features = [
        Unit(places, 3, 16, 3, 2), block(16, 24, 16, 1, False), block(16, 40, 25, 2, False), block(25, 50, 25, 1, True),
        block(25, 60, 32, 2, True), Unit(places, 32, 64, 1),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class XceptionBlock(nn.Module):
    """Two separable convolutions with a relu in front of each, pooling, and a strided 1x1 beside them."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int, first: bool = False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Identity() if first else nn.ReLU(), Separable(places, inputs, outputs, act=None),
            nn.ReLU(), Separable(places, outputs, outputs, act=None),
            nn.MaxPool2d(3, stride, 1) if stride > 1 else nn.Identity(),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else Unit(places, inputs, outputs, 1, stride, None)
        self.add = Add(places, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x), self.skip(x))


def xception(places: Places) -> nn.Module:
    block = partial(XceptionBlock, places)
    features = [
        Unit(places, 3, 16, 3, 2, padding=0), Unit(places, 16, 24, padding=0), block(24, 32, 2, True),
        block(32, 48, 2), block(48, 48, 1), Separable(places, 48, 64),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class ChannelsFirstNorm(nn.Module):
    """Layer norm over channels written out, as in ConvNeXt's reference code for images."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then channels last: layer norm, an inverted bottleneck of linear layers, layer scale."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.before = places.noise("before norm", channels, -1)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.after = places.noise("after norm", channels, -1)
        self.expand = Dense(places, channels, 4 * channels, nn.GELU)
        self.project = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.randn(channels))
        self.add = Add(places, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.norm(self.before(self.depthwise(x).permute(0, 2, 3, 1))))
        return self.add((self.gamma * self.project(self.expand(y))).permute(0, 3, 1, 2), x)


def convnext(places: Places) -> nn.Module:
    features = [
        nn.Conv2d(3, 16, 4, 4), ChannelsFirstNorm(16), ConvNeXtBlock(places, 16), ConvNeXtBlock(places, 16),
        ChannelsFirstNorm(16), nn.Conv2d(16, 32, 2, 2), ConvNeXtBlock(places, 32), ConvNeXtBlock(places, 32),
    ]  # fmt: skip
    return Classifier(places, features, 32)


ARCHITECTURES = (
    Architecture("mobilenet_v1", "MobileNet v1", mobilenet_v1, IMAGE),
    Architecture("mobilenet_v2", "MobileNet v2", mobilenet_v2, IMAGE),
    Architecture("mobilenet_v3", "MobileNet v3", mobilenet_v3, IMAGE),
    Architecture("efficientnet", "EfficientNet", efficientnet, IMAGE),
    Architecture("mixnet", "MixNet", mixnet, IMAGE),
    Architecture("shufflenet_v1", "ShuffleNet v1", shufflenet_v1, IMAGE),
    Architecture("shufflenet_v2", "ShuffleNet v2", shufflenet_v2, IMAGE),
    Architecture("ghostnet", "GhostNet", ghostnet, IMAGE),
    Architecture("xception", "Xception", xception, IMAGE),
    Architecture("convnext", "ConvNeXt", convnext, IMAGE),
)
