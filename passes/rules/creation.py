"""Tensors filled with one number: zeros, ones, full, and the same in the shape of another tensor.

forward: every entry is known.
backward: the operand, if there is one, gives its shape alone.
couple: nothing; any entries may stay.
rewrite: the sizes of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.analysis import size_source
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.view import new_sizes

aten = torch.ops.aten

NUMBERS: dict[object, float] = {
    aten.zeros.default: 0, aten.zeros_like.default: 0, aten.new_zeros.default: 0,
    aten.ones.default: 1, aten.ones_like.default: 1, aten.new_ones.default: 1,
}  # fmt: skip
OWN_NUMBER = (aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)


@rule(*NUMBERS, *OWN_NUMBER)
class Filled(Rule):
    """One number everywhere."""

    def number(self, op: Op) -> Any:
        return NUMBERS[op.target] if op.target in NUMBERS else op.arg("fill_value", "s")

    def applies(self, op: Op) -> bool:
        """Whether the number is plain, and the shape that of an operand only if an input gives it too."""
        sizes_known = all(
            op.out.is_static(axis) or size_source(op.program, op.out, axis) for axis in range(op.out.rank)
        )
        return isinstance(self.number(op), (bool, int, float)) and (not op.operands or sizes_known)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        shape = (1,) * op.out.rank
        value = torch.full(shape, self.number(op), dtype=op.out.dtype)
        return Facts(value, torch.ones(shape, dtype=torch.bool))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        return [full_mask(op.info_of(operand), False) for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Leave every set as it is."""

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        sizes = new_sizes(op, op.args["size"], rewriter)
        args = [sizes if value is op.args["size"] else rewriter.map(value) for value in op.node.args]
        return rewriter.call(op.target, args, dict(op.node.kwargs), like=op.node)
