"""Networks without branches, or nearly: LeNet, AlexNet, VGG, NiN, SqueezeNet, Highway, Maxout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture, floats
from tests.zoo.places import Places
from tests.zoo.units import Add, Classifier, Dense, Perceptron, Unit


class Flat(nn.Module):
    """Features, flattened, then a perceptron."""

    def __init__(self, places: Places, features: Sequence[nn.Module], widths: Sequence[int], inputs: int = 3):
        super().__init__()
        self.input = places.noise("on input", inputs)
        self.features = nn.Sequential(*features)
        self.flat = places.noise("on flattened", widths[0])
        self.classifier = Perceptron(places, widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flat(torch.flatten(self.features(self.input(x)), 1)))


def lenet5(places: Places) -> nn.Module:
    tanh = partial(Unit, places, kernel=5, act=nn.Tanh, norm=None, padding=0)
    features = [tanh(1, 6), nn.AvgPool2d(2), tanh(6, 16), nn.AvgPool2d(2)]
    return Flat(places, features, (256, 120, 84, 10), inputs=1)


def lenet_500_300(places: Places) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Perceptron(places, (196, 125, 75, 10)))


def alexnet(places: Places) -> nn.Module:
    """Two groups as in the paper, local response norm after the activation, overlapping pooling."""
    unit = partial(Unit, places, norm=None)
    features = [
        unit(3, 24, 5, 2), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2),
        unit(24, 32, 5, groups=2), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2),
        unit(32, 48), unit(48, 48, groups=2), unit(48, 32, groups=2), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return Flat(places, features, (288, 96, 96, 10))


def vgg(places: Places, plan: Sequence[int | str], norm: str | None) -> nn.Module:
    """The plan lists widths and "M" for pooling; the head has dropout between its layers."""
    features: list[nn.Module] = []
    channels, size = 3, 32
    for step in plan:
        if isinstance(step, str):
            features.append(nn.MaxPool2d(2, 2))
            size //= 2
        else:
            features.append(Unit(places, channels, step, norm=norm))
            channels = step
    return Flat(places, [*features, nn.Dropout()], (channels * size * size, 64, 64, 10))


VGG11 = (16, "M", 24, "M", 32, 32, "M", 48, 48, "M", 48, 48, "M")
VGG16 = (16, 16, "M", 24, 24, "M", 32, 32, 32, "M", 48, 48, 48, "M", 48, 48, 48, "M")


def nin(places: Places) -> nn.Module:
    """Blocks of a spatial convolution and two 1x1; class maps averaged."""

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        return [
            Unit(places, a, b, k, norm=None)
            for a, b, k in ((inputs, outputs, kernel), (outputs, outputs, 1), (outputs, outputs, 1))
        ]

    return nn.Sequential(
        *block(3, 24, 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(),
        *block(24, 32, 5), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(),
        Unit(places, 32, 32, norm=None), Unit(places, 32, 32, 1, norm=None), Unit(places, 32, 10, 1, norm=None),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Fire(nn.Module):
    def __init__(self, places: Places, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = Unit(places, inputs, squeezed, 1, norm=None)
        self.one = Unit(places, squeezed, expanded, 1, norm=None)
        self.three = Unit(places, squeezed, expanded, 3, norm=None)
        self.out = places.noise("on blocks", 2 * expanded)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return self.out(torch.cat([self.one(x), self.three(x)], 1))


def squeezenet(places: Places) -> nn.Module:
    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        places.noise("on input", 3), Unit(places, 3, 24, norm=None), pool(),
        Fire(places, 24, 8, 16), Fire(places, 32, 8, 16), pool(),
        Fire(places, 32, 12, 24), Fire(places, 48, 12, 24), pool(), Fire(places, 48, 16, 32),
        nn.Dropout(), nn.Conv2d(64, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Maxout(nn.Module):
    """The largest of `pieces` linear maps for each unit."""

    def __init__(self, places: Places, inputs: int, outputs: int, pieces: int = 3):
        super().__init__()
        self.pieces = pieces
        self.maps = Dense(places, inputs, outputs * pieces, act=None)
        self.noise = places.noise("hidden", outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.maps(x)
        return self.noise(y.view(y.shape[0], -1, self.pieces).max(dim=2)[0])


def maxout(places: Places) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), Maxout(places, 196, 60), nn.Dropout(), Maxout(places, 60, 40), nn.Linear(40, 10)
    )


class HighwayLayer(nn.Module):
    """t * h(x) + (1 - t) * x."""

    def __init__(self, places: Places, width: int):
        super().__init__()
        self.plain = Dense(places, width, width)
        self.gate = nn.Linear(width, width)
        self.add = Add(places, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return self.add(gate * self.plain(x), (1 - gate) * x)


def highway(places: Places) -> nn.Module:
    layers = [HighwayLayer(places, 64) for _ in range(4)]
    return nn.Sequential(nn.Flatten(), Dense(places, 196, 64), *layers, nn.Linear(64, 10))


def all_convolutional(places: Places) -> nn.Module:
    """Strided convolutions instead of pooling (Springenberg et al. 2015)."""
    features = [
        Unit(places, 3, 24), Unit(places, 24, 24), Unit(places, 24, 24, stride=2), nn.Dropout(),
        Unit(places, 24, 32), Unit(places, 32, 32), Unit(places, 32, 32, stride=2), nn.Dropout(),
        Unit(places, 32, 32, padding=0), Unit(places, 32, 32, 1),
    ]  # fmt: skip
    return Classifier(places, features, 32)


DIGITS = floats((1, 28, 28))
SMALL_DIGITS = floats((1, 14, 14))

ARCHITECTURES = (
    Architecture("lenet5", "LeNet", lenet5, DIGITS),
    Architecture("lenet_500_300", "LeNet", lenet_500_300, SMALL_DIGITS),
    Architecture("alexnet", "AlexNet", alexnet, floats((3, 64, 64))),
    Architecture("vgg11", "VGG", partial(vgg, plan=VGG11, norm=None), IMAGE),
    Architecture("vgg16_bn", "VGG", partial(vgg, plan=VGG16, norm="batch"), IMAGE),
    Architecture("nin", "NiN", nin, IMAGE),
    Architecture("all_convolutional", "All-CNN", all_convolutional, IMAGE),
    Architecture("squeezenet", "SqueezeNet", squeezenet, IMAGE),
    Architecture("maxout", "Maxout", maxout, SMALL_DIGITS),
    Architecture("highway", "Highway", highway, SMALL_DIGITS),
)
