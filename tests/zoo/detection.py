"""Detectors: feature pyramids, the YOLO family's blocks, SSD, CenterNet. The outputs are the heads' maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture, floats
from tests.zoo.places import Places
from tests.zoo.residual import basic
from tests.zoo.units import Add, Transposed, Unit

CLASSES = 4
Silu = partial(Unit, act=nn.SiLU)
Leaky = partial(Unit, act=partial(nn.LeakyReLU, 0.1))


class FPN(nn.Module):
    """Lateral 1x1 convolutions, sums from coarse to fine, a smoothing 3x3 at each level."""

    def __init__(self, places: Places, widths: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(
            Unit(places, width, channels, 1, act=None, norm=None) for width in widths
        )
        self.smooth = nn.ModuleList(Unit(places, channels, channels, act=None, norm=None) for _ in widths)
        self.add = nn.ModuleList(Add(places, channels) for _ in widths[:-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            up = F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
            maps[level] = self.add[level](maps[level], up)
        return [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]


class RetinaNet(nn.Module):
    """A pyramid and two heads that are shared by all levels; predictions flattened and concatenated."""

    def __init__(self, places: Places, anchors: int = 3):
        super().__init__()
        self.stem = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2), basic(places, 16, 16, 1)
        )
        self.deeper = nn.ModuleList((basic(places, 16, 24, 2), basic(places, 24, 32, 2)))
        self.pyramid = FPN(places, (16, 24, 32), 24)
        self.classes, self.boxes = (
            nn.Sequential(Unit(places, 24, 24, norm=None), nn.Conv2d(24, anchors * size, 3, padding=1))
            for size in (CLASSES, 4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(x)]
        for stage in self.deeper:
            maps.append(stage(maps[-1]))
        maps = self.pyramid(maps)
        classes = [self._rows(self.classes(level), CLASSES) for level in maps]
        boxes = [self._rows(self.boxes(level), 4) for level in maps]
        return torch.cat(classes, 1).sigmoid(), torch.cat(boxes, 1)

    @staticmethod
    def _rows(x: Tensor, size: int) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, -1, size, height, width)
        return x.permute(0, 3, 4, 1, 2).reshape(batch, -1, size)


class DarkBlock(nn.Module):
    """1x1 to half of the channels, 3x3 back, the input added; YOLO's bottleneck with `act`."""

    def __init__(self, places: Places, channels: int, unit: partial[Unit], ratio: int = 2, add: bool = True):
        super().__init__()
        width = channels // ratio
        self.body = nn.Sequential(unit(places, channels, width, 1), unit(places, width, channels))
        self.add = Add(places, channels) if add else None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.add is None else self.add(x, self.body(x))


