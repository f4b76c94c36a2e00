"""Networks that label every pixel: U-Net, FCN, DeepLab, PSPNet, SegNet-like, LinkNet, ENet-like, SegFormer's head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.places import Places
from tests.zoo.residual import basic, bottleneck
from tests.zoo.units import Add, Transposed, Unit

CLASSES = 6


class UNet(nn.Module):
    """Double convolutions; the way up is a transposed convolution, padded to the skip's size, or an upsampling."""

    def __init__(self, places: Places, widths: Sequence[int] = (16, 24, 32), bilinear: bool = False):
        super().__init__()
        self.input = places.noise("on input", 3)
        self.down, self.up, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 3
        for width in widths:
            self.down.append(nn.Sequential(Unit(places, channels, width), Unit(places, width, width)))
            channels = width
        for width in reversed(widths[:-1]):
            up = (
                Unit(places, channels, width, 1)
                if bilinear
                else Transposed(places, channels, width, 2, padding=0)
            )
            self.up.append(up)
            self.join.append(nn.Sequential(Unit(places, 2 * width, width), Unit(places, width, width)))
            channels = width
        self.bilinear = bilinear
        self.head = nn.Conv2d(channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        skips = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = up(x)
            if self.bilinear:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = join(torch.cat([skip, x], dim=1))
        return self.head(x)


class AttentionGate(nn.Module):
    """Attention U-Net: the skip is weighted by what the coarser level finds interesting."""

    def __init__(self, places: Places, channels: int, middle: int):
        super().__init__()
        self.gate, self.skip = (Unit(places, channels, middle, 1, act=None) for _ in range(2))
        self.weight = Unit(places, middle, 1, 1, act=nn.Sigmoid)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * self.weight(F.relu(self.gate(gate) + self.skip(skip)))


class AttentionUNet(nn.Module):
    def __init__(self, places: Places):
        super().__init__()
        self.fine = nn.Sequential(places.noise("on input", 3), Unit(places, 3, 16), Unit(places, 16, 16))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), Unit(places, 16, 32), Unit(places, 32, 32))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), Unit(places, 32, 16))
        self.gate = AttentionGate(places, 16, 8)
        self.head = nn.Sequential(Unit(places, 32, 16), Unit(places, 16, 16), nn.Conv2d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.fine(x)
        up = self.up(self.coarse(skip))
        return self.head(torch.cat((self.gate(up, skip), up), dim=1))


class FCN8(nn.Module):
    """Scores of three depths, enlarged by transposed convolutions, cropped and added."""

    def __init__(self, places: Places):
        super().__init__()
        unit = partial(Unit, places, norm=None)
        pool = partial(nn.MaxPool2d, 2, ceil_mode=True)
        self.eighth = nn.Sequential(unit(3, 16), pool(), unit(16, 24), pool(), unit(24, 32), pool())
        self.sixteenth = nn.Sequential(unit(32, 32), pool())
        self.last = nn.Sequential(unit(32, 48), pool(), nn.Dropout2d(), unit(48, 48, 1), nn.Dropout2d())
        self.scores = nn.ModuleList(nn.Conv2d(width, CLASSES, 1) for width in (32, 32, 48))
        self.twice = nn.ModuleList(nn.ConvTranspose2d(CLASSES, CLASSES, 4, 2, bias=False) for _ in range(2))
        self.eightfold = nn.ConvTranspose2d(CLASSES, CLASSES, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        eighth = self.eighth(x)
        sixteenth = self.sixteenth(eighth)
        score = self.twice[0](self.scores[2](self.last(sixteenth)))
        score = self._cropped(score, self.scores[1](sixteenth), 1)
        score = self._cropped(self.twice[1](score), self.scores[0](eighth), 1)
        score = self.eightfold(score)
        return score[:, :, 4 : 4 + x.size(2), 4 : 4 + x.size(3)].contiguous()

    @staticmethod
    def _cropped(large: Tensor, small: Tensor, offset: int) -> Tensor:
        return large[:, :, offset : offset + small.size(2), offset : offset + small.size(3)] + small


class ImagePooling(nn.Module):
    """The mean of the image through a unit, spread over the image again."""

    def __init__(self, places: Places, inputs: int, outputs: int, bins: int = 1):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(bins)
        self.unit = Unit(places, inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.unit(self.pool(x))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilations, the image's mean."""

    def __init__(self, places: Places, inputs: int, width: int):
        super().__init__()
        dilated = [Unit(places, inputs, width, 3, dilation=rate) for rate in (2, 4, 6)]
        self.branches = nn.ModuleList(
            [Unit(places, inputs, width, 1), *dilated, ImagePooling(places, inputs, width)]
        )
        self.project = nn.Sequential(Unit(places, 5 * width, width, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))


class DeepLab(nn.Module):
    """DeepLab v3+: residual features, ASPP, and a decoder that takes fine features in."""

    def __init__(self, places: Places):
        super().__init__()
        self.fine = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2), basic(places, 16, 16, 1)
        )
        self.coarse = bottleneck(places, 16, 48, 2)
        self.aspp = ASPP(places, 48, 16)
        self.low = Unit(places, 16, 8, 1)
        self.head = nn.Sequential(Unit(places, 24, 24), nn.Conv2d(24, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        low = self.low(fine)
        up = F.interpolate(
            self.aspp(self.coarse(fine)), size=low.shape[2:], mode="bilinear", align_corners=False
        )
        score = self.head(torch.cat([low, up], dim=1))
        return F.interpolate(score, size=x.shape[2:], mode="bilinear", align_corners=False)


class PSPNet(nn.Module):
    """Pyramid pooling with 1, 2, 4 bins; an auxiliary head beside the main one."""

    def __init__(self, places: Places):
        super().__init__()
        self.features = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2), basic(places, 16, 32, 2)
        )
        self.pyramid = nn.ModuleList(ImagePooling(places, 32, 8, bins) for bins in (1, 2, 4))
        self.head = nn.Sequential(Unit(places, 56, 32), nn.Dropout2d(0.1), nn.Conv2d(32, CLASSES, 1))
        self.extra = nn.Sequential(Unit(places, 32, 8), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        pooled = torch.cat([features, *(branch(features) for branch in self.pyramid)], 1)
        enlarge = partial(F.interpolate, scale_factor=4, mode="bilinear", align_corners=True)
        return {"out": enlarge(self.head(pooled)), "aux": enlarge(self.extra(features))}


class LinkDecoder(nn.Sequential):
    """1x1, transposed 3x3 with output padding, 1x1."""

    def __init__(self, places: Places, inputs: int, outputs: int):
        super().__init__(
            Unit(places, inputs, inputs // 4, 1),
            Transposed(places, inputs // 4, inputs // 4, 3, 2, padding=1, extra=1),
            Unit(places, inputs // 4, outputs, 1),
        )


class LinkNet(nn.Module):
    """The decoder's results are added to the encoder's."""

    def __init__(self, places: Places):
        super().__init__()
        self.stem = nn.Sequential(places.noise("on input", 3), Unit(places, 3, 16, 3, 2))
        self.first, self.second = basic(places, 16, 24, 2), basic(places, 24, 32, 2)
        self.up_second, self.up_first = LinkDecoder(places, 32, 24), LinkDecoder(places, 24, 16)
        self.add_second, self.add_first = Add(places, 24), Add(places, 16)
        self.head = nn.Sequential(
            Transposed(places, 16, 16, 3, 2, padding=1, extra=1), nn.ConvTranspose2d(16, CLASSES, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = self.first(x)
        up = self.add_second(self.up_second(self.second(first)), first)
        return self.head(self.add_first(self.up_first(up), x))


class ENetDown(nn.Module):
    """ENet's first block: a strided convolution and a pooling, concatenated."""

    def __init__(self, places: Places, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.after = places.noise("after norm", outputs)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.after(self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2, 2)], 1))))


class ENetBlock(nn.Module):
    """A bottleneck with PReLU whose middle is dilated or asymmetric."""

    def __init__(self, places: Places, channels: int, dilation: int = 1, asymmetric: bool = False):
        super().__init__()
        width = channels // 4
        unit = partial(Unit, places, act=partial(nn.PReLU, width))
        middle = (
            [unit(width, width, (5, 1)), unit(width, width, (1, 5))]
            if asymmetric
            else [unit(width, width, dilation=dilation)]
        )
        self.body = nn.Sequential(
            unit(channels, width, 1), *middle, Unit(places, width, channels, 1, act=None), nn.Dropout2d(0.1)
        )
        self.add = Add(places, channels, partial(nn.PReLU, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.body(x))


def enet(places: Places) -> nn.Module:
    return nn.Sequential(
        places.noise("on input", 3), ENetDown(places, 3, 16), ENetDown(places, 16, 48), ENetBlock(places, 48, 2),
        ENetBlock(places, 48, asymmetric=True), ENetBlock(places, 48, 4),
        Transposed(places, 48, 16, 3, 2, padding=1, extra=1), nn.ConvTranspose2d(16, CLASSES, 2, 2),
    )  # fmt: skip


ARCHITECTURES = (
    Architecture("unet", "U-Net", UNet, IMAGE),
    Architecture("unet_bilinear", "U-Net", partial(UNet, bilinear=True), IMAGE),
    Architecture("attention_unet", "U-Net", AttentionUNet, IMAGE),
    Architecture("fcn8", "FCN", FCN8, IMAGE),
    Architecture("deeplab", "DeepLab", DeepLab, IMAGE),
    Architecture("pspnet", "PSPNet", PSPNet, IMAGE),
    Architecture("linknet", "LinkNet", LinkNet, IMAGE),
    Architecture("enet", "ENet", enet, IMAGE),
)
