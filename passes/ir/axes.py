"""Axis algebra as data: what an operator does to axes is described once and interpreted by the sweeps.

A view never moves data; it only groups axes anew. So its axes fall into minimal *blocks*, runs of operand
axes and runs of result axes with equal products of sizes:

    (B, 50, 4, 4) -> (B, 800)          [0]-[0]  [1, 2, 3]-[1]
    (B, 10, 512)  -> (B, 10, 8, 64)    [0]-[0]  [1]-[1]  [2]-[2, 3]
    (B, 50, 1, 1) -> (B, 50)           [0]-[0]  [1]-[1]  [2]-[]  [3]-[]
    (B, 6, 4)     -> (B, 3, 8)         [0]-[0]  [1, 2]-[1, 2]
    (B, 8, T, 64) -> (B*8, T, 64)      [0, 1]-[0]  [2]-[1]  [3]-[2]

A block is *separable* when all its axes are static: its positions can be numbered before any input is seen.
A block in which a dynamic axis meets static ones (batch * heads) is not.

Every other operator that only copies entries is a *reading*: each result axis reads one operand axis at some
positions, or is new; some operand axes are dropped. x of shape (B, 6, 5):

    x.permute(0, 2, 1)      axes [0] [2] [1]
    x[:, 1:4]               axes [0] [1 at 1, 2, 3] [2]
    x[:, 4]                 axes [0] [2]                     dropped {1: 4}
    x.flip(2)               axes [0] [1] [2 at 4, 3, 2, 1, 0]
    x[:, :, :1].expand(B, 6, 7)   axes [0] [1] [2 at 0, 0, 0, 0, 0, 0, 0]
    x.unsqueeze(1)          axes [0] [new] [1] [2]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from passes.ir.lattice import Facts, along
from passes.ir.program import TensorInfo


@dataclass(frozen=True)
class Block:
    """Consecutive operand axes and consecutive result axes that hold the same entries in the same order."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    separable: bool

    def flipped(self) -> Block:
        """The block seen from the result."""
        return Block(self.outs, self.ins, self.separable)


def split_blocks(source: TensorInfo, target: TensorInfo) -> tuple[Block, ...]:
    """The minimal blocks of a view from `source` to `target`, in order; both example sizes must agree."""
    if 0 in source.sizes + target.sizes:
        return (Block(tuple(range(source.rank)), tuple(range(target.rank)), False),)
    blocks = []
    first = second = 0
    while first < source.rank or second < target.rank:
        ins, outs = _next_block(source, first, target, second)
        first, second = first + len(ins), second + len(outs)
        static = all(source.is_static(axis) for axis in ins) and all(target.is_static(axis) for axis in outs)
        blocks.append(Block(ins, outs, static))
    return tuple(blocks)


