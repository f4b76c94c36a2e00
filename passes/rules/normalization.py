r"""Normalisations: layer, RMS, group and instance norm.

    y = gamma (x - mean) / sqrt(var + eps) + beta,       RMS norm: y = gamma x / sqrt(mean(x^2) + eps)

Constants take part in the statistics, so no channel is ever cut out of a norm as it is.

forward: where gamma is 0, y is beta. Where all entries that the statistics are taken of are known, y is. A known 0
    stays 0 through an RMS norm. Behind a variance of 0 rounding is magnified by 1 / sqrt(eps): where that would
    show, nothing is called known.
backward: one live entry asks for everything that its statistics are taken of.
couple and rewrite:
    group norm: a group goes as a whole, with its weights; an instance norm has groups of one channel. Where few of the
        channels are read behind it, they are gathered there.
    layer and RMS norm over one axis of n entries: x and y keep the same K, k of them, if that is few enough
        (LARGEST_SHARE); the removed ones R are known, and with S = sum_R c, m = n - k, c' = S / m,

            mean = sum_K x / n + S / n
            var  = sum_K (x - mean)^2 / n + m (mean - c')^2 / n + sum_R (c - c')^2 / n

        written out as elementwise operators; an RMS norm stays one, since with Q = sum_R c^2

            mean(x^2) + eps = k/n (sum_K x^2 / k + Q / k + eps n / k),

        that is gamma' = gamma sqrt(n / k) and eps' = eps n / k + Q / k.
    anything else keeps its axes whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, fx

from passes.ir.axes import any_over
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, any_over_others, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule

aten = torch.ops.aten

# A layer norm is written out where at most this share of its entries stays (docs/results/norms.md), and channels are
# gathered behind a group norm where at most this share is read.
LARGEST_SHARE = 0.75
# Rounding of a mean, relative to the largest entry, and what of it may be left in a result of about 1.
MEAN_ROUNDING = 2.0**-51
LARGEST_ROUNDING = 1e-12


class Normalization(Rule):
    """What the norms share: weight and bias along the axes given by `weighted`, statistics that entries share."""

    def applies(self, op: Op) -> bool:
        """Whether no argument but tensors is computed at run time."""
        return set(op.node.all_input_nodes) == set(op.operands)

    def weighted(self, op: Op) -> tuple[int, ...]:
        """Return the axes of x that weight and bias have."""
        raise NotImplementedError

    def standardized(self, op: Op, x: Facts) -> Facts:
        """Facts of the norm without weight and bias."""
        raise NotImplementedError

    def shared(self, op: Op, mask: Tensor) -> Tensor:
        """Mark everything whose statistics are taken together with a marked entry."""
        raise NotImplementedError

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know what comes of known entries alone, and beta where gamma is 0."""
        found = dict(zip(op.operands, facts, strict=True))
        gamma = self._vector(op, found, "weight", 1.0)
        beta = self._vector(op, found, "bias", 0.0)
        zero = gamma.known & (gamma.value == 0)
        x = found[op.args["input"]]
        if not x.any_known and not bool(zero.any()):
            return Facts.unknown(op.out)
        core = self.standardized(op, x) if x.any_known else Facts.unknown(op.out)
        value = core.known_value * gamma.known_value + beta.known_value
        known = beta.known & (zero | (core.known & (gamma.known | _is_zero(core))))
        return Facts(value, known).compress()

    def _vector(self, op: Op, found: dict[fx.Node, Facts], name: str, default: float) -> Facts:
        """Facts of weight or bias, laid out like x."""
        axes, rank = self.weighted(op), op.out.rank
        node = op.args.get(name)
        if node is None:
            number = torch.full((1,) * rank, default, dtype=torch.float64)
            return Facts(number, full_mask(op.out, True))
        stored = found[node]
        shape = [1] * rank
        for position, axis in enumerate(axes):
            shape[axis] = stored.value.shape[position]
        known = [1] * rank
        for position, axis in enumerate(axes):
            known[axis] = stored.known.shape[position]
        return Facts(stored.value.reshape(shape), stored.known.reshape(known))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for all that the statistics are taken of."""
        others = [axis for axis in range(op.out.rank) if axis not in self.weighted(op)]
        vectors = any_over(demand, others)
        masks = []
        for operand in op.operands:
            if operand is op.args["input"]:
                masks.append(self.shared(op, demand))
            else:
                shape = [vectors.shape[axis] for axis in self.weighted(op)]
                masks.append(vectors.reshape(shape))
        return masks

    def vectors(self, op: Op) -> list[fx.Node]:
        """Return weight and bias, as far as they are there."""
        found = (op.args.get(name) for name in ("weight", "bias"))
        return [node for node in found if isinstance(node, fx.Node)]


def _is_zero(facts: Facts) -> Tensor:
    return facts.known & (facts.value == 0)


def standardize(value: Tensor, axes: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """((x - mean) / sqrt(var + eps) over the axes, where rounding leaves enough of it)."""
    mean = value.mean(tuple(axes), keepdim=True)
    centred = value - mean
    spread = ((centred * centred).mean(tuple(axes), keepdim=True) + eps).sqrt()
    largest = value.abs().amax(tuple(axes), keepdim=True)
    trusted = largest * MEAN_ROUNDING <= LARGEST_ROUNDING * spread
    return torch.where(spread > 0, centred / spread, 0.0), trusted


class OverLastAxes(Normalization):
    """Layer and RMS norm: statistics over the last axes of x."""

    def applies(self, op: Op) -> bool:
        """Whether the normalised axes are static and have entries."""
        axes = self.weighted(op) if super().applies(op) else ()
        return bool(axes) and all(op.out.is_static(axis) and op.out.sizes[axis] for axis in axes)

    def weighted(self, op: Op) -> tuple[int, ...]:
        """Return the normalised axes."""
        return tuple(range(op.out.rank - len(op.args["normalized_shape"]), op.out.rank))

    def shared(self, op: Op, mask: Tensor) -> Tensor:
        """Mark whole rows."""
        return any_over(mask, self.weighted(op))

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Keep the same entries of x and y, all of them unless the norm is worth writing out."""
        x, axes = op.args["input"], self.weighted(op)
        for axis in op.out.static_axes:
            keep.tie((x, axis), (op.node, axis), f"aligned by {op.node.name}")
        why = self.keeps_whole(op, keep, facts[0])
        if why:
            keep.fill(op.node, why, axes)
            keep.fill(x, why, axes)
        for vector in self.vectors(op):
            for position, axis in enumerate(axes):
                keep.tie((vector, position), (op.node, axis), f"aligned by {op.node.name}")

    def keeps_whole(self, op: Op, keep: KeepSets, facts: Facts) -> str:
        """Return why nothing can go along the normalised axes; nothing if it can."""
        axes = self.weighted(op)
        if len(axes) > 1:
            return f"{op.node.name} takes its statistics over several axes"
        return ""


