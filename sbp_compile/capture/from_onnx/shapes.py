"""Views, padding and what is made from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Known, Value, axis_of, dtype, number, numbers, rank, tensor

_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@translates("Reshape")
def _reshape(node: Node, x: Value, shape: Value) -> Tensor:
    value = tensor(x)
    sizes = numbers(node, shape, "new sizes")
    if not node.get("allowzero", 0):
        sizes = [
            value.shape[axis] if isinstance(size, int) and size == 0 else size
            for axis, size in enumerate(sizes)
        ]
    return value.reshape(sizes)


@translates("Flatten")
def _flatten(node: Node, x: Value) -> Tensor:
    value, axis = tensor(x), node.get("axis", 1)
    axis = axis + value.ndim if axis < 0 else axis
    if axis == 0:
        return value.reshape(1, -1)
    if axis == value.ndim:
        return value.reshape(-1, 1)
    behind = value.flatten(axis)
    return behind.flatten(0, axis - 1)


@translates("Transpose")
def _transpose(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    return value.permute(node.get("perm") or list(reversed(range(value.ndim))))


@translates("Squeeze")
def _squeeze(node: Node, x: Value, axes: Value = None) -> Tensor:
    value = tensor(x)
    given = node.get("axes") if axes is None else numbers(node, axes, "axes")
    if given is None:
        return value.squeeze()
    return value.squeeze([axis_of(node, axis, value.ndim) for axis in given])


@translates("Unsqueeze")
def _unsqueeze(node: Node, x: Value, axes: Value = None) -> Tensor:
    value = tensor(x)
    given = node.get("axes") if axes is None else numbers(node, axes, "axes")
    axes_behind = value.ndim + len(given)
    for axis in sorted(axis_of(node, axis, axes_behind) for axis in given):
        value = value.unsqueeze(axis)
    return value


@translates("Expand")
def _expand(node: Node, x: Value, shape: Value) -> Tensor:
    """Expand; a size of 1 leaves the operand's size, and so does one that is only known to be some size."""
    value, sizes = tensor(x), numbers(node, shape, "new sizes")
    missing = max(value.ndim - len(sizes), 0)
    sizes = [*[1] * missing, *sizes]
    offset = len(sizes) - value.ndim
    wanted = []
    for axis, size in enumerate(sizes):
        own = value.shape[axis - offset] if axis >= offset else 1
        keeps = not (isinstance(own, int) and own == 1) or (isinstance(size, int) and size == 1)
        wanted.append(-1 if keeps and axis >= offset else size)
    return value.expand(wanted)


@translates("Tile")
def _tile(node: Node, x: Value, repeats: Value) -> Tensor:
    value = tensor(x)
    return value.repeat(numbers(node, repeats, "repeats"))


@translates("Concat")
def _concat(node: Node, *parts: Value) -> Tensor:
    tensors = [tensor(part) for part in parts]
    return torch.cat(tensors, axis_of(node, node.get("axis", 0), tensors[0].ndim))


@translates("Split")
def _split(node: Node, x: Value, sizes: Value = None) -> tuple[Tensor, ...]:
    value = tensor(x)
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    given = node.get("split") if sizes is None else numbers(node, sizes, "sizes")
    if given is None:
        count = node.get("num_outputs") or len(node.outputs)
        return torch.split(value, (value.shape[axis] + count - 1) // count, axis)
    return torch.split(value, given, axis)


@translates("Pad")
def _pad(node: Node, x: Value, pads: Value = None, filling: Value = None, axes: Value = None) -> Tensor:
    value, mode = tensor(x), node.get("mode", "constant")
    amounts = node.get("pads") if pads is None else numbers(node, pads, "amounts")
    fill = 0 if filling is None else number(node, filling, "constant value")
    chosen = (
        range(value.ndim)
        if axes is None
        else [axis_of(node, a, value.ndim) for a in numbers(node, axes, "axes")]
    )
    count = len(chosen)
    pairs: list[tuple[Any, Any]] = [(0, 0)] * value.ndim
    for position, axis in enumerate(chosen):
        pairs[axis] = (amounts[position], amounts[count + position])
    first = next((axis for axis, pair in enumerate(pairs) if pair != (0, 0)), value.ndim)
    if first == value.ndim:
        return value.clone()
    if mode == "constant":
        return F.pad(value, _flat(pairs[first:]), value=fill)
    if mode not in _MODES:
        raise node.refusal(f"mode {mode!r} is not known")
    if value.ndim > 5 or first < max(value.ndim - 3, 1):
        raise node.refusal(
            f"mode {mode!r} is supported along the last axes of up to 5, not along axis {first}"
        )
    return _pad_by_content(value, pairs, first, _MODES[mode])


def _pad_by_content(x: Tensor, pairs: Sequence[tuple[Any, Any]], first: int, mode: str) -> Tensor:
    """Pad the last axes from what they hold; torch wants as many axes in front as its layers have."""
    spatial = max(x.ndim - first, x.ndim - 2) if x.ndim > 2 else 1
    flat = _flat(pairs[x.ndim - spatial :])
    if x.ndim - spatial == 0:
        return F.pad(x.unsqueeze(0), flat, mode=mode).squeeze(0)
    return F.pad(x, flat, mode=mode)


def _flat(pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
    return [amount for pair in reversed(pairs) for amount in pair]


@translates("DepthToSpace")
def _depth_to_space(node: Node, x: Value) -> Tensor:
    """Shuffle channels into positions; the older order of channels (DCR) is made torch's first."""
    value, size = tensor(x), node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        channels = torch.arange(value.shape[1]).reshape(size * size, -1)
        value = value.index_select(1, channels.t().reshape(-1))
    return F.pixel_shuffle(value, size)


@translates("SpaceToDepth")
def _space_to_depth(node: Node, x: Value) -> Tensor:
    value, size = tensor(x), node.get("blocksize")
    channels = torch.arange(value.shape[1] * size * size).reshape(-1, size * size)
    return F.pixel_unshuffle(value, size).index_select(1, channels.t().reshape(-1))


@translates("ConstantOfShape")
def _constant_of_shape(node: Node, shape: Value) -> Tensor:
    value = node.get("value")
    fill, kind = (0.0, torch.float32) if value is None else (value.reshape(-1)[0].item(), value.dtype)
    return torch.full(numbers(node, shape, "sizes"), fill, dtype=kind)


@translates("Range")
def _range(node: Node, start: Value, limit: Value, step: Value) -> Tensor:
    low, high, by = (number(node, value, "limits") for value in (start, limit, step))
    return torch.arange(low, high, by, dtype=dtype(start))


@translates("EyeLike")
def _eye(node: Node, x: Value) -> Tensor:
    from sbp_compile.capture.from_onnx.tensors import dtype_of

    value = tensor(x)
    kind = dtype_of(node.get("dtype"), node.place) if node.get("dtype") else value.dtype
    rows, columns = value.shape
    places = torch.arange(columns).unsqueeze(0) - torch.arange(rows).unsqueeze(1)
    return torch.eq(places, node.get("k", 0)).to(kind)


@translates("Trilu")
def _triangle(node: Node, x: Value, diagonal: Value = None) -> Tensor:
    offset = 0 if diagonal is None else number(node, diagonal, "diagonal")
    return (torch.triu if node.get("upper", 1) else torch.tril)(tensor(x), offset)


@translates("Shape", "Size")
def _sizes(node: Node, x: Value) -> Known:
    raise AssertionError(f"sizes are known without a call ({rank(x)} axes)")
