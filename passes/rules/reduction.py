"""Reductions over some axes: mean, sum, largest and smallest entry, variance and standard deviation.

forward: a result is known where all entries that go into it are. The op itself runs on the stored facts, laid
    out at full size along reduced axes if repeating an entry changes the result. Over a dynamic axis a mean
    and an extremum of equal constants are that constant, a sum is known only if it is 0, a variance never is.
backward: an entry is live if the result that it goes into is.
couple: the axes that stay keep equal indices. Reduced axes are kept whole, except that a sum leaves out the
    indices that are known to be 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, all_over_others
from passes.ir.program import Op
from passes.rules.base import Rule, rule
from passes.rules.spatial import run

aten = torch.ops.aten


@rule(aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default)
class Reduction(Rule):
    """A reduction that does not change if every entry is repeated equally often."""

    def applies(self, op: Op) -> bool:
        """Whether there is an axis to reduce."""
        return op.info_of(op.operands[0]).rank > 0

    def axes(self, op: Op) -> tuple[int, ...]:
        """Return the reduced axes of the operand; no axes at all mean every one."""
        rank = op.info_of(op.operands[0]).rank
        given = op.args.get("dim")
        given = [given] if isinstance(given, int) else given or range(rank)
        return tuple(sorted(axis % max(rank, 1) for axis in given))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the results that known entries alone go into."""
        axes = self.axes(op)
        stored = self.laid_out(op, facts[0], axes) if facts[0].any_known else facts[0]
        if not stored.any_known:
            return Facts.unknown(op.out)
        unknown = ~stored.known
        if axes:
            unknown = unknown.any(dim=axes, keepdim=bool(op.args.get("keepdim")))
        return Facts(run(op, stored.known_value), ~unknown)

    def laid_out(self, op: Op, facts: Facts, axes: tuple[int, ...]) -> Facts:
        """Return facts on which the op gives what it gives at full size."""
        return facts

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for everything that goes into a live result."""
        if not op.args.get("keepdim"):
            for axis in self.axes(op):
                demand = demand.unsqueeze(axis)
        return [demand]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie the axes that stay, keep what is reduced."""
        x, reduced = op.operands[0], self.axes(op)
        rank = op.info_of(x).rank
        stay = (
            range(rank) if op.args.get("keepdim") else [axis for axis in range(rank) if axis not in reduced]
        )
        for position, axis in enumerate(stay):
            if axis not in reduced:
                keep.tie((x, axis), (op.node, position), f"aligned by {op.node.name}")
        for axis in reduced:
            self.keep_reduced(op, axis, keep, facts[0])

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        """Widen the keep set of a reduced axis."""
        keep.fill(op.operands[0], f"reduced by {op.node.name}", (axis,))


@rule(aten.sum.default, aten.sum.dim_IntList)
class Sum(Reduction):
    """A sum; zeros may be left out."""

    def laid_out(self, op: Op, facts: Facts, axes: tuple[int, ...]) -> Facts:
        """Lay out static axes; over dynamic ones only zeros count."""
        info = op.info_of(op.operands[0])
        if not all(info.is_static(axis) for axis in axes):
            facts = facts.forget(facts.value != 0)
        return facts.expand([axis for axis in axes if info.is_static(axis)], info)

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        """Keep what is not known to be 0, and at least one index."""
        x = op.operands[0]
        zero = all_over_others(facts.known & (facts.value == 0), axis, op.info_of(x).sizes[axis])
        if zero.numel() and bool(zero.all()):
            zero[0] = False
        keep.widen(x, axis, ~zero, f"added up by {op.node.name}")


@rule(
    aten.var.dim, aten.var.correction, aten.var.default, aten.std.dim, aten.std.correction, aten.std.default
)
class Variance(Reduction):
    """Variance and standard deviation, with any correction."""

    def laid_out(self, op: Op, facts: Facts, axes: tuple[int, ...]) -> Facts:
        """Lay out static axes; over a dynamic one nothing is known."""
        info = op.info_of(op.operands[0])
        if not all(info.is_static(axis) for axis in axes):
            return Facts.unknown(info)
        return facts.expand(axes, info)
