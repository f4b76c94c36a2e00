"""Where the constants of removed channels go: into a bias, or into the columns of a kept basis.

For kept rows J and removed known channels R of x: K = conv(x_R) restricted to J. Group by group (a layer without groups
is one group):

- rows that are wholly known and flat become a zero row and the constant itself as bias;
- K uniform over positions: b' = b + K;
- otherwise x_R = C x_B for a basis B of the maps, in the same group, that is kept: W'_B = W_B + sum_R C_R^T W_R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.ir.axes import flatten_facts
from passes.ir.basis import express
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, all_over_others, along, any_over_others
from passes.rules.layer import Contraction, varying


@dataclass(frozen=True, eq=False)
class Basis:
    """In one group, x[removed] = coefficients @ x[kept]; indices are those of x, coefficients (removed, kept)."""

    group: int
    removed: Tensor
    kept: Tensor
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class Absorption:
    """Where the constants of removed channels go: `constant` (rows,) into the bias of `rows`, others into `bases`."""

    rows: Tensor
    constant: Tensor
    bases: tuple[Basis, ...] = ()

    @property
    def stay(self) -> Tensor:
        """The channels of x that the bases keep."""
        kept = [basis.kept for basis in self.bases]
        return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)


def absorption(this: Contraction, facts: Facts, keep: KeepSets) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias with the constants of x's removed channels absorbed; None where there are none."""
    channels = removed_constants(this, facts, keep)
    if channels is None:
        return None
    found = absorb_into(this, facts, keep, channels)
    weight = this.own_weight()
    bias = torch.zeros(this.out_channels, dtype=weight.dtype) if this.bias is None else this.bias.clone()
    known, constants = _flat_rows(this, facts)
    weight[known], bias[known] = 0.0, constants
    bias[found.rows] += found.constant
    _clear(this, weight, channels, found)
    for basis in found.bases:
        _combine(this, weight, basis)
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
    rows = keep.get(this.op.node, this.axis)
    removed = candidates & this.channels_read(rows)
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
    groups = indices // this.out_per_group
    uneven = torch.unique(groups if total is None else groups[varying(total, this.axis)])
    even = ~torch.isin(groups, uneven)
    constant = torch.zeros(0) if total is None else _first(total, this.axis)[even]
    bases = tuple(_bases(this, facts, channels, kept, uneven))
    return Absorption(indices[even], constant, bases)


def _bases(
    this: Contraction, facts: Facts, channels: Tensor, kept: Tensor, groups: Tensor
) -> Iterator[Basis]:
    """A basis for the removed channels of each of the groups."""
    known = all_over_others(facts.known, this.axis, this.in_channels)
    nonzero = any_over_others(facts.known_value != 0, this.axis, this.in_channels)
    available = (known & kept & nonzero).nonzero().flatten()
    maps = _by_channel(this.at_full_width(facts.known_value), this.axis)
    owner = channels // this.in_per_group
    for group in groups.tolist():
        removed = channels[owner == group]
        if removed.numel():
            at_hand = available[available // this.in_per_group == group]
            yield Basis(group, removed, *express(maps, removed, at_hand))


def _clear(this: Contraction, weight: Tensor, channels: Tensor, found: Absorption) -> None:
    """W_R = 0, but for the groups whose bases still need it."""
    owner = channels // this.in_per_group
    held = torch.tensor([basis.group for basis in found.bases], dtype=torch.int64)
    gone = channels[~torch.isin(owner, held)]
    blocks = weight.view(this.groups, this.out_per_group, *weight.shape[1:])
    blocks[gone // this.in_per_group, :, gone % this.in_per_group] = 0.0


def _combine(this: Contraction, weight: Tensor, basis: Basis) -> None:
    """W_B += sum_R C[R, B] W_R, and W_R = 0 outside the basis; in place, in the rows of the group."""
    first = basis.group * this.out_per_group
    block = weight[first : first + this.out_per_group]
    removed, kept = (index - basis.group * this.in_per_group for index in (basis.removed, basis.kept))
    extra = torch.einsum("or...,rb->ob...", block[:, removed], basis.coefficients)
    block[:, removed] = 0.0
    block[:, kept] += extra


def _flat_rows(this: Contraction, facts: Facts) -> tuple[Tensor, Tensor]:
    """(rows of y that are known and the same at all positions, their values)."""
    if "flat_rows" not in this.op.cache:
        rows, part = known_rows(this, facts, (~reached_rows(this, facts)).nonzero().flatten())
        flat = _by_channel(part, this.axis)
        uniform = (flat == flat[:, :1]).all(1)
        this.op.cache["flat_rows"] = rows[uniform], flat[uniform, 0]
    found: tuple[Tensor, Tensor] = this.op.cache["flat_rows"]
    return found


def reached_rows(this: Contraction, facts: Facts) -> Tensor:
    """Rows of y that read an unknown entry with a weight that is not zero; (out,)."""
    return this.rows_reading(~all_over_others(facts.known, this.axis, this.in_channels))


def known_rows(this: Contraction, facts: Facts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the given rows whose values can be laid out, and the values, bias included, in stored form."""
    value = facts.known_value
    nonzero = any_over_others(value != 0, this.axis, this.in_channels)
    wanted = torch.zeros(this.out_channels, dtype=torch.bool).index_fill(0, rows, True)
    channels = (this.channels_read(wanted) & nonzero).nonzero().flatten()
    part = this.contribution(value, channels, rows)
    if part is None:
        rows = rows[~this.rows_reading(nonzero)[rows]]
        part = this.contribution(value, channels[:0], rows)
        assert part is not None
    rows, part = _settled(this, rows, part)
    return rows, part if this.bias is None else part + along(this.bias[rows], this.axis, this.info.rank)


def _settled(this: Contraction, rows: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that do not vary along dynamic axes, at size 1 along them."""
    dynamic = [axis for axis in this.spatial if not this.info.is_static(axis) and part.shape[axis] > 1]
    if not dynamic:
        return rows, part
    facts = flatten_facts(Facts(part, torch.ones([1] * part.ndim, dtype=torch.bool)), dynamic)
    even = all_over_others(facts.known, this.axis, rows.numel())
    return rows[even], facts.value.index_select(this.axis, even.nonzero().flatten())


def _by_channel(stored: Tensor, axis: int) -> Tensor:
    """Stored values as a matrix (size of `axis`, everything else)."""
    return torch.movedim(stored, axis, 0).unsqueeze(-1).flatten(1)


def _first(stored: Tensor, axis: int) -> Tensor:
    return _by_channel(stored, axis)[:, 0]
