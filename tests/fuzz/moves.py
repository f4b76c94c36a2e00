"""The catalogue's readings: steps that move, repeat and pick entries, several in a row too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply, Kind


def _static_axis(draw: Draw, x: Shape) -> int | None:
    """The channels more often than not, else any static axis but the batch."""
    axis = draw.one((1, 1, draw.randrange(1, x.rank))) if x.rank > 1 else 0
    return axis if axis and x.is_static(axis) and x.sizes[axis] > 1 else None


def reorder(draw: Draw, x: Shape) -> nn.Module | None:
    """Indices of one axis in another order: all of them, some, some of them twice."""
    axis = _static_axis(draw, x)
    if axis is None:
        return None
    size = x.sizes[axis]
    order = draw.sample(range(size), size)
    some = [draw.randrange(size) for _ in range(draw.randint(1, size))]
    shift = draw.randrange(1, size)
    cut = draw.randrange(1, size)
    every = (slice(None),) * axis
    return Apply(
        *draw.one(
            (
                (f"index {axis} {order}", lambda x: x[(*every, order)]),
                (f"index {axis} {some}", lambda x: x[(*every, some)]),
                (f"index_select {axis} {order}", lambda x: x.index_select(axis, torch.tensor(order))),
                (f"flip {axis}", lambda x: x.flip(axis)),
                (f"roll {axis} {shift}", lambda x: x.roll(shift, axis)),
                (
                    f"swap halves {axis} {cut}",
                    lambda x: torch.cat(x.split([cut, size - cut], axis)[::-1], axis),
                ),
                (f"repeat_interleave {axis}", lambda x: x.repeat_interleave(2, axis).narrow(axis, 0, size)),
            )
        )
    )


def channel_shuffle(draw: Draw, x: Shape) -> nn.Module | None:
    """A shuffle as a call, then perhaps another permutation."""
    if x.rank < 3 or not x.is_static(1):
        return None
    groups = draw.one([each for each in range(1, x.sizes[1] + 1) if x.sizes[1] % each == 0])
    again = draw.chance(0.4)
    return Apply(
        f"channel_shuffle {groups}{', flip' if again else ''}",
        lambda x: F.channel_shuffle(x, groups).flip(1) if again else F.channel_shuffle(x, groups),
    )


def pixels(draw: Draw, x: Shape) -> nn.Module | None:
    """Pixel shuffle and unshuffle, windows and their sums."""
    if x.rank != 4 or not x.inner_static:
        return None
    channels, height, width = x.sizes[1:]
    forms = [
        ("unfold 2", lambda x: F.unfold(x, 2, padding=1)),
        ("unfold 3", lambda x: F.unfold(x, (height, 1))),
    ]
    if channels % 4 == 0:
        forms.append(("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2)))
    if height % 2 == 0 and width % 2 == 0:
        forms.append(("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)))
        forms.append(
            ("fold", lambda x: F.fold(F.unfold(x, 2, stride=2).flip(1), (height, width), 2, stride=2))
        )
    return Apply(*draw.one(forms))


def windows(draw: Draw, x: Shape) -> nn.Module | None:
    """Windows along an axis as an axis, a diagonal, a table read at a matrix of places."""
    axis = _static_axis(draw, x)
    if axis is None or x.rank > 4:
        return None
    size = x.sizes[axis]
    length, step = draw.randint(1, size), draw.randint(1, 2)
    places = torch.tensor([[draw.randrange(size) for _ in range(2)] for _ in range(2)])
    chosen = torch.tensor([draw.chance(0.5) for _ in range(size - 1)] + [True])
    every = (slice(None),) * axis
    forms = [
        (f"windows {axis} {length} {step}", lambda x: x.unfold(axis, length, step)),
        (f"table {axis} {places.tolist()}", lambda x: x[(*every, places)]),
        (f"mask {axis} {chosen.tolist()}", lambda x: x[(*every, chosen)]),
    ]
    if x.rank > 2 and axis > 1 and x.is_static(axis - 1):
        forms.append((f"diagonal {axis - 1} {axis}", lambda x: x.diagonal(dim1=axis - 1, dim2=axis)))
    return Apply(*draw.one(forms))


def overwrite(draw: Draw, x: Shape) -> nn.Module | None:
    """Some indices replaced by others, or by a number."""
    axis = _static_axis(draw, x)
    if axis is None:
        return None
    size = x.sizes[axis]
    length = draw.randint(1, size - 1)
    start, source = draw.randint(0, size - length), draw.randint(0, size - length)
    number = draw.one((0.0, 0.5))

    def put(x):  # type: ignore[no-untyped-def]
        return torch.slice_scatter(x, x.narrow(axis, source, length), axis, start, start + length)

    def set_to(x):  # type: ignore[no-untyped-def]
        copy = x.clone()
        copy.narrow(axis, start, length).fill_(number)
        return copy

    forms = (
        (f"put {axis} {source}->{start}+{length}", put),
        (f"set {axis} {start}+{length} {number}", set_to),
    )
    return Apply(*draw.one(forms))


MOVES: dict[str, Kind] = {
    "reorder": reorder, "channel_shuffle": channel_shuffle, "pixels": pixels, "windows": windows,
    "overwrite": overwrite,
}  # fmt: skip
