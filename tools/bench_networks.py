"""The networks of the benchmark: the paper's at the paper's counts, and common ones at their usual size, masked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import Places, as_trained
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.training import LeNet5, LeNet500300, VGGLike, keep_random
from tests.zoo.dense import DenseLayer
from tests.zoo.mobile import InvertedResidual
from tests.zoo.residual import basic, bottleneck
from tests.zoo.segmentation import UNet
from tests.zoo.units import Classifier, PreUnit, Unit

LENET_500_300 = (245, 160, 55)
LENET_5 = (3, 18, 284, 283)
SBP = (64, 62, 128, 126, 234, 155, 31, 79, 73, 9, 59, 73, 56, 27)
SBPA = (44, 54, 92, 115, 234, 155, 31, 76, 55, 9, 34, 35, 21, 280)
MOBILENET = (  # factor, channels, blocks, stride
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
SHARE = 0.5


@dataclass(frozen=True)
class Case:
    """A masked network in eval mode, and the shape of one example.

    `paper`: the paper's CPU speed-up, if it has one; `by_hand`: the network built from the kept counts, where that is
    simple.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    paper: float | None = None
    by_hand: Callable[[], nn.Module] | None = None
    is_convolutional: bool = True


def kept(network: LeNet5 | LeNet500300 | VGGLike, counts: Sequence[int]) -> nn.Module:
    """The network with statistics of its own and that many units alive behind each noise layer."""
    as_trained(network, 0.0)
    keep_random(network, counts)
    return network.eval()


def vgg(name: str, counts: Sequence[int], paper: float | None = None) -> Case:
    """The VGG-like network with that many channels alive in each convolution and in the hidden layer."""
    *channels, hidden = counts
    return Case(
        name,
        lambda: kept(VGGLike(), (*channels, channels[-1], hidden)),
        VGGLike.input_shape,
        paper,
        lambda: as_trained(VGGLike(counts, noise=False), 0.0),
    )


class Stemmed(nn.Module):
    """A ResNet's stem, a strided 7x7 convolution and a max pool, in front of its blocks."""

    def __init__(self, places: Places, blocks: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.stem = Unit(places, 3, 64, 7, 2)
        self.rest = Classifier(places, blocks, channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(F.max_pool2d(self.stem(x), 3, 2, 1))  # type: ignore[no-any-return]


def resnet(depths: Sequence[int], factor: int) -> nn.Module:
    """ResNet-18 or ResNet-50 for 224x224 images."""
    places, blocks, channels = Places("after norm"), list[nn.Module](), 64
    for stage, depth in enumerate(depths):
        for position in range(depth):
            width, stride = 64 * 2**stage * factor, 2 if stage and not position else 1
            block = bottleneck if factor > 1 else basic
            blocks.append(block(places, channels, width, stride))
            channels = width
    return as_trained(Stemmed(places, blocks, channels), SHARE)


def mobilenet() -> nn.Module:
    """MobileNetV2 for 224x224 images."""
    places = Places("after norm")
    layers: list[nn.Module] = [Unit(places, 3, 32, 3, 2, nn.ReLU6)]
    channels = 32
    for factor, width, blocks, stride in MOBILENET:
        for position in range(blocks):
            step = 1 if position else stride
            layers.append(InvertedResidual(places, channels, width, step, expand=factor))
            channels = width
    layers.append(Unit(places, channels, 1280, 1, act=nn.ReLU6))
    return as_trained(Classifier(places, layers, 1280, 1000), SHARE)


def densenet() -> nn.Module:
    """DenseNet-BC for 32x32 images: three blocks of twelve layers, growth 24."""
    places, growth = Places("after norm"), 24
    layers: list[nn.Module] = [Unit(places, 3, 2 * growth, 3)]
    channels = 2 * growth
    for block in range(3):
        if block:
            layers += [PreUnit(places, channels, channels // 2, 1), nn.AvgPool2d(2, 2)]
            channels //= 2
        for _ in range(12):
            layers.append(DenseLayer(places, channels, growth))
            channels += growth
    return as_trained(Classifier(places, [*layers, nn.BatchNorm2d(channels), nn.ReLU()], channels), SHARE)


CASES = (
    Case(
        "LeNet-500-300",
        lambda: kept(LeNet500300(), LENET_500_300),
        (1, 28, 28),
        2.33,
        lambda: LeNet500300(LENET_500_300, noise=False).eval(),
        is_convolutional=False,
    ),
    Case(
        "LeNet-5",
        lambda: kept(LeNet5(), LENET_5),
        (1, 28, 28),
        5.41,
        lambda: LeNet5(LENET_5, noise=False).eval(),
    ),
    vgg("VGG-like, SBP", SBP, 2.71),
    vgg("VGG-like, SBPa", SBPA),
    Case("ResNet-18", lambda: resnet((2, 2, 2, 2), 1), (3, 224, 224)),
    Case("ResNet-50", lambda: resnet((3, 4, 6, 3), 4), (3, 224, 224)),
    Case("MobileNetV2", mobilenet, (3, 224, 224)),
    Case("DenseNet", densenet, (3, 32, 32)),
    Case("U-Net", lambda: as_trained(UNet(Places("after norm"), (32, 64, 128, 256)), SHARE), (3, 128, 128)),
)


def without_constants(network: nn.Module) -> nn.Module:
    """The same masked network, but nothing is left of a masked channel: no biases, no means, no shifts.

    What a compiler leaves of it is the network that one builds by hand from the kept counts.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.zero_()
    return network
