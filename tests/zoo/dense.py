"""Networks that concatenate: DenseNet, the Inceptions, VoVNet, DLA, HRNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.places import Places
from tests.zoo.residual import basic
from tests.zoo.units import Add, Classifier, PreUnit, Unit


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, norm first; the result is put behind the input."""

    def __init__(self, places: Places, inputs: int, growth: int):
        super().__init__()
        self.body = nn.Sequential(
            PreUnit(places, inputs, 2 * growth, 1), PreUnit(places, 2 * growth, growth, 3), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(places: Places, growth: int = 8, layers: int = 4) -> nn.Module:
    features: list[nn.Module] = [Unit(places, 3, 2 * growth, 3, 2)]
    channels = 2 * growth
    for block in range(2):
        if block:
            features += [PreUnit(places, channels, channels // 2, 1), nn.AvgPool2d(2, 2)]
            channels //= 2
        for _ in range(layers):
            features.append(DenseLayer(places, channels, growth))
            channels += growth
    return Classifier(places, [*features, nn.BatchNorm2d(channels), nn.ReLU()], channels)


class Branches(nn.Module):
    """The concatenation of all branches."""

    def __init__(self, places: Places, branches: Sequence[nn.Module], channels: int):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.out = places.noise("on blocks", channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([branch(x) for branch in self.branches], 1))


def inception_block(
    places: Places, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int
) -> nn.Module:
    branches = [
        Unit(places, inputs, one, 1),
        nn.Sequential(Unit(places, inputs, three[0], 1), Unit(places, three[0], three[1], 3)),
        nn.Sequential(Unit(places, inputs, five[0], 1), Unit(places, five[0], five[1], 5)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(places, inputs, pool, 1)),
    ]
    return Branches(places, branches, one + three[1] + five[1] + pool)


def googlenet(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 16, 3, 2),
        inception_block(places, 16, 8, (12, 16), (4, 8), 8),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        inception_block(places, 40, 16, (12, 24), (6, 12), 8),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        inception_block(places, 60, 16, (16, 32), (6, 12), 12),
    ]
    return Classifier(places, features, 72)


def factorised(places: Places, inputs: int, width: int) -> nn.Module:
    """Inception v3's 17x17 block: 7x7 as 1x7 and 7x1."""
    unit = partial(Unit, places)
    branches = [
        unit(inputs, width, 1),
        nn.Sequential(unit(inputs, 8, 1), unit(8, 8, (1, 7)), unit(8, width, (7, 1))),
        nn.Sequential(unit(inputs, 8, 1), unit(8, 8, (7, 1)), unit(8, 8, (1, 7)), unit(8, width, (7, 1))),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(inputs, width, 1)),
    ]
    return Branches(places, branches, 4 * width)


def reduction(places: Places, inputs: int, width: int) -> nn.Module:
    """Two strided convolutions and a pooling side by side."""
    unit = partial(Unit, places)
    branches = [
        unit(inputs, width, 3, 2, padding=0),
        nn.Sequential(unit(inputs, 8, 1), unit(8, 12), unit(12, width, 3, 2, padding=0)),
        nn.MaxPool2d(3, 2),
    ]
    return Branches(places, branches, 2 * width + inputs)


def inception_v3(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 12, 3, 2, padding=0), Unit(places, 12, 24), inception_block(places, 24, 8, (8, 12), (6, 8), 8),
        reduction(places, 36, 14), factorised(places, 64, 16), factorised(places, 64, 16),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class ScaledResidual(nn.Module):
    """Inception-ResNet: concatenated branches through a linear 1x1 convolution, scaled, added."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        unit = partial(Unit, places)
        branches = [
            unit(channels, 8, 1),
            nn.Sequential(unit(channels, 8, 1), unit(8, 8)),
            nn.Sequential(unit(channels, 8, 1), unit(8, 12), unit(12, 16)),
        ]
        self.branches = Branches(places, branches, 32)
        self.linear = nn.Conv2d(32, channels, 1)
        self.add = Add(places, channels, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.linear(self.branches(x)) * 0.3)


def inception_resnet(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 16, 3, 2), Unit(places, 16, 32), ScaledResidual(places, 32), ScaledResidual(places, 32),
        reduction(places, 32, 16), ScaledResidual(places, 64),
    ]  # fmt: skip
    return Classifier(places, features, 64)


class OneShot(nn.Module):
    """VoVNet: a chain of convolutions, everything concatenated once, a gate over channels, the input added."""

    def __init__(self, places: Places, inputs: int, width: int, outputs: int, layers: int = 3):
        super().__init__()
        self.units = nn.ModuleList(Unit(places, width if i else inputs, width) for i in range(layers))
        self.join = Unit(places, inputs + layers * width, outputs, 1)
        self.gate = nn.Conv2d(outputs, outputs, 1)
        self.add = Add(places, outputs) if inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for unit in self.units:
            found.append(unit(found[-1]))
        y = self.join(torch.cat(found, 1))
        y = y * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        return y if self.add is None else self.add(y, x)


def vovnet(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 16, 3, 2), OneShot(places, 16, 12, 32), nn.MaxPool2d(3, 2, ceil_mode=True),
        OneShot(places, 32, 16, 48), OneShot(places, 48, 16, 48),
    ]  # fmt: skip
    return Classifier(places, features, 48)


class Tree(nn.Module):
    """Deep layer aggregation: two subtrees whose results, with all handed down, meet in a root."""

    def __init__(
        self,
        places: Places,
        levels: int,
        inputs: int,
        outputs: int,
        stride: int,
        handed: int = 0,
        root: bool = False,
    ):
        super().__init__()
        self.levels, self.root = levels, root
        more = inputs if root else 0
        if levels == 1:
            self.left = basic(places, inputs, outputs, stride)
            self.right = basic(places, outputs, outputs, 1)
            self.join = Unit(places, 2 * outputs + handed + more, outputs, 1)
        else:
            self.left = Tree(places, levels - 1, inputs, outputs, stride)
            self.right = Tree(places, levels - 1, outputs, outputs, 1, handed=handed + more + outputs)
        self.down = nn.MaxPool2d(stride, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor, children: tuple[Tensor, ...] = ()) -> Tensor:
        if self.root:
            children = (*children, self.down(x))
        left = self.left(x)
        if self.levels == 1:
            return self.join(torch.cat([self.right(left), left, *children], 1))
        return self.right(left, (*children, left))


def dla(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 16),
        Unit(places, 16, 16, 3, 2),
        Tree(places, 1, 16, 24, 1),
        Tree(places, 2, 24, 32, 2, root=True),
    ]
    return Classifier(places, features, 32)


class Exchange(nn.Module):
    """HRNet: each resolution gets the sum of all, strided down or interpolated up."""

    def __init__(self, places: Places, widths: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList(basic(places, width, width, 1) for width in widths)
        self.paths = nn.ModuleList(
            nn.ModuleList(self._path(places, widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    @staticmethod
    def _path(places: Places, widths: Sequence[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            up = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
            return nn.Sequential(Unit(places, widths[source], widths[target], 1, act=None), up)
        steps = [Unit(places, widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, Unit(places, widths[source], widths[target], 3, 2, None))

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        parts = [block(part) for block, part in zip(self.blocks, parts, strict=True)]
        return [F.relu(sum(path(part) for path, part in zip(row, parts, strict=True))) for row in self.paths]


class HRNet(nn.Module):
    """Two, then three resolutions side by side; a head over all of them, interpolated to the finest."""

    def __init__(self, places: Places, classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(places.noise("on input", 3), Unit(places, 3, 16, 3, 2))
        self.first = Unit(places, 16, 24, 3, 2)
        self.two = Exchange(places, (16, 24))
        self.second = Unit(places, 24, 32, 3, 2)
        self.three = Exchange(places, (16, 24, 32))
        self.head = nn.Sequential(Unit(places, 72, 32, 1), nn.Conv2d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = self.two([x, self.first(x)])
        fine, *coarse = self.three([*parts, self.second(parts[-1])])
        size = fine.shape[2:]
        up = [F.interpolate(part, size=size, mode="bilinear", align_corners=True) for part in coarse]
        return self.head(torch.cat([fine, *up], 1))


ARCHITECTURES = (
    Architecture("densenet", "DenseNet", densenet, IMAGE),
    Architecture("googlenet", "Inception v1", googlenet, IMAGE),
    Architecture("inception_v3", "Inception v3", inception_v3, IMAGE),
    Architecture("inception_resnet", "Inception-ResNet", inception_resnet, IMAGE),
    Architecture("vovnet", "VoVNet", vovnet, IMAGE),
    Architecture("dla", "DLA", dla, IMAGE),
    Architecture("hrnet", "HRNet", HRNet, IMAGE),
)
