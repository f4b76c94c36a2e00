"""Convolutions and linear layers with constant weights.

For y = W x + b over channels, W of shape (out, in / groups, *kernel):

forward: a row of y is known where every unknown channel of x meets a zero column: y_j = conv(known part of x)_j + b_j.
backward: a channel of x is live where a live row of y reads it with a weight that is not zero.
couple: without groups the channels of x and y are independent, but the constants of removed channels must have a place
    to go (`absorption`); with groups, whole groups stay or go.
rewrite: W' = W[kept rows][:, kept columns], b' = b[kept rows].

Absorption, for kept rows J and removed known channels R of x: K = conv(x_R) restricted to J.
- rows that are wholly known and flat become a zero row and the constant itself as bias;
- K uniform over positions: b' = b + K;
- otherwise x_R = C x_B for a basis B of the maps that is kept: W'_B = W_B + sum_R C_R^T W_R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.ir.basis import express
from passes.ir.errors import PassError
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, all_over_others, along, any_over_others, full_mask
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
LINEAR = aten.linear.default


@dataclass(frozen=True, eq=False)
class Absorption:
    """Where the constants of removed channels go: which channels stay as a basis, and the new weights."""

    basis: Tensor
    weight: Tensor
    bias: Tensor | None


class Contraction:
    """One call, described: x, W, b, channel axes, groups, spatial axes."""

    def __init__(self, op: Op) -> None:
        weight = op.constant("weight")
        assert weight is not None
        self.op = op
        self.weight = weight
        self.bias = op.constant("bias")
        self.x: fx.Node = op.args["input"]
        self.info = op.info_of(self.x)
        self.spatial_rank = CONVOLUTIONS.get(op.target, 0)
        self.axis = self.info.rank - 1 - self.spatial_rank
        self.spatial = tuple(range(self.axis + 1, self.info.rank))
        self.leading = tuple(range(self.axis))
        self.groups: int = op.args.get("groups", 1)
        self.out_channels, self.in_per_group = weight.shape[:2]
        self.in_channels = self.info.sizes[self.axis]

    def columns(self) -> Tensor:
        """Whether row j reads input channel c with a weight that is not zero; bool (out, in / groups)."""
        return (self.weight != 0).flatten(2).any(2) if self.spatial_rank else self.weight != 0

    def per_spatial(self, name: str) -> tuple[int, ...]:
        values = self.op.args[name]
        values = [values] if isinstance(values, int) else list(values)
        return tuple(values * self.spatial_rank if len(values) == 1 else values)

    def run(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """The op on other data of the same layout, without bias."""
        if not self.spatial_rank:
            return F.linear(x, weight)
        names = ("stride", "padding", "dilation")
        stride, padding, dilation = (list(self.per_spatial(name)) for name in names)
        return self.op.target(x, weight, None, stride, padding, dilation, groups)  # type: ignore[operator]

    def has_dynamic_border(self) -> bool:
        """Whether some dynamic axis is padded, so that border effects cannot be laid out."""
        if not self.spatial_rank:
            return False
        return any(
            pad > 0 and not self.info.is_static(axis)
            for pad, axis in zip(self.per_spatial("padding"), self.spatial, strict=True)
        )

    def spread(self, stored: Tensor) -> Tensor:
        """Stored values at sizes on which the op shows every border effect (dynamic axes: one window)."""
        sizes = list(stored.shape)
        for position, axis in enumerate(self.spatial):
            window = self.per_spatial("dilation")[position] * (self.weight.shape[2 + position] - 1) + 1
            sizes[axis] = self.info.sizes[axis] if self.info.is_static(axis) else window
        return stored.expand(sizes)

    def contribution(self, values: Tensor, channels: Tensor, rows: Tensor) -> Tensor | None:
        """conv of stored x values on some channels, for some rows, without bias; None where it cannot be laid out.

        Shape: stored form of y restricted to `rows` along the channel axis. Groups must be 1.
        """
        values = values.expand([*values.shape[: self.axis], self.in_channels, *values.shape[self.axis + 1 :]])
        part = values.index_select(self.axis, channels)
        weight = self.weight[rows][:, channels]
        if not self.spatial_rank or part.numel() == 0:
            return self.run(part, weight) if part.numel() else self._nothing(rows)
        flat = all(part.shape[axis] == 1 for axis in self.spatial)
        if flat and not any(self.per_spatial("padding")):
            return torch.movedim(
                F.linear(torch.movedim(part, self.axis, -1), weight.flatten(2).sum(2)), -1, self.axis
            )
        if self.has_dynamic_border():
            return None
        return self.run(self.spread(part), weight)

    def _nothing(self, rows: Tensor) -> Tensor:
        shape = [1] * self.info.rank
        shape[self.axis] = rows.numel()
        return torch.zeros(shape, dtype=self.weight.dtype)


def is_uniform(stored: Tensor, axis: int) -> bool:
    """Whether values vary along no axis but `axis`, up to rounding of the sums behind them."""
    first = stored
    for other in range(stored.ndim):
        if other != axis:
            first = first.narrow(other, 0, 1)
    scale = stored.abs().max() if stored.numel() else torch.zeros(())
    return bool(((stored - first).abs() <= 1e-15 * scale).all())


@rule(*CONVOLUTIONS, LINEAR)
class ContractionRule(Rule):
    """conv1d/2d/3d and linear with a constant weight (and a constant bias or none)."""

    def applies(self, op: Op) -> bool:
        bias = op.args["bias"]
        return op.constant("weight") is not None and (bias is None or op.constant("bias") is not None)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[0].any_known and bool((op.constant("weight") != 0).flatten(1).any(1).all()):
            return Facts.unknown(op.out)
        this = Contraction(op)
        rows = (~_reached(this, facts[0])).nonzero().flatten()
        if rows.numel() == 0:
            return Facts.unknown(op.out)
        part = _known_rows(this, facts[0], rows)
        return Facts.unknown(op.out) if part is None else _scattered(this, part, rows)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        this = Contraction(op)
        rows = any_over_others(demand, this.axis, this.out_channels)
        live = (this.columns() & rows[:, None]).view(this.groups, -1, this.in_per_group).any(1).flatten()
        others = demand.any(dim=this.axis, keepdim=True)
        for axis in this.spatial:
            others = others.any(dim=axis, keepdim=True)
        mask = others & along(live, this.axis, this.info.rank)
        return [mask, *(full_mask(op.info_of(operand), True) for operand in op.operands[1:])]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        this = Contraction(op)
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
        plan = absorption(this, facts[0], keep)
        if plan is not None and bool(plan.basis.any()):
            keep.widen(this.x, this.axis, plan.basis, f"stands for the constants that {op.node.name} reads")

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        this = Contraction(op)
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
        this = Contraction(op)
        plan = absorption(this, facts[0], keep) if this.groups == 1 else None
        return None if plan is None else emit(this, rewriter, plan.weight, plan.bias, 1)


def emit(this: Contraction, rewriter: Rewriter, weight: Tensor, bias: Tensor | None, groups: int) -> fx.Node:
    """The call with other weights; new constants keep the old ones' names and dtypes."""
    node = this.op.node
    source = this.op.args["weight"]
    dtype = rewriter.dtype_of(source)
    args: list[object] = [rewriter.value(this.x), rewriter.constant(weight, str(source.target), dtype), None]
    if bias is not None:
        held = this.op.args["bias"]
        name = str(source.target).removesuffix("weight") + "bias" if held is None else str(held.target)
        args[2] = rewriter.constant(bias, name, dtype)
    if this.spatial_rank:
        args += [list(this.per_spatial(name)) for name in ("stride", "padding", "dilation")]
        args.append(groups)
    return rewriter.call(node.target, args, like=node)


