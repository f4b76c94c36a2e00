"""Pooling: the maximum or the mean of a window of positions, per channel.

A flat channel stays flat behind a maximum (padding is minus infinity there) and behind a mean that counts
real entries alone. A mean that counts its padding or has a divisor of its own is laid out on static sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.ir.program import Op
from passes.rules.base import rule
from passes.rules.spatial import SpatialRule

aten = torch.ops.aten

MAX_POOLS = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
MEAN_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
ADAPTIVE_MEAN_POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}


@rule(*MAX_POOLS)
class MaxPool(SpatialRule):
    """max_pool1d/2d/3d; padding is at most half a window, so every window holds a real entry.

    With dilation that takes as many entries as the dilation; otherwise the result is minus infinity.
    """

    spatial_rank = MAX_POOLS

    def preserves_constants(self, op: Op, position: int) -> bool:
        """Whether every window holds a real entry."""
        size = op.info_of(op.operands[0]).sizes[self.spatial(op)[position]]
        return size >= _at(op.args["dilation"], position)


@rule(*MEAN_POOLS)
class MeanPool(SpatialRule):
    """avg_pool1d/2d/3d with any padding, ceil_mode, count_include_pad and divisor."""

    spatial_rank = MEAN_POOLS

    def preserves_constants(self, op: Op, position: int) -> bool:
        """Whether the mean divides by the number of entries that it adds."""
        if op.args.get("divisor_override") is not None:
            return False
        return not op.args["count_include_pad"] or _at(op.args["padding"], position) == 0


@rule(*ADAPTIVE_MEAN_POOLS)
class AdaptiveMeanPool(SpatialRule):
    """adaptive_avg_pool1d/2d/3d: every output position is the mean of real entries."""

    spatial_rank = ADAPTIVE_MEAN_POOLS


def _at(value: int | Sequence[int], position: int) -> int:
    """Look up an argument that is given per spatial axis or once for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values[position] if len(values) > 1 else values[0]
