"""Random variants of a sample call: other sizes, ranks, dtypes, arguments and constants.

Whatever torch accepts is a call that some network may make, so a variant is a random change of a sample that torch
runs, with and without data. How an operator is written (its number of operands, say) is never changed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.passes.rules.laws import Sample, X

LARGEST = 2000
ATTEMPTS = 20

Change = Callable[[Sample, random.Random], Sample | None]


def vary(sample: Sample, source: random.Random) -> Sample:
    """The sample itself, or one that is up to three accepted changes away from it."""
    for _ in range(source.choice((0, 1, 1, 2, 3))):
        for _ in range(ATTEMPTS):
            changed = source.choice(CHANGES)(sample, source)
            if changed is not None and is_accepted(changed):
                sample = changed
                break
    return sample


def is_accepted(sample: Sample) -> bool:
    """Whether torch runs the call, with and without data and at the other sizes of dynamic axes.

    A dynamic size is never 1: torch.export takes that for a constant.
    """
    variables = [leaf for leaf in leaves(sample) if isinstance(leaf, X)]
    if any(x.shape[axis] < 2 for x in variables for axis in x.dynamic):
        return False
    try:
        _shape_without_data(sample, lambda x: x.scaled(5))
        other = _shape_without_data(sample, lambda x: x.scaled(2))
        shape = _shape_without_data(sample, lambda x: x.shape)
        if other != _shape(run(sample, lambda x: draw(x.scaled(2), x))):
            return False
        result = run(sample, lambda x: draw(x.shape, x))
    except Exception:  # the ways in which torch refuses a call have no common class
        return False
    sizes = [torch.Size(found).numel() for found in (shape, *(x.shape for x in variables))]
    return (
        shape == _shape(result)
        and min(sizes) > 0
        and max(sizes) <= LARGEST
        and not _is_rounded(sample, result)
    )


def _shape_without_data(sample: Sample, shape_of: Callable[[X], tuple[int, ...]]) -> tuple[int, ...]:
    return _shape(run(sample, lambda x: torch.empty(shape_of(x), dtype=x.dtype, device="meta")))


def _is_rounded(sample: Sample, result: Any) -> bool:
    """Whether numbers appear in float32 from integers: what the laws compare would be rounded in that dtype."""
    kinds = [leaf.dtype for leaf in leaves(sample) if isinstance(leaf, (X, Tensor))]
    return isinstance(result, Tensor) and result.dtype == torch.float32 and torch.float64 not in kinds


def draw(shape: tuple[int, ...], x: X) -> Tensor:
    """Values for an operand of another shape, always the same ones."""
    return dataclasses.replace(x, shape=shape).sample(torch.Generator().manual_seed(0))


def run(sample: Sample, value_of: Callable[[X], Tensor]) -> Any:
    """The call on values for its variables, all of them on one device."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(value_of(X(())).device)
        return value_of(leaf) if isinstance(leaf, X) else leaf

    mapped = mapping(sample, place)
    return mapped.overload(*mapped.args, **mapped.kwargs)


def _shape(result: Any) -> tuple[int, ...]:
    return tuple(result.shape if isinstance(result, Tensor) else result[0].shape)


def mapping(sample: Sample, function: Callable[[Any], Any]) -> Sample:
    """The sample with a function applied to every argument, inside lists too."""

    def walk(value: Any) -> Any:
        return (
            type(value)(walk(item) for item in value) if isinstance(value, (list, tuple)) else function(value)
        )

    kwargs = {name: walk(value) for name, value in sample.kwargs.items()}
    return dataclasses.replace(sample, args=walk(sample.args), kwargs=kwargs)


def leaves(sample: Sample) -> Iterator[Any]:
    """Every argument, those inside lists too, in order."""
    found: list[Any] = []
    mapping(sample, found.append)
    return iter(found)


def _at(sample: Sample, chosen: int, function: Callable[[Any], Any]) -> Sample:
    """The sample with one leaf changed."""
    position = iter(range(len(list(leaves(sample)))))
    return mapping(sample, lambda leaf: function(leaf) if next(position) == chosen else leaf)


def _positions(sample: Sample, *kinds: type) -> list[int]:
    return [position for position, leaf in enumerate(leaves(sample)) if isinstance(leaf, kinds)]


