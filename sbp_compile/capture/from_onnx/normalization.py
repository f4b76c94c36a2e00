"""Norms, and softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Value, axis_of, optional_tensor, tensor


@translates("BatchNormalization")
def _batch_norm(node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> Tensor:
    if node.get("training_mode", 0):
        raise node.refusal(
            "it is in training mode (statistics of the batch); export the network in eval mode"
        )
    if node.get("spatial", 1) != 1:
        raise node.refusal("spatial=0 is not supported")
    return F.batch_norm(
        tensor(x),
        tensor(mean),
        tensor(variance),
        tensor(scale),
        tensor(bias),
        False,
        0.0,
        node.get("epsilon", 1e-5),
    )


@translates("InstanceNormalization")
def _instance_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    return F.instance_norm(
        tensor(x), None, None, tensor(scale), tensor(bias), True, 0.0, node.get("epsilon", 1e-5)
    )


@translates("LayerNormalization")
def _layer_norm(node: Node, x: Value, scale: Value, bias: Value = None) -> Any:
    value, weight, shift, epsilon = tensor(x), tensor(scale), optional_tensor(bias), node.get("epsilon", 1e-5)
    axis = axis_of(node, node.get("axis", -1), value.ndim)
    shape = list(value.shape[axis:])
    if list(weight.shape) == shape and (shift is None or list(shift.shape) == shape):
        result = F.layer_norm(value, shape, weight, shift, epsilon)
    else:
        result = F.layer_norm(value, shape, None, None, epsilon) * weight
        result = result if shift is None else result + shift
    if not (node.wants(1) or node.wants(2)):
        return result
    axes = list(range(axis, value.ndim))
    spread = value.var(axes, correction=0, keepdim=True)
    return result, value.mean(axes, keepdim=True), torch.rsqrt(spread + epsilon)


@translates("RMSNormalization")
def _rms_norm(node: Node, x: Value, scale: Value) -> Tensor:
    value, weight, epsilon = tensor(x), tensor(scale), node.get("epsilon", 1e-5)
    shape = list(value.shape[axis_of(node, node.get("axis", -1), value.ndim) :])
    if list(weight.shape) == shape:
        return F.rms_norm(value, shape, weight, epsilon)
    return F.rms_norm(value, shape, None, epsilon) * weight


@translates("GroupNormalization")
def _group_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    value, weight, shift, groups = tensor(x), tensor(scale), tensor(bias), node.get("num_groups")
    return F.group_norm(value, groups, weight, shift, node.get("epsilon", 1e-5))


@translates("LpNormalization")
def _lp_normalization(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    norm = torch.linalg.vector_norm(value, node.get("p", 2), dim=node.get("axis", -1), keepdim=True)
    return torch.div(value, norm)


@translates("LRN")
def _local_response_norm(node: Node, x: Value) -> Tensor:
    size = node.get("size")
    if size % 2 == 0:
        raise node.refusal(f"an even size (={size}) is not supported")
    return F.local_response_norm(
        tensor(x), size, node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    )


@translates("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Value) -> Tensor:
    """Take softmax along one axis; before opset 13 along all axes from that one on."""
    value, function = tensor(x), F.softmax if node.op == "Softmax" else F.log_softmax
    axis = axis_of(node, node.get("axis", -1 if node.opset >= 13 else 1), value.ndim)
    if node.opset >= 13 or axis == value.ndim - 1:
        return function(value, axis)
    return function(value.flatten(axis), axis).reshape(value.shape)


@translates("Hardmax")
def _hardmax(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    axis = axis_of(node, node.get("axis", -1 if node.opset >= 13 else 1), value.ndim)
    if node.opset < 13 and axis != value.ndim - 1:
        raise node.refusal("several axes at once are not supported")
    chosen = value.argmax(axis, keepdim=True)
    places = torch.arange(value.shape[axis]).reshape(-1, *[1] * (value.ndim - 1 - axis))
    return (places == chosen).to(value.dtype)