class YoloV3(nn.Module):
    """Darknet with leaky units; two detection maps, the finer one from an upsampled route."""

    def __init__(self, places: Places):
        super().__init__()
        unit = partial(Leaky, places)
        outputs = 3 * (5 + CLASSES)
        self.fine = nn.Sequential(
            places.noise("on input", 3), unit(3, 16), unit(16, 24, 3, 2), DarkBlock(places, 24, Leaky),
            unit(24, 32, 3, 2), DarkBlock(places, 32, Leaky),
        )  # fmt: skip
        self.coarse = nn.Sequential(unit(32, 48, 3, 2), DarkBlock(places, 48, Leaky), unit(48, 24, 1))
        self.detect_coarse = nn.Sequential(unit(24, 48), nn.Conv2d(48, outputs, 1))
        self.route = nn.Sequential(unit(24, 16, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        self.detect_fine = nn.Sequential(unit(48, 24, 1), unit(24, 32), nn.Conv2d(32, outputs, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        joined = torch.cat([self.route(coarse), fine], 1)
        return [self._decoded(self.detect_coarse(coarse)), self._decoded(self.detect_fine(joined))]

    @staticmethod
    def _decoded(x: Tensor) -> Tensor:
        batch, _, rows, columns = x.shape
        x = x.view(batch, 3, 5 + CLASSES, rows, columns).permute(0, 1, 3, 4, 2).contiguous()
        return torch.cat((x[..., :2].sigmoid(), x[..., 2:4].exp(), x[..., 4:].sigmoid()), -1)


class C3(nn.Module):
    """YOLOv5's CSP block: bottlenecks on one 1x1 convolution's result, another one beside, both joined."""

    def __init__(self, places: Places, inputs: int, outputs: int, add: bool = True):
        super().__init__()
        half = outputs // 2
        self.left, self.right = (Silu(places, inputs, half, 1) for _ in range(2))
        self.blocks = DarkBlock(places, half, Silu, ratio=1, add=add)
        self.join = Silu(places, 2 * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((self.blocks(self.left(x)), self.right(x)), 1))


class C2f(nn.Module):
    """YOLOv8's: one 1x1 convolution, chunked in two; every bottleneck's result is kept for the end."""

    def __init__(self, places: Places, inputs: int, outputs: int, depth: int = 2, add: bool = True):
        super().__init__()
        half = outputs // 2
        self.split = Silu(places, inputs, 2 * half, 1)
        self.blocks = nn.ModuleList(DarkBlock(places, half, Silu, ratio=1, add=add) for _ in range(depth))
        self.join = Silu(places, (2 + depth) * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.join(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three poolings in a row, all concatenated."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.reduce = Silu(places, channels, channels // 2, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.join = Silu(places, 2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        first = self.pool(x)
        second = self.pool(first)
        return self.join(torch.cat((x, first, second, self.pool(second)), 1))


class PathAggregation(nn.Module):
    """Two levels: down, SPPF, up with a concatenation, down again with another."""

    def __init__(self, places: Places, block: type[C3] | type[C2f]):
        super().__init__()
        self.fine = nn.Sequential(
            places.noise("on input", 3),
            Silu(places, 3, 16, 3, 2),
            block(places, 16, 16),
            Silu(places, 16, 24, 3, 2),
        )
        self.coarse = nn.Sequential(Silu(places, 24, 32, 3, 2), block(places, 32, 32), SPPF(places, 32))
        self.reduce = Silu(places, 32, 24, 1)
        self.up = block(places, 48, 24, add=False)
        self.down = Silu(places, 24, 24, 3, 2)
        self.out = block(places, 48, 32, add=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        coarse = self.reduce(self.coarse(fine))
        up = self.up(torch.cat((F.interpolate(coarse, scale_factor=2, mode="nearest"), fine), 1))
        return up, self.out(torch.cat((self.down(up), coarse), 1))


class YoloV5(nn.Module):
    """C3 blocks; one 1x1 convolution per level gives boxes and classes."""

    def __init__(self, places: Places):
        super().__init__()
        self.neck = PathAggregation(places, C3)
        self.detect = nn.ModuleList(nn.Conv2d(width, 3 * (5 + CLASSES), 1) for width in (24, 32))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for detect, level in zip(self.detect, self.neck(x), strict=True):
            y = detect(level)
            batch, _, height, width = y.shape
            y = y.view(batch, 3, 5 + CLASSES, height, width).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            rows.append(y.view(batch, -1, 5 + CLASSES))
        return torch.cat(rows, 1)


class YoloV8(nn.Module):
    """C2f blocks; decoupled heads; box edges as expectations over bins (DFL)."""

    def __init__(self, places: Places, bins: int = 8):
        super().__init__()
        self.neck, self.bins = PathAggregation(places, C2f), bins
        self.boxes, self.classes = (
            nn.ModuleList(
                nn.Sequential(Silu(places, width, 16), Silu(places, 16, 16), nn.Conv2d(16, outputs, 1))
                for width in (24, 32)
            )
            for outputs in (4 * bins, CLASSES)
        )
        self.expectation = nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = self.neck(x)
        heads = zip(self.boxes, self.classes, levels, strict=True)
        maps = [torch.cat((boxes(level), classes(level)), 1) for boxes, classes, level in heads]
        rows = torch.cat([y.view(y.shape[0], 4 * self.bins + CLASSES, -1) for y in maps], 2)
        boxes, classes = rows.split((4 * self.bins, CLASSES), 1)
        batch, _, anchors = boxes.shape
        edges = boxes.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)
        return torch.cat((self.expectation(edges).view(batch, 4, anchors), classes.sigmoid()), 1)


class SSD(nn.Module):
    """A chain of maps, each with its own box and class convolutions; the first is L2-normalised and scaled."""

    def __init__(self, places: Places, anchors: int = 4):
        super().__init__()
        unit = partial(Unit, places, norm=None)
        self.first = nn.Sequential(
            places.noise("on input", 3), unit(3, 16), nn.MaxPool2d(2), unit(16, 24), unit(24, 24)
        )
        self.rest = nn.ModuleList(
            nn.Sequential(unit(inputs, 12, 1), unit(12, 32, 3, 2)) for inputs in (24, 32, 32)
        )
        self.scale = nn.Parameter(torch.rand(24) + 1)
        widths = (24, 32, 32, 32)
        self.boxes = nn.ModuleList(nn.Conv2d(width, anchors * 4, 3, padding=1) for width in widths)
        self.classes = nn.ModuleList(nn.Conv2d(width, anchors * CLASSES, 3, padding=1) for width in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        maps = [self.scale.view(1, -1, 1, 1) * F.normalize(x, dim=1)]
        for stage in self.rest:
            x = stage(x)
            maps.append(x)
        boxes, classes = (
            torch.cat([self._rows(head(y)) for head, y in zip(heads, maps, strict=True)], 1)
            for heads in (self.boxes, self.classes)
        )
        return boxes.view(x.size(0), -1, 4), classes.view(x.size(0), -1, CLASSES).softmax(-1)

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous().view(x.size(0), -1)


class CenterNet(nn.Module):
    """An encoder, transposed convolutions, and three heads by name; peaks kept by a pooling."""

    def __init__(self, places: Places):
        super().__init__()
        self.features = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2), basic(places, 16, 24, 2), basic(places, 24, 32, 2),
            Transposed(places, 32, 24), Transposed(places, 24, 16),
        )  # fmt: skip
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(Unit(places, 16, 24, norm=None), nn.Conv2d(24, outputs, 1))
                for name, outputs in (("heat", CLASSES), ("size", 2), ("offset", 2))
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        maps = {name: head(features) for name, head in self.heads.items()}
        heat = maps["heat"].sigmoid()
        maps["heat"] = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        return maps


ARCHITECTURES = (
    Architecture("retinanet", "FPN", RetinaNet, IMAGE),
    Architecture("yolov3", "YOLO", YoloV3, IMAGE),
    Architecture("yolov5", "YOLO (CSP)", YoloV5, IMAGE),
    Architecture("yolov8", "YOLO (CSP)", YoloV8, IMAGE),
    Architecture("ssd", "SSD", SSD, floats((3, 48, 48))),
    Architecture("centernet", "CenterNet", CenterNet, IMAGE),
)
