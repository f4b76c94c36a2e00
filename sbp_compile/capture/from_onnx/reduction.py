"""Reductions over axes, and where their extrema are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.node import TRANSLATIONS, Node, translates
from sbp_compile.capture.from_onnx.values import Value, axis_of, number, numbers, tensor


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep, dtype=x.dtype),
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Value]:
    def run(node: Node, x: Value, axes: Value = None) -> Value:
        value = tensor(x)
        given = node.get("axes") if axes is None else numbers(node, axes, "axes")
        if not given and node.get("noop_with_empty_axes", 0):
            return x
        chosen = [axis_of(node, axis, value.ndim) for axis in given or range(value.ndim)]
        return function(value, chosen, bool(node.get("keepdims", 1))) if chosen else value.clone()

    return run


TRANSLATIONS.update({name: _reduction(function) for name, function in _REDUCTIONS.items()})


@translates("ArgMax", "ArgMin")
def _place(node: Node, x: Value) -> Tensor:
    value, keep = tensor(x), bool(node.get("keepdims", 1))
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not node.get("select_last_index", 0):
        return function(value, axis, keepdim=keep)
    return value.shape[axis] - 1 - function(value.flip(axis), axis, keepdim=keep)


@translates("TopK")
def _top(node: Node, x: Value, count: Value) -> Any:
    value = tensor(x)
    axis = axis_of(node, node.get("axis", -1), value.ndim)
    wanted = number(node, count, "k")
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    return tuple(torch.topk(value, wanted, axis, largest, ordered))


@translates("CumSum")
def _running_sum(node: Node, x: Value, axis: Value) -> Tensor:
    value = tensor(x)
    along = axis_of(node, number(node, axis, "axis"), value.ndim)
    turned = value.flip(along) if node.get("reverse", 0) else value
    total = turned.cumsum(along, dtype=value.dtype)
    total = total - turned if node.get("exclusive", 0) else total
    return total.flip(along) if node.get("reverse", 0) else total
