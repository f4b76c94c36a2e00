"""The catalogue's views: steps that only give entries another place."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply, Kind


def flatten(draw: Draw, x: Shape) -> nn.Module | None:
    if x.rank < 3 or not x.inner_static:
        return None
    count = math.prod(x.sizes[1:])
    first = draw.randrange(1, x.rank - 1)
    forms = (
        ("flatten 1", lambda x: torch.flatten(x, 1)),
        ("flatten 1", lambda x: torch.flatten(x, 1)),
        ("view", lambda x: x.reshape(-1, count)),
        ("view", lambda x: x.reshape(x.shape[0], -1)),
        (f"flatten {first}", lambda x: torch.flatten(x, first)),
    )
    return Apply(*draw.one(forms))


def regroup(draw: Draw, x: Shape) -> nn.Module | None:
    """One axis as two, or two neighbours as one, or neighbours grouped anew."""
    if not x.inner_static or x.rank < 2 or x.rank > 4:
        return None
    axis = draw.randrange(1, x.rank)
    inner = list(x.sizes[1:])
    divisors = [each for each in range(1, inner[axis - 1] + 1) if inner[axis - 1] % each == 0]
    factor = draw.one(divisors)
    split = [*inner[: axis - 1], factor, inner[axis - 1] // factor, *inner[axis:]]
    if draw.chance(0.3) and len(inner) > 1:
        split = [*inner[:-2], inner[-2] * inner[-1]]
        split = [*split[:-1], split[-1] // factor, factor] if split[-1] % factor == 0 else split
    dynamic = draw.chance(0.5)
    return Apply(f"view (B, {split})", lambda x: x.reshape(x.shape[0] if dynamic else -1, *split))


def shuffle(draw: Draw, x: Shape) -> nn.Module | None:
    """A channel shuffle: view, transpose, view."""
    if not x.inner_static or x.rank < 3:
        return None
    count = x.sizes[1]
    groups = draw.one([each for each in range(1, count + 1) if count % each == 0])
    rest = list(x.sizes[2:])

    def run(x):  # type: ignore[no-untyped-def]
        return x.reshape(-1, groups, count // groups, *rest).transpose(1, 2).reshape(-1, count, *rest)

    return Apply(f"channel shuffle {groups}", run)


def permute(draw: Draw, x: Shape) -> nn.Module | None:
    if x.rank < 3:
        return None
    order = list(range(1, x.rank))
    draw.shuffle(order)
    first, second = draw.randrange(1, x.rank), draw.randrange(1, x.rank)
    if draw.chance(0.4):
        return Apply(f"transpose {first} {second}", lambda x: x.transpose(first, second))
    return Apply(f"permute {order}", lambda x: x.permute(0, *order))


def squeeze(draw: Draw, x: Shape) -> nn.Module | None:
    single = [axis for axis in range(1, x.rank) if x.sizes[axis] == 1 and x.is_static(axis)]
    if single and x.rank > 2:
        axis = draw.one(single)
        return Apply(f"squeeze {axis}", lambda x: x.squeeze(axis))
    if x.rank > 4:
        return None
    axis = draw.randint(1, x.rank)
    return Apply(f"unsqueeze {axis}", lambda x: x.unsqueeze(axis))


def cut(draw: Draw, x: Shape) -> nn.Module | None:
    """A slice, a selection, a split or chunks of a static axis."""
    axis = draw.one((1, 1, draw.randrange(1, x.rank)))
    if not x.is_static(axis) or x.sizes[axis] < 2:
        return None
    size = x.sizes[axis]
    start = draw.randrange(size)
    length = draw.randint(1, size - start)
    step = draw.one((1, 1, 2))
    every = (slice(None),) * axis
    first = draw.randint(1, size - 1)
    forms = [
        (f"slice {axis} {start}+{length}", lambda x: x.narrow(axis, start, length)),
        (f"slice {axis} {start}::{step}", lambda x: x[(*every, slice(start, None, step))]),
        (f"chunk {axis}", lambda x: x.chunk(2, axis)),
        (f"split {axis} {first}", lambda x: x.split([first, size - first], axis)),
    ]
    if x.rank > 2:
        forms.append((f"select {axis} {start}", lambda x: x.select(axis, start)))
    return Apply(*draw.one(forms))


def expand(draw: Draw, x: Shape) -> nn.Module | None:
    single = [axis for axis in range(1, x.rank) if x.sizes[axis] == 1 and x.is_static(axis)]
    if not single:
        return None
    sizes = [-1] * x.rank
    sizes[draw.one(single)] = draw.randint(2, 4)
    return Apply(f"expand {sizes}", lambda x: x.expand(sizes))


VIEWS: dict[str, Kind] = {
    "flatten": flatten, "regroup": regroup, "shuffle": shuffle, "permute": permute, "squeeze": squeeze,
    "cut": cut, "expand": expand,
}  # fmt: skip
