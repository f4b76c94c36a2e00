"""Reductions over some axes: mean, sum, product, extrema, any, all, logsumexp, norms, variance, argmax.

forward: a result is known where all entries that go into it are. The op itself runs on the stored facts, laid
    out at full size along reduced axes if repeating an entry changes the result. Over a dynamic axis a mean
    and an extremum of equal constants are that constant, a sum is known only if it is 0, a variance never is.
backward: an entry is live if the result that it goes into is.
couple: the axes that stay keep equal indices. Along reduced axes known indices may go, but for one.
rewrite: with K the op on the removed entries alone, and n' of n entries kept,
    sum = sum' + K,   mean = mean' n'/n + K,   max = maximum(max', K),   prod = prod' K,   any = any' or K,
    logsumexp = logaddexp(logsumexp', K),   |x|_1 = |x'|_1 + K,   |x|_2 = sqrt(|x'|_2^2 + K^2).

A variance and an argmax keep their reduced axes whole. A sum over a dynamic axis lets zeros go alone, for K is not a
constant then. One zero makes a product known, one true entry `any`, one false entry `all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, along, any_over_others
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.spatial import run

aten = torch.ops.aten


class Reduction(Rule):
    """A reduction; `is_idempotent` if it does not change when every entry is repeated equally often."""

    is_idempotent = True
    neutral: float = 0

    def applies(self, op: Op) -> bool:
        """Whether there is an axis to reduce."""
        return op.info_of(op.operands[0]).rank > 0

    def axes(self, op: Op) -> tuple[int, ...]:
        """Return the reduced axes of the operand; no axes at all mean every one."""
        rank = op.info_of(op.operands[0]).rank
        given = op.args.get("dim")
        given = [given] if isinstance(given, int) else given or range(rank)
        return tuple(sorted(axis % rank for axis in given))

    def keeps_axes(self, op: Op) -> bool:
        """Whether the result has the reduced axes too."""
        return bool(op.args.get("keepdim"))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the results that known entries alone go into."""
        stored = self.usable(op, facts[0]) if facts[0].any_known else facts[0]
        if not stored.any_known:
            return Facts.unknown(op.out)
        if not self.is_idempotent:
            stored = stored.expand(self.static_axes(op), op.info_of(op.operands[0]))
        unknown = (~stored.known).any(dim=self.axes(op), keepdim=self.keeps_axes(op))
        return Facts(run(op, stored.known_value), ~unknown)

    def usable(self, op: Op, facts: Facts) -> Facts:
        """Return the facts that hold whatever the sizes of dynamic axes are."""
        return facts

    def static_axes(self, op: Op) -> list[int]:
        """Return the reduced axes with static sizes."""
        return [axis for axis in self.axes(op) if op.info_of(op.operands[0]).is_static(axis)]

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for everything that goes into a live result."""
        if not self.keeps_axes(op):
            for axis in self.axes(op):
                demand = demand.unsqueeze(axis)
        return [demand]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie the axes that stay; see to it that what is removed along the others can be added again."""
        x, reduced = op.operands[0], self.axes(op)
        rank = op.info_of(x).rank
        stay = range(rank) if self.keeps_axes(op) else [axis for axis in range(rank) if axis not in reduced]
        for position, axis in enumerate(stay):
            if axis not in reduced:
                keep.tie((x, axis), (op.node, position), f"aligned by {op.node.name}")
        for axis in reduced:
            self.keep_reduced(op, axis, keep, facts[0])

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        """Widen the keep set of a reduced axis."""
        kept = keep.get(op.operands[0], axis)
        if kept.numel() and not bool(kept.any()):
            first = torch.zeros_like(kept).index_fill(0, torch.zeros(1, dtype=torch.int64), True)
            keep.widen(op.operands[0], axis, first, f"{op.node.name} reduces at least one index")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Reduce what is kept, then add what is not."""
        x = op.operands[0]
        if all(rewriter.index(x, axis) is None for axis in self.axes(op)):
            return super().rewrite(op, rewriter)
        kept = rewriter.call(
            op.target,
            rewriter.map(op.node.args),
            rewriter.map(dict(op.node.kwargs)),
            like=op.node,
            step="kept",
        )
        return self.completed(op, rewriter, kept, rewriter.slice(self.removed(op, rewriter), op.node))

    def removed(self, op: Op, rewriter: Rewriter) -> Tensor:
        """Run the op on the removed entries, with neutral ones in the place of the others; stored form."""
        assert rewriter.analysis is not None
        x, keep = op.operands[0], rewriter.analysis.keep
        info = op.info_of(x)
        value = self.usable(op, rewriter.analysis.facts[x.name]).known_value
        gone = torch.zeros([1] * info.rank, dtype=torch.bool)
        for axis in self.static_axes(op):
            gone = gone | along(~keep.get(x, axis), axis, info.rank)
        return run(op, torch.where(gone, value, torch.tensor(self.neutral, dtype=value.dtype)))

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit the whole result from what the kept and the removed entries give."""
        raise NotImplementedError


