"""What all operators share that only copy entries to other places: permutations, slices, expansions.

A reading (passes/ir/axes.py) says for each axis of the result which axis of the operand it reads, and where.

forward and backward: facts and demand move with the entries.
couple: axes that are not renumbered are tied; along others the operand keeps what the result reads.
rewrite: the positions in the operand's new numbering; a reading that became the identity goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.axes import AxisRead, Reading, gather, scatter
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule

aten = torch.ops.aten

Description = Callable[[Op], Reading | None]


class ReadingRule(Rule):
    """The base of the readings; `table` describes a call of each overload, or gives None where it cannot."""

    table: Mapping[object, Description]

    def reading(self, op: Op) -> Reading:
        found = self.table[op.target](op)
        assert found is not None
        return found

    def applies(self, op: Op) -> bool:
        sizes = op.out.sizes + op.info_of(op.operands[0]).sizes
        return 0 not in sizes and self.table[op.target](op) is not None

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        reading = self.reading(op)
        return Facts(gather(facts[0].value, reading), gather(facts[0].known, reading))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        rest = [full_mask(op.info_of(other), False) for other in op.operands[1:]]
        return [scatter(demand, self.reading(op), op.info_of(op.operands[0])), *rest]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        reading, x = self.reading(op), op.operands[0]
        for axis, read in enumerate(reading.axes):
            couple_axis(op, axis, read, keep)
        for axis, index in reading.dropped.items():
            keep.widen(x, axis, _marked(torch.tensor([index]), keep.get(x, axis)), f"read by {op.node.name}")


def couple_axis(op: Op, axis: int, read: AxisRead, keep: KeepSets) -> None:
    """Make the operand keep what one result axis reads, and the result what it cannot do without."""
    x = op.operands[0]
    if read.source is None:
        return
    if not read.numbered:
        keep.fill(x, f"read whole by {op.node.name}", (read.source,))
        keep.fill(op.node, f"{op.node.name} reads along a dynamic axis", (axis,))
    elif read.positions is not None:
        wanted = _marked(read.positions[keep.get(op.node, axis)], keep.get(x, read.source))
        keep.widen(x, read.source, wanted, f"read by {op.node.name}")
    elif op.out.is_static(axis):
        keep.tie((x, read.source), (op.node, axis), f"aligned by {op.node.name}")


def _marked(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill(0, index, True)


def rank_of(op: Op) -> int:
    """The number of the operand's axes."""
    return op.info_of(op.operands[0]).rank


def is_tied(read: AxisRead) -> bool:
    """Whether the operand's axis and the result's have one numbering."""
    return read.numbered and read.positions is None


Call = tuple[object, tuple[Any, ...]]


def read_positions(op: Op, rewriter: Rewriter, axis: int, read: AxisRead) -> Tensor:
    """The positions behind the kept indices of a result axis, in the operand's old numbering."""
    assert read.positions is not None
    kept = rewriter.index(op.node, axis)
    return read.positions if kept is None else read.positions[kept]


def renumbered(rewriter: Rewriter, positions: Tensor, x: fx.Node, axis: int) -> Tensor:
    """Old positions along an operand's axis, all of them kept, as places among the kept ones."""
    kept = rewriter.index(x, axis)
    return positions if kept is None else torch.searchsorted(kept, positions)


def read_call(op: Op, rewriter: Rewriter, axis: int, positions: Tensor, count: int) -> Call | None:
    """The cheapest call that reads `positions` along an axis of size `count`; None for the identity."""
    everything = torch.arange(count)
    if torch.equal(positions, everything):
        return None
    if torch.equal(positions, everything.flip(0)):
        return aten.flip.default, ([axis],)
    steps = positions.diff()
    if steps.numel() == 0 or bool((steps == steps[0]).all() & (steps[0] > 0)):
        step = int(steps[0]) if steps.numel() else 1
        return aten.slice.Tensor, (axis, int(positions[0]), int(positions[-1]) + 1, step)
    index = rewriter.constant(positions, f"{op.node.name}_index", torch.int64)
    return aten.index_select.default, (axis, index)


def chain(op: Op, rewriter: Rewriter, calls: Sequence[Call]) -> fx.Node:
    """The calls one after the other on the operand; the last one carries the result."""
    calls = _with_joint_flips(calls)
    x = rewriter.value(op.operands[0])
    for position, (target, args) in enumerate(calls, 1):
        step = "" if position == len(calls) else f"part{position}"
        x = rewriter.call(target, (x, *args), like=op.node, step=step)
    return x


def _with_joint_flips(calls: Sequence[Call]) -> list[Call]:
    """The same calls with all flips in one: they commute with reads along other axes."""
    axes = [axis for target, args in calls if target is aten.flip.default for axis in args[0]]
    rest = [call for call in calls if call[0] is not aten.flip.default]
    return [(aten.flip.default, (axes,)), *rest] if axes else rest
