"""Residual networks: ResNet and what grew out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.places import Places
from tests.zoo.units import Add, Classifier, PreUnit, SqueezeExcite, Unit


def shortcut(places: Places, inputs: int, outputs: int, stride: int, norm: str = "batch") -> nn.Module:
    """Nothing where the shapes agree, else a strided 1x1 convolution."""
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else Unit(places, inputs, outputs, 1, stride, act=None, norm=norm)


class Residual(nn.Module):
    """body(x) + shortcut(x), with a relu after the sum."""

    def __init__(self, places: Places, body: Sequence[nn.Module], skip: nn.Module, outputs: int):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.skip = skip
        self.add = Add(places, outputs, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.body(x), self.skip(x))


def basic(places: Places, inputs: int, outputs: int, stride: int, norm: str = "batch") -> nn.Module:
    body = [
        Unit(places, inputs, outputs, 3, stride, norm=norm), Unit(places, outputs, outputs, act=None, norm=norm)
    ]  # fmt: skip
    return Residual(places, body, shortcut(places, inputs, outputs, stride, norm), outputs)


def bottleneck(
    places: Places, inputs: int, outputs: int, stride: int, ratio: int = 4, groups: int = 1
) -> nn.Module:
    width = outputs // ratio
    body = [
        Unit(places, inputs, width, 1),
        Unit(places, width, width, 3, stride, groups=groups),
        Unit(places, width, outputs, 1, act=None),
    ]
    return Residual(places, body, shortcut(places, inputs, outputs, stride), outputs)


class Pooled(nn.Sequential):
    """ResNet-D's shortcut: an average pool in front of the 1x1 convolution."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        super().__init__(pool, Unit(places, inputs, outputs, 1, act=None))


def tweaked(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    body = [Unit(places, inputs, outputs, 3, stride), Unit(places, outputs, outputs, act=None)]
    skip = nn.Identity() if inputs == outputs else Pooled(places, inputs, outputs, stride)
    return Residual(places, body, skip, outputs)


class Padded(nn.Module):
    """The first ResNet's shortcut on CIFAR (option A): every second position, zeros as new channels."""

    def __init__(self, more: int):
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))


