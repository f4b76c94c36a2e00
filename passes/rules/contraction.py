"""Convolutions, transposed convolutions and linear layers with constant weights.

For y = W x + b over channels, W of shape (out, in / groups, *kernel):

forward: a row of y is known where every unknown channel of x meets a zero column: y_j = conv(known part of x)_j + b_j.
backward: a channel of x is live where a live row of y reads it with a weight that is not zero.
couple: the channels of x and y are independent, but the constants of removed channels must have a place to go
    (`absorption`), and groups that keep different numbers of channels need a form to be emitted in (`grouping`).
rewrite: W' = W[kept rows][:, kept columns], b' = b[kept rows].

passes/rules/absorption.py says where the constants go, passes/rules/grouping.py what becomes of groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from passes.ir.errors import PassError
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, along, any_over_others, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.absorption import absorb_into, absorption, known_rows, reached_rows, removed_constants
from passes.rules.base import Rule, rule
from passes.rules.grouping import emit_groups, widen_groups
from passes.rules.layer import SPATIAL_RANK, Contraction, describe, emit, is_contraction


@rule(*SPATIAL_RANK)
class ContractionRule(Rule):
    """conv1d/2d/3d, conv_transpose1d/2d/3d and linear with a constant weight (and a constant bias or none)."""

    def applies(self, op: Op) -> bool:
        return is_contraction(op)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        this = describe(op)
        if not facts[0].any_known and this.full_rows:
            return Facts.unknown(op.out)
        rows = (~reached_rows(this, facts[0])).nonzero().flatten()
        if rows.numel():
            rows, part = known_rows(this, facts[0], rows)
        return _scattered(this, part, rows) if rows.numel() else Facts.unknown(op.out)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        this = describe(op)
        rows = any_over_others(demand, this.axis, this.out_channels)
        live = this.channels_read(rows)
        others = demand.any(dim=this.axis, keepdim=True)
        for axis in this.spatial:
            others = others.any(dim=axis, keepdim=True)
        mask = others & along(live, this.axis, this.info.rank)
        return [mask, *(full_mask(op.info_of(operand), True) for operand in op.operands[1:])]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        this = describe(op)
        for axis in this.leading:
            if this.info.is_static(axis):
                keep.tie((this.x, axis), (op.node, axis), f"aligned by {op.node.name}")
        keep.fill(this.x, f"positions of {op.node.name}", this.spatial)
        keep.fill(op.node, f"positions of {op.node.name}", this.spatial)
        kept = keep.get(this.x, this.axis)
        if not bool(kept.any()):
            first = torch.zeros_like(kept)
            first[0] = True
            keep.widen(this.x, this.axis, first, f"{op.node.name} reads at least one channel")
        channels = removed_constants(this, facts[0], keep) if facts[0].any_known else None
        if channels is not None:
            stay = torch.zeros_like(kept).index_fill(
                0, absorb_into(this, facts[0], keep, channels).stay, True
            )
            keep.widen(this.x, this.axis, stay, f"stands for the constants that {op.node.name} reads")
        if this.groups > 1:
            widen_groups(this, keep)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        this = describe(op)
        _check_absorbed(this, rewriter)
        if this.groups > 1:
            return emit_groups(this, rewriter)
        rows, columns = rewriter.index(op.node, this.axis), rewriter.index(this.x, this.axis)
        weight = this.cut_weight(rows, columns)
        return emit(this, rewriter, weight, None if this.bias is None else _select(this.bias, 0, rows), 1)

    def absorb(self, op: Op, rewriter: Rewriter, facts: Sequence[Facts], keep: KeepSets) -> fx.Node | None:
        """The same call at full width with the removed channels' constants absorbed; None if there is nothing to do."""
        this = describe(op)
        plan = absorption(this, facts[0], keep)
        return None if plan is None else emit(this, rewriter, *plan, this.groups)


def _scattered(this: Contraction, part: Tensor, rows: Tensor) -> Facts:
    shape = list(part.shape)
    shape[this.axis] = this.out_channels
    value = torch.zeros(shape, dtype=part.dtype).index_copy(this.axis, rows, part)
    known = torch.zeros(this.out_channels, dtype=torch.bool).index_fill(0, rows, True)
    return Facts(value, along(known, this.axis, this.info.rank)).compress()


def _check_absorbed(this: Contraction, rewriter: Rewriter) -> None:
    if rewriter.analysis is None:
        return
    facts = rewriter.analysis.facts[this.x.name]
    if facts.any_known and removed_constants(this, facts, rewriter.analysis.keep) is not None:
        raise PassError(
            f"{this.op.node.name}: constants of removed channels were not absorbed; run absorb_constants first"
        )


def _select(value: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return value if index is None else value.index_select(axis, index)
