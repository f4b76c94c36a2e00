"""Networks with noise at chosen places and random masks, for measurements.

Every network takes a `Places` object that says where noise layers go; `as_trained` then switches units off. Batch norm
has statistics and an affine map as after training, biases are not zero: a masked channel leaves a constant behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.nn import noise_layers
from tests.zoo.places import Places, switch_off
from tests.zoo.units import PreUnit, Unit

__all__ = ["NETWORKS", "PLACEMENTS", "Places", "ResNet50", "as_trained"]

PLACEMENTS = (
    "before norm", "after norm", "after activation", "on flattened", "on input", "on output", "both sides of adds",
    "everywhere",
)  # fmt: skip


class Head(nn.Module):
    """flatten -> noise -> linear -> relu -> noise -> linear -> noise."""

    def __init__(self, places: Places, features: int, hidden: int, classes: int = 10):
        super().__init__()
        self.flat = places.noise("on flattened", features)
        self.hidden = nn.Linear(features, hidden)
        self.noise = places.noise("after activation", hidden)
        self.classify = nn.Linear(hidden, classes)
        self.out = places.noise("on output", classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(F.relu(self.hidden(self.flat(x.flatten(1)))))
        return self.out(self.classify(x))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """LeNet-5 and VGG: units with pooling between them, then a head."""

    def __init__(
        self, places: Places, image: Sequence[int], widths: Sequence[int], pools: Sequence[int], kernel: int
    ):
        super().__init__()
        channels, size, _ = image
        self.shape = tuple(image)
        self.input = places.noise("on input", channels)
        units: list[nn.Module] = []
        for position, width in enumerate(widths):
            units.append(Unit(places, channels, width, kernel))
            channels = width
            if position in pools:
                units.append(nn.MaxPool2d(2))
                size //= 2
        self.units = nn.Sequential(*units)
        self.head = Head(places, channels * size * size, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.input(x)))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """LeNet-500-300."""

    def __init__(self, places: Places):
        super().__init__()
        self.shape = (784,)
        self.input = places.noise("on input", 784)
        self.first = nn.Linear(784, 500)
        self.noise = places.noise("after activation", 500)
        self.head = Head(places, 500, 300)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.noise(F.relu(self.first(self.input(x)))))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A basic block; noise on both sides of the add where that is the placement."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = Unit(places, inputs, outputs, 3, stride)
        self.second = Unit(places, outputs, outputs, 3, act=None)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Unit(places, inputs, outputs, 1, stride, act=None)
        self.left = places.noise("both sides of adds", outputs)
        self.right = places.noise("both sides of adds", outputs)
        self.last = places.noise("after activation", outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.second(self.first(x))) + self.right(self.shortcut(x))
        return self.last(F.relu(y))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A ResNet for 32x32 images with basic blocks."""

    def __init__(self, places: Places, widths: Sequence[int] = (32, 64, 128), blocks: int = 2):
        super().__init__()
        self.shape = (3, 32, 32)
        self.input = places.noise("on input", 3)
        self.stem = Unit(places, 3, widths[0], 3)
        parts, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                parts.append(Residual(places, channels, width, 2 if stage and not block else 1))
                channels = width
        self.parts = nn.Sequential(*parts)
        self.head = Head(places, channels, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(self.stem(self.input(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """Dense blocks (norm, relu, convolution; concatenation) with transitions."""

    def __init__(self, places: Places, growth: int = 16, layers: int = 4):
        super().__init__()
        self.shape = (3, 32, 32)
        self.input = places.noise("on input", 3)
        self.stem = Unit(places, 3, 2 * growth, 3)
        channels = 2 * growth
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(
                    nn.Sequential(
                        PreUnit(places, channels, 2 * growth, 1), PreUnit(places, 2 * growth, growth, 3)
                    )
                )
                channels += growth
            self.blocks.append(block)
            self.transitions.append(PreUnit(places, channels, channels // 2, 1))
            channels //= 2
        self.head = Head(places, channels, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.input(x))
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            for layer in block:  # type: ignore[attr-defined]
                x = torch.cat([x, layer(x)], 1)
            x = F.avg_pool2d(transition(x), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, places: Places, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            Unit(places, inputs, width, 1),
            Unit(places, width, width, 3, stride),
            Unit(places, width, outputs, 1, act=None),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Unit(places, inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for 224x224 images, 25.6 million parameters."""

    def __init__(self, places: Places, classes: int = 1000):
        super().__init__()
        self.shape = (3, 224, 224)
        self.stem = Unit(places, 3, 64, 7, 2)
        blocks, channels = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for position in range(count):
                blocks.append(Bottleneck(places, channels, width, stride if not position else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.classify(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[Places], nn.Module]] = {
    "LeNet-5": lambda places: Plain(places, (1, 28, 28), (20, 50), (0, 1), 5),
    "LeNet-500-300": Perceptron,
    "VGG-like": lambda places: Plain(
        places, (3, 32, 32), (64, 64, 128, 128, 256, 256, 256, *[512] * 6), (1, 3, 6, 9, 12), 3
    ),
    "ResNet": ResNet,
    "DenseNet": DenseNet,
}


def as_trained(network: nn.Module, masked: float, seed: int = 0) -> nn.Module:
    """Non-trivial statistics everywhere and a share of all noise units switched off; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
        for layer in noise_layers(network):
            size = layer.mu.shape
            layer.mu.normal_(-0.3, 0.2, generator=generator)
            switch_off(layer, torch.rand(size, generator=generator) < masked)
    return network.eval()