@rule(aten.layer_norm.default)
class LayerNorm(OverLastAxes):
    """layer_norm over any number of static last axes."""

    def standardized(self, op: Op, x: Facts) -> Facts:
        """Facts of rows that are known."""
        axes = self.weighted(op)
        stored = x.expand(axes, op.out)
        value, trusted = standardize(stored.known_value, axes, op.args["eps"])
        return Facts(value, ~any_over(~stored.known, axes) & trusted)

    def keeps_whole(self, op: Op, keep: KeepSets, facts: Facts) -> str:
        """Return why the norm is not written out."""
        axis, dtype = op.out.rank - 1, op.node.meta.get("dtype", torch.float64)
        if dtype not in {torch.float32, torch.float64}:
            return f"{op.node.name} in {dtype} is not written out, for lack of precision"
        if keep.count(op.node, axis) > LARGEST_SHARE * op.out.sizes[axis]:
            return f"{op.node.name} is cheaper whole"
        return super().keeps_whole(op, keep, facts)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Write the norm out where entries are gone."""
        if all(rewriter.index(op.node, axis) is None for axis in self.weighted(op)):
            return rewriter.copy(op.node)
        return _WrittenOut(op, rewriter).emit()


class _WrittenOut:
    """A layer norm over the kept entries, with the statistics of all."""

    def __init__(self, op: Op, rewriter: Rewriter) -> None:
        self.op, self.rewriter = op, rewriter
        self.axis = op.out.rank - 1
        self.n, self.k = op.out.sizes[self.axis], rewriter.size(op.node, self.axis)
        self.removed = removed_entries(op, rewriter, self.axis)

    def emit(self) -> fx.Node:
        """Emit gamma (x - mean) / sqrt(var + eps) + beta."""
        x = self.rewriter.value(self.op.args["input"])
        total = self.removed.sum(self.axis, keepdim=True)
        mean = self._plus(self._share(x, "mean"), total / self.n, "mean")
        centred = self._call(aten.sub.Tensor, x, mean, "centred")
        square = self._call(aten.mul.Tensor, centred, centred, "square")
        spread = self._with_removed(self._share(square, "variance"), mean)
        root = self.rewriter.call(aten.rsqrt.default, (spread,), like=self.op.node, step="root")
        steps = [(aten.mul.Tensor, root)]
        for name, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
            if self.op.args[name] is not None:
                steps.append((target, self.rewriter.value(self.op.args[name])))
        for position, (target, second) in enumerate(steps, 1):
            step = "" if position == len(steps) else "scaled"
            centred = self._call(target, centred, second, step)
        return centred

    def _share(self, value: fx.Node, step: str) -> fx.Node:
        """Emit sum_K / n."""
        args = (value, [self.axis], True)
        kept = self.rewriter.call(aten.mean.dim, args, like=self.op.node, step=f"kept_{step}")
        return self._call(aten.mul.Tensor, kept, self.k / self.n, f"{step}_share")

    def _with_removed(self, spread: fx.Node, mean: fx.Node) -> fx.Node:
        """Emit the variance plus eps: m (mean - c')^2 / n + sum_R (c - c')^2 / n + eps are added."""
        own = self.removed.mean(self.axis, keepdim=True)
        distance = self._plus(mean, -own, "distance")
        square = self._call(aten.mul.Tensor, distance, distance, "distance_square")
        share = self._call(aten.mul.Tensor, square, (self.n - self.k) / self.n, "distance_share")
        total = self._call(aten.add.Tensor, spread, share, "variance")
        within = ((self.removed - own) ** 2).sum(self.axis, keepdim=True) / self.n
        return self._plus(total, within + self.op.args["eps"], "variance_eps")

    def _plus(self, value: fx.Node, constant: Tensor, step: str) -> fx.Node:
        """Emit a sum with a constant, which is a number where it does not vary."""
        if not bool((constant != 0).any()):
            return value
        second: fx.Node | float = float(constant.flatten()[0])
        if constant.numel() > 1:
            dtype = self.op.node.meta.get("dtype", torch.float64)
            second = self.rewriter.constant(constant, f"{self.op.node.name}_{step}", dtype)
        return self._call(aten.add.Tensor, value, second, step)

    def _call(self, target: object, first: fx.Node, second: fx.Node | float, step: str) -> fx.Node:
        return self.rewriter.call(target, (first, second), like=self.op.node, step=step)


def removed_entries(op: Op, rewriter: Rewriter, axis: int) -> Tensor:
    """Known values of x at the removed indices of an axis, 0 where they are dead; cut along the other axes."""
    assert rewriter.analysis is not None
    x, analysis = op.args["input"], rewriter.analysis
    gone = (~analysis.keep.get(x, axis)).nonzero().flatten()
    value = analysis.facts[x.name].expand((axis,), op.info_of(x)).known_value
    for other in range(value.ndim):
        index = rewriter.index(x, other)
        if other != axis and index is not None and value.shape[other] > 1:
            value = value.index_select(other, index)
    return value.index_select(axis, gone)


@rule(aten.rms_norm.default)
class RmsNorm(OverLastAxes):
    """rms_norm over static last axes with eps given (capture writes it down)."""

    def applies(self, op: Op) -> bool:
        """Whether eps is given."""
        return super().applies(op) and op.args["eps"] is not None

    def standardized(self, op: Op, x: Facts) -> Facts:
        """Facts of rows that are known, and zeros."""
        axes = self.weighted(op)
        stored = x.expand(axes, op.out)
        spread = ((stored.known_value**2).mean(axes, keepdim=True) + op.args["eps"]).sqrt()
        value = torch.where(spread > 0, stored.known_value / spread, 0.0)
        return Facts(value, ~any_over(~stored.known, axes) | _is_zero(stored))

    def keeps_whole(self, op: Op, keep: KeepSets, facts: Facts) -> str:
        """Return why eps and weight cannot make up for what is removed."""
        if op.args["weight"] is not None and op.held("weight") is None:
            return f"{op.node.name} has a weight that is computed"
        return super().keeps_whole(op, keep, facts)

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Keep constants whose squares vary, too."""
        super().couple(op, keep, facts)
        x, axis = op.args["input"], op.out.rank - 1
        if keep.is_full(x, axis) or not facts[0].any_known:
            return
        value = facts[0].expand((axis,), op.out).known_value
        varies = value != value[(slice(0, 1),) * axis]
        mask = any_over_others(varies, axis, op.out.sizes[axis])
        keep.widen(x, axis, mask, f"constants that vary for {op.node.name}")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Change eps and weight where entries are gone."""
        axis = op.out.rank - 1
        if all(rewriter.index(op.node, at) is None for at in self.weighted(op)):
            return rewriter.copy(op.node)
        n, k = op.out.sizes[axis], rewriter.size(op.node, axis)
        removed = removed_entries(op, rewriter, axis)
        squares = float((removed**2).sum(axis).amax()) if removed.numel() else 0.0
        weight, dtype = op.constant("weight"), op.node.meta.get("dtype", torch.float64)
        held = torch.ones(n, dtype=torch.float64) if weight is None else weight
        index = rewriter.index(op.node, axis)
        name = f"{op.node.name}_weight" if weight is None else str(op.args["weight"].target)
        dtype = dtype if weight is None else rewriter.dtype_of(op.args["weight"])
        scaled = rewriter.constant((held if index is None else held[index]) * sqrt(n / k), name, dtype)
        eps = op.args["eps"] * n / k + squares / k
        args = (rewriter.value(op.args["input"]), [k], scaled, eps)
        return rewriter.call(op.target, args, like=op.node)


class OverGroups(Normalization):
    """Group and instance norm: statistics over the channels of a group and all positions."""

    def groups(self, op: Op) -> int:
        """Return the number of groups."""
        raise NotImplementedError

    def applies(self, op: Op) -> bool:
        """Whether the channels are static."""
        info = op.info_of(op.args["input"]) if super().applies(op) else None
        return info is not None and info.rank > 1 and info.is_static(1) and info.sizes[1] > 0

    def weighted(self, op: Op) -> tuple[int, ...]:
        """Return the channel axis."""
        return (1,)

    def per_group(self, op: Op) -> int:
        """Return the channels of a group."""
        return op.out.sizes[1] // self.groups(op)

    def standardized(self, op: Op, x: Facts) -> Facts:
        """Facts of groups that are known; a constant along positions has the mean of one of them."""
        stored = x.expand((1,), op.out)
        value, known = self._by_group(op, stored.known_value), self._by_group(op, stored.known)
        axes = tuple(range(2, value.ndim))
        result, trusted = standardize(value, axes, op.args["eps"])
        sure = ~any_over(~known, axes) & trusted
        return Facts(result.flatten(1, 2), sure.flatten(1, 2).repeat_interleave(self.per_group(op), 1))

    def shared(self, op: Op, mask: Tensor) -> Tensor:
        """Mark whole groups."""
        mask = any_over(mask, range(2, op.out.rank))
        if mask.shape[1] == 1:
            return mask
        return self._by_group(op, mask).any(2).repeat_interleave(self.per_group(op), 1)

    def _by_group(self, op: Op, stored: Tensor) -> Tensor:
        """A stored tensor with all channels as (batch, groups, channels of a group, positions)."""
        return stored.reshape(stored.shape[0], self.groups(op), self.per_group(op), *stored.shape[2:])

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Keep whole groups of x, and all of them of y unless a gather behind the norm pays."""
        x = op.args["input"]
        keep.tie((x, 0), (op.node, 0), f"aligned by {op.node.name}")
        for node in (x, op.node):
            keep.fill(node, f"positions of {op.node.name}", tuple(range(2, op.out.rank)))
        stay = (keep.get(x, 1) | keep.get(op.node, 1)).view(self.groups(op), -1).any(1)
        why = f"{op.node.name} takes its statistics over whole groups"
        keep.widen(x, 1, stay.repeat_interleave(self.per_group(op)), why)
        is_gathered = all(user.target is aten.index_select.default for user in op.node.users)
        if is_gathered or keep.count(op.node, 1) > LARGEST_SHARE * keep.count(x, 1):
            keep.widen(op.node, 1, keep.get(x, 1), why)
        for vector in self.vectors(op):
            keep.tie((vector, 0), (x, 1), f"aligned by {op.node.name}")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Normalise what is kept of x, and select what is kept of y."""
        assert rewriter.analysis is not None
        kept, wanted = (rewriter.analysis.keep.get(node, 1) for node in (op.args["input"], op.node))
        if torch.equal(kept, wanted):
            return self.normalized(op, rewriter, "")
        index = rewriter.constant(wanted[kept].nonzero().flatten(), f"{op.node.name}_channels", torch.int64)
        whole = self.normalized(op, rewriter, "whole")
        return rewriter.call(aten.index_select.default, (whole, 1, index), like=op.node)

    def normalized(self, op: Op, rewriter: Rewriter, step: str) -> fx.Node:
        """Emit the norm of the kept channels of x."""
        args = rewriter.map(tuple(op.args.values()))
        return rewriter.call(op.target, args, like=op.node, step=step)


@rule(aten.group_norm.default)
class GroupNorm(OverGroups):
    """group_norm, over any number of positions."""

    def groups(self, op: Op) -> int:
        """Return the number of groups."""
        count: int = op.args["num_groups"]
        return count

    def normalized(self, op: Op, rewriter: Rewriter, step: str) -> fx.Node:
        """Emit the norm of the groups that are left."""
        count = rewriter.size(op.args["input"], 1) // self.per_group(op)
        x, weight, bias = (rewriter.map(op.args[name]) for name in ("input", "weight", "bias"))
        args = (x, count, weight, bias, op.args["eps"])
        return rewriter.call(op.target, args, like=op.node, step=step)


@rule(aten.instance_norm.default)
class InstanceNorm(OverGroups):
    """instance_norm with statistics of its input."""

    def applies(self, op: Op) -> bool:
        """Whether no running statistics are read or written."""
        return super().applies(op) and op.args["use_input_stats"] and op.args["running_mean"] is None

    def groups(self, op: Op) -> int:
        """Return the number of channels."""
        return op.out.sizes[1]
