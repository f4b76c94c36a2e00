"""The catalogue's joins: steps that read two values, or share a layer with an earlier step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.fuzz.attention import cross
from tests.fuzz.builder import Builder
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply
from tests.fuzz.masks import alive
from tests.fuzz.sequences import embedding

Join = Callable[[Draw, Builder, int], bool]


def binary(draw: Draw, builder: Builder, source: int) -> bool:
    """A sum, product or the like of two values that broadcast."""
    x = builder.shape(source)

    def fits(y: Shape) -> bool:
        pairs = zip(x.sizes[::-1], y.sizes[::-1], x.other[::-1], y.other[::-1], strict=False)
        return (
            all((a == b and c == d) or b == d == 1 or a == c == 1 for a, b, c, d in pairs)
            and x.rank == y.rank
        )

    partner = builder.partner(draw, fits)
    name, function = draw.one(
        (
            ("add", torch.add), ("add", torch.add), ("mul", torch.mul), ("maximum", torch.maximum),
            ("gate", lambda x, y: x * torch.sigmoid(y)),
            ("weighted", lambda x, y: torch.add(x, y, alpha=0.5)),
            ("sub", lambda x, y: x - 0.7 * y), ("div", lambda x, y: x / (y.abs() + 0.6)),
        )
    )  # fmt: skip
    return partner is not None and builder.add(Apply(name, function), (source, partner))


def concat(draw: Draw, builder: Builder, source: int) -> bool:
    """cat or stack with another value, with itself, or with a constant."""
    x = builder.shape(source)
    axis = draw.one((1, 1, draw.randrange(1, x.rank)))

    def fits(y: Shape) -> bool:
        rest = [each for each in range(x.rank) if each != axis] if y.rank == x.rank else []
        return bool(rest) and all((x.sizes[i], x.other[i]) == (y.sizes[i], y.other[i]) for i in rest)

    partner = builder.partner(draw, fits)
    if partner is None:
        return False
    if draw.chance(0.15):
        return builder.add(Apply(f"stack {axis}", lambda x, y: torch.stack([x, y], axis)), (source, partner))
    if draw.chance(0.15):
        return builder.add(
            Apply(f"cat zeros {axis}", lambda x: torch.cat([x, torch.zeros_like(x)], axis)), (source,)
        )
    return builder.add(Apply(f"cat {axis}", lambda x, y: torch.cat([x, y], axis)), (source, partner))


def again(draw: Draw, builder: Builder, source: int) -> bool:
    """A layer used before, on another value: its parameters are shared."""
    plan = [entry for entry in builder.network.plan if len(entry[1]) == 1]
    if not plan:
        return False
    layer = draw.one(plan)[0]
    return builder.add(builder.network.layers[layer], (source,), layer)


def tied(draw: Draw, builder: Builder, source: int) -> bool:
    """The weight of an earlier linear layer or embedding again, transposed or with a bias of its own."""
    size = builder.shape(source).sizes[-1]
    linears = [m for m in builder.network.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    linears = [m for m in linears if isinstance(m.weight, nn.Parameter) and size in m.weight.shape]
    if not linears:
        return False
    base = draw.one(linears)
    twin = nn.Linear(size, base.weight.numel() // size)
    with torch.no_grad():
        twin.bias.copy_(draw.normal(twin.out_features))
    if base.weight.shape[1] == size:
        twin.weight = base.weight
        return builder.add(twin, (source,))
    return builder.add(Transposed(base), (source,))


class Transposed(nn.Module):
    """x W with the weight of a linear layer or an embedding."""

    def __init__(self, base: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight


def product(draw: Draw, builder: Builder, source: int) -> bool:
    """A matrix product of two values, as attention has."""
    x = builder.shape(source)
    if x.rank not in {3, 4} or not x.inner_static:
        return False
    scale = 1.0 / math.sqrt(x.sizes[-1])
    return builder.add(Apply("x xT x", lambda x: (x @ x.transpose(-1, -2)) * scale @ x), (source,))


def inner(draw: Draw, builder: Builder, source: int) -> bool:
    """A matrix product of two values that share an axis: x yT, xT y or x y."""
    x = builder.shape(source)
    if x.rank not in {3, 4}:
        return False
    first, second = draw.chance(0.3), draw.chance(0.6)

    def fits(y: Shape) -> bool:
        if y.rank != x.rank:
            return False
        mine, other = (-2 if first else -1), (-1 if second else -2)
        axes = [(mine, other), *((axis, axis) for axis in range(x.rank - 2))]
        return all((x.sizes[i], x.other[i]) == (y.sizes[j], y.other[j]) for i, j in axes)

    partner = builder.partner(draw, fits)
    scale = 1.0 / math.sqrt(x.sizes[-2 if first else -1])

    def run(x: Tensor, y: Tensor) -> Tensor:
        return (x.transpose(-1, -2) if first else x) * scale @ (y.transpose(-1, -2) if second else y)

    text = f"x{'T' if first else ''} y{'T' if second else ''}"
    return partner is not None and builder.add(Apply(text, run), (source, partner))


def einsum(draw: Draw, builder: Builder, source: int) -> bool:
    """A sum of products of two values over some of the axes that fit, in any order of axes."""
    x = builder.shape(source)
    partner = builder.partner(draw, lambda y: y.rank <= 4)
    if partner is None or x.rank > 4:
        return False
    y = builder.shape(partner)
    left = "bcdef"[: x.rank]
    right, summed, scale = ["b"], set(), 1.0
    for axis in range(1, y.rank):
        pair = (y.sizes[axis], y.other[axis])
        free = [n for n in range(1, x.rank) if (x.sizes[n], x.other[n]) == pair and left[n] not in right]
        if free and draw.chance(0.7):
            right.append(left[draw.one(free)])
            if draw.chance(0.7):
                summed.add(right[-1])
                scale /= math.sqrt(y.sizes[axis])
        else:
            right.append("wxyz"[axis])
    kept = [letter for letter in dict.fromkeys([*left[1:], *right[1:]]) if letter not in summed]
    draw.shuffle(kept)
    text = f"{left},{''.join(right)}->b{''.join(kept)}"
    return builder.add(Apply(text, lambda x, y: torch.einsum(text, x * scale, y)), (source, partner))


class Chosen(nn.Module):
    """Some channels of x, the others of y."""

    def __init__(self, chosen: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("chosen", chosen)
        self.axis = axis

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.chosen, x, y)

    def extra_repr(self) -> str:
        return f"{int(self.chosen.sum())} of {self.chosen.numel()} along {self.axis}"


def select(draw: Draw, builder: Builder, source: int) -> bool:
    """where, between two values of one shape, by the sign of either or by a constant for each channel."""
    x = builder.shape(source)
    partner = builder.partner(draw, lambda y: y == x)
    if partner is None:
        return False
    axis = draw.randrange(1, x.rank)
    forms: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("where sign", lambda x, y: torch.where(x > 0.05, x, 0.5 * y)),
        ("where other", lambda x, y: torch.where(y > 0.05, x, 0.4)),
        ("masked_fill", lambda x, y: x.masked_fill(y < 0.05, 0.3)),
    ]
    name, function = draw.one(forms)
    if x.is_static(axis) and draw.chance(0.4):
        chosen = alive(draw, x.sizes[axis]).reshape(-1, *([1] * (x.rank - 1 - axis)))
        return builder.add(Chosen(chosen, axis), (source, partner))
    return builder.add(Apply(name, function), (source, partner))


JOINS: dict[str, Join] = {
    "binary": binary, "concat": concat, "again": again, "tied": tied, "product": product, "inner": inner,
    "einsum": einsum, "select": select, "embedding": embedding, "cross": cross,
}  # fmt: skip
