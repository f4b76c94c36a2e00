"""Layers with weights: convolutions and products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Value, optional_tensor, tensor

_CONVOLUTIONS: Sequence[Callable[..., Tensor]] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: Sequence[Callable[..., Tensor]] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def spatial_axes(node: Node, x: Tensor) -> int:
    """Return the number of spatial axes; torch has layers for one to three."""
    axes = x.ndim - 2
    if not 1 <= axes <= 3:
        raise node.refusal(f"its operand has {x.ndim} axes; convolutions and pools of 3 to 5 axes are read")
    return axes


def border(
    node: Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[Any, Any]]:
    """Return the padding in front of and behind each spatial axis, from `pads` or `auto_pad`."""
    axes = len(kernel)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.get("pads") or [0] * (2 * axes)
        return list(zip(pads[:axes], pads[axes:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * axes
    found = []
    for size, window, step, spread in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        reach = spread * (window - 1) + 1
        total: Any = reach - 1
        if step != 1:
            total = torch.sym_max(((size + step - 1) // step - 1) * step + reach - size, 0)  # type: ignore[no-untyped-call]
        small = total // 2
        found.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return found


def padded(x: Tensor, pads: Sequence[tuple[Any, Any]], value: float = 0.0) -> Tensor:
    """Pad the last axes with a constant."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return F.pad(x, flat, value=value)


def is_even(pads: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the padding is the same at both ends of each axis."""
    return all(low == high for low, high in pads)


@translates("Conv")
def _convolve(node: Node, x: Value, w: Value, b: Value = None) -> Tensor:
    value, weight, bias = tensor(x), tensor(w), optional_tensor(b)
    axes = spatial_axes(node, value)
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    pads = border(node, value, weight.shape[2:], stride, dilation)
    if not is_even(pads):
        value, pads = padded(value, pads), [(0, 0)] * axes
    padding = [low for low, _ in pads]
    if min(padding) < 0:
        value, padding = padded(value, pads), [0] * axes
    return _CONVOLUTIONS[axes - 1](value, weight, bias, stride, padding, dilation, node.get("group", 1))


@translates("ConvTranspose")
def _convolve_transposed(node: Node, x: Value, w: Value, b: Value = None) -> Tensor:
    value, weight, bias = tensor(x), tensor(w), optional_tensor(b)
    axes = spatial_axes(node, value)
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    extra = node.get("output_padding") or [0] * axes
    group = node.get("group", 1)
    pads = _border_transposed(node, value, weight, stride, dilation, extra)
    call = _TRANSPOSED[axes - 1]
    plain = all(
        step > more or spread > more for step, spread, more in zip(stride, dilation, extra, strict=True)
    )
    if is_even(pads) and plain and all(low >= 0 for low, _ in pads):
        return call(value, weight, bias, stride, [low for low, _ in pads], extra, group, dilation)
    full = call(value, weight, None, stride, 0, 0, group, dilation)
    cropped = padded(full, [(-low, more - high) for (low, high), more in zip(pads, extra, strict=True)])
    return cropped if bias is None else cropped + bias.reshape(-1, *[1] * axes)


def _border_transposed(
    node: Node,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    extra: Sequence[int],
) -> list[tuple[Any, Any]]:
    """Return what is cut off in front and behind: `pads`, or what `output_shape` and `auto_pad` ask for."""
    wanted, mode = node.get("output_shape"), node.get("auto_pad", "NOTSET")
    if wanted is None and mode in {"NOTSET", "VALID"}:
        return border(node, x, weight.shape[2:], stride, dilation)
    found = []
    for axis, (size, window, step, spread, more) in enumerate(
        zip(x.shape[2:], weight.shape[2:], stride, dilation, extra, strict=True)
    ):
        goal: Any = size * step if wanted is None else wanted[len(wanted) - (x.ndim - 2) + axis]
        total = step * (size - 1) + more + (window - 1) * spread + 1 - goal
        small = total // 2
        found.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return found


@translates("Gemm")
def _gemm(node: Node, a: Value, b: Value, c: Value = None) -> Tensor:
    """Compute alpha A B + beta C; a linear layer, where the weights are the file's."""
    left, right, bias = tensor(a), tensor(b), optional_tensor(c)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    left = left.t() if node.get("transA", 0) else left
    weight = right if node.get("transB", 0) else right.t()
    weight = weight if alpha == 1.0 else weight * alpha
    if bias is not None and beta != 1.0:
        bias = bias * beta
    rows = weight.shape[0]
    if bias is not None and node.is_constant(2) and tuple(bias.shape) in {(rows,), (1, rows)}:
        return F.linear(left, weight, bias.reshape(-1))
    result = F.linear(left, weight)
    return result if bias is None else result + bias


@translates("MatMul")
def _product(node: Node, a: Value, b: Value) -> Tensor:
    left, right = tensor(a), tensor(b)
    if node.is_constant(1) and right.ndim == 2 and left.ndim >= 1:
        return F.linear(left, right.t())
    return torch.matmul(left, right)


@translates("Einsum")
def _einsum(node: Node, *operands: Value) -> Tensor:
    return torch.einsum(node.get("equation", ""), *map(tensor, operands))
