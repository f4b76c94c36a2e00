"""Layers as ONNX models of their own, to be timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from passes.targets import Layer

IR_VERSION, OPSET = 10, 20


@dataclass(frozen=True)
class Shape:
    """What a Layer leaves open: the kernel's sizes, and over how many positions it runs along each axis."""

    kernel: tuple[int, ...]
    positions: tuple[int, ...]


def shape_of(layer: Layer) -> Shape | None:
    """Square kernels and nearly square images of as many positions; None where there is no such kernel."""
    if layer.spatial_rank == 0:
        return Shape((), (layer.positions,))
    side = round(layer.taps ** (1 / layer.spatial_rank))
    kernel = (side,) * layer.spatial_rank
    if side**layer.spatial_rank != layer.taps:
        kernel = (*(1,) * (layer.spatial_rank - 1), layer.taps)
    if layer.spatial_rank == 1:
        return Shape(kernel, (layer.positions,))
    if layer.spatial_rank > 2 or layer.is_transposed:
        return None
    height = next(size for size in range(math.isqrt(layer.positions), 0, -1) if not layer.positions % size)
    return Shape(kernel, (height, layer.positions // height))


def layer_model(layers: Sequence[tuple[Layer, int, int]], batch: int) -> bytes:
    """Layers one after the other with relus between them, as an ONNX model.

    Each layer: with its input and output channels. Raises ValueError where `shape_of` gives None.
    """
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    value = "x"
    for number, (layer, inputs, outputs) in enumerate(layers):
        shape = shape_of(layer)
        if shape is None:
            raise ValueError(f"{layer} has no model")
        name = f"layer_{number}"
        groups = inputs if layer.is_depthwise else layer.groups
        weight = generator.standard_normal((outputs, inputs // groups, *shape.kernel))
        bias = np.zeros(outputs)
        for suffix, array in (("weight", weight / math.sqrt(weight[0].size)), ("bias", bias)):
            weights.append(onnx.numpy_helper.from_array(array.astype(np.float32), f"{name}_{suffix}"))
        operands = [value, f"{name}_weight", f"{name}_bias"]
        operator, attributes = _operator(shape, groups)
        value = f"{name}_relu"
        nodes.append(helper.make_node(operator, operands, [name], **attributes))
        nodes.append(helper.make_node("Relu", [name], [value]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in (
            ("x", input_sizes(layers[0][0], layers[0][1], batch)),
            (value, input_sizes(layers[-1][0], layers[-1][2], batch)),
        )
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", OPSET)
    content: bytes = helper.make_model(
        graph, opset_imports=[opset], ir_version=IR_VERSION
    ).SerializeToString()
    return content


def _operator(shape: Shape, groups: int) -> tuple[str, dict[str, Any]]:
    """The operator and its attributes; an even kernel is padded so that as many positions come out."""
    if not shape.kernel:
        return "Gemm", {"transB": 1}
    pads = [(size - 1) // 2 for size in shape.kernel] + [size // 2 for size in shape.kernel]
    return "Conv", {"group": groups, "pads": pads}


def input_sizes(layer: Layer, channels: int, batch: int) -> tuple[int, ...]:
    """The shape of what a layer takes or gives."""
    shape = shape_of(layer)
    assert shape is not None
    if not shape.kernel:
        return batch * layer.positions, channels
    return batch, channels, *shape.positions
