"""Concatenation and stacking: operands side by side along one axis.

forward: facts side by side; along a dynamic axis what all operands agree on.
backward: each operand is asked for its own segment.
couple: an operand of whose segment nothing is kept is not read at all; the others keep what the result keeps
    there, and the result keeps what they keep.
rewrite: the operands that are read; one alone needs no concatenation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule

aten = torch.ops.aten


class Joining(Rule):
    """What cat and stack share: the result's joined axis falls into one segment for each operand."""

    def length(self, op: Op, operand: fx.Node) -> int:
        """The size of an operand's segment."""
        raise NotImplementedError

    def lifted(self, op: Op, stored: Tensor) -> Tensor:
        """A stored tensor of an operand with the result's number of axes."""
        return stored

    def lowered(self, op: Op, mask: Tensor) -> Tensor:
        """A stored mask of one segment with the operand's number of axes."""
        return mask

    def segments(self, op: Op) -> Iterator[tuple[fx.Node, slice]]:
        """Each operand with its indices along the joined axis."""
        start = 0
        for operand in op.operands:
            stop = start + self.length(op, operand)
            yield operand, slice(start, stop)
            start = stop

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not any(fact.any_known for fact in facts):
            return Facts.unknown(op.out)
        axis = joined_axis(op)
        lifted = [Facts(self.lifted(op, fact.known_value), self.lifted(op, fact.known)) for fact in facts]
        if not op.out.is_static(axis):
            flat = [flatten_facts(fact, (axis,)) for fact in lifted]
            result = flat[0]
            for fact in flat[1:]:
                result = result.join(fact)
            return result
        lengths = [self.length(op, operand) for operand in op.operands]
        values = _side_by_side([fact.value for fact in lifted], axis, lengths)
        return Facts(values, _side_by_side([fact.known for fact in lifted], axis, lengths)).compress()

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        axis = joined_axis(op)
        if demand.shape[axis] == 1 or not op.out.is_static(axis):
            return [self.lowered(op, any_over(demand, (axis,))) for _ in op.operands]
        parts = [demand.narrow(axis, at.start, at.stop - at.start) for _, at in self.segments(op)]
        return [self.lowered(op, part) for part in parts]

    def axis_in(self, op: Op, axis: int) -> int:
        """The operand's axis behind an axis of the result that is not joined."""
        return axis

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        axis = joined_axis(op)
        for operand, at in self.segments(op):
            if self.is_read(op, at, keep):
                self.couple_segment(op, operand, at, keep)
                for other in range(op.out.rank):
                    if other != axis and op.out.is_static(other):
                        why = f"aligned by {op.node.name}"
                        keep.tie((operand, self.axis_in(op, other)), (op.node, other), why)

    def is_read(self, op: Op, at: slice, keep: KeepSets) -> bool:
        """Whether something of a segment is kept."""
        axis = joined_axis(op)
        return not op.out.is_static(axis) or bool(keep.get(op.node, axis)[at].any())

    def couple_segment(self, op: Op, operand: fx.Node, at: slice, keep: KeepSets) -> None:
        """Tie the joined axis of an operand that is read to its segment."""

    def read_operands(self, op: Op, rewriter: Rewriter) -> list[fx.Node]:
        """The new values of the operands that are read."""
        analysis = rewriter.analysis
        return [
            rewriter.value(operand)
            for operand, at in self.segments(op)
            if analysis is None or self.is_read(op, at, analysis.keep)
        ]


def joined_axis(op: Op) -> int:
    """The axis of the result along which the operands lie."""
    return op.axis(op.args["dim"])


def _side_by_side(parts: Sequence[Tensor], axis: int, lengths: Sequence[int]) -> Tensor:
    """Stored tensors joined along an axis, each at full size there and at the widest size elsewhere."""
    widest = [max(part.shape[other] for part in parts) for other in range(parts[0].ndim)]
    shapes = [[*widest[:axis], length, *widest[axis + 1 :]] for length in lengths]
    return torch.cat([part.expand(shape) for part, shape in zip(parts, shapes, strict=True)], axis)


@rule(aten.cat.default)
class Concatenate(Joining):
    """Operands joined along an axis that they have."""

    def applies(self, op: Op) -> bool:
        infos = [op.info_of(operand) for operand in op.operands]
        return all(info.rank == op.out.rank and info.dtype == op.out.dtype for info in infos)

    def length(self, op: Op, operand: fx.Node) -> int:
        return op.info_of(operand).sizes[joined_axis(op)]

    def couple_segment(self, op: Op, operand: fx.Node, at: slice, keep: KeepSets) -> None:
        axis = joined_axis(op)
        if not op.out.is_static(axis):
            keep.fill(operand, f"{op.node.name} joins them along a dynamic axis", (axis,))
            return
        kept = keep.get(op.node, axis)
        keep.widen(operand, axis, kept[at], f"aligned by {op.node.name}")
        wanted = torch.zeros_like(kept)
        wanted[at] = keep.get(operand, axis)
        keep.widen(op.node, axis, wanted, f"aligned by {op.node.name}")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        values = self.read_operands(op, rewriter)
        if len(values) == 1:
            return values[0]
        return rewriter.call(aten.cat.default, (values, joined_axis(op)), like=op.node)


@rule(aten.stack.default)
class Stack(Joining):
    """Operands joined along a new axis, one index each."""

    def applies(self, op: Op) -> bool:
        return all(op.info_of(operand).dtype == op.out.dtype for operand in op.operands)

    def length(self, op: Op, operand: fx.Node) -> int:
        return 1

    def lifted(self, op: Op, stored: Tensor) -> Tensor:
        return stored.unsqueeze(joined_axis(op))

    def lowered(self, op: Op, mask: Tensor) -> Tensor:
        return mask.squeeze(joined_axis(op))

    def axis_in(self, op: Op, axis: int) -> int:
        return axis - int(axis > joined_axis(op))

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        values, axis = self.read_operands(op, rewriter), joined_axis(op)
        if len(values) == 1:
            return rewriter.call(aten.unsqueeze.default, (values[0], axis), like=op.node)
        return rewriter.call(aten.stack.default, (values, axis), like=op.node)