def _with_constant(
    op: Op, rewriter: Rewriter, target: Any, first: fx.Node, constant: Tensor, step: str = ""
) -> fx.Node:
    """Emit a binary call in the place of the op, or as a step on the way to it."""
    dtype = op.node.meta.get("dtype", op.out.dtype)
    second = rewriter.constant(constant, f"{op.node.name}_removed", dtype)
    return rewriter.call(target, (first, second), like=op.node, step=step)


@rule(aten.mean.default, aten.mean.dim)
class Mean(Reduction):
    """A mean; what is left of it counts for its share."""

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit mean' n'/n + K."""
        x, axes = op.operands[0], self.static_axes(op)
        share = prod(rewriter.size(x, axis) for axis in axes) / prod(
            op.info_of(x).sizes[axis] for axis in axes
        )
        scaled = rewriter.call(aten.mul.Tensor, (kept, share), like=op.node, step="share")
        return _with_constant(op, rewriter, aten.add.Tensor, scaled, removed)


class Accumulation(Reduction):
    """A reduction that counts how often an entry occurs; over a dynamic axis some numbers alone count as known."""

    is_idempotent = False

    def survives(self, op: Op, value: Tensor) -> Tensor:
        """Mark the values whose reduction does not depend on how often they occur."""
        return value == 0

    def usable(self, op: Op, facts: Facts) -> Facts:
        """Over a dynamic axis, return what does not depend on its size."""
        all_static = len(self.static_axes(op)) == len(self.axes(op))
        return facts if all_static else facts.forget(~self.survives(op, facts.value))

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        """Keep the indices whose constants cannot be added again."""
        super().keep_reduced(op, axis, keep, facts)
        lost = facts.known & ~self.usable(op, facts).known
        mask = any_over_others(lost, axis, op.info_of(op.operands[0]).sizes[axis])
        keep.widen(op.operands[0], axis, mask, f"reduced by {op.node.name}, which cannot make up for them")


@rule(aten.sum.default, aten.sum.dim_IntList)
class Sum(Accumulation):
    """A sum."""

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit sum' + K."""
        return _with_constant(op, rewriter, aten.add.Tensor, kept, removed)


