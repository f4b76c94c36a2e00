"""The catalogue's normalisations and scans: what mixes channels or positions, with masks before and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply, Kind, WithBuffer, sequence
from tests.fuzz.masks import alive, mask

INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def shift(draw: Draw, x: Shape, axis: int) -> nn.Module | None:
    """Constants that turn removed channels into channels that are not zero."""
    if not x.is_static(axis):
        return None
    return WithBuffer("add", draw.normal(x.sizes[axis], *([1] * (x.rank - 1 - axis)), scale=0.6), torch.add)


def between_masks(draw: Draw, module: nn.Module, x: Shape, axis: int, keeps: bool = True) -> nn.Module:
    """The module with a mask, and perhaps constants, before it, and a mask after it where the shape stays."""
    return sequence(
        [
            mask(draw, x, axis) if draw.chance(0.7) else None,
            shift(draw, x, axis) if draw.chance(0.4) else None,
            module,
            mask(draw, x, axis) if keeps and draw.chance(0.5) else None,
        ]
    )


def _affine(draw: Draw, layer: nn.Module) -> nn.Module:
    """Scales, some of them zero or negative, and shifts that are not zero."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 0.4 if name == "weight" else 0.7
            parameter.copy_(draw.normal(*parameter.shape, scale=scale) + (0.8 if name == "weight" else 0.0))
            if name == "weight" and parameter.ndim == 1 and draw.chance(0.4):
                parameter.mul_(alive(draw, len(parameter)))
    return layer


def over_last(draw: Draw, x: Shape) -> nn.Module | None:
    """Layer norm and RMS norm, over the last axis or the last two, and unit vectors."""
    last = x.rank - 1
    if not x.is_static(last):
        return None
    count = 2 if x.rank > 2 and x.is_static(last - 1) and draw.chance(0.25) else 1
    sizes = list(x.sizes[-count:])
    affine = draw.chance(0.7)
    layer = draw.one(
        (
            nn.LayerNorm(sizes, elementwise_affine=affine),
            nn.LayerNorm(sizes, elementwise_affine=affine, bias=draw.chance(0.5)),
            nn.RMSNorm(sizes, eps=1e-5, elementwise_affine=affine),
            Apply("normalize", lambda x: F.normalize(x + 0.1, dim=-1, eps=1e-3)),
        )
    )
    return between_masks(draw, _affine(draw, layer), x, last)


def over_positions(draw: Draw, x: Shape) -> nn.Module | None:
    """Group norm, instance norm, and a layer norm over channels that are not last."""
    if x.rank not in {3, 4, 5} or not x.is_static(1):
        return None
    count = x.sizes[1]
    groups = draw.one([each for each in range(1, count + 1) if count % each == 0])
    layers: list[nn.Module] = [nn.GroupNorm(groups, count, affine=draw.chance(0.8)), Channels(count)]
    if all(x.least(axis) > 1 for axis in x.spatial):
        instance = INSTANCE_NORMS[x.rank - 2]
        layers.append(instance(count, affine=draw.chance(0.6), track_running_stats=draw.chance(0.3)))
    return between_masks(draw, _affine(draw, draw.one(layers)), x, 1)


class Channels(nn.Module):
    """A layer norm over axis 1, spelled out."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(count)), nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + 1e-3)
        shape = (-1, *([1] * (x.ndim - 2)))
        return unit * self.weight.reshape(shape) + self.bias.reshape(shape)


def softmax(draw: Draw, x: Shape) -> nn.Module:
    """A softmax over the masked channels, or beside them."""
    axis = draw.randrange(1, x.rank)
    channels = axis if draw.chance(0.5) else draw.randrange(1, x.rank)
    forms: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("softmax", lambda x: torch.softmax(x, axis)),
        ("log_softmax", lambda x: torch.log_softmax(x, axis)),
        ("softmin", lambda x: F.softmin(0.7 * x, axis)),
        ("logsumexp", lambda x: x - torch.logsumexp(x, axis, keepdim=True)),
    )
    name, function = draw.one((*forms[:1], *forms))
    return between_masks(draw, Apply(f"{name} {axis}", function), x, channels)


def scan(draw: Draw, x: Shape) -> nn.Module:
    """Running sums, products and maxima, along the masked channels or beside them."""
    axis = draw.randrange(1, x.rank)
    channels = axis if draw.chance(0.5) else draw.randrange(1, x.rank)
    forms: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("cumsum", lambda x: 0.4 * torch.cumsum(x, axis)),
        ("cumprod", lambda x: torch.cumprod(x.clamp(-1.2, 1.2), axis)),
        ("cummax", lambda x: torch.cummax(x, axis).values),
        ("logcumsumexp", lambda x: torch.logcumsumexp(x, axis)),
    )
    name, function = draw.one((*forms[:1], *forms))
    return between_masks(draw, Apply(f"{name} {axis}", function), x, channels)


def gated(draw: Draw, x: Shape) -> nn.Module | None:
    """A gated linear unit: half of an axis times the sigmoid of the other half, each half with its own mask."""
    even = [axis for axis in range(1, x.rank) if x.is_static(axis) and x.sizes[axis] % 2 == 0]
    if not even:
        return None
    axis = draw.one(even)
    halves: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        (f"glu {axis}", lambda x: F.glu(x, axis)),
        (f"swiglu {axis}", lambda x: F.silu(x.chunk(2, axis)[0]) * x.chunk(2, axis)[1]),
    )
    return between_masks(draw, Apply(*draw.one(halves)), x, axis, keeps=False)


def parametric(draw: Draw, x: Shape) -> nn.Module | None:
    """prelu with a slope for each channel, some of them zero."""
    if not x.is_static(1):
        return None
    layer = nn.PReLU(x.sizes[1] if draw.chance(0.8) else 1)
    with torch.no_grad():
        layer.weight.copy_(draw.normal(len(layer.weight), scale=0.5) * alive(draw, len(layer.weight)))
    return between_masks(draw, layer, x, 1)


NORMS: dict[str, Kind] = {
    "over_last": over_last, "over_positions": over_positions, "softmax": softmax, "scan": scan, "gated": gated,
    "parametric": parametric,
}  # fmt: skip