def absorption(this: Contraction, facts: Facts, keep: KeepSets) -> Absorption | None:
    """How the constants of x's removed channels enter the kept rows; None where there are none to absorb."""
    kept = keep.get(this.x, this.axis)
    rows = keep.get(this.op.node, this.axis)
    known = all_over_others(facts.known, this.axis, this.in_channels)
    nonzero = any_over_others(facts.known_value != 0, this.axis, this.in_channels)
    read = (this.columns() & rows[:, None]).any(0)
    removed = known & nonzero & read & ~kept
    if not bool(removed.any()):
        return None
    weight = this.weight.clone()
    bias = torch.zeros(this.out_channels, dtype=weight.dtype) if this.bias is None else this.bias.clone()
    _fix_known_rows(this, facts, weight, bias)
    this_rows = (rows & (weight != 0).flatten(1).any(1)).nonzero().flatten()
    channels = removed.nonzero().flatten()
    basis = torch.zeros_like(kept)
    total = this.contribution(facts.known_value, channels, this_rows)
    if total is not None and is_uniform(total, this.axis):
        bias[this_rows] += _first(total, this.axis)
        weight[:, channels] = 0.0
    else:
        basis, coefficients = express(_maps(this, facts), channels, (known & kept & nonzero).nonzero().flatten())
        weight = _combine(weight, basis, coefficients, channels)
        basis = torch.zeros_like(kept).index_fill(0, basis, True)
    return Absorption(basis, weight, bias if this.bias is not None or bool((bias != 0).any()) else None)


