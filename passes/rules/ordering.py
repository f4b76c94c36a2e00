"""Operators that put the entries along an axis in order and give two results, entries and their indices.

sort and topk order an axis, cummax and cummin go along it; max, min, median, kthvalue and mode pick one entry of it.

forward: the entries are known where all along a static axis are. Indices are only where the first of equal entries
    counts: elsewhere how ties are broken is not fixed.
backward: a result needs everything along the axis.
couple: the axis stays whole on both sides, since indices count its entries; other axes keep equal indices, in the
    results that are read too, since they come from one call.
rewrite: the one call, on what is kept along the other axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.axes import any_over
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.rules.base import rule
from passes.rules.reduction import Variance
from passes.rules.spatial import has_plain_arguments

aten = torch.ops.aten

FIRST_OF_EQUALS = frozenset({aten.max.dim, aten.min.dim})  # their documentation says which index they give


@rule(
    aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default
)
class Picked(Variance):
    """One entry along an axis, and its index."""

    def applies(self, op: Op) -> bool:
        return super().applies(op) and has_plain_arguments(op)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        fixed = op.position == 0 or op.target in FIRST_OF_EQUALS
        return super().forward(op, facts) if fixed else Facts.unknown(op.out)


@rule(aten.sort.default, aten.sort.stable, aten.topk.default, aten.cummax.default, aten.cummin.default)
class Ordered(Picked):
    """Entries along an axis in another order, and their indices."""

    def keeps_axes(self, op: Op) -> bool:
        return True

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        return [any_over(demand, self.axes(op))]

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        why = f"put in order by {op.source.name}"
        for node in (op.operands[0], op.node):
            keep.fill(node, why, (axis,))
