"""Where the constants of removed channels go: into a bias, or into the columns of a kept basis.

For kept rows J and removed known channels R of x: K = conv(x_R) restricted to J.

- rows that are wholly known and flat become a zero row and the constant itself as bias;
- K uniform over positions: b' = b + K;
- otherwise x_R = C x_B for a basis B of the maps that is kept: W'_B = W_B + sum_R C_R^T W_R.

Groups are not covered: a grouped convolution keeps whole groups, so nothing is removed beside what stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from passes.ir.basis import express
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, all_over_others, along, any_over_others
from passes.rules.layer import Contraction, is_uniform


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


def absorption(this: Contraction, facts: Facts, keep: KeepSets) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias with the constants of x's removed channels absorbed; None where there are none."""
    channels = removed_constants(this, facts, keep)
    if channels is None:
        return None
    found = absorb_into(this, facts, keep, channels)
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


def removed_constants(this: Contraction, facts: Facts, keep: KeepSets) -> Tensor | None:
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


def absorb_into(this: Contraction, facts: Facts, keep: KeepSets, channels: Tensor) -> Absorption:
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
    value = this.at_full_width(value)
    return _by_channel(value, this.axis)


def _flat_rows(this: Contraction, facts: Facts) -> tuple[Tensor, Tensor]:
    """(rows of y that are known and the same at all positions, their values)."""
    if "flat_rows" not in this.op.cache:
        rows = (~reached_rows(this, facts)).nonzero().flatten()
        part = known_rows(this, facts, rows) if rows.numel() else None
        if part is None:
            this.op.cache["flat_rows"] = rows[:0], torch.zeros(0, dtype=this.weight.dtype)
        else:
            flat = _by_channel(part, this.axis)
            uniform = (flat == flat[:, :1]).all(1)
            this.op.cache["flat_rows"] = rows[uniform], flat[uniform, 0]
    found: tuple[Tensor, Tensor] = this.op.cache["flat_rows"]
    return found


def reached_rows(this: Contraction, facts: Facts) -> Tensor:
    """Rows of y that read an unknown entry with a weight that is not zero; (out,)."""
    unknown = ~all_over_others(facts.known, this.axis, this.in_channels)
    per_group = unknown.view(this.groups, 1, this.in_per_group)
    return (this.columns.view(this.groups, -1, this.in_per_group) & per_group).any(2).flatten()


def known_rows(this: Contraction, facts: Facts, rows: Tensor) -> Tensor | None:
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
    value = this.at_full_width(value)
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


def _by_channel(stored: Tensor, axis: int) -> Tensor:
    """Stored values as a matrix (size of `axis`, everything else)."""
    return torch.movedim(stored, axis, 0).unsqueeze(-1).flatten(1)


def _first(stored: Tensor, axis: int) -> Tensor:
    return _by_channel(stored, axis)[:, 0]