@rule(aten.logsumexp.default)
class LogSumExp(Accumulation):
    """The logarithm of a sum of exponentials."""

    neutral = -inf

    def survives(self, op: Op, value: Tensor) -> Tensor:
        """Mark nothing."""
        return torch.zeros_like(value, dtype=torch.bool)

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit logaddexp(logsumexp', K)."""
        return _with_constant(op, rewriter, aten.logaddexp.default, kept, removed)


@rule(aten.linalg_vector_norm.default)
class VectorNorm(Accumulation):
    """The p-norm of the entries, p > 0; constants that are not zero go if p is 1, 2 or infinite."""

    def applies(self, op: Op) -> bool:
        """Whether zeros do not count."""
        order = op.args["ord"]
        is_plain = isinstance(order, (int, float)) and op.args["dim"] != []
        return super().applies(op) and is_plain and order > 0

    def usable(self, op: Op, facts: Facts) -> Facts:
        """Return what can be added again."""
        if op.args["ord"] in {1, 2, inf}:
            return super().usable(op, facts)
        return facts.forget(facts.value != 0)

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit norm' + K, sqrt(norm'^2 + K^2) or maximum(norm', K)."""
        if not bool((removed != 0).any()):
            return rewriter.copy(op.node)
        if op.args["ord"] == 2:
            square = rewriter.call(aten.mul.Tensor, (kept, kept), like=op.node, step="square")
            total = _with_constant(op, rewriter, aten.add.Tensor, square, removed * removed, step="total")
            return rewriter.call(aten.sqrt.default, (total,), like=op.node)
        target = aten.add.Tensor if op.args["ord"] == 1 else aten.maximum.default
        return _with_constant(op, rewriter, target, kept, removed)


class Decisive(Accumulation):
    """A reduction that one known `decisive` entry decides."""

    decisive: float

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the results of known entries alone, and those with a decisive one among their entries."""
        found = super().forward(op, facts)
        sure = facts[0].known & (facts[0].value == self.decisive)
        if not bool(sure.any()):
            return found
        decided = sure.any(dim=self.axes(op), keepdim=bool(op.args.get("keepdim")))
        value = torch.full((), self.decisive, dtype=found.value.dtype)
        return Facts(torch.where(decided, value, found.value), found.known | decided)


@rule(aten.prod.default, aten.prod.dim_int)
class Product(Decisive):
    """A product."""

    neutral = 1
    decisive = 0

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit prod' K."""
        return _with_constant(op, rewriter, aten.mul.Tensor, kept, removed)


class Quantifier(Decisive):
    """Whether some or all entries are not zero; booleans alone."""

    is_idempotent = True

    def applies(self, op: Op) -> bool:
        """Whether the entries are booleans and the axes are named or left out."""
        return (
            super().applies(op)
            and op.info_of(op.operands[0]).dtype == torch.bool
            and op.args.get("dim") != []
        )

    def survives(self, op: Op, value: Tensor) -> Tensor:
        """Mark everything."""
        return torch.ones_like(value)


@rule(aten.any.default, aten.any.dim, aten.any.dims)
class Some(Quantifier):
    """Whether some entry is true."""

    neutral = False
    decisive = True

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit any' or K."""
        return _with_constant(op, rewriter, aten.logical_or.default, kept, removed)


@rule(aten.all.default, aten.all.dim, aten.all.dims)
class Every(Quantifier):
    """Whether all entries are true."""

    neutral = True
    decisive = False

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit all' and K."""
        return _with_constant(op, rewriter, aten.logical_and.default, kept, removed)


class Extremum(Reduction):
    """The largest or the smallest of floating-point entries."""

    def applies(self, op: Op) -> bool:
        """Whether infinity is neutral."""
        return super().applies(op) and op.out.dtype.is_floating_point


@rule(aten.amax.default)
class Largest(Extremum):
    """The largest entry."""

    neutral = -inf

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit maximum(max', K)."""
        return _with_constant(op, rewriter, aten.maximum.default, kept, removed)


@rule(aten.amin.default)
class Smallest(Extremum):
    """The smallest entry."""

    neutral = inf

    def completed(self, op: Op, rewriter: Rewriter, kept: fx.Node, removed: Tensor) -> fx.Node:
        """Emit minimum(min', K)."""
        return _with_constant(op, rewriter, aten.minimum.default, kept, removed)


class Whole(Reduction):
    """A reduction that keeps its reduced axes whole and knows nothing over a dynamic one."""

    is_idempotent = False

    def usable(self, op: Op, facts: Facts) -> Facts:
        """Over a dynamic axis, return nothing."""
        all_static = len(self.static_axes(op)) == len(self.axes(op))
        return facts if all_static else Facts.unknown(op.info_of(op.operands[0]))

    def keep_reduced(self, op: Op, axis: int, keep: KeepSets, facts: Facts) -> None:
        """Keep everything."""
        keep.fill(op.operands[0], f"reduced by {op.node.name}", (axis,))


@rule(
    aten.var.dim, aten.var.correction, aten.var.default, aten.std.dim, aten.std.correction, aten.std.default,
    aten.var_mean.dim, aten.var_mean.correction, aten.var_mean.default,
    aten.std_mean.dim, aten.std_mean.correction, aten.std_mean.default,
)  # fmt: skip
class Variance(Whole):
    """Variance and standard deviation, with any correction, and the mean beside them."""


@rule(aten.argmax.default, aten.argmin.default)
class Position(Whole):
    """Where the largest or the smallest entry is; its number counts all entries."""
