"""What an affine map can be moved through: relu-like ops, pooling, views and permutations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from passes.affine import Affine
from passes.ir.lattice import along
from passes.ir.program import Op

aten = torch.ops.aten


POSITIVE_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default})

MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})

AVERAGES = frozenset(
    {
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    }
)  # fmt: skip

RESAMPLINGS = frozenset(
    {
        aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
        aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
        aten.upsample_bicubic2d.vec,
    }
)  # fmt: skip
RENUMBERINGS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
        aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints,
    }
)  # fmt: skip

SUMS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
LARGEST_RENUMBERING = 1 << 22


def through(op: Op, joint: Affine, *, backward: bool) -> tuple[fx.Node | None, Affine | None]:
    """(operand, the map on the other side of the call) if the call commutes with the map, else (.., None)."""
    if not op.operands:
        return None, None
    operand = op.operands[0]
    if op.target in POSITIVE_HOMOGENEOUS:
        return operand, joint if joint.keeps_order and not joint.has_shift else None
    if op.target in MAX_POOLS:
        same = joint.axis in (None, _pool_axis(op))
        return operand, joint if joint.keeps_order and same else None
    if op.target in AVERAGES or op.target in RESAMPLINGS:
        same = joint.axis in (None, _pool_axis(op))
        return operand, joint if same and not joint.has_shift else None
    if op.target in SUMS:
        return operand, _beside_reduced(op, joint, backward)
    if op.target in RENUMBERINGS and len(op.operands) == 1:
        return operand, _renumber(op, joint, backward)
    return operand, None


def _pool_axis(op: Op) -> int:
    """The channel axis of a pooling call: the one before the pooled axes."""
    rank = {"1d": 1, "2d": 2, "3d": 3}[str(op.target).split(".")[1][-2:]]
    return op.out.rank - rank - 1


def _beside_reduced(op: Op, joint: Affine, backward: bool) -> Affine | None:
    """A scale along an axis that is not reduced, in the numbering of the reduction's other side."""
    rank, axes = op.info_of(op.operands[0]).rank, op.args["dim"]
    if joint.has_shift or not axes:
        return None
    reduced = {axis % rank for axis in axes}
    kept = list(range(rank)) if op.args["keepdim"] else [axis for axis in range(rank) if axis not in reduced]
    if joint.axis is None:
        return joint
    axis = kept[joint.axis] if backward else joint.axis
    if axis in reduced:
        return None
    return Affine(axis if backward else kept.index(axis), joint.scale, joint.shift)


def _renumber(op: Op, joint: Affine, backward: bool) -> Affine | None:
    """The map in the coordinates of a view's other side, found by sending the operand's positions through it."""
    if joint.axis is None:
        return joint
    source, target = op.info_of(op.operands[0]), op.out
    here, there = (target, source) if backward else (source, target)
    count = int(torch.Size(source.sizes).numel())
    if count > LARGEST_RENUMBERING or count == 0 or not here.is_static(joint.axis):
        return None
    sizes = here.sizes
    labels = along(torch.arange(sizes[joint.axis]), joint.axis, here.rank).expand(sizes).flatten()
    moved = _apply_view(op, torch.arange(count).reshape(source.sizes), target.sizes)
    if backward:
        flat = torch.empty(count, dtype=torch.int64)
        flat[moved.flatten()] = labels
    else:
        flat = labels[moved.flatten()]
    return _along_one_axis(flat.reshape(there.sizes), joint, there)


def _apply_view(op: Op, positions: Tensor, out_sizes: tuple[int, ...]) -> Tensor:
    if op.target in {aten.permute.default, aten.transpose.int}:
        moved: Tensor = op.target(positions, *op.node.args[1:])
        return moved
    return positions.reshape(out_sizes)


def _along_one_axis(labels: Tensor, joint: Affine, info: Any) -> Affine | None:
    for axis in info.static_axes:
        line = labels
        for other in range(labels.ndim):
            if other != axis:
                line = line.narrow(other, 0, 1)
        if bool((labels == line).all()):
            index = line.flatten()
            return Affine(axis, joint.scale[index], joint.shift[index])
    return None
