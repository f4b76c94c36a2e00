"""Products of two values: matmul of anything with at least two axes.

For y[..., i, j] = sum_k a[..., i, k] b[..., k, j]:

forward: y_ij is known where each k has both factors known, or one of them a known 0.
backward: a_ik is live where a live y_ij meets a b_kj that is not a known 0; b_kj likewise.
couple: rows of a are rows of y, columns of b are columns of y, leading axes are broadcast; the contracted axes of a and
    b keep the same indices.
rewrite: what removed indices k contributed, K = a_R b_R, is known and is added: y = a' b' + K.

Two things that softmax makes true where it stands on one side of the product:

- a is a softmax over its last axis: its rows sum to 1, so a b_j = c where column j is the known constant c at every k;
- y goes into a softmax over its last axis and nowhere else, past scalings and sums: what is the same along j cancels.
  A b_k that is known and the same along j is worth nothing, so neither is a_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from passes.ir.axes import flatten_facts, split_blocks
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, reduce_to
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.view import RESHAPES

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)
SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@rule(aten.matmul.default, aten.bmm.default)
class Product(Rule):
    """A matrix product of two values, of which one may be constant."""

    def applies(self, op: Op) -> bool:
        """Whether both have rows and columns, and there is something to add up."""
        if len(op.operands) != 2:
            return False
        left, right = (op.info_of(operand) for operand in op.operands)
        return left.rank > 1 and right.rank > 1 and 0 not in left.sizes + right.sizes

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        left, right = facts
        if not left.any_known and not right.any_known:
            return Facts.unknown(op.out)
        info = op.info_of(op.operands[0])
        unknown = _meets(~left.known, ~_zeros(right)) | _meets(~_zeros(left), ~right.known)
        value = _product(left.known_value, right.known_value, info.sizes[-1])
        if not info.is_static(info.rank - 1):
            unknown = unknown | _meets(~_zeros(left), ~_zeros(right))
        if not _adds_up_to_one(op):
            return Facts(value, ~unknown)
        flat = _flat(right, -2)
        return Facts(torch.where(unknown & flat.known, flat.known_value, value), ~unknown | flat.known)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        left, right = (op.info_of(operand) for operand in op.operands)
        idle = _zeros(facts[1])
        if _ends_in_softmax(op):
            idle = idle | _flat(facts[1], -1).known
        rows = _meets(demand, ~idle.mT)
        columns = _meets(~_zeros(facts[0]).mT, demand)
        return [reduce_to(rows, left), reduce_to(columns, right)]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        for operand in op.operands:
            tie_leading(op, operand, keep)
        (left, right), why = op.operands, f"aligned by {op.node.name}"
        first, second = op.info_of(left).rank - 1, op.info_of(right).rank - 2
        keep.tie((left, first - 1), (op.node, op.out.rank - 2), why)
        keep.tie((right, second + 1), (op.node, op.out.rank - 1), why)
        keep.tie((left, first), (right, second), why)
        keep_one((left, first), keep, f"{op.node.name} adds up at least one product")
        if _adds_up_to_one(op) and bool((_flat(facts[1], -2).known_value != 0).any()):
            keep.fill(left, f"{op.node.name} needs all of a softmax", (first,))
        if _ends_in_softmax(op) and bool((_flat(facts[1], -1).known_value != 0).any()):
            keep.fill(op.node, f"what {op.node.name} adds to a whole row cancels", (op.out.rank - 1,))
        keep.tie((left, first), (right, second), why)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        removed = self.removed(op, rewriter)
        if removed is None:
            return rewriter.call(aten.matmul.default, rewriter.map(op.operands), like=op.node)
        kept = rewriter.call(aten.matmul.default, rewriter.map(op.operands), like=op.node, step="kept")
        dtype = op.node.meta.get("dtype", op.out.dtype)
        constant = rewriter.constant(rewriter.slice(removed, op.node), f"{op.node.name}_removed", dtype)
        return rewriter.call(aten.add.Tensor, (kept, constant), like=op.node)

    def removed(self, op: Op, rewriter: Rewriter) -> Tensor | None:
        """What the removed indices contribute, in stored form; None where that is nothing."""
        axis = op.info_of(op.operands[0]).rank - 1
        if rewriter.analysis is None or not op.info_of(op.operands[0]).is_static(axis):
            return None
        gone = ~rewriter.analysis.keep.get(op.operands[0], axis)
        left, right = (rewriter.analysis.facts[operand.name] for operand in op.operands)
        if _ends_in_softmax(op):
            flat = _flat(right, -1)
            right = right.forget(flat.known)
        if not bool(gone.any()):
            return None
        found = _product(left.known_value * gone, right.known_value, int(gone.numel()))
        return found if bool((found != 0).any()) else None


def _adds_up_to_one(op: Op) -> bool:
    """Whether the left operand is a softmax over its last axis."""
    left = op.operands[0]
    return left.target in SOFTMAXES and left.args[1] in (-1, op.info_of(left).rank - 1)


def _ends_in_softmax(op: Op) -> bool:
    if "ends_in_softmax" not in op.cache:
        op.cache["ends_in_softmax"] = _only_softmax(op.node, op)
    return bool(op.cache["ends_in_softmax"])


def _only_softmax(node: fx.Node, op: Op) -> bool:
    """Whether all that reads a value is a softmax over its last axis, past factors, sums and views beside it."""
    rank = op.program.infos[node].rank
    for user in node.users:
        if user.target in SOFTMAXES:
            if user.args[1] not in (-1, rank - 1):
                return False
        elif not _keeps_shifts(user, node, op) or not _only_softmax(user, op):
            return False
    return bool(node.users)


def _keeps_shifts(user: fx.Node, node: fx.Node, op: Op) -> bool:
    """Whether a call turns what is the same along the last axis into what is the same along it."""
    info, before = op.program.infos.get(user), op.program.infos[node]
    if info is None or len(user.args) < 2:
        return False
    if user.target in RESHAPES:
        last = split_blocks(before, info)[-1]
        return (last.ins, last.outs) == ((before.rank - 1,), (info.rank - 1,))
    if not info.has_shape_of(before):
        return False
    first, second = user.args[:2]
    if user.target in (aten.add.Tensor, aten.sub.Tensor):
        return not (first is node and second is node)
    if user.target not in SCALINGS or first is not node:
        return False
    constant = op.program.constant(second)
    return (
        isinstance(second, (int, float)) if constant is None else not constant.ndim or constant.shape[-1] == 1
    )


def tie_leading(op: Op, operand: fx.Node, keep: KeepSets, trailing: int = 2) -> None:
    """Tie an operand's axes but the last ones to the result's; an axis that is broadcast is kept."""
    info = op.info_of(operand)
    offset = op.out.rank - info.rank
    for axis in range(info.rank - trailing):
        if not info.is_static(axis):
            continue
        if info.key(axis) == op.out.key(axis + offset):
            keep.tie((operand, axis), (op.node, axis + offset), f"aligned by {op.node.name}")
        else:
            keep.fill(operand, "broadcast", (axis,))


def keep_one(place: tuple[fx.Node, int], keep: KeepSets, why: str) -> None:
    """Keep the first index along an axis of which nothing is kept."""
    kept = keep.get(*place)
    if not bool(kept.any()):
        first = torch.zeros_like(kept).index_fill(0, torch.zeros(1, dtype=torch.int64), True)
        keep.widen(*place, first, why)


def _zeros(facts: Facts) -> Tensor:
    return facts.known & (facts.value == 0)


def _flat(facts: Facts, axis: int) -> Facts:
    """Known where every entry along an axis is known and the same; size 1 along it."""
    return flatten_facts(facts, (facts.value.ndim + axis,))


def _product(left: Tensor, right: Tensor, size: int) -> Tensor:
    """A b on stored forms, whose contracted axis of the given size may be stored at size 1."""
    if left.shape[-1] == 1 and right.shape[-2] == 1:
        return left * right * size
    size = max(left.shape[-1], right.shape[-2])
    left = left.expand(*left.shape[:-1], size)
    right = right.expand(*right.shape[:-2], size, right.shape[-1])
    return left @ right


def _meets(left: Tensor, right: Tensor) -> Tensor:
    """Whether some k has both set, on stored masks."""
    return _product(left.to(torch.float64), right.to(torch.float64), 1) > 0
