"""The catalogue's blocks: what architectures are made of, with masks in all the places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.fuzz import layers
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import CONVOLUTIONS, Kind, WithBuffer, fill, sequence
from tests.fuzz.masks import mask, thin


def like(x: Shape, channels: int, axis: int = 1) -> Shape:
    """The shape with another number of channels."""
    swap = lambda sizes: (*sizes[:axis], channels, *sizes[axis + 1 :])  # noqa: E731
    return Shape(swap(x.sizes), swap(x.other))


def _after(module: nn.Module, x: Shape) -> Shape | None:
    """The shape of a module's result; None where it does not run."""
    try:
        with torch.no_grad():
            first, second = module(torch.zeros(x.sizes)), module(torch.zeros(x.other))
    except (RuntimeError, ValueError):
        return None
    return Shape(tuple(first.shape), tuple(second.shape))


def block(draw: Draw, x: Shape) -> nn.Module | None:
    """conv, mask, bias, batch norm, mask, activation, mask, pool; each but the first may be missing."""
    first = layers.conv(draw, x)
    y = None if first is None else _after(first, x)
    if y is None:
        return None
    bias = WithBuffer("add", draw.normal(y.sizes[1], *([1] * (y.rank - 2))), torch.add)
    parts: list[nn.Module | None] = [
        first,
        mask(draw, y, 1) if draw.chance(0.5) else None,
        bias if draw.chance(0.4) else None,
        layers.batch_norm(draw, y) if draw.chance(0.5) else None,
        mask(draw, y, 1) if draw.chance(0.25) else None,
        layers.activation(draw, y) if draw.chance(0.8) else None,
        mask(draw, y, 1) if draw.chance(0.25) else None,
        layers.max_pool(draw, y) if draw.chance(0.2) else None,
    ]
    return sequence(parts)


def dense(draw: Draw, x: Shape) -> nn.Module | None:
    """linear, mask, activation, mask, on vectors or tokens."""
    first = layers.linear(draw, x)
    if first is None:
        return None
    y = like(x, first.out_features, x.rank - 1)
    last = y.rank - 1
    parts = [
        mask(draw, x, last) if draw.chance(0.4) else None,
        first,
        mask(draw, y, last) if draw.chance(0.5) else None,
        layers.activation(draw, y),
        mask(draw, y, last) if draw.chance(0.3) else None,
    ]
    return sequence(parts)


class Sum(nn.Module):
    """f(x) + g(x)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def conv_like(draw: Draw, x: Shape, out: int) -> nn.Module:
    """A convolution of stride 1 that keeps the positions, or a linear layer where there are none."""
    if x.rank not in {3, 4, 5}:
        layer: nn.Module = nn.Linear(x.sizes[1], out, bias=draw.chance(0.5))
    else:
        kernel = draw.one((1, 3))
        groups = draw.one((1, 1, x.sizes[1])) if out == x.sizes[1] else 1
        layer = CONVOLUTIONS[x.rank - 2](
            x.sizes[1], out, kernel, padding=kernel // 2, bias=draw.chance(0.5), groups=groups
        )
    fill(draw, layer)
    thin(draw, layer)
    return layer


def residual(draw: Draw, x: Shape) -> nn.Module | None:
    """A residual block with different masks on both sides of the sum."""
    if x.rank not in {2, 3, 4, 5} or not x.is_static(1):
        return None
    inner, out = draw.randint(1, 6), x.sizes[1] if draw.chance(0.7) else draw.randint(1, 6)
    y, z = like(x, inner), like(x, out)
    branch = sequence(
        [
            conv_like(draw, x, inner),
            mask(draw, y, 1) if draw.chance(0.4) else None,
            layers.batch_norm(draw, y) if draw.chance(0.5) else None,
            layers.activation(draw, y),
            conv_like(draw, y, out),
            layers.batch_norm(draw, z) if draw.chance(0.4) else None,
            mask(draw, z, 1) if draw.chance(0.6) else None,
        ]
    )
    shortcut = sequence(
        [
            None if out == x.sizes[1] and draw.chance(0.7) else conv_like(draw, x, out),
            mask(draw, z, 1) if draw.chance(0.5) else None,
        ]
    )
    return sequence([Sum(branch, shortcut), layers.activation(draw, z) if draw.chance(0.7) else None])


class Gate(nn.Module):
    """x times a gate computed from its means over positions."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        positions = list(range(2, x.ndim))
        scale = self.gate(x.mean(positions) if positions else x)
        return x * scale.reshape(*scale.shape, *([1] * len(positions)))


def squeeze_excite(draw: Draw, x: Shape) -> nn.Module | None:
    if not x.is_static(1):
        return None
    vector = Shape(x.sizes[:2], x.other[:2])
    inner = like(vector, draw.randint(1, 4))
    gate = sequence(
        [
            conv_like(draw, vector, inner.sizes[1]),
            mask(draw, inner, 1) if draw.chance(0.4) else None,
            nn.ReLU(),
            conv_like(draw, inner, x.sizes[1]),
            mask(draw, vector, 1) if draw.chance(0.3) else None,
            draw.one((nn.Sigmoid, nn.Hardsigmoid))(),
        ]
    )
    return Gate(gate)


class MergedBatch(nn.Module):
    """Apply a module with axis 1 folded into the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.reshape(-1, *x.shape[2:]))
        return y.reshape(-1, x.shape[1], *y.shape[1:])


def merged(draw: Draw, x: Shape) -> nn.Module | None:
    """Tokens or channels folded into the batch, as attention does with its heads."""
    if x.rank not in {3, 4, 5} or not x.inner_static:
        return None
    folded = Shape((x.sizes[0] * x.sizes[1], *x.sizes[2:]), (x.other[0] * x.other[1], *x.other[2:]))
    make: Callable[[Draw, Shape], nn.Module | None] = draw.one(
        (dense, layers.batch_norm, residual, layers.masked)
    )
    inner = make(draw, folded)
    return None if inner is None else MergedBatch(inner)


BLOCKS: dict[str, Kind] = {
    "block": block, "dense": dense, "residual": residual, "squeeze_excite": squeeze_excite, "merged": merged,
}  # fmt: skip
