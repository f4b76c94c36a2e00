"""What the per-channel spatial operators share: pooling, resampling, padding by the input's own entries.

Such an op treats every index along the leading axes (batch, channels) alike and alone, and its output
positions read boxes of input positions: (i, j) reads (p, q) iff i reads p along the first spatial axis and
j reads q along the second. `reach` finds those relations by running the op itself on one-hot inputs.

forward: a position that reads known entries alone is known; its value comes from the op itself.
backward: an entry is live where a live position reads it.
couple: leading axes keep equal indices, spatial axes are kept whole on both sides.

Stored facts of size 1 along a spatial axis stay so where the op maps a constant to the same constant along it
(`preserves_constants`). Elsewhere they are laid out at full size if the axis is static; along a dynamic axis
only zeros stay known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.rules.base import Rule

LARGEST_PROBE = 1 << 24


class SpatialRule(Rule):
    """A per-channel op on the last axes of its only operand.

    Families give the number of spatial axes of each overload, and say what they do to constants.
    """

    spatial_rank: Mapping[Any, int]

    def preserves_constants(self, op: Op, position: int) -> bool:
        """Whether values that do not vary along a spatial axis (numbered from 0) pass through unchanged."""
        return True

    def applies(self, op: Op) -> bool:
        """Whether the operand is the only tensor."""
        return len(op.operands) == 1 and op.info_of(op.operands[0]).rank == op.out.rank

    def spatial(self, op: Op) -> tuple[int, ...]:
        """Return the spatial axes, the same for operand and result."""
        return tuple(range(op.out.rank - self.spatial_rank[op.target], op.out.rank))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Know the positions that read known entries alone."""
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        stored = self._restricted(op, facts[0])
        if not stored.any_known:
            return Facts.unknown(op.out)
        unknown = ~stored.known
        for axis in self.spatial(op):
            if unknown.shape[axis] > 1:
                unknown = self._pushed(op, unknown, axis, backward=False)
        return Facts(self._value(op, stored), ~unknown).compress()

    def _restricted(self, op: Op, facts: Facts) -> Facts:
        """Forget what a dynamic axis or an argument computed at run time does not let through."""
        info = op.info_of(op.operands[0])
        for position, axis in enumerate(self.spatial(op)):
            static = info.is_static(axis) and op.out.is_static(axis) and has_plain_arguments(op)
            if not static:
                facts = flatten_facts(facts, (axis,))
                if not self.preserves_constants(op, position):
                    facts = facts.forget(facts.value != 0)
        return facts

    def _value(self, op: Op, stored: Facts) -> Tensor:
        """Run the op on the stored values, at full size where the result varies."""
        value, info = stored.known_value, op.info_of(op.operands[0])
        spatial = self.spatial(op)
        varying = [
            axis
            for position, axis in enumerate(spatial)
            if value.shape[axis] > 1 or not self.preserves_constants(op, position)
        ]
        if not bool((value != 0).any()):
            return torch.zeros([1] * value.ndim, dtype=value.dtype)
        if not varying:
            return value
        sizes = [*value.shape[: spatial[0]], *(info.sizes[axis] for axis in spatial)]
        result = run(op, value.expand(sizes))
        for axis in spatial:
            if axis not in varying or not op.out.is_static(axis) or not info.is_static(axis):
                result = result.narrow(axis, 0, 1)
        return result

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """Ask for the entries that live positions read."""
        for axis in self.spatial(op):
            if demand.shape[axis] > 1:
                demand = self._pushed(op, demand, axis, backward=True)
        return [demand]

    def _pushed(self, op: Op, mask: Tensor, axis: int, *, backward: bool) -> Tensor:
        """Mark what reads a marked index (or, backward, what a marked position reads), along one axis."""
        reach = self.reach(op, axis)
        if reach is None:
            return any_over(mask, (axis,))
        matrix = (reach.T if backward else reach).to(torch.float64)
        moved = torch.movedim(mask, axis, -1).to(torch.float64) @ matrix.T
        return torch.movedim(moved > 0, -1, axis)

    def reach(self, op: Op, axis: int) -> Tensor | None:
        """Whether a position of the result reads an index of the operand, along one spatial axis.

        bool, (size of the result, size of the operand); None where it depends on run-time sizes or is too
        large to run.
        """
        info = op.info_of(op.operands[0])
        spatial = self.spatial(op)
        count = info.sizes[axis]
        if not (info.is_static(axis) and op.out.is_static(axis)) or not has_plain_arguments(op):
            return None
        sizes = [info.sizes[other] for other in spatial]
        if count * int(torch.Size(sizes).numel()) > LARGEST_PROBE:
            return None
        shape = [count, 1, *(count if other == axis else 1 for other in spatial)]
        one_hot = torch.eye(count, dtype=torch.float64).reshape(shape)
        result = run(op, one_hot.expand(count, 1, *sizes))
        positions = (result != 0).movedim(2 + spatial.index(axis), 1)
        return positions.flatten(2).any(2).T

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Tie the leading axes, keep all positions."""
        x = op.operands[0]
        spatial = self.spatial(op)
        for axis in range(spatial[0]):
            keep.tie((x, axis), (op.node, axis), f"aligned by {op.node.name}")
        for node in (x, op.node):
            keep.fill(node, f"positions of {op.node.name}", spatial)


def run(op: Op, value: Tensor) -> Tensor:
    """Run the op with the same arguments on another operand."""
    result: Tensor = op.run({op.operands[0]: value}.__getitem__)
    return result


def has_plain_arguments(op: Op) -> bool:
    """Whether no argument beside the operand is computed at run time."""
    return set(op.source.all_input_nodes) == set(op.operands)
