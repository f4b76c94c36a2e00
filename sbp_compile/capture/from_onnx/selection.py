"""Slices, gathers and scatters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Known, Value, axis_of, number, numbers, tensor

aten = torch.ops.aten
_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@translates("Slice")
def _slice(
    node: Node, x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Tensor:
    value = tensor(x)
    low, high = numbers(node, starts, "starts"), numbers(node, ends, "ends")
    along = range(len(low)) if axes is None else numbers(node, axes, "axes")
    step = [1] * len(low) if steps is None else numbers(node, steps, "steps")
    for start, end, axis, by in zip(low, high, along, step, strict=True):
        axis = axis_of(node, axis, value.ndim)
        if by < 0:
            value = _backwards(node, value, start, end, axis, by)
        elif not (
            isinstance(start, int) and start == 0 and isinstance(end, int) and end >= 2**31 - 1 and by == 1
        ):
            value = aten.slice.Tensor(value, axis, start, end, by)
    return value


def _backwards(node: Node, x: Tensor, start: Any, end: Any, axis: int, step: int) -> Tensor:
    size = x.shape[axis]
    if step == -1 and isinstance(start, int) and start in {-1, 2**63 - 1, 2**31 - 1} and end <= -(2**31):
        return x.flip(axis)
    if not all(isinstance(number, int) for number in (start, end, size)):
        raise node.refusal("it goes backwards through a part of an axis whose size is open")
    return x.index_select(
        axis, torch.tensor(range(*slice(start, end, step).indices(size)), dtype=torch.int64)
    )


@translates("Gather")
def _gather(node: Node, x: Value, indices: Value) -> Tensor:
    value = tensor(x)
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    if isinstance(indices, Known):
        if indices.entries.ndim == 0:
            return value.select(axis, indices.numbers[0])
        if not indices.is_symbolic and isinstance(value.shape[axis], int):
            return _fixed(node, value, axis, indices)
    places = tensor(indices)
    if axis == 0 and value.ndim == 2 and node.is_constant(0):
        return F.embedding(places, value)
    shape = [*value.shape[:axis], *places.shape, *value.shape[axis + 1 :]]
    chosen = value.index_select(axis, places.reshape(-1))
    return chosen if places.ndim == 1 else chosen.reshape(shape)


def _fixed(node: Node, x: Tensor, axis: int, indices: Known) -> Tensor:
    """Gather entries that the file names; negative ones count from the end."""
    size = x.shape[axis]
    chosen = [index + size if index < 0 else index for index in indices.numbers]
    if not all(0 <= index < size for index in chosen):
        raise node.refusal(f"it gathers an index outside of the {size} that there are")
    shape = [*x.shape[:axis], *indices.entries.shape, *x.shape[axis + 1 :]]
    found = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return found if indices.entries.ndim == 1 else found.reshape(shape)


@translates("GatherElements")
def _gather_elements(node: Node, x: Value, indices: Value) -> Tensor:
    value, places = tensor(x), tensor(indices)
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    return value.gather(axis, _counted_from_front(places, value.shape[axis]))


@translates("GatherND")
def _gather_nd(node: Node, x: Value, indices: Value) -> Tensor:
    if node.get("batch_dims", 0):
        raise node.refusal("batch_dims other than 0 are not supported")
    places = tensor(indices)
    return tensor(x)[tuple(places.unbind(-1))]


@translates("ScatterElements", "Scatter")
def _scatter_elements(node: Node, x: Value, indices: Value, updates: Value) -> Tensor:
    value, places = tensor(x), tensor(indices)
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    places = _counted_from_front(places, value.shape[axis])
    how = node.get("reduction", "none")
    if how == "none":
        return value.scatter(axis, places, tensor(updates))
    return value.scatter_reduce(axis, places, tensor(updates), _REDUCTIONS[how])


@translates("ScatterND")
def _scatter_nd(node: Node, x: Value, indices: Value, updates: Value) -> Tensor:
    how = node.get("reduction", "none")
    if how not in {"none", "add"}:
        raise node.refusal(f"reduction {how!r} is not supported")
    places = tuple(tensor(indices).unbind(-1))
    return tensor(x).index_put(places, tensor(updates), accumulate=how == "add")


@translates("OneHot")
def _one_hot(node: Node, indices: Value, depth: Value, values: Value) -> Tensor:
    places, count = tensor(indices), number(node, depth, "depth")
    axis = axis_of(node, node.get("axis", -1), places.ndim + 1)
    classes = torch.arange(count, dtype=places.dtype).reshape(-1, *[1] * (places.ndim - axis))
    hit = _counted_from_front(places, count).unsqueeze(axis) == classes
    off, on = tensor(values).unbind(0)
    return torch.where(hit, on, off)


def _counted_from_front(indices: Tensor, size: Any) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)


@translates("ReverseSequence")
def _reverse_sequence(node: Node, x: Value, lengths: Value) -> Tensor:
    raise node.refusal(
        "sequences of lengths that are data are not supported; reverse whole sequences with Slice"
    )
