"""Pieces of a view: a part of the flat axis first, then a smaller view.

A fused projection for queries, keys and values is written

    linear -> reshape(..., 3, H, D) -> permute -> select 0, 1, 2

Read like that, the three keep one set of channels, a product of sets of 3, H and D. So

    select(permute(reshape(x, (..., 3, H, D))), i)  =  permute(reshape(x[..., positions of i], (..., H, D)))

where the three axes share a block of the view with one axis of x; each piece has then channels of its own. A slice of
one entry whose axis is squeezed is such a select, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.ir.axes import split_blocks
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules.pointwise import COPIES
from passes.rules.reading import Call, read_call
from passes.rules.view import REARRANGEMENTS, RESHAPES, SQUEEZES

aten = torch.ops.aten


def select(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A `select` behind a view."""
    source, index = op.node.args[0], op.args["index"]
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    return piece(op, rewriter, source, op.args["dim"], index)


def squeeze(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A `squeeze` of an axis that was sliced to one entry, as ONNX files have a `select`."""
    source = op.operands[0]
    if source.target is not aten.slice.Tensor or source not in op.program.infos:
        return None
    cut = op.program.op(source)
    axis, start = cut.axis(cut.args["dim"], cut.operands[0]), cut.args["start"]
    start = 0 if start is None else start
    whole, reading = cut.info_of(cut.operands[0]), SQUEEZES[op.target](op)
    others = [other for other in range(whole.rank) if other != axis]
    if reading is None or [read.source for read in reading.axes] != others or not whole.is_static(axis):
        return None
    if not isinstance(start, int) or not -whole.sizes[axis] <= start < whole.sizes[axis]:
        return None
    return piece(op, rewriter, cut.operands[0], axis, start)


def piece(op: Op, rewriter: Rewriter, source: fx.Node, axis: int, index: int) -> fx.Node | None:
    """source.select(axis, index) in the place of the call `op`; None where no view is behind it."""
    found = _trace(op.program, source, axis)
    if found is None:
        return None
    view = op.program.op(found.view)
    x, before, after = view.operands[0], view.info_of(view.operands[0]), view.out
    block = next(block for block in split_blocks(before, after) if found.axis in block.outs)
    if not block.separable or len(block.ins) != 1 or len(block.outs) < 2:
        return None
    numbers = torch.arange(before.sizes[block.ins[0]]).reshape([after.sizes[out] for out in block.outs])
    positions = numbers.select(block.outs.index(found.axis), index % after.sizes[found.axis]).flatten()
    sizes = rewriter.map(view.arg("size", "shape"))
    calls = [
        read_call(op, rewriter, block.ins[0], positions, before.sizes[block.ins[0]]),
        (aten.reshape.default, ([sizes[out] for out in sorted(found.order)],)),
        _permutation(found.order),
    ]
    return _chained(op, rewriter, rewriter.value(x), [call for call in calls if call is not None])


@dataclass(frozen=True)
class Trace:
    """A view, its axis that is selected from, and which of its axes the others are, in order."""

    view: fx.Node
    axis: int
    order: tuple[int, ...]


def _trace(program: Program, source: fx.Node, axis: int) -> Trace | None:
    """Go back through copies, permutations and axes of size 1 to a view."""
    if source not in program.infos:
        return None
    rank = program.infos[source].rank
    chosen: int | None = axis % rank
    order: list[int | None] = [other for other in range(rank) if other != chosen]
    while source.target not in RESHAPES:
        if source.target in COPIES:
            source = program.op(source).operands[0]
            continue
        table = REARRANGEMENTS.get(source.target) or SQUEEZES.get(source.target)
        reading = table(program.op(source)) if table is not None and source in program.infos else None
        if reading is None or chosen is None:
            return None
        back = [read.source for read in reading.axes]
        chosen = back[chosen]
        order = [None if other is None else back[other] for other in order]
        source = program.op(source).operands[0]
    kept = tuple(other for other in order if other is not None)
    shape_kept = len(kept) == len(order) and program.infos.get(source) is not None
    return None if chosen is None or not shape_kept else Trace(source, chosen, kept)


def _permutation(order: tuple[int, ...]) -> Call | None:
    ranked = [sorted(order).index(axis) for axis in order]
    return None if ranked == list(range(len(order))) else (aten.permute.default, (ranked,))


def _chained(op: Op, rewriter: Rewriter, x: fx.Node, calls: list[Call]) -> fx.Node:
    for position, (target, args) in enumerate(calls, 1):
        step = "" if position == len(calls) else f"piece{position}"
        x = rewriter.call(target, (x, *args), like=op.node, step=step)
    return x
