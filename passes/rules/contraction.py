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
from dataclasses import dataclass, field
from functools import cached_property

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

CONVOLUTIONS: dict[object, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
LINEAR = aten.linear.default


@dataclass(frozen=True, eq=False)
class Absorption:
    """Where the constants of removed channels go: into the bias of `rows`, or into the columns of a kept basis.

    constant: (rows,), what they add at every position; basis: channels of x that stay, with coefficients (removed,
    basis) that express the removed ones, or None.
    """

    rows: Tensor
    constant: Tensor
    basis: Tensor | None = None
    coefficients: Tensor = field(default_factory=lambda: torch.zeros(0))


def describe(op: Op) -> Contraction:
    """The call's description, made once for each Op."""
    if "contraction" not in op.cache:
        op.cache["contraction"] = Contraction(op)
    found: Contraction = op.cache["contraction"]
    return found


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
        self.spatial_rank: int = CONVOLUTIONS.get(op.target, 0)
        self.axis = self.info.rank - 1 - self.spatial_rank
        self.spatial = tuple(range(self.axis + 1, self.info.rank))
        self.leading = tuple(range(self.axis))
        self.groups: int = op.args.get("groups", 1)
        self.out_channels, self.in_per_group = weight.shape[:2]
        self.in_channels = self.info.sizes[self.axis]

    @cached_property
    def columns(self) -> Tensor:
        """Whether row j reads input channel c with a weight that is not zero; bool (out, in / groups)."""
        if not self.spatial_rank:
            return self.weight != 0
        taps = self.weight.flatten(2)
        first = taps[:, :, 0] != 0
        return first if bool(first.all()) else (taps != 0).any(2)

    @cached_property
    def full_rows(self) -> bool:
        """Whether every row has a weight that is not zero."""
        return bool(self.columns.any(1).all())

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
        result: Tensor = self.op.target(x, weight, None, stride, padding, dilation, groups)
        return result

    def has_dynamic_border(self) -> bool:
        """Whether some dynamic axis is padded, so that border effects cannot be laid out."""
        if not self.spatial_rank:
            return False
        return any(
            pad > 0 and not self.info.is_static(axis)
            for pad, axis in zip(self.per_spatial("padding"), self.spatial, strict=True)
        )

    def spread(self, stored: Tensor, every_position: bool = True) -> Tensor:
        """Stored values at the size of x (dynamic axes: one window).

        Without `every_position` a flat axis is cut short, by whole strides, to a size with the same border effects.
        """
        sizes = list(stored.shape)
        for position, axis in enumerate(self.spatial):
            window = self.per_spatial("dilation")[position] * (self.weight.shape[2 + position] - 1) + 1
            size = self.info.sizes[axis] if self.info.is_static(axis) else window
            if not every_position and stored.shape[axis] == 1:
                stride, padding = self.per_spatial("stride")[position], self.per_spatial("padding")[position]
                spare = (size - 2 * (window + padding) - stride) // stride
                size -= stride * max(0, spare)
            sizes[axis] = size
        return stored.expand(sizes)

    def contribution(
        self, values: Tensor, channels: Tensor, rows: Tensor, every_position: bool = True
    ) -> Tensor | None:
        """Conv of stored x values on some channels, for some rows, without bias; None where it cannot be laid out.

        Shape: stored form of y restricted to `rows` along the channel axis; without `every_position` with fewer
        positions, among them the first and one of each kind. Groups must be 1.
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
        return self.run(self.spread(part, every_position), weight)

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


def is_contraction(op: Op) -> bool:
    """Whether weight and bias are constants of the usual ranks (a linear layer takes a vector and a number too)."""
    weight, bias = op.constant("weight"), op.constant("bias")
    if weight is None or weight.ndim != CONVOLUTIONS.get(op.target, 0) + 2:
        return False
    return op.args["bias"] is None or (bias is not None and bias.shape == weight.shape[:1])


@rule(*CONVOLUTIONS, LINEAR)
class ContractionRule(Rule):
    """conv1d/2d/3d and linear with a constant weight (and a constant bias or none)."""

    def applies(self, op: Op) -> bool:
        return is_contraction(op)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        this = describe(op)
        if not facts[0].any_known and this.full_rows:
            return Facts.unknown(op.out)
        rows = (~_reached(this, facts[0])).nonzero().flatten()
        if rows.numel() == 0:
            return Facts.unknown(op.out)
        part = _known_rows(this, facts[0], rows)
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
        channels = _removed_constants(this, facts[0], keep) if facts[0].any_known else None
        found = None if channels is None else _absorb_into(this, facts[0], keep, channels)
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


def absorption(this: Contraction, facts: Facts, keep: KeepSets) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias with the constants of x's removed channels absorbed; None where there are none."""
    channels = _removed_constants(this, facts, keep)
    if channels is None:
        return None
    found = _absorb_into(this, facts, keep, channels)
    weight = this.weight.clone()
    bias = torch.zeros(this.out_channels, dtype=weight.dtype) if this.bias is None else this.bias.clone()
    known, constants = _flat_rows(this, facts)
    weight[known], bias[known] = 0.0, constants
    if found.basis is None:
        bias[found.rows] += found.constant
        weight[:, channels] = 0.0
    else:
        weight = _combine(weight, found.basis, found.coefficients, channels)
    return weight, bias if this.bias is not None or bool((bias != 0).any()) else None


def _removed_constants(this: Contraction, facts: Facts, keep: KeepSets) -> Tensor | None:
    """The removed channels of x whose non-zero constants the kept rows read; None if there are none.

    Where such a channel is not known it is dead (at other tokens, say) and counts as 0.
    """
    kept = keep.get(this.x, this.axis)
    if bool(kept.all()):
        return None
    nonzero = any_over_others(facts.known_value != 0, this.axis, this.in_channels)
    candidates = nonzero & ~kept
    if not bool(candidates.any()):
        return None
    removed = candidates & (this.columns & keep.get(this.op.node, this.axis)[:, None]).any(0)
    return removed.nonzero().flatten() if bool(removed.any()) else None


def _absorb_into(this: Contraction, facts: Facts, keep: KeepSets, channels: Tensor) -> Absorption:
    """Where the constants of the removed `channels` go; remembered for the last keep sets asked about."""
    rows = keep.get(this.op.node, this.axis)
    kept = keep.get(this.x, this.axis)
    key = (channels.numpy().tobytes(), rows.numpy().tobytes(), kept.numpy().tobytes())
    held = this.op.cache.get("absorption")
    if held is not None and held[0] == key:
        remembered: Absorption = held[1]
        return remembered
    found = _find_absorption(this, facts, channels, rows, kept)
    this.op.cache["absorption"] = (key, found)
    return found


def _find_absorption(
    this: Contraction, facts: Facts, channels: Tensor, rows: Tensor, kept: Tensor
) -> Absorption:
    reading = rows & this.columns.any(1)
    reading[_flat_rows(this, facts)[0]] = False
    indices = reading.nonzero().flatten()
    total = this.contribution(facts.known_value, channels, indices, every_position=False)
    if total is not None and is_uniform(total, this.axis):
        return Absorption(indices, _first(total, this.axis))
    known = all_over_others(facts.known, this.axis, this.in_channels)
    nonzero = any_over_others(facts.known_value != 0, this.axis, this.in_channels)
    available = (known & kept & nonzero).nonzero().flatten()
    return Absorption(indices, torch.zeros(0), *express(_maps(this, facts), channels, available))


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
    return _by_channel(value, this.axis)


def _by_channel(stored: Tensor, axis: int) -> Tensor:
    """Stored values as a matrix (size of `axis`, everything else)."""
    return torch.movedim(stored, axis, 0).unsqueeze(-1).flatten(1)


def _first(stored: Tensor, axis: int) -> Tensor:
    return _by_channel(stored, axis)[:, 0]


def _flat_rows(this: Contraction, facts: Facts) -> tuple[Tensor, Tensor]:
    """(rows of y that are known and the same at all positions, their values)."""
    if "flat_rows" not in this.op.cache:
        rows = (~_reached(this, facts)).nonzero().flatten()
        part = _known_rows(this, facts, rows) if rows.numel() else None
        if part is None:
            this.op.cache["flat_rows"] = rows[:0], torch.zeros(0, dtype=this.weight.dtype)
        else:
            flat = _by_channel(part, this.axis)
            uniform = (flat == flat[:, :1]).all(1)
            this.op.cache["flat_rows"] = rows[uniform], flat[uniform, 0]
    found: tuple[Tensor, Tensor] = this.op.cache["flat_rows"]
    return found


def _reached(this: Contraction, facts: Facts) -> Tensor:
    """Rows of y that read an unknown entry with a weight that is not zero; (out,)."""
    unknown = ~all_over_others(facts.known, this.axis, this.in_channels)
    per_group = unknown.view(this.groups, 1, this.in_per_group)
    return (this.columns.view(this.groups, -1, this.in_per_group) & per_group).any(2).flatten()


def _known_rows(this: Contraction, facts: Facts, rows: Tensor) -> Tensor | None:
    """Values of the given rows of y, bias included, in stored form; None where they cannot be laid out."""
    value = facts.known_value
    if this.groups > 1:
        part = _grouped_rows(this, value, rows)
    else:
        read = this.columns[rows].any(0)
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
    if facts.any_known and _removed_constants(this, facts, rewriter.analysis.keep) is not None:
        raise PassError(
            f"{this.op.node.name}: constants of removed channels were not absorbed; run absorb_constants first"
        )


def _select(value: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return value if index is None else value.index_select(axis, index)
