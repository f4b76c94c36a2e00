"""Padding and cropping.

With a constant, result index low + i is operand index i, and what is added holds the constant:

forward: what is added is known. Along a dynamic axis it has no place: only that same constant stays known.
backward: the demand, cropped.
couple: operand and result keep equal indices, shifted. What is added is a known constant like any other, so
    it goes where nobody needs it: zero channels of a residual shortcut go with their partners in the add.
rewrite: as many entries on each side as are kept; where the pad is negative, as were kept of what it crops.

With the input's own entries (reflection, replication, circular) padding is a per-channel spatial op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.spatial import SpatialRule

aten = torch.ops.aten

OWN_ENTRIES: dict[Any, int] = {
    aten.reflection_pad1d.default: 1,
    aten.reflection_pad2d.default: 2,
    aten.reflection_pad3d.default: 3,
    aten.replication_pad1d.default: 1,
    aten.replication_pad2d.default: 2,
    aten.replication_pad3d.default: 3,
}


@dataclass(frozen=True)
class Sides:
    """What is added to one axis at its low and its high end; negative for what is cropped."""

    axis: int
    low: int
    high: int

    def inner_of_operand(self, size: int) -> slice:
        """Return the operand's indices that the result has too."""
        return slice(max(0, -self.low), size - max(0, -self.high))

    def inner_of_result(self, size: int) -> slice:
        """Return the result's indices that the operand has too."""
        return slice(max(0, self.low), size - max(0, self.high))


@rule(aten.constant_pad_nd.default)
class ConstantPad(Rule):
    """constant_pad_nd along any axes, channels included, with negative pads too."""

    def sides(self, op: Op) -> list[Sides]:
        """Return the padded axes whose pads are plain numbers and whose sizes are static."""
        pads, info = op.args["pad"], op.info_of(op.operands[0])
        found = []
        for position, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            sides = Sides(op.out.rank - 1 - position, low, high)
            plain = isinstance(low, int) and isinstance(high, int) and (low or high)
            if plain and info.is_static(sides.axis) and op.out.is_static(sides.axis):
                inner = sides.inner_of_operand(info.sizes[sides.axis])
                found += [sides] if inner.start < inner.stop else []
        return found

    def untouched(self, op: Op) -> list[int]:
        """Return the axes that are not padded."""
        rank, pads = op.out.rank, op.args["pad"]
        return [
            axis
            for axis in range(rank)
            if axis < rank - len(pads) // 2 or all(pads[2 * (rank - 1 - axis) + side] == 0 for side in (0, 1))
        ]

    def unlaid(self, op: Op) -> set[int]:
        """Return the padded axes whose pads cannot be laid out.

        They are dynamic, the pads are computed at run time, or nothing of the operand is left.
        """
        return set(range(op.out.rank)) - {entry.axis for entry in self.sides(op)} - set(self.untouched(op))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Lay out the pads; along an axis where that cannot be done, equal constants stay."""
        sides, stored = self.sides(op), facts[0]
        if self.unlaid(op):
            stored = flatten_facts(stored, self.unlaid(op))
            stored = stored.forget(stored.value != op.args["value"])
        if not sides and not stored.any_known:
            return Facts.unknown(op.out)
        stored = stored.expand([entry.axis for entry in sides], op.info_of(op.operands[0]))
        pads = _pads(sides, op.out.rank, +1)
        return Facts(
            F.pad(stored.known_value, pads, value=op.args["value"]), F.pad(stored.known, pads, value=True)
        )

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Crop the demand where it varies."""
        sides = [entry for entry in self.sides(op) if demand.shape[entry.axis] > 1]
        demand = any_over(demand, self.unlaid(op))
        return [F.pad(demand, _pads(sides, op.out.rank, -1), value=False)]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie the axes that are not padded, and with a shift those that are."""
        x, sides = op.operands[0], self.sides(op)
        why = f"aligned by {op.node.name}"
        for axis in self.untouched(op):
            keep.tie((x, axis), (op.node, axis), why)
        for axis in self.unlaid(op):
            for node in (x, op.node):
                keep.fill(node, f"padded by {op.node.name}", (axis,))
        for entry in sides:
            _tie_shifted(op, entry, keep, why)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """Pad with the kept entries of each side."""
        pads = list(rewriter.map(op.args["pad"]))
        for entry in self.sides(op):
            low, high = _kept_sides(op, entry, rewriter)
            position = 2 * (op.out.rank - 1 - entry.axis)
            pads[position : position + 2] = [low, high]
        return rewriter.call(
            op.target, (rewriter.value(op.operands[0]), pads, op.args["value"]), like=op.node
        )


def _pads(sides: Sequence[Sides], rank: int, sign: int) -> list[int]:
    """Return the pad argument, last axis first; with sign -1 that of the inverse."""
    pads = [0] * (2 * rank)
    for entry in sides:
        position = 2 * (rank - 1 - entry.axis)
        pads[position : position + 2] = [sign * entry.low, sign * entry.high]
    return pads


def _tie_shifted(op: Op, entry: Sides, keep: KeepSets, why: str) -> None:
    """Keep the same indices in the part that operand and result share, at least one of them."""
    x, axis = op.operands[0], entry.axis
    inner = entry.inner_of_operand(op.info_of(x).sizes[axis])
    shared = entry.inner_of_result(op.out.sizes[axis])
    ours, theirs = keep.get(x, axis).clone(), keep.get(op.node, axis).clone()
    joint = ours[inner] | theirs[shared]
    if not bool(joint.any()):
        joint[0] = True
    ours[inner], theirs[shared] = joint, joint
    keep.widen(x, axis, ours, why)
    keep.widen(op.node, axis, theirs, why)


def _kept_sides(op: Op, entry: Sides, rewriter: Rewriter) -> tuple[int, int]:
    """Return the new pads of one axis."""
    x, axis = op.operands[0], entry.axis
    result = _kept(rewriter, op.node, axis, op.out.sizes[axis])
    operand = _kept(rewriter, x, axis, op.info_of(x).sizes[axis])
    low = result[: entry.low].sum() if entry.low > 0 else -operand[: -entry.low].sum()
    high = (
        result[len(result) - entry.high :].sum()
        if entry.high > 0
        else -operand[len(operand) + entry.high :].sum()
    )
    return int(low), int(high)


def _kept(rewriter: Rewriter, node: fx.Node, axis: int, size: int) -> Tensor:
    index = rewriter.index(node, axis)
    return torch.ones(size) if index is None else torch.zeros(size).index_fill(0, index, 1.0)


@rule(*OWN_ENTRIES, aten.pad.default)
class OwnEntriesPad(SpatialRule):
    """Reflection, replication and circular padding: flat channels stay flat."""

    spatial_rank = OWN_ENTRIES

    def applies(self, op: Op) -> bool:
        """Whether the pads are the operand's own entries."""
        return super().applies(op) and op.args.get("mode") != "constant"

    def spatial(self, op: Op) -> tuple[int, ...]:
        """Return the padded axes, which the general call leaves to the number of pads."""
        count = len(op.args["pad"]) // 2 if op.target is aten.pad.default else OWN_ENTRIES[op.target]
        return tuple(range(op.out.rank - count, op.out.rank))
