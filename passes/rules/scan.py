"""Operators that keep the shape and mix the entries along some axes alone: softmax, cumulative sums, triangles.

forward: a line along the mixed axes is known where all of it is; a cumulative one where all entries up to here are.
    The op itself runs on the stored facts, laid out at full size along the mixed axes. Along a dynamic axis a
    cumulative sum or product of zeros and a triangle of zeros are known to be 0, nothing else is.
backward: an entry is live where something on its line is, for a cumulative op where something behind it is.
couple: the other axes keep equal indices, the mixed ones are kept whole: a constant logit takes part in the sum, and
    there is no form of the op without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.axes import any_over
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.rules.base import Rule, rule
from passes.rules.spatial import run

aten = torch.ops.aten


class AlongAxes(Rule):
    """An op on one operand that treats everything beside the mixed axes alike and alone."""

    def applies(self, op: Op) -> bool:
        """Whether the operand is the only node and has an axis."""
        return op.node.all_input_nodes == list(op.operands[:1]) and op.out.rank > 0

    def mixed(self, op: Op) -> tuple[int, ...]:
        """Return the axes whose entries meet."""
        return (op.axis(op.args["dim"]),)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the lines that are known."""
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        if not all(op.out.is_static(axis) for axis in self.mixed(op)):
            return self.along_dynamic(op, facts[0])
        stored = facts[0].expand(self.mixed(op), op.out)
        return Facts(run(op, stored.known_value), self.known(op, stored)).compress()

    def along_dynamic(self, op: Op, facts: Facts) -> Facts:
        """Return what holds whatever the sizes of the mixed axes are."""
        return Facts.unknown(op.out)

    def known(self, op: Op, stored: Facts) -> Tensor:
        """Return which results known entries decide."""
        return ~any_over(~stored.known, self.mixed(op))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for whole lines."""
        return [any_over(demand, self.mixed(op))]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie the other axes, keep the mixed ones whole."""
        x, mixed = op.operands[0], self.mixed(op)
        for axis in op.out.static_axes:
            if axis not in mixed:
                keep.tie((x, axis), (op.node, axis), f"aligned by {op.node.name}")
        for node in (x, op.node):
            keep.fill(node, f"{op.node.name} reads them together", mixed)


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)
class Softmax(AlongAxes):
    """softmax and log_softmax along one axis."""


class Cumulative(AlongAxes):
    """A result for each entry, of it and all before it."""

    def known(self, op: Op, stored: Facts) -> Tensor:
        """Return where nothing unknown came before."""
        return (~stored.known).cumsum(*self.mixed(op)) == 0

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for everything before a live result."""
        (axis,) = self.mixed(op)
        return [demand.flip(axis).cumsum(axis).flip(axis) > 0]


@rule(aten.cumsum.default, aten.cumprod.default)
class CumulativeSum(Cumulative):
    """Sums and products; of zeros alone they are 0 along any axis."""

    def along_dynamic(self, op: Op, facts: Facts) -> Facts:
        """Return the zeros."""
        return _zeros(op, facts)


@rule(aten.logcumsumexp.default)
class CumulativeLogSumExp(Cumulative):
    """Logarithms of sums of exponentials."""


@rule(aten.tril.default, aten.triu.default)
class Triangle(AlongAxes):
    """The entries on one side of a diagonal, 0 elsewhere."""

    def applies(self, op: Op) -> bool:
        """Whether the diagonal is a number."""
        return super().applies(op) and op.out.rank > 1

    def mixed(self, op: Op) -> tuple[int, ...]:
        """Return the two axes of the triangle."""
        return (op.out.rank - 2, op.out.rank - 1)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the other side of the diagonal, too."""
        if all(op.out.is_static(axis) for axis in self.mixed(op)):
            stored = facts[0].expand(self.mixed(op), op.out)
            return Facts(run(op, stored.known_value), self.known(op, stored)).compress()
        return super().forward(op, facts)

    def known(self, op: Op, stored: Facts) -> Tensor:
        """Return what was known, and what is on the other side."""
        return stored.known | ~run(op, torch.ones(op.out.sizes[-2:], dtype=torch.bool))

    def along_dynamic(self, op: Op, facts: Facts) -> Facts:
        """Return the zeros."""
        return _zeros(op, facts)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for the entries themselves."""
        return [demand]


def _zeros(op: Op, facts: Facts) -> Facts:
    """Zeros that fill an axis stay zeros."""
    return Facts(torch.zeros([1] * op.out.rank, dtype=op.out.dtype), facts.known & (facts.value == 0))
