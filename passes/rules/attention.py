"""Scaled dot-product attention: y_i = sum_j softmax_j(s q_i k_j + mask_ij) v_j, for each head.

forward: column c of y is known where column c of v is known and the same at every position, for the weights of a row
    add up to 1; unless it is 0, every row must be sure to attend to something.
backward: v is live where y is. q_id is live where k_jd is unknown or differs between positions j (what is the same for
    all j cancels in the softmax), k_jd where some live q_id is not a known 0.
couple: heads and other leading axes of q, k, v, y and mask keep the same indices; so do the columns of v and y, and
    the columns of q and k, of which one stays. Positions of k and v are kept whole. Where several heads of q share one
    of k and v, each of these keeps equally many.
rewrite: the call on what is kept; the scale is written out, since its default counts the columns of q.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, fx

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, any_over_others, reduce_to
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.grouping import filled
from passes.rules.product import keep_one, tie_leading

aten = torch.ops.aten

HEADS = -3


@rule(aten.scaled_dot_product_attention.default)
class Attention(Rule):
    """Attention without dropout, with any mask."""

    def applies(self, op: Op) -> bool:
        """Whether q, k and v have one rank, and heads that are shared can be counted."""
        names = ("query", "key", "value")
        if not all(op.args[name] in op.program.infos for name in names) or op.args["dropout_p"] != 0.0:
            return False
        infos = [op.info_of(op.args[name]) for name in names]
        same_rank = len({info.rank for info in infos}) == 1 and infos[0].rank >= 2
        plain = op.args["scale"] is None or isinstance(op.args["scale"], (int, float))
        if not same_rank or not plain or any(0 in info.sizes for info in infos):
            return False
        shared = not op.args["enable_gqa"] or (
            infos[0].rank > 2
            and all(info.is_static(info.rank + HEADS) for info in infos)
            and infos[1].sizes[HEADS] == infos[2].sizes[HEADS]
        )
        return shared and infos[0].is_static(infos[0].rank - 1)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[2].any_known:
            return Facts.unknown(op.out)
        flat = flatten_facts(facts[2], (op.out.rank - 2,))
        if not _attends(op):
            flat = flat.forget(flat.value != 0)
        return Facts(_to_queries(flat.value, op), _to_queries(flat.known, op))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        rank = op.out.rank
        rows = any_over(demand, (rank - 1,))
        idle = _to_queries(flatten_facts(facts[1], (rank - 2,)).known, op)
        zero = facts[0].known & (facts[0].value == 0)
        masks = [
            rows & ~idle,
            _to_keys(any_over(rows & ~zero, (rank - 2,)), op),
            _to_keys(any_over(demand, (rank - 2,)), op),
            rows,
        ]
        return [
            reduce_to(mask, op.info_of(operand)) for mask, operand in zip(masks, op.operands, strict=False)
        ]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        query, key, value = op.operands[:3]
        rank, why = op.out.rank, f"aligned by {op.node.name}"
        shared = _shared(op)
        tie_leading(op, query, keep)
        for operand in (key, value):
            tie_leading(op, operand, keep, 2 if shared == 1 else 3)
        if shared > 1:
            _couple_shared(op, keep)
        for mask in op.operands[3:]:
            tie_leading(op, mask, keep, 1)
        for operand in op.operands[1:]:
            axis = op.info_of(operand).rank - (1 if operand in op.operands[3:] else 2)
            keep.fill(operand, f"positions of {op.node.name}", (axis,))
        keep.tie((query, rank - 2), (op.node, rank - 2), why)
        if op.args["is_causal"]:
            keep.fill(query, f"positions of {op.node.name}", (rank - 2,))
        keep.tie((value, rank - 1), (op.node, rank - 1), why)
        keep.widen(key, rank - 1, _weighed(op, facts), f"constants of {op.node.name} that differ by position")
        keep.tie((query, rank - 1), (key, rank - 1), why)
        keep_one((query, rank - 1), keep, f"{op.node.name} reads at least one column")
        keep.tie((query, rank - 1), (key, rank - 1), why)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        query = op.args["query"]
        axis = op.info_of(query).rank - 1
        if rewriter.index(query, axis) is None:
            return rewriter.copy(op.node)
        scale = op.args["scale"]
        scale = 1.0 / sqrt(op.info_of(query).sizes[axis]) if scale is None else scale
        kwargs = {**rewriter.map(dict(op.node.kwargs)), "scale": scale}
        return rewriter.call(op.target, rewriter.map(op.node.args), kwargs, like=op.node)


def _attends(op: Op) -> bool:
    """Whether every row is sure to have a weight that is not 0."""
    if op.args["attn_mask"] is None:
        return True
    mask = op.constant("attn_mask")
    if mask is None or op.args["is_causal"]:
        return False
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return bool(seen.any(-1).all())


def _weighed(op: Op, facts: Sequence[Facts]) -> Tensor:
    """The columns in which known entries of q and of k weigh positions differently; (columns,)."""
    axis = op.out.rank - 1
    size = op.info_of(op.operands[0]).sizes[axis]
    uneven = ~flatten_facts(facts[1], (axis - 1,)).known & (facts[1].known_value != 0)
    return any_over_others(uneven, axis, size) & any_over_others(facts[0].known_value != 0, axis, size)


def _shared(op: Op) -> int:
    """How many heads of q read one head of k and v."""
    if not op.args["enable_gqa"]:
        return 1
    query, key = (op.info_of(op.args[name]) for name in ("query", "key"))
    return query.sizes[HEADS] // key.sizes[HEADS]


def _to_queries(stored: Tensor, op: Op) -> Tensor:
    """What is stored of k or v, for each head of q."""
    shared = _shared(op)
    if shared == 1 or stored.shape[HEADS] == 1:
        return stored
    return stored.repeat_interleave(shared, HEADS)


def _to_keys(mask: Tensor, op: Op) -> Tensor:
    """A mask over heads of q, for each head of k and v: whether one of those that read it is set."""
    shared = _shared(op)
    if shared == 1 or mask.shape[HEADS] == 1:
        return mask
    found: Tensor = mask.unflatten(HEADS, (-1, shared)).any(HEADS)  # type: ignore[no-untyped-call]
    return found


def _couple_shared(op: Op, keep: KeepSets) -> None:
    """Equally many heads of q for each head of k and v that stays."""
    query, key, value = op.operands[:3]
    axis, shared, why = op.out.rank + HEADS, _shared(op), f"heads that share one in {op.node.name}"
    heads = keep.get(query, axis).view(-1, shared)
    used = heads.any(1) | keep.get(key, axis) | keep.get(value, axis)
    keep.widen(query, axis, filled(heads, used * heads.sum(1).max().clamp(min=1)).flatten(), why)
    for operand in (key, value):
        keep.widen(operand, axis, used, why)
