"""Multiply-adds, parameters and errors of an ONNX model, from the shapes that onnxruntime really sees.

Every contraction's first input and output become outputs of the model, which then runs once: no shape inference has to
succeed, and models of any origin are counted alike. Biases and normalisation are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one run with the given inputs costs: multiply-adds, and the floating-point numbers in the file."""

    macs: int
    parameters: int


def session_of(model: onnx.ModelProto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    """Load a model on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def run(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs; `inputs` in the network's order."""
    return [torch.as_tensor(value) for value in session_of(model).run(None, feeds(model, inputs))]


def cost(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> Cost:
    """Count a model's multiply-adds on these inputs, and its parameters."""
    nodes = [node for node in model.graph.node if node.op_type in CONTRACTIONS]
    shapes = _shapes(model, nodes, inputs)
    macs = sum(CONTRACTIONS[node.op_type](node, shapes) for node in nodes)
    tensors = [*model.graph.initializer, *_constants(model)]
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    return Cost(macs, sum(math.prod(entry.dims) for entry in tensors if entry.data_type in floating))


def _constants(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR
    ]


def feeds(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Match inputs by position, or by `input_names` where a tool has dropped one that nothing reads."""
    taken = [entry.name for entry in model.graph.input]
    names = taken if len(taken) == len(inputs) else input_names(len(inputs))
    given = dict(zip(names, (value.numpy() for value in inputs), strict=True))
    return {name: given[name] for name in taken}


def input_names(count: int) -> list[str]:
    """Return the names under which networks are exported."""
    return [f"input_{position}" for position in range(count)]


def _shapes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], inputs: Sequence[Tensor]
) -> dict[str, Shape]:
    """Return the shape of every operand and result of `nodes`."""
    known = {entry.name: tuple(entry.dims) for entry in model.graph.initializer}
    names = {name for node in nodes for name in (*node.input, *node.output[:1]) if name} - known.keys()
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {entry.name for entry in probe.graph.output}
    fed = {entry.name for entry in probe.graph.input}
    for name in sorted(names - present - fed):
        probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    given = feeds(model, inputs)
    values = session_of(probe, optimize=False).run(None, given)
    known |= {name: value.shape for name, value in given.items()}
    return known | {
        entry.name: np.shape(value) for entry, value in zip(probe.graph.output, values, strict=True)
    }


def _convolution(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _transposed(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _gemm(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _matmul(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _einsum(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    equation = onnx.helper.get_attribute_value(node.attribute[0]).decode()
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sizes |= dict(zip(term, shapes[name], strict=True))
    return math.prod(sizes.values())


def _recurrent(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    """Input [steps, batch, inputs], weights [directions, gates * hidden, inputs] and [..., hidden]."""
    steps, batch = shapes[node.input[0]][:2]
    return steps * batch * sum(math.prod(shapes[name]) for name in node.input[1:3])


CONTRACTIONS: dict[str, Callable[[onnx.NodeProto, dict[str, Shape]], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}


def pin_batch(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> onnx.ModelProto:
    """Give the model's inputs the sizes of these, and drop what was inferred without them."""
    pinned = onnx.ModelProto()
    pinned.CopyFrom(model)
    given = feeds(model, inputs)
    for entry in pinned.graph.input:
        shape = entry.type.tensor_type.shape
        for dimension, size in zip(shape.dim, given[entry.name].shape, strict=True):
            dimension.dim_value = size
    for result in pinned.graph.output:
        for dimension in result.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.ClearField("dim_param")
    del pinned.graph.value_info[:]
    return pinned
