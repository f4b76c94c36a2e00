"""Operators that make a tensor of one number: zeros, ones, full and what is like another tensor.

forward: every entry is known.
backward: nothing is read, the operand gives shape and dtype alone.
couple: a tensor like another keeps what that one keeps.
rewrite: kept counts in the place of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule

aten = torch.ops.aten

LIKE_ANOTHER = (
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.fill.Scalar,
)  # fmt: skip
ONES = (aten.ones_like.default, aten.ones.default, aten.new_ones.default)
OF_SIZES = (
    aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default,
)  # fmt: skip


class Filling(Rule):
    """One number everywhere."""

    def applies(self, op: Op) -> bool:
        """Whether the number is known before any input is seen."""
        number = op.args.get("fill_value", op.args.get("value", 0))
        return isinstance(number, (int, float))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know every entry."""
        number = op.args.get("fill_value", op.args.get("value", self.number(op)))
        return Facts.constant(torch.full((1,) * op.out.rank, number, dtype=op.out.dtype))

    def number(self, op: Op) -> float:
        """Return the number that the operator's name tells."""
        return int(op.target in ONES)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for nothing."""
        return [full_mask(op.info_of(operand), False) for operand in op.operands]


@rule(*LIKE_ANOTHER)
class Like(Filling):
    """A tensor of another one's shape."""

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie all axes."""
        for axis in op.out.static_axes:
            keep.tie((op.operands[0], axis), (op.node, axis), f"aligned by {op.node.name}")


@rule(*OF_SIZES)
class OfSizes(Filling):
    """A tensor of given sizes; a dynamic axis keeps its own."""

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Keep one entry of the operand that gives the dtype."""
        for operand in op.operands:
            for axis in op.info_of(operand).static_axes:
                first = torch.zeros(op.info_of(operand).sizes[axis], dtype=torch.bool)
                first[:1] = True
                keep.widen(operand, axis, first, f"gives {op.node.name} its dtype")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Make what is kept."""
        args: list[Any] = list(rewriter.map(op.node.args))
        at = list(op.args).index("size")
        args[at] = [
            rewriter.size(op.node, axis) if op.out.is_static(axis) else entry
            for axis, entry in enumerate(args[at])
        ]
        return rewriter.call(op.target, args, rewriter.map(dict(op.node.kwargs)), like=op.node)
