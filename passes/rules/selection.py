"""Selections and repetitions, readings at other positions: slice, select, index, flip, roll, expand, repeat.

Nothing is emitted where the kept entries are read as they lie; a slice where they are read at a constant
step; else an index_select.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from passes.ir.axes import AxisRead, Reading
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import rule
from passes.rules.reading import (
    Call,
    Description,
    ReadingRule,
    chain,
    is_tied,
    rank_of,
    read_call,
    read_positions,
    renumbered,
)
from passes.rules.routing import Routed
from passes.rules.view import new_sizes

aten = torch.ops.aten

LAST = 2**63 - 1


def _at(op: Op, axis: int, positions: Tensor) -> Reading:
    return Reading.along_axis(rank_of(op), AxisRead(axis, positions))


def _slice(op: Op) -> Reading | None:
    axis = op.axis(op.args["dim"])
    info = op.info_of(op.operands[0])
    bounds = [op.args["start"], op.args["end"]]
    step = op.args.get("step", 1)
    if not info.is_static(axis):
        whole = bounds[0] in (None, 0) and (bounds[1] is None or bounds[1] == LAST) and step == 1
        return Reading.along_axis(info.rank, AxisRead(axis, numbered=whole))
    if not all(bound is None or isinstance(bound, int) for bound in (*bounds, step)):
        return None
    chosen = range(info.sizes[axis])[bounds[0] : bounds[1] : step]
    return _at(op, axis, torch.tensor(chosen, dtype=torch.int64))


def _select(op: Op) -> Reading | None:
    info = op.info_of(op.operands[0])
    axis, index = op.args["dim"] % info.rank, op.args["index"]
    if not isinstance(index, int):
        return None
    rest = [AxisRead(other) for other in range(info.rank) if other != axis]
    return Reading(tuple(rest), {axis: index % info.sizes[axis] if info.is_static(axis) else 0})


def _index_select(op: Op) -> Reading | None:
    index, axis = op.constant("index"), op.axis(op.args["dim"])
    if index is None or op.out.rank == 0 or not op.info_of(op.operands[0]).is_static(axis):
        return None
    return _at(op, axis, index.reshape(-1).long())


def _index(op: Op) -> Reading | None:
    """x[:, index] with one constant index vector."""
    info = op.info_of(op.operands[0])
    used = [(axis, index) for axis, index in enumerate(op.args["indices"]) if index is not None]
    index = op.program.constant(used[0][1]) if len(used) == 1 else None
    if (
        index is None
        or index.ndim != 1
        or index.dtype not in (torch.int32, torch.int64)
        or not info.is_static(used[0][0])
    ):
        return None
    axis = used[0][0]
    return _at(op, axis, index.long() % info.sizes[axis])


def _flip(op: Op) -> Reading | None:
    info = op.info_of(op.operands[0])
    dims = {axis % info.rank for axis in op.args["dims"]}
    axes = []
    for axis in range(info.rank):
        backwards = torch.arange(info.sizes[axis]).flip(0) if info.is_static(axis) else None
        flipped = AxisRead(axis, backwards, numbered=backwards is not None)
        axes.append(flipped if axis in dims else AxisRead(axis))
    return Reading(tuple(axes))


def _roll(op: Op) -> Reading | None:
    info, moves = op.info_of(op.operands[0]), _moves(op)
    if moves is None:
        return None
    axes = []
    for axis in range(info.rank):
        static = axis in moves and info.is_static(axis)
        positions = torch.arange(info.sizes[axis]).roll(moves[axis]) if static else None
        axes.append(AxisRead(axis, positions, numbered=static or axis not in moves))
    return Reading(tuple(axes))


def _moves(op: Op) -> dict[int, int] | None:
    """Axis to shift of a roll, where both are plain numbers, one for each axis."""
    dims, shifts = (
        [entry] if isinstance(entry, int) else list(entry) for entry in (op.args["dims"], op.args["shifts"])
    )
    rank = rank_of(op)
    moves = {axis % rank: shift for axis, shift in zip(dims, shifts, strict=False)}
    plain = all(isinstance(shift, int) for shift in shifts)
    return moves if dims and len(moves) == len(dims) == len(shifts) and plain else None


SELECTIONS: dict[object, Description] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
}


@rule(*SELECTIONS)
class Select(ReadingRule):
    """Some indices along an axis, in any order; those that the input decides are for another rule."""

    table = SELECTIONS
    otherwise = Routed()

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        reading, x = self.reading(op), op.operands[0]
        if op.target is aten.roll.default and self.is_uncut(op, reading, rewriter):
            return rewriter.copy(op.node)
        calls = [
            _read_axis(op, rewriter, axis, read)
            for axis, read in enumerate(reading.axes)
            if not is_tied(read)
        ]
        for axis, index in reading.dropped.items():
            if op.info_of(x).is_static(axis):
                index = int(renumbered(rewriter, torch.tensor([index]), x, axis))
                calls.append((aten.select.int, (axis, index)))
            else:
                calls.append((op.target, tuple(rewriter.map(op.node.args[1:]))))
        return chain(op, rewriter, [call for call in calls if call is not None])

    def is_uncut(self, op: Op, reading: Reading, rewriter: Rewriter) -> bool:
        """Whether the axes that are read at other positions are kept whole on both sides."""
        x = op.operands[0]
        moved = [(axis, read) for axis, read in enumerate(reading.axes) if not is_tied(read)]
        return all(
            rewriter.index(op.node, axis) is None and rewriter.index(x, read.source or 0) is None
            for axis, read in moved
        )


def _read_axis(op: Op, rewriter: Rewriter, axis: int, read: AxisRead) -> Call | None:
    """The call (without its first argument) that reads one axis in the new numbering; None: the identity."""
    x, source = op.operands[0], read.source
    assert source is not None
    if read.positions is None:
        if op.target is aten.flip.default:
            return aten.flip.default, ([source],)
        if op.target is aten.roll.default:
            return aten.roll.default, ([(_moves(op) or {})[source]], [source])
        return op.target, tuple(rewriter.map(op.node.args[1:]))
    positions = renumbered(rewriter, read_positions(op, rewriter, axis, read), x, source)
    return read_call(op, rewriter, source, positions, rewriter.size(x, source))


def _expand(op: Op) -> Reading | None:
    info, offset = op.info_of(op.operands[0]), op.out.rank - rank_of(op)
    reads = [AxisRead(None)] * offset
    for axis in range(info.rank):
        reads.append(_repeated(op, axis, axis + offset))
    return Reading(tuple(reads))


def _repeat(op: Op) -> Reading | None:
    info = op.info_of(op.operands[0])
    unclear = [
        axis for axis in info.static_axes if info.sizes[axis] > 1 and not op.out.is_static(axis - info.rank)
    ]
    return None if unclear else _expand(op)


def _repeated(op: Op, source: int, axis: int) -> AxisRead:
    """An operand axis that the result holds a whole number of times."""
    info = op.info_of(op.operands[0])
    if info.key(source) == op.out.key(axis):
        return AxisRead(source)
    if info.is_static(source) and op.out.is_static(axis):
        return AxisRead(
            source, torch.arange(info.sizes[source]).repeat(op.out.sizes[axis] // info.sizes[source])
        )
    return AxisRead(source, numbered=False)


@rule(aten.expand.default)
class Expand(ReadingRule):
    """Axes of size 1, or new ones, repeated without a copy."""

    table: Mapping[object, Description] = {aten.expand.default: _expand}

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        x, reads = rewriter.value(op.operands[0]), self.reading(op).axes
        sizes = new_sizes(op, op.args["size"], rewriter)
        sizes = [
            -1 if is_tied(read) and read.source is not None and not op.out.is_static(axis) else sizes[axis]
            for axis, read in enumerate(reads)
        ]
        grows = [not is_tied(read) and size != 1 for read, size in zip(reads, sizes, strict=True)]
        if not any(grows) and len(reads) == rank_of(op):
            return x
        return rewriter.call(op.target, (x, sizes), like=op.node)


@rule(aten.repeat.default)
class Repeat(ReadingRule):
    """Axes tiled a number of times."""

    table: Mapping[object, Description] = {aten.repeat.default: _repeat}

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        counts = list(rewriter.map(op.args["repeats"]))
        calls: list[Call] = []
        for axis, read in enumerate(self.reading(op).axes):
            if read.source is None and op.out.is_static(axis):
                counts[axis] = rewriter.size(op.node, axis)
            elif read.source is not None and read.positions is not None:
                counts[axis], call = _tiles(op, rewriter, axis, read)
                calls += [] if call is None else [call]
        if any(count != 1 for count in counts) or len(counts) > rank_of(op):
            calls.append((op.target, (counts,)))
        return chain(op, rewriter, calls)


def _tiles(op: Op, rewriter: Rewriter, axis: int, read: AxisRead) -> tuple[int, Call | None]:
    """(how often the operand's axis is tiled, None), or (1, the call that reads what is left of it)."""
    x, source = op.operands[0], read.source
    assert source is not None
    count = rewriter.size(x, source)
    positions = renumbered(rewriter, read_positions(op, rewriter, axis, read), x, source)
    if torch.equal(positions, torch.arange(positions.numel()) % count) and positions.numel() % count == 0:
        return positions.numel() // count, None
    return 1, read_call(op, rewriter, source, positions, count)
