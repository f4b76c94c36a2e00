"""Strided views that read one axis twice, or two axes at once: Tensor.unfold and diagonal.

The result's axes are the operand's other axes in order, and axes of its own that mix what it takes:

    unfold(dim, size, step)   takes dim          gives dim (which window) and a last axis (where in it)
    diagonal(dim1, dim2)      takes dim1, dim2   gives a last axis

forward: the op itself runs on what is known; along a dynamic axis facts survive where they do not vary.
backward: the op's transpose runs on the demand.
couple: the other axes keep equal indices; what is mixed is kept whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, expand_axes
from passes.ir.program import Op
from passes.rules.base import Rule, rule
from passes.rules.spatial import run

aten = torch.ops.aten


class Strided(Rule):
    """What both share."""

    def taken(self, op: Op) -> list[int]:
        """The operand's axes that are mixed."""
        raise NotImplementedError

    def given(self, op: Op) -> list[int]:
        """The result's axes that mix them."""
        raise NotImplementedError

    def transposed(self, op: Op, demand: Tensor, sizes: list[int]) -> Tensor:
        """The transpose of the op on a demand in float64, for an operand of the given sizes."""
        raise NotImplementedError

    def applies(self, op: Op) -> bool:
        x = op.info_of(op.operands[0])
        plain = set(op.node.all_input_nodes) == set(op.operands)
        return plain and 0 not in x.sizes + op.out.sizes

    def is_static(self, op: Op) -> bool:
        """Whether what is mixed can be numbered."""
        x = op.info_of(op.operands[0])
        return all(map(x.is_static, self.taken(op))) and all(map(op.out.is_static, self.given(op)))

    def beside(self, op: Op) -> list[tuple[int, int]]:
        """(axis of the operand, axis of the result) for the others."""
        taken, given = self.taken(op), self.given(op)
        before = [axis for axis in range(op.info_of(op.operands[0]).rank) if axis not in taken]
        return list(zip(before, [axis for axis in range(op.out.rank) if axis not in given], strict=True))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        if self.is_static(op):
            full = facts[0].expand(self.taken(op), op.info_of(op.operands[0]))
            return Facts(run(op, full.known_value), run(op, full.known)).compress()
        flat = flatten_facts(facts[0], self.taken(op))
        parts = (
            self._laid_out(part, self.beside(op), op.out.rank) for part in (flat.known_value, flat.known)
        )
        return Facts(*parts)

    @staticmethod
    def _laid_out(stored: Tensor, pairs: Sequence[tuple[int, int]], rank: int) -> Tensor:
        """A stored tensor that does not vary along what is mixed, on the other side of the op."""
        shape = [1] * rank
        for here, there in pairs:
            shape[there] = stored.shape[here]
        return stored.reshape(shape)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        x, pairs = op.info_of(op.operands[0]), [(there, here) for here, there in self.beside(op)]
        if not self.is_static(op):
            return [self._laid_out(any_over(demand, self.given(op)), pairs, x.rank)]
        sizes = [x.sizes[axis] for axis in range(x.rank)]
        for there, here in pairs:
            sizes[here] = demand.shape[there]
        full = expand_axes(demand, self.given(op), op.out).to(torch.float64)
        return [self.transposed(op, full, sizes) > 0]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        x = op.operands[0]
        for here, there in self.beside(op):
            keep.tie((x, here), (op.node, there), f"aligned by {op.node.name}")
        keep.fill(x, f"positions of {op.node.name}", tuple(self.taken(op)))
        keep.fill(op.node, f"positions of {op.node.name}", tuple(self.given(op)))


@rule(aten.unfold.default)
class Windows(Strided):
    """Windows along one axis, overlapping or not."""

    def taken(self, op: Op) -> list[int]:
        return [op.args["dimension"] % op.info_of(op.operands[0]).rank]

    def given(self, op: Op) -> list[int]:
        return [*self.taken(op), op.out.rank - 1]

    def transposed(self, op: Op, demand: Tensor, sizes: list[int]) -> Tensor:
        arguments = self.taken(op)[0], op.args["size"], op.args["step"]
        result: Tensor = aten.unfold_backward.default(demand, sizes, *arguments)
        return result


@rule(aten.diagonal.default)
class Diagonal(Strided):
    """The diagonal of two axes."""

    def taken(self, op: Op) -> list[int]:
        rank = op.info_of(op.operands[0]).rank
        return [op.args["dim1"] % rank, op.args["dim2"] % rank]

    def given(self, op: Op) -> list[int]:
        return [op.out.rank - 1]

    def transposed(self, op: Op, demand: Tensor, sizes: list[int]) -> Tensor:
        arguments = op.args["offset"], op.args["dim1"], op.args["dim2"]
        result: Tensor = aten.diagonal_backward.default(demand, sizes, *arguments)
        return result
