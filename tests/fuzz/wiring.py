"""The catalogue's wiring: parts that are split and joined, used twice or read by all that follow, and heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.fuzz import blocks, layers
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply, Kind, sequence
from tests.fuzz.masks import mask


class Branches(nn.Module):
    """Each part of an axis through a module of its own, joined again in another order."""

    def __init__(self, branches: list[nn.Module], sizes: list[int], axis: int, order: list[int]) -> None:
        super().__init__()
        self.branches, self.sizes, self.axis, self.order = nn.ModuleList(branches), sizes, axis, order

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, self.axis)
        results = [branch(part) for branch, part in zip(self.branches, parts, strict=True)]
        return torch.cat([results[each] for each in self.order], self.axis)

    def extra_repr(self) -> str:
        return f"{self.sizes} along {self.axis}, joined as {self.order}"


def branches(draw: Draw, x: Shape) -> nn.Module | None:
    """split, a mask, a layer or nothing on each part, cat; a part may be left out or occur twice."""
    axis = draw.one((1, 1, draw.randrange(1, x.rank)))
    if not x.is_static(axis) or x.sizes[axis] < 2:
        return None
    count = draw.randint(2, min(3, x.sizes[axis]))
    cuts = [0, *sorted(draw.sample(range(1, x.sizes[axis]), count - 1)), x.sizes[axis]]
    sizes = [high - low for low, high in itertools.pairwise(cuts)]
    parts = [_branch(draw, blocks.like(x, size, axis), axis) for size in sizes]
    order = draw.one((list(range(count)), draw.sample(range(count), count), [draw.randrange(count), 0]))
    return Branches(parts, sizes, axis, order)


def _branch(draw: Draw, x: Shape, axis: int) -> nn.Module:
    way = draw.one(("nothing", "mask", "mask", "activation", "layer"))
    if way == "layer" and axis == 1 and x.rank in {2, 3, 4, 5}:
        return sequence([blocks.conv_like(draw, x, x.sizes[1]), mask(draw, x, 1)])
    if way == "activation":
        return sequence([mask(draw, x, axis), layers.activation(draw, x)])
    return mask(draw, x, axis) if way == "mask" else nn.Identity()


class Growing(nn.Module):
    """Every layer reads all results before it."""

    def __init__(self, parts: list[nn.Module], masks: list[nn.Module]) -> None:
        super().__init__()
        self.parts, self.masks = nn.ModuleList(parts), nn.ModuleList(masks)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for part, noise in zip(self.parts, self.masks, strict=True):
            found.append(torch.relu(noise(part(torch.cat(found, 1)))))
        return torch.cat(found, 1)


def growing(draw: Draw, x: Shape) -> nn.Module | None:
    """A block of a densely connected network."""
    if x.rank not in {2, 3, 4, 5} or not x.is_static(1):
        return None
    parts, masks, count = [], [], x.sizes[1]
    for _ in range(draw.randint(2, 3)):
        more = draw.randint(1, 4)
        parts.append(blocks.conv_like(draw, blocks.like(x, count), more))
        masks.append(mask(draw, blocks.like(x, more), 1))
        count += more
    return Growing(parts, masks)


class Twice(nn.Module):
    """One module called twice, on x and on what another makes of its result."""

    def __init__(self, shared: nn.Module, between: nn.Module, summed: bool) -> None:
        super().__init__()
        self.shared, self.between, self.summed = shared, between, summed

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(x)
        second = self.shared(self.between(first))
        return first + second if self.summed else second


def twice(draw: Draw, x: Shape) -> nn.Module | None:
    """A layer called twice, with masks of their own behind its calls."""
    if x.rank not in {2, 3, 4, 5} or not x.is_static(1):
        return None
    shared = sequence([blocks.conv_like(draw, x, x.sizes[1]), mask(draw, x, 1) if draw.chance(0.5) else None])
    between = sequence([mask(draw, x, 1), layers.activation(draw, x)])
    return Twice(shared, between, draw.chance(0.5))


def unstacked(draw: Draw, x: Shape) -> nn.Module | None:
    """An axis unbound, its pieces used in another order or way, and stacked along an axis again."""
    axis = draw.randrange(1, x.rank)
    if x.rank < 3 or not x.is_static(axis) or x.sizes[axis] > 6:
        return None
    order = draw.sample(range(x.sizes[axis]), x.sizes[axis])
    behind = draw.randrange(1, x.rank)
    forms: tuple[tuple[str, Callable[[Tensor], object]], ...] = (
        (
            f"unbind {axis}, stack {behind} {order}",
            lambda x: torch.stack([x.unbind(axis)[n] for n in order], behind),
        ),
        (f"unbind {axis}, sum", lambda x: sum(part * (0.3 + n) for n, part in enumerate(x.unbind(axis)))),
        (f"unbind {axis}, cat {order}", lambda x: torch.cat([x.unbind(axis)[n] for n in order], 1)),
    )
    return sequence([mask(draw, x) if draw.chance(0.6) else None, Apply(*draw.one(forms))])


class Gather(nn.Module):
    """Entries at constant places along an axis, other places for each channel."""

    def __init__(self, places: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("places", places)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.gather(x, self.axis, self.places.expand(x.shape[0], *self.places.shape))

    def extra_repr(self) -> str:
        return f"{self.places.tolist()} along {self.axis}"


def gather(draw: Draw, x: Shape) -> nn.Module | None:
    """torch.gather with constant indices, all rows alike or not."""
    if not x.inner_static or x.rank > 4:
        return None
    axis = draw.randrange(1, x.rank)
    shape = list(x.sizes[1:])
    shape[axis - 1] = draw.randint(1, 4)
    alike = [1] * len(shape)
    alike[axis - 1] = shape[axis - 1]
    drawn = alike if draw.chance(0.5) else shape
    places = torch.randint(x.sizes[axis], drawn, generator=draw.generator).expand(shape).clone()
    return Gather(places, axis)


def head(draw: Draw, x: Shape) -> nn.Module | None:
    """What picks: argmax, the best few and where they are, maxima with places, comparisons."""
    axis = draw.randrange(1, x.rank)
    if not x.is_static(axis) or x.sizes[axis] > 12:
        return None
    keep, count = x.rank == 2 or draw.chance(0.4), draw.randint(1, x.sizes[axis])
    apart = draw.normal(x.sizes[axis], *([1] * (x.rank - 1 - axis))) if draw.chance(0.6) else torch.zeros(())
    forms: tuple[tuple[str, Callable[[Tensor], object]], ...] = (
        (f"argmax {axis} {keep}", lambda x: (x + apart).argmax(axis, keepdim=keep)),
        (f"argmin {axis} {keep}", lambda x: (x + apart).argmin(axis, keepdim=keep)),
        (f"topk {axis} {count}", lambda x: tuple((x + apart).topk(count, axis))),
        (f"topk values {axis} {count}", lambda x: (x + apart).topk(count, axis).values),
        (f"max {axis} {keep}", lambda x: tuple((x + apart).max(axis, keepdim=keep))),
        (f"sort {axis}", lambda x: torch.sort(x + apart, axis).values),
        (f"best {axis}", lambda x: (x >= x.amax(axis, keepdim=True)).to(x.dtype)),
    )
    return Apply(*draw.one(forms))


WIRING: dict[str, Kind] = {
    "branches": branches, "growing": growing, "twice": twice, "unstacked": unstacked, "gather": gather,
    "head": head,
}  # fmt: skip
