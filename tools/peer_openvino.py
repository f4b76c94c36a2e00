"""OpenVINO's pruning transformation on the ONNX file, and its result written back to ONNX where that is possible.

The transformation removes channels that are zero. It works on OpenVINO's own graph, whose operations keep the names of
the ONNX nodes: that is how smaller weights find their way back. The result is measured in OpenVINO; the file that comes
of writing it back counts only if onnxruntime computes the same with it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from peer_case import Case, Outcome, worst
from torch import Tensor

SETTINGS = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
WITHOUT_BIAS = "/WithoutBiases"


def pruning(case: Case) -> Outcome:
    """`openvino.convert_model`, then `apply_pruning_transformation`."""
    openvino: Any = importlib.import_module("openvino")
    transformations: Any = importlib.import_module("openvino._offline_transformations")
    source = case.folded_onnx()
    path = case.folder / "source.onnx"
    onnx.save_model(source, str(path))
    model = openvino.convert_model(path)
    transformations.apply_pruning_transformation(model)
    compiled = openvino.compile_model(model, "CPU", SETTINGS)
    found = [_run(compiled, entry) for entry in case.inputs32]
    error = worst(case.references, found)
    row = {
        "error": error,
        "bound": case.bound32,
        "measured": "float32, OpenVINO",
        "macs": sum(_macs(op) for op in model.get_ops()),
        "parameters": _parameters(model),
    }
    written = written_back(source, model)
    try:
        same = abs(case.error_of_file(written) - error) <= case.bound32
    except Exception:  # what onnxruntime makes of shapes that do not fit
        same = False
    return Outcome(model=written if same else None, row=row, note="" if same else "not written back to ONNX")


def _run(compiled: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.tensor(value) for value in compiled([value.numpy() for value in inputs]).values()]


def _parameters(model: Any) -> int:
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(math.prod(op.get_output_shape(0)) for op in constants if op.get_element_type().is_real())


def _macs(op: Any) -> int:
    count = COUNTS.get(op.get_type_name())
    if count is None:
        return 0
    return count(op, [op.get_input_shape(position) for position in range(op.get_input_size())])


def _matmul(op: Any, shapes: Sequence[Sequence[int]]) -> int:
    inner = shapes[0][-2 if op.get_attributes()["transpose_a"] else -1]
    return int(math.prod(op.get_output_shape(0)) * inner)


def _attention(op: Any, shapes: Sequence[Sequence[int]]) -> int:
    query, key, value = shapes[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(op: Any, shapes: Sequence[Sequence[int]]) -> int:
    """Input [batch, steps, inputs]; the two weights are the operands of three axes behind the states."""
    weights = [shape for shape in shapes[2:] if len(shape) == 3][-2:]
    return math.prod(shapes[0][:2]) * sum(map(math.prod, weights))


COUNTS: dict[str, Callable[[Any, Sequence[Sequence[int]]], int]] = {
    "Convolution": lambda op, shapes: math.prod(op.get_output_shape(0)) * math.prod(shapes[1][1:]),
    "GroupConvolution": lambda op, shapes: math.prod(op.get_output_shape(0)) * math.prod(shapes[1][2:]),
    "ConvolutionBackpropData": lambda op, shapes: math.prod(shapes[0]) * math.prod(shapes[1][1:]),
    "GroupConvolutionBackpropData": lambda op, shapes: math.prod(shapes[0]) * math.prod(shapes[1][2:]),
    "MatMul": _matmul,
    "ScaledDotProductAttention": _attention,
    "LSTMSequence": _recurrent,
    "GRUSequence": _recurrent,
}


def written_back(source: onnx.ModelProto, model: Any) -> onnx.ModelProto:
    """Return the ONNX model with the constants that OpenVINO's operations of the same names have now."""
    result = onnx.ModelProto()
    result.CopyFrom(source)
    tensors = {entry.name: entry for entry in result.graph.initializer}
    operations = {op.get_friendly_name().removesuffix(WITHOUT_BIAS): op for op in _sources(model)}
    for node in result.graph.node:
        op = operations.get(node.name)
        for position, name in enumerate(node.input):
            if op is not None and name in tensors:
                _replace(tensors[name], _constant(op, position))
        if op is not None and op.get_type_name() == "GroupConvolution":
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = op.get_input_shape(1)[0]
    del result.graph.value_info[:]
    return result


def _sources(model: Any) -> Iterator[Any]:
    """Operations, those without a bias last: they win where an Add has taken their name."""
    ops = list(model.get_ops())
    yield from (op for op in ops if not op.get_friendly_name().endswith(WITHOUT_BIAS))
    yield from (op for op in ops if op.get_friendly_name().endswith(WITHOUT_BIAS))


def _constant(op: Any, position: int) -> np.ndarray | None:
    """Return an operand that is constant; the third one of a layer is what is added behind it."""
    if position < op.get_input_size():
        return _value(op.input_value(position).get_node())
    for target in op.output(0).get_target_inputs():
        behind = target.get_node()
        if behind.get_type_name() == "Add":
            for value in behind.input_values():
                found = _value(value.get_node())
                if found is not None:
                    return found.reshape(-1)
    return None


def _value(node: Any) -> np.ndarray | None:
    return np.array(node.get_data()) if node.get_type_name() == "Constant" else None


def _replace(tensor: onnx.TensorProto, value: np.ndarray | None) -> None:
    old = numpy_helper.to_array(tensor)
    if value is None or value.dtype != old.dtype:
        return
    if value.ndim == old.ndim + 1:  # the groups of a grouped convolution
        value = value.reshape(-1, *value.shape[2:])
    if value.ndim == old.ndim:
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