def _next_block(
    source: TensorInfo, first: int, target: TensorInfo, second: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shortest runs of axes from `first` and `second` on with equal products, at least one axis each."""
    ins, outs = _Run(source, first), _Run(target, second)
    ins.take()
    outs.take()
    while ins.product != outs.product:
        shorter = ins if ins.product < outs.product else outs
        if not shorter.take():
            ins.take_all()
            outs.take_all()
            break
    return ins.axes, outs.axes


class _Run:
    """Axes taken so far, with the product of their sizes in both examples."""

    def __init__(self, info: TensorInfo, start: int) -> None:
        self.info, self.start, self.stop = info, start, start
        self.product = (1, 1, 1)

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))

    def take(self) -> bool:
        if self.stop == self.info.rank:
            return False
        first, second, third = self.info.key(self.stop)
        self.product = self.product[0] * first, self.product[1] * second, self.product[2] * third
        self.stop += 1
        return True

    def take_all(self) -> None:
        while self.take():
            pass


def carry(stored: Tensor, blocks: Iterable[Block], source: TensorInfo, target: TensorInfo) -> Tensor:
    """A stored tensor of the operand, laid out like the result.

    A block along which nothing varies stays at size 1; a separable one is expanded first. Along the others
    nothing may vary (`flatten_facts` and `any_over` see to it).
    """
    before, after = [], []
    for block in blocks:
        varies = any(stored.shape[axis] > 1 for axis in block.ins)
        before += [source.sizes[axis] if varies else 1 for axis in block.ins]
        after += [target.sizes[axis] if varies else 1 for axis in block.outs]
    return stored.expand(before).reshape(after)


def inseparable_axes(blocks: Iterable[Block]) -> tuple[int, ...]:
    """The operand's axes whose positions cannot be numbered."""
    return tuple(axis for block in blocks if not block.separable for axis in block.ins)


def flatten_facts(facts: Facts, axes: Iterable[int]) -> Facts:
    """Known only where every entry along `axes` is known and equal; size 1 along them."""
    value, known = torch.broadcast_tensors(facts.known_value, facts.known)  # type: ignore[no-untyped-call]
    for axis in axes:
        if value.shape[axis] > 1:
            first = value.narrow(axis, 0, 1)
            known = (known & (value == first)).all(dim=axis, keepdim=True)
            value = first
    return Facts(value, known)


def any_over(mask: Tensor, axes: Iterable[int]) -> Tensor:
    """A stored mask reduced to size 1 along `axes`."""
    for axis in axes:
        if mask.shape[axis] > 1:
            mask = mask.any(dim=axis, keepdim=True)
    return mask


def outer(keeps: Sequence[Tensor]) -> Tensor:
    """Which flat positions are kept where every axis keeps its set: bool, shape (product of the sizes,)."""
    return reduce(
        lambda left, right: (left[:, None] & right).flatten(), keeps, torch.ones(1, dtype=torch.bool)
    )


def projections(positions: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each axis, the indices at which some flat position is set."""
    laid_out = positions.reshape(tuple(sizes))
    axes = range(len(sizes))
    return [
        laid_out.any(dim=[other for other in axes if other != axis]) if len(sizes) > 1 else laid_out
        for axis in axes
    ]


@dataclass(frozen=True, eq=False)
class AxisRead:
    """How one result axis is read: from operand axis `source` (None: a new axis) at `positions`.

    `positions`: int64, the operand's index behind each index of the result; None for the same numbering. An
    axis that is not `numbered` (a slice of a dynamic axis) is read at positions that only the input decides.
    """

    source: int | None
    positions: Tensor | None = None
    numbered: bool = True


@dataclass(frozen=True, eq=False)
class Reading:
    """The axes of a result, and the operand axes dropped on the way (axis: the one index that was read)."""

    axes: tuple[AxisRead, ...]
    dropped: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of_axes(sources: Iterable[int | None], dropped: Iterable[int] = ()) -> Reading:
        """A reading that only orders, adds and drops axes."""
        return Reading(tuple(AxisRead(source) for source in sources), dict.fromkeys(dropped, 0))

    @staticmethod
    def along_axis(rank: int, read: AxisRead) -> Reading:
        """A reading that changes one axis alone."""
        return Reading(tuple(read if axis == read.source else AxisRead(axis) for axis in range(rank)))

    @property
    def order(self) -> list[int]:
        """The operand's axes in the order of the result, dropped ones last."""
        return [read.source for read in self.axes if read.source is not None] + list(self.dropped)


def gather(stored: Tensor, reading: Reading) -> Tensor:
    """What the reading makes of a stored tensor of the operand: a stored tensor of the result."""
    for read in reading.axes:
        if read.source is not None and read.positions is not None and stored.shape[read.source] > 1:
            stored = stored.index_select(read.source, read.positions)
    for axis, index in reading.dropped.items():
        if stored.shape[axis] > 1:
            stored = stored.narrow(axis, index, 1)
    shape = [1 if read.source is None else stored.shape[read.source] for read in reading.axes]
    return stored.permute(reading.order).reshape(shape)


def scatter(mask: Tensor, reading: Reading, source: TensorInfo) -> Tensor:
    """The operand's entries behind the set entries of a stored mask of the result."""
    vague = [axis for axis, read in enumerate(reading.axes) if read.source is None or not read.numbered]
    mask = any_over(mask, vague)
    for axis, read in enumerate(reading.axes):
        if read.source is not None and read.positions is not None:
            mask = _scatter_axis(mask, axis, read.positions, source.sizes[read.source])
    shape = [mask.shape[axis] for axis, read in enumerate(reading.axes) if read.source is not None]
    order = torch.tensor(reading.order, dtype=torch.int64).argsort().tolist()
    mask = mask.reshape(shape + [1] * len(reading.dropped)).permute(order)
    for axis, index in reading.dropped.items():
        if source.is_static(axis) and source.sizes[axis] > 1:
            mask = _scatter_axis(mask, axis, torch.tensor([index]), source.sizes[axis])
    return mask


def _scatter_axis(mask: Tensor, axis: int, positions: Tensor, size: int) -> Tensor:
    if mask.shape[axis] == 1:
        hit = torch.zeros(size, dtype=torch.bool).index_fill(0, positions, True)
        return mask if bool(hit.all()) else mask & along(hit, axis, mask.ndim)
    shape = list(mask.shape)
    shape[axis] = size
    return torch.zeros(shape, dtype=torch.int32).index_add(axis, positions, mask.to(torch.int32)) > 0