def option_a(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    body = [Unit(places, inputs, outputs, 3, stride), Unit(places, outputs, outputs, act=None)]
    skip = nn.Identity() if inputs == outputs else Padded(outputs - inputs)
    return Residual(places, body, skip, outputs)


def squeeze_excite(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    body = [
        Unit(places, inputs, outputs, 3, stride), Unit(places, outputs, outputs, act=None),
        SqueezeExcite(places, outputs, outputs // 4),
    ]  # fmt: skip
    return Residual(places, body, shortcut(places, inputs, outputs, stride), outputs)


class SpatialGate(nn.Module):
    """CBAM's second half: positions gated by a convolution over the channels' mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([torch.mean(x, 1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(pooled))


class ChannelGate(nn.Module):
    """CBAM's first half: one perceptron on the channels' means and on their maxima."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.reduce = nn.Linear(channels, channels // 4)
        self.hidden = places.noise("hidden", channels // 4)
        self.expand = nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = sum(
            self.expand(self.hidden(F.relu(self.reduce(pool(x, 1).flatten(1)))))
            for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
        )
        return x * torch.sigmoid(gate).unsqueeze(2).unsqueeze(3).expand_as(x)


def cbam(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    body = [
        Unit(places, inputs, outputs, 3, stride), Unit(places, outputs, outputs, act=None),
        ChannelGate(places, outputs), SpatialGate(),
    ]  # fmt: skip
    return Residual(places, body, shortcut(places, inputs, outputs, stride), outputs)


class PreActivation(nn.Module):
    """norm-relu-convolution twice; a projecting shortcut takes the first activation."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.after = places.noise("after norm", inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.before = places.noise("before norm", outputs)
        self.second = PreUnit(places, outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.skip = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.add = Add(places, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.after(self.norm(x)))
        return self.add(self.second(self.before(self.first(y))), x if self.skip is None else self.skip(y))


class SplitTransform(nn.Module):
    """Res2Net's middle: each part of the channels is convolved after adding the previous part's result."""

    def __init__(self, places: Places, width: int, scale: int = 4):
        super().__init__()
        self.part = width // scale
        self.units = nn.ModuleList(Unit(places, self.part, self.part) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.split(x, self.part, 1)
        done = [first]
        for position, (unit, part) in enumerate(zip(self.units, parts, strict=True)):
            done.append(unit(part if not position else part + done[-1]))
        return torch.cat(done, 1)


def res2(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    body: list[nn.Module] = [Unit(places, inputs, outputs, 1), SplitTransform(places, outputs)]
    if stride > 1:
        body.append(nn.AvgPool2d(3, stride, 1))
    body.append(Unit(places, outputs, outputs, 1, act=None))
    return Residual(places, body, shortcut(places, inputs, outputs, stride), outputs)


class SelectiveKernel(nn.Module):
    """Two dilations; for each channel a softmax over the branches (Li et al. 2019)."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            Unit(places, channels, channels, groups=4, dilation=1 + index) for index in range(2)
        )
        self.reduce = nn.Linear(channels, channels // 2)
        self.hidden = places.noise("hidden", channels // 2)
        self.expand = nn.ModuleList(nn.Linear(channels // 2, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([branch(x) for branch in self.branches], dim=1)
        z = self.hidden(F.relu(self.reduce(branches.sum(1).mean((2, 3)))))
        weights = torch.stack([expand(z) for expand in self.expand], dim=1).softmax(dim=1)
        return (branches * weights[..., None, None]).sum(1)


def selective_kernel(places: Places, inputs: int, outputs: int, stride: int) -> nn.Module:
    width = outputs // 2
    body: list[nn.Module] = [Unit(places, inputs, width, 1), SelectiveKernel(places, width)]
    body += [nn.AvgPool2d(2)] * (stride - 1) + [Unit(places, width, outputs, 1, act=None)]
    return Residual(places, body, shortcut(places, inputs, outputs, stride), outputs)


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and identity branches, each with a batch norm, as they are while training."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.dense = Unit(places, inputs, outputs, 3, stride, act=None)
        self.pointwise = Unit(places, inputs, outputs, 1, stride, act=None)
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None
        self.add = Add(places, outputs, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        rest = self.pointwise(x) if self.identity is None else self.pointwise(x) + self.identity(x)
        return self.add(self.dense(x), rest)


Block = Callable[[Places, int, int, int], nn.Module]


def stages(
    places: Places,
    block: Block,
    widths: Sequence[int] = (16, 32, 48),
    depth: int = 2,
    stem: int = 16,
    norm: str = "batch",
    last: Sequence[nn.Module] = (),
) -> nn.Module:
    """A stem, then `depth` blocks for each width; the first of each later stage halves the image."""
    blocks, channels = [], stem
    for stage, width in enumerate(widths):
        for position in range(depth):
            blocks.append(block(places, channels, width, 2 if stage and not position else 1))
            channels = width
    return Classifier(places, [Unit(places, 3, stem, norm=norm), *blocks, *last], channels)


def preact(places: Places) -> nn.Module:
    return stages(places, PreActivation, last=[nn.BatchNorm2d(48), nn.ReLU()])


def entry(name: str, family: str, block: Block, **options: object) -> Architecture:
    return Architecture(name, family, partial(stages, block=block, **options), IMAGE)


ARCHITECTURES = (
    entry("resnet18", "ResNet (basic)", basic),
    entry("resnet20_option_a", "ResNet (basic)", option_a),
    entry("resnet50", "ResNet (bottleneck)", bottleneck, widths=(32, 64)),
    Architecture("resnet_preact", "ResNet (preact)", preact, IMAGE),
    entry("resnet_d", "ResNet-D", tweaked),
    entry("wide_resnet", "Wide ResNet", basic, widths=(48, 64), depth=1),
    entry("resnet_group_norm", "ResNet (group norm)", partial(basic, norm="group"), norm="group"),
    entry("resnext", "ResNeXt", partial(bottleneck, ratio=2, groups=8), widths=(32, 64)),
    entry("regnet", "RegNet", partial(bottleneck, ratio=1, groups=4), widths=(16, 32)),
    entry("se_resnet", "SE-ResNet", squeeze_excite, widths=(16, 32)),
    entry("cbam_resnet", "CBAM", cbam, widths=(16, 32), depth=1),
    entry("sknet", "SKNet", selective_kernel, widths=(16, 32), depth=1),
    entry("res2net", "Res2Net", res2, widths=(16, 32), depth=1),
    entry("repvgg", "RepVGG", RepVGGBlock, widths=(16, 32)),
)