def _resize(sample: Sample, source: random.Random) -> Sample | None:
    """Another size for every axis of one size, in constants too, and for arguments of that value."""
    sizes = sorted({size for leaf in leaves(sample) if isinstance(leaf, X) for size in leaf.shape})
    if not sizes:
        return None
    old, new = source.choice(sizes), source.randint(1, 9)
    arguments_too = source.random() < 0.5

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, X):
            return dataclasses.replace(leaf, shape=tuple(new if size == old else size for size in leaf.shape))
        if isinstance(leaf, Tensor):
            for axis, size in enumerate(leaf.shape):
                leaf = leaf.index_select(axis, torch.arange(new) % old) if size == old else leaf
        return new if arguments_too and leaf is not True and isinstance(leaf, int) and leaf == old else leaf

    return mapping(sample, changed)


def _resize_one(sample: Sample, source: random.Random) -> Sample | None:
    """Another size for one axis of one variable."""
    positions = _positions(sample, X)

    def changed(x: X) -> X:
        shape = list(x.shape)
        if shape:
            shape[source.randrange(len(shape))] = source.randint(1, 9)
        return dataclasses.replace(x, shape=tuple(shape))

    return _at(sample, source.choice(positions), changed) if positions else None


def _rerank(sample: Sample, source: random.Random) -> Sample:
    """Without the leading axis, or with one more."""
    extra = source.choice(((), (1,), (2,)))

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, X):
            return leaf
        return dataclasses.replace(leaf, shape=(*extra, *leaf.shape[0 if extra else 1 :]), dynamic=())

    return mapping(sample, changed)


def _retype(sample: Sample, source: random.Random) -> Sample:
    """Integers or truth values in the place of numbers."""
    dtype = source.choice((torch.int64, torch.int64, torch.bool))
    return mapping(
        sample, lambda leaf: dataclasses.replace(leaf, dtype=dtype) if isinstance(leaf, X) else leaf
    )


def _release(sample: Sample, source: random.Random) -> Sample:
    """Sizes along one axis, or of one value, that only the input decides."""
    position, size = source.choice((0, 0, 0, 1, 2, 3, -1, -2)), source.randint(1, 9)
    by_size = source.random() < 0.3

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, X):
            return leaf
        rank = len(leaf.shape)
        fresh = [
            axis
            for axis in range(rank)
            if (leaf.shape[axis] == size if by_size else axis in {position, position + rank})
        ]
        return dataclasses.replace(leaf, dynamic=tuple(sorted({*leaf.dynamic, *fresh})))

    return mapping(sample, changed)


def _argue(sample: Sample, source: random.Random) -> Sample | None:
    """Another number or flag as one argument."""
    positions = _positions(sample, int, float)

    def changed(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        step = source.choice((-1, 1))
        return source.choice((value + step, -value, 0 * value, value - 2 * step))

    return _at(sample, source.choice(positions), changed) if positions else None


def _refill(sample: Sample, source: random.Random) -> Sample | None:
    """Zeros along an index of a constant, everywhere or nowhere in it."""
    positions = [
        position
        for position, leaf in enumerate(leaves(sample))
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    ]

    def changed(value: Tensor) -> Tensor:
        kind = source.choice(("index", "index", "everywhere", "nowhere"))
        if kind == "everywhere" or not value.ndim:
            return torch.zeros_like(value)
        if kind == "nowhere":
            return torch.where(value == 0, 0.75, value)
        axis = source.randrange(value.ndim)
        return value.index_fill(axis, torch.tensor([source.randrange(value.shape[axis])]), 0.0)

    return _at(sample, source.choice(positions), changed) if positions else None


def _swap(sample: Sample, source: random.Random) -> Sample | None:
    """A constant in the place of a variable, or a variable in the place of a constant."""
    positions = _positions(sample, X, Tensor)
    if not positions:
        return None

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, X):
            return draw(leaf.shape, leaf)
        return X(tuple(leaf.shape), leaf.dtype)

    found = _at(sample, source.choice(positions), changed)
    return found if _positions(found, X) else None


CHANGES: tuple[Change, ...] = (
    _resize, _resize, _resize, _resize_one, _rerank, _retype, _release, _release, _argue, _argue, _refill, _swap,
)  # fmt: skip
