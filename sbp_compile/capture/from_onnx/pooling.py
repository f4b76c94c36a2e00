"""Windows over positions: averages, maxima, norms; and those over all positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.layers import border, is_even, padded, spatial_axes
from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Value, tensor

_AVERAGES: Sequence[Callable[..., Tensor]] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMA: Sequence[Callable[..., Tensor]] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _window(node: Node, x: Tensor) -> tuple[int, list[int], list[int], list[int], list[tuple[Any, Any]]]:
    """Return axes, kernel, stride, dilation and padding."""
    axes = spatial_axes(node, x)
    kernel = node.get("kernel_shape")
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    return axes, kernel, stride, dilation, border(node, x, kernel, stride, dilation)


def _fits(pads: Sequence[tuple[Any, Any]], kernel: Sequence[int]) -> bool:
    """Whether torch's own padding will do: even, and of at most half a window."""
    return is_even(pads) and all(0 <= low <= size // 2 for (low, _), size in zip(pads, kernel, strict=True))


@translates("MaxPool")
def _max_pool(node: Node, x: Value) -> Any:
    value = tensor(x)
    if node.get("storage_order", 0):
        raise node.refusal("storage_order 1 (column major indices) is not supported")
    axes, kernel, stride, dilation, pads = _window(node, value)
    if node.wants(1):
        raise node.refusal("its indices are used; only its values are supported")
    if not _fits(pads, kernel):
        lowest = float("-inf") if value.is_floating_point() else torch.iinfo(value.dtype).min
        value, pads = padded(value, pads, lowest), [(0, 0)] * axes
    padding, ceil = [low for low, _ in pads], bool(node.get("ceil_mode", 0))
    return _MAXIMA[axes - 1](value, kernel, stride, padding, dilation, ceil)


@translates("AveragePool")
def _average_pool(node: Node, x: Value) -> Tensor:
    """Average; where torch cannot pad so, the padding is made before, and divided by the count of real entries."""
    value = tensor(x)
    axes, kernel, stride, dilation, pads = _window(node, value)
    if any(spread != 1 for spread in dilation):
        raise node.refusal(f"dilations {list(dilation)} are not supported, only 1")
    ceil, counted = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    pool = _AVERAGES[axes - 1]
    if _fits(pads, kernel):
        return pool(value, kernel, stride, [low for low, _ in pads], ceil, counted)
    result = pool(padded(value, pads), kernel, stride, 0, ceil)
    if counted:
        return result
    ones = torch.ones([1, 1, *value.shape[2:]], dtype=value.dtype)
    return result / pool(padded(ones, pads), kernel, stride, 0, ceil)


@translates("LpPool")
def _lp_pool(node: Node, x: Value) -> Tensor:
    value, order = tensor(x), node.get("p", 2)
    axes, kernel, stride, dilation, pads = _window(node, value)
    if any(spread != 1 for spread in dilation):
        raise node.refusal(f"dilations {list(dilation)} are not supported, only 1")
    count = 1
    for size in kernel:
        count *= size
    powers = padded(value.abs() ** order, pads)
    means = _AVERAGES[axes - 1](powers, kernel, stride, 0, bool(node.get("ceil_mode", 0)))
    return torch.pow(means * count, 1 / order)


def _positions(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


@translates("GlobalAveragePool")
def _global_average_pool(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    return value.mean(_positions(value), keepdim=True)


@translates("GlobalMaxPool")
def _global_max_pool(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    return value.amax(_positions(value), keepdim=True)


@translates("GlobalLpPool")
def _global_lp_pool(node: Node, x: Value) -> Tensor:
    value, order = tensor(x), node.get("p", 2)
    return torch.pow((value.abs() ** order).sum(_positions(value), keepdim=True), 1 / order)
