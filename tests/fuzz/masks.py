"""Masks of every origin: noise layers, plain buffers, torch's pruning, zeroed filters and columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sbp_compile.nn import LogNormalNoise
from tests.fuzz.draw import Draw, Shape

NOISE_SHARE = 0.12  # a noise layer is some forty calls in the captured graph, a buffer is one
SPARSITIES = (0.0, 0.3, 0.6, 0.6, 0.9, 1.0)


def alive(draw: Draw, count: int) -> Tensor:
    """Which of `count` units live, bool."""
    dead = torch.tensor(draw.dead(count, SPARSITIES), dtype=torch.int64)
    return torch.ones(count, dtype=torch.bool).index_fill(0, dead, False)


class Mask(nn.Module):
    """x times a buffer that broadcasts to it."""

    def __init__(self, mask: Tensor, in_front: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.in_front = in_front

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x if self.in_front else x * self.mask

    def extra_repr(self) -> str:
        live = int((self.mask != 0).sum())
        return f"{tuple(self.mask.shape)}, {live} of {self.mask.numel()} alive"


def noise(draw: Draw, count: int, dim: int) -> LogNormalNoise:
    """A noise layer whose dead units sit where training leaves them."""
    layer = LogNormalNoise(count, dim=dim)
    live = alive(draw, count)
    with torch.no_grad():
        layer.mu.copy_(torch.where(live, draw.between(-1.0, 0.2, count), torch.tensor(-1.0)))
        layer.log_sigma.copy_(torch.where(live, draw.between(-5.0, -2.0, count), torch.tensor(3.4)))
    return layer


def channel_axis(draw: Draw, x: Shape) -> int:
    """Mostly axis 1, where convolutions have their channels, sometimes the last or any."""
    return draw.one((1, 1, 1, x.rank - 1, draw.randrange(1, x.rank)))


def mask(draw: Draw, x: Shape, axis: int | None = None) -> nn.Module:
    """A mask along one static axis, now and then along several."""
    axis = channel_axis(draw, x) if axis is None else axis
    if not x.is_static(axis):
        return nn.Identity()
    if draw.chance(NOISE_SHARE):
        return noise(draw, x.sizes[axis], axis if draw.chance(0.5) else axis - x.rank)
    axes = [axis]
    if draw.chance(0.2):
        axes = [each for each in range(1, x.rank) if x.is_static(each)]
    count = 1
    for each in axes:
        count *= x.sizes[each]
    live = alive(draw, count).to(torch.float32)
    if draw.chance(0.4):
        live = live * draw.normal(count)
    shape = [x.sizes[each] if each in axes else 1 for each in range(draw.one((0, 0, min(axes))), x.rank)]
    return Mask(live.reshape(shape), draw.chance(0.3))


def thin(draw: Draw, layer: nn.Module) -> None:
    """Zero parts of a convolution's or linear layer's weight, in place, by one of several methods."""
    weight = layer.weight
    rows, columns = alive(draw, weight.shape[0]), alive(draw, weight.shape[1])
    way = draw.one(("none", "none", "rows", "columns", "custom", "structured", "entries", "both"))
    if way in {"rows", "both"}:
        _zero(weight, rows, 0)
        if layer.bias is not None and draw.chance(0.4):
            _zero(layer.bias, rows, 0)
    if way in {"columns", "both"}:
        _zero(weight, columns, 1)
    shape = (-1, *([1] * (weight.ndim - 1)))
    if way == "custom":
        prune.custom_from_mask(layer, "weight", rows.reshape(shape).expand_as(weight).float())
    elif way == "structured":
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=draw.randrange(2))
    elif way == "entries":
        prune.l1_unstructured(layer, "weight", amount=draw.one((0.5, 0.9)))


def _zero(parameter: Tensor, live: Tensor, axis: int) -> None:
    shape = [1] * parameter.ndim
    shape[axis] = -1
    with torch.no_grad():
        parameter.mul_(live.reshape(shape))
