"""The catalogue's transposed and grouped convolutions, with other channels dead in each group."""

from __future__ import annotations

import torch
from torch import nn

from tests.fuzz import layers
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import CONVOLUTIONS, Kind, sequence
from tests.fuzz.masks import alive, mask
from tests.fuzz.norms import shift

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _divisors(count: int) -> list[int]:
    return [each for each in range(1, count + 1) if count % each == 0]


def _with_channels(x: Shape, count: int) -> Shape:
    return Shape((x.sizes[0], count, *x.sizes[2:]), (x.other[0], count, *x.other[2:]))


def _masked(draw: Draw, x: Shape, layer: nn.Module, out: int) -> nn.Module:
    """A mask and constants before the layer, and behind it; all of them drawn anew, so groups differ."""
    y = _with_channels(x, out)  # the positions are others, but no mask looks at them
    return sequence(
        [
            mask_of_channels(draw, x),
            shift(draw, x, 1) if draw.chance(0.4) else None,
            layer,
            mask_of_channels(draw, y) if draw.chance(0.8) else None,
            shift(draw, y, 1) if draw.chance(0.3) else None,
            layers.activation(draw, y) if draw.chance(0.6) else None,
        ]
    )


def mask_of_channels(draw: Draw, x: Shape) -> nn.Module:
    """A mask along axis 1 alone, whatever the positions are."""
    return mask(
        draw, Shape((2, x.sizes[1], *([1] * (x.rank - 2))), (3, x.sizes[1], *([2] * (x.rank - 2)))), 1
    )


def transposed(draw: Draw, x: Shape) -> nn.Module | None:
    """conv_transpose1d/2d/3d with any stride, padding, output padding, dilation and groups."""
    if x.rank not in {3, 4, 5} or not x.is_static(1) or max(x.sizes[2:]) > 9:
        return None
    groups = draw.one((1, 1, draw.one(_divisors(x.sizes[1])), x.sizes[1]))
    out = groups * draw.randint(1, 3)
    kernel, stride, dilation = draw.one((1, 2, 3, 3)), draw.one((1, 1, 2, 2, 3)), draw.one((1, 1, 1, 2))
    padding = draw.randint(0, min(2, dilation * (kernel - 1)))
    extra = [draw.randrange(max(stride, dilation)) if draw.chance(0.5) else 0 for _ in x.spatial]
    layer = TRANSPOSED[x.rank - 2](
        x.sizes[1], out, kernel, stride, padding, output_padding=extra, groups=groups,
        bias=draw.chance(0.6), dilation=dilation,
    )  # fmt: skip
    with torch.no_grad():
        scale = (max(1, x.sizes[1] // groups) * kernel / stride) ** -0.5
        layer.weight.copy_(draw.normal(*layer.weight.shape, scale=scale))
        if layer.bias is not None:
            layer.bias.copy_(draw.normal(out, scale=0.7))
        if draw.chance(0.4):
            layer.weight.mul_(alive(draw, x.sizes[1]).reshape(-1, *([1] * (x.rank - 1))))
    return _masked(draw, x, layer, out)


def grouped(draw: Draw, x: Shape) -> nn.Module | None:
    """A convolution with groups or a depthwise multiplier, then one over all channels that reads it."""
    if x.rank not in {3, 4, 5} or not x.is_static(1):
        return None
    count = x.sizes[1]
    wide = count if count > 3 else draw.one((4, 6, 8))
    groups = draw.one([each for each in _divisors(wide) if each > 1])
    out = groups * draw.randint(1, 3)
    kind, kernel = CONVOLUTIONS[x.rank - 2], draw.one((1, 3))
    padding = draw.randint(0, kernel // 2) if min(map(x.least, x.spatial)) >= kernel else kernel // 2
    first = None if wide == count else kind(count, wide, 1)
    middle = kind(wide, out, kernel, padding=padding, groups=groups, bias=draw.chance(0.5))
    last = kind(out, draw.randint(1, 6), 1)
    for layer in (first, middle, last):
        if layer is not None:
            layers.fill(draw, layer)
    return sequence(
        [first, _masked(draw, _with_channels(x, wide), middle, out), last if draw.chance(0.6) else None]
    )


GROUPED: dict[str, Kind] = {"transposed": transposed, "grouped": grouped}
