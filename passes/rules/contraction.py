"""Convolutions and linear layers with constant weights.

For y = W x + b over channels, W of shape (out, in / groups, *kernel):

forward: a row of y is known where every unknown channel of x meets a zero column: y_j = conv(known part of x)_j + b_j.
backward: a channel of x is live where a live row of y reads it with a weight that is not zero.
couple: without groups the channels of x and y are independent, but the constants of removed channels must have a place
    to go (`absorption`); with groups, whole groups stay or go.
rewrite: W' = W[kept rows][:, kept columns], b' = b[kept rows].

passes/rules/absorption.py says where the constants go.
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
from passes.rules.layer import CONVOLUTIONS, LINEAR, Contraction, describe, emit, is_contraction


@rule(*CONVOLUTIONS, LINEAR)
class ContractionRule(Rule):
    """conv1d/2d/3d and linear with a constant weight (and a constant bias or none)."""

    def applies(self, op: Op) -> bool:
        return is_contraction(op)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        this = describe(op)
        if not facts[0].any_known and this.full_rows:
            return Facts.unknown(op.out)
        rows = (~reached_rows(this, facts[0])).nonzero().flatten()
        if rows.numel() == 0:
            return Facts.unknown(op.out)
        part = known_rows(this, facts[0], rows)
        return Facts.unknown(op.out) if part is None else _scattered(this, part, rows)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        this = describe(op)
        rows = any_over_others(demand, this.axis, this.out_channels)
        live = (this.columns & rows[:, None]).view(this.groups, -1, this.in_per_group).any(1).flatten()
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
        if this.groups > 1:
            _couple_groups(this, keep)
            return
        kept = keep.get(this.x, this.axis)
        if not bool(kept.any()):
            first = torch.zeros_like(kept)
            first[0] = True
            keep.widen(this.x, this.axis, first, f"{op.node.name} reads at least one channel")
        channels = removed_constants(this, facts[0], keep) if facts[0].any_known else None
        found = None if channels is None else absorb_into(this, facts[0], keep, channels)
        if found is not None and found.basis is not None:
            stay = torch.zeros_like(kept).index_fill(0, found.basis, True)
            keep.widen(this.x, this.axis, stay, f"stands for the constants that {op.node.name} reads")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        this = describe(op)
        rows, columns = rewriter.index(op.node, this.axis), rewriter.index(this.x, this.axis)
        groups = this.groups
        if groups > 1 and columns is not None:
            groups = columns.numel() // this.in_per_group
        elif groups == 1:
            _check_absorbed(this, rewriter)
        weight = _select(_select(this.weight, 0, rows), 1, columns if this.groups == 1 else None)
        bias = None if this.bias is None else _select(this.bias, 0, rows)
        return emit(this, rewriter, weight, bias, groups)

    def absorb(self, op: Op, rewriter: Rewriter, facts: Sequence[Facts], keep: KeepSets) -> fx.Node | None:
        """The same call at full width with the removed channels' constants absorbed; None if there is nothing to do."""
        this = describe(op)
        plan = absorption(this, facts[0], keep) if this.groups == 1 else None
        return None if plan is None else emit(this, rewriter, *plan, 1)


def _scattered(this: Contraction, part: Tensor, rows: Tensor) -> Facts:
    shape = list(part.shape)
    shape[this.axis] = this.out_channels
    value = torch.zeros(shape, dtype=part.dtype).index_copy(this.axis, rows, part)
    known = torch.zeros(this.out_channels, dtype=torch.bool).index_fill(0, rows, True)
    return Facts(value, along(known, this.axis, this.info.rank)).compress()


def _couple_groups(this: Contraction, keep: KeepSets) -> None:
    """A group stays whole if any of its input or output channels stays."""
    ins = keep.get(this.x, this.axis).view(this.groups, -1).any(1)
    outs = keep.get(this.op.node, this.axis).view(this.groups, -1).any(1)
    stay = ins | outs
    why = f"groups of {this.op.node.name} stay whole"
    keep.widen(this.x, this.axis, stay.repeat_interleave(this.in_per_group), why)
    keep.widen(this.op.node, this.axis, stay.repeat_interleave(this.out_channels // this.groups), why)


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
