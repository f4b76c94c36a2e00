"""Resize: torch's interpolation where it is the same, else a choice or a weighted sum of positions along each axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Known, Value, axis_of, numbers, tensor

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@translates("Resize", "Upsample")
def _resize(node: Node, x: Value, *rest: Value) -> Tensor:
    """Resize; operands: region and scales and sizes, of which one of the last two is given."""
    value = tensor(x)
    scales, sizes = (rest[0], None) if node.op == "Upsample" else (*rest, None, None, None)[1:3]
    _refuse_rare(node)
    along = node.get("axes")
    axes = list(range(value.ndim)) if along is None else [axis_of(node, axis, value.ndim) for axis in along]
    goal: dict[int, tuple[Any, Any]] = {}
    if _has_entries(sizes):
        for axis, size in zip(axes, numbers(node, sizes, "sizes"), strict=True):
            goal[axis] = (size, None)
    else:
        for axis, scale in zip(axes, numbers(node, scales, "scales"), strict=True):
            goal[axis] = (_scaled(value.shape[axis], scale), scale)
    goal = {axis: entry for axis, entry in goal.items() if not _is_neutral(value.shape[axis], *entry)}
    if not goal:
        return value.clone()
    return _resized(node, value, goal)


def _refuse_rare(node: Node) -> None:
    where = node.get("coordinate_transformation_mode", "half_pixel")
    if where == "tf_crop_and_resize":
        raise node.refusal("coordinate_transformation_mode tf_crop_and_resize is not supported")
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refusal("only keep_aspect_ratio_policy stretch is supported")
    if node.get("antialias", 0):
        raise node.refusal("antialias is not supported")


def _has_entries(value: Value) -> bool:
    return (isinstance(value, Known) and value.entries.size > 0) or isinstance(value, Tensor)


def _scaled(size: Any, scale: Any) -> Any:
    if isinstance(scale, float) and scale == int(scale):
        return size * int(scale)
    return math.floor(size * scale)


def _is_neutral(size: Any, goal: Any, scale: Any) -> bool:
    if scale is not None:
        return bool(scale == 1)
    if isinstance(size, torch.SymInt) or isinstance(goal, torch.SymInt):
        return str(size) == str(goal)
    return bool(size == goal)


def _resized(node: Node, x: Tensor, goal: dict[int, tuple[Any, Any]]) -> Tensor:
    mode = node.get("mode", "nearest")
    where = (
        "asymmetric" if node.op == "Upsample" else node.get("coordinate_transformation_mode", "half_pixel")
    )
    if 3 <= x.ndim <= 5 and min(goal) >= 2:
        found = _by_torch(node, x, goal, mode, where)
        if found is not None:
            return found
    for axis, (size, scale) in sorted(goal.items()):
        if not isinstance(size, int) or not isinstance(x.shape[axis], int):
            raise node.refusal(
                f"mode {mode} with {where} coordinates has no counterpart in torch for sizes that are open; export the "
                "network with fixed sizes"
            )
        x = _along(node, x, axis, size, scale, mode, where)
    return x


def _by_torch(
    node: Node, x: Tensor, goal: dict[int, tuple[Any, Any]], mode: str, where: str
) -> Tensor | None:
    """Return torch's interpolation where it computes the same, else None."""
    spatial = range(2, x.ndim)
    sizes = [goal[axis][0] if axis in goal else x.shape[axis] for axis in spatial]
    whole = [_factor(x.shape[axis], *goal.get(axis, (x.shape[axis], 1.0))) for axis in spatial]
    if mode == "nearest" and _is_repetition(node, where, whole):
        factors = [float(factor) for factor in whole if factor is not None]
        return F.interpolate(x, scale_factor=factors, mode="nearest")
    exact = all(scale is None or scale == int(scale) for _, scale in goal.values())
    aligned = where == "align_corners"
    if not exact or not (aligned or where in {"half_pixel", "pytorch_half_pixel"}):
        return None
    if any(isinstance(size, int) and size == 1 for size in sizes):
        return None
    if mode == "linear":
        return F.interpolate(x, size=sizes, mode=_LINEAR[x.ndim], align_corners=aligned)
    sharp = node.get("cubic_coeff_a", -0.75) == -0.75 and not node.get("exclude_outside", 0)
    if mode == "cubic" and x.ndim == 4 and sharp:
        return F.interpolate(x, size=sizes, mode="bicubic", align_corners=aligned)
    return None