def _combine(weight: Tensor, basis: Tensor, coefficients: Tensor, channels: Tensor) -> Tensor:
    """W_B += sum_R C[R, B] W_R, and W_R = 0 outside the basis."""
    extra = torch.einsum("or...,rb->ob...", weight[:, channels], coefficients)
    in_basis = torch.isin(channels, basis)
    weight[:, channels[~in_basis]] = 0.0
    result = weight.clone()
    result[:, basis] = torch.where(
        _broadcast(torch.isin(basis, channels), result), extra, weight[:, basis] + extra
    )
    return result


def _broadcast(mask: Tensor, weight: Tensor) -> Tensor:
    return mask.reshape(1, -1, *([1] * (weight.ndim - 2)))


def _maps(this: Contraction, facts: Facts) -> Tensor:
    """The known map of each channel of x, flattened; (in, positions)."""
    value = facts.known_value
    value = value.expand([*value.shape[: this.axis], this.in_channels, *value.shape[this.axis + 1 :]])
    return torch.movedim(value, this.axis, 0).flatten(1)


def _first(stored: Tensor, axis: int) -> Tensor:
    return torch.movedim(stored, axis, 0).flatten(1)[:, 0]


def _fix_known_rows(this: Contraction, facts: Facts, weight: Tensor, bias: Tensor) -> None:
    """Rows that are known and flat: no weights, the constant as bias (in place)."""
    rows = (~_reached(this, facts)).nonzero().flatten()
    part = _known_rows(this, facts, rows) if rows.numel() else None
    if part is None:
        return
    flat = torch.movedim(part, this.axis, 0).flatten(1)
    uniform = (flat == flat[:, :1]).all(1)
    weight[rows[uniform]] = 0.0
    bias[rows[uniform]] = flat[uniform, 0]


def _reached(this: Contraction, facts: Facts) -> Tensor:
    """Rows of y that read an unknown entry with a weight that is not zero; (out,)."""
    unknown = ~all_over_others(facts.known, this.axis, this.in_channels)
    per_group = unknown.view(this.groups, 1, this.in_per_group)
    return (this.columns().view(this.groups, -1, this.in_per_group) & per_group).any(2).flatten()


def _known_rows(this: Contraction, facts: Facts, rows: Tensor) -> Tensor | None:
    """Values of the given rows of y, bias included, in stored form; None where they cannot be laid out."""
    value = facts.known_value
    if this.groups > 1:
        part = _grouped_rows(this, value, rows)
    else:
        read = this.columns()[rows].any(0)
        nonzero = any_over_others(value != 0, this.axis, this.in_channels)
        part = this.contribution(value, (read & nonzero).nonzero().flatten(), rows)
    if part is None or this.bias is None:
        return part
    return part + along(this.bias[rows], this.axis, this.info.rank)


def _grouped_rows(this: Contraction, value: Tensor, rows: Tensor) -> Tensor | None:
    """Rows of a grouped convolution, computed for all rows of the groups that hold them."""
    per_group = this.out_channels // this.groups
    value = value.expand([*value.shape[: this.axis], this.in_channels, *value.shape[this.axis + 1 :]])
    groups = torch.unique(rows // per_group)
    inputs = (groups[:, None] * this.in_per_group + torch.arange(this.in_per_group)).flatten()
    outputs = (groups[:, None] * per_group + torch.arange(per_group)).flatten()
    part = value.index_select(this.axis, inputs)
    if bool((part != 0).any()):
        if this.has_dynamic_border():
            return None
        result = this.run(this.spread(part), this.weight[outputs], groups.numel())
        return result.index_select(this.axis, torch.searchsorted(outputs, rows))
    return this._nothing(rows)


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
    keep = rewriter.analysis.keep
    nonzero = any_over_others(facts.known_value != 0, this.axis, this.in_channels)
    known = all_over_others(facts.known, this.axis, this.in_channels)
    read = (this.columns() & keep.get(this.op.node, this.axis)[:, None]).any(0)
    if bool((known & nonzero & read & ~keep.get(this.x, this.axis)).any()):
        raise PassError(
            f"{this.op.node.name}: constants of removed channels were not absorbed; run absorb_constants first"
        )


def _select(value: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return value if index is None else value.index_select(axis, index)