def _factor(size: Any, goal: Any, scale: Any) -> int | None:
    """Return by what whole number an axis grows, None where by none."""
    if scale is not None:
        return int(scale) if scale == int(scale) and scale >= 1 else None
    if isinstance(size, int) and isinstance(goal, int):
        return goal // size if goal % size == 0 else None
    for factor in (2, 4, 8, 16, 32, 3):
        if str(size * factor) == str(goal):
            return factor
    return None


def _is_repetition(node: Node, where: str, factors: Sequence[int | None]) -> bool:
    """Whether nearest neighbours repeat each entry: by whole factors, half a pixel or rounding down."""
    if any(factor is None for factor in factors):
        return False
    if where in {"half_pixel", "pytorch_half_pixel"}:
        return node.get("nearest_mode", "round_prefer_floor") in {"round_prefer_floor", "round_prefer_ceil"}
    return where == "asymmetric" and (node.op == "Upsample" or node.get("nearest_mode") == "floor")


def _along(node: Node, x: Tensor, axis: int, size: int, scale: Any, mode: str, where: str) -> Tensor:
    """Resize one axis by what the standard says of each position."""
    old = x.shape[axis]
    ratio = float(scale) if scale is not None else size / old
    places = [_place(index, old, size, ratio, where) for index in range(size)]
    if mode == "nearest":
        rounding = "floor" if node.op == "Upsample" else node.get("nearest_mode", "round_prefer_floor")
        chosen = [min(max(_ROUNDINGS[rounding](place), 0), old - 1) for place in places]
        return x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    weights = torch.zeros(size, old, dtype=torch.float64)
    for row, place in enumerate(places):
        for column, weight in _neighbours(node, place, old, mode):
            weights[row, min(max(column, 0), old - 1)] += weight
    moved = F.linear(x.transpose(axis, -1), weights.to(x.dtype))
    return moved.transpose(axis, -1)


def _place(index: int, old: int, new: int, scale: float, where: str) -> float:
    """Return where an entry of the result lies in the operand (ONNX, Resize, coordinate_transformation_mode)."""
    if where == "align_corners":
        return 0.0 if new == 1 else index * (old - 1) / (new - 1)
    if where == "asymmetric":
        return index / scale
    if where == "pytorch_half_pixel" and new == 1:
        return 0.0
    place = (index + 0.5) / scale - 0.5
    if where == "half_pixel_symmetric":
        place += old / 2 * (1 - new / (scale * old))
    return place


_ROUNDINGS: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda place: math.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: math.floor(place + 0.5),
}


def _neighbours(node: Node, place: float, old: int, mode: str) -> list[tuple[int, float]]:
    """Return (entry, weight) of what a position is a mean of: two neighbours, or four with Keys' cubic."""
    low = math.floor(place)
    part = place - low
    if mode == "linear":
        return [(low, 1 - part), (low + 1, part)]
    a = node.get("cubic_coeff_a", -0.75)
    near = [_cubic(abs(part - offset), a) for offset in (-1, 0, 1, 2)]
    found = [(low + offset, weight) for offset, weight in zip((-1, 0, 1, 2), near, strict=True)]
    if node.get("exclude_outside", 0):
        found = [(entry, weight) for entry, weight in found if 0 <= entry < old]
        total = sum(weight for _, weight in found)
        found = [(entry, weight / total) for entry, weight in found]
    return found


def _cubic(distance: float, a: float) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a


@translates("GridSample")
def _grid_sample(node: Node, x: Value, grid: Value) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        node.get("mode", "bilinear"), node.get("mode", "bilinear")
    )
    return F.grid_sample(
        tensor(x), tensor(grid), mode, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0))
    )
