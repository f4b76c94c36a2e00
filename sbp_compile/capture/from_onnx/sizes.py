"""Calls on numbers that are known at capture: ONNX's own reference where all are plain, Python where sizes are symbols.

What only moves entries is run by the reference on the entries' positions, so it needs no second definition here.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from sbp_compile.capture.from_onnx.node import ONNX_DOMAINS, Node
from sbp_compile.capture.from_onnx.tensors import DTYPES
from sbp_compile.capture.from_onnx.values import (
    MOST_KNOWN,
    MOST_KNOWN_FLOATS,
    Known,
    from_objects,
    numpy_dtype,
    torch_dtype,
)

_TO_ONNX = {dtype: kind for kind, dtype in DTYPES.items()}
_GROWS = frozenset(
    {"ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "EyeLike", "Pad", "Resize", "Upsample"}
)
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})


def evaluate(node: Node, proto: onnx.NodeProto, operands: Sequence[Known | None]) -> list[Known] | None:
    """Return the results of a call on known numbers; None where tensors must be made of them first."""
    if node.domain not in ONNX_DOMAINS or node.op in _RANDOM or _grows_too_much(node, operands):
        return None
    present = [operand for operand in operands if operand is not None]
    if not any(operand.is_symbolic for operand in present):
        return _by_reference(node, proto, operands)
    if node.op in _MOVES and all(not operand.is_symbolic for operand in present[1:]):
        return _moved(node, proto, operands, 1)
    if node.op == "Concat":
        return _moved(node, proto, operands, len(operands))
    if node.op in _ON_SYMBOLS:
        return _ON_SYMBOLS[node.op](node, present)
    return None


def _grows_too_much(node: Node, operands: Sequence[Known | None]) -> bool:
    """Whether the result may be far larger than the operands, which hold its sizes then."""
    if sum(operand.entries.size for operand in operands if operand is not None) > 2 * MOST_KNOWN:
        return True
    if node.op not in _GROWS or node.op in {"Pad", "Resize", "Upsample"}:
        return node.op in _GROWS
    if any(operand.is_symbolic for operand in operands if operand is not None):
        return node.op != "Expand"
    held = [operand.numbers for operand in operands if operand is not None]
    if node.op == "Range":
        start, limit, step = (float(part[0]) for part in held)
        return step == 0 or abs(limit - start) / abs(step) > MOST_KNOWN
    factors = held[-1] if node.op != "OneHot" else held[1]
    return math.prod(max(int(factor), 1) for factor in factors) > MOST_KNOWN


def _by_reference(node: Node, proto: onnx.NodeProto, operands: Sequence[Known | None]) -> list[Known] | None:
    arrays = [None if operand is None else operand.entries for operand in operands]
    kinds = [None if operand is None else _TO_ONNX[operand.dtype] for operand in operands]
    results = _reference(node, proto, arrays, kinds)
    if results is None:
        return None
    found = []
    for result in results:
        array = np.asarray(result)
        dtype = torch_dtype(array.dtype)
        if dtype is None or array.size > (MOST_KNOWN_FLOATS if array.dtype.kind == "f" else MOST_KNOWN):
            return None
        found.append(Known(array, dtype))
    return found


def _reference(
    node: Node, proto: onnx.NodeProto, arrays: Sequence[Any], kinds: Sequence[int | None]
) -> list[Any] | None:
    """Return what ONNX's reference gives for one call; None where it has nothing to say."""
    inputs = [
        onnx.helper.make_tensor_value_info(name, kind, None)
        for name, kind in dict(zip(node.inputs, kinds, strict=True)).items()
        if name and kind is not None
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.outputs if name]
    graph = onnx.helper.make_graph([proto], "one", inputs, outputs)
    imports = [onnx.helper.make_opsetid(node.domain, node.opset)]
    feeds = {name: array for name, array in zip(node.inputs, arrays, strict=True) if name}
    try:
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports))
        return list(evaluator.run(None, feeds))
    except (Exception, MemoryError):  # the tensors' own operators will say what is wrong, if something is
        return None


def _moved(
    node: Node, proto: onnx.NodeProto, operands: Sequence[Known | None], data: int
) -> list[Known] | None:
    """Run a call that moves the entries of its first `data` operands on their positions."""
    moved = [operand for operand in operands[:data] if operand is not None]
    rest = list(operands[data:])
    starts = np.cumsum([0, *(operand.entries.size for operand in moved)])
    positions = [
        np.arange(start, start + operand.entries.size, dtype=np.int64).reshape(operand.entries.shape)
        for start, operand in zip(starts, moved, strict=False)
    ]
    arrays = [*positions, *(None if operand is None else operand.entries for operand in rest)]
    kinds = [onnx.TensorProto.INT64] * len(moved)
    kinds += [None if operand is None else _TO_ONNX[operand.dtype] for operand in rest]  # type: ignore[misc]
    results = _reference(node, proto, arrays, kinds)
    if results is None:
        return None
    entries = np.empty(int(starts[-1]), dtype=object)
    entries[:] = [number for operand in moved for number in operand.numbers]
    return [
        from_objects(entries[np.asarray(result)].reshape(np.shape(result)), moved[0].dtype)
        for result in results
    ]


_MOVES = frozenset(
    {
        "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Gather", "Slice", "Split", "Expand", "Flatten",
    }
)  # fmt: skip


def _elementwise(function: Callable[..., Any]) -> Callable[[Node, list[Known]], list[Known]]:
    def run(node: Node, operands: list[Known]) -> list[Known]:
        arrays = [_objects(operand) for operand in operands]
        return [from_objects(_each(function, arrays), operands[0].dtype)]

    return run


def _comparison(function: Callable[..., Any]) -> Callable[[Node, list[Known]], list[Known]]:
    def run(node: Node, operands: list[Known]) -> list[Known]:
        arrays = [_objects(operand) for operand in operands]
        return [from_objects(_each(lambda a, b: bool(function(a, b)), arrays), torch.bool)]

    return run


def _each(function: Callable[..., Any], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Apply a function to each set of entries, with broadcasting."""
    broadcast = np.broadcast_arrays(*arrays) if len(arrays) > 1 else list(arrays)
    result = np.empty(broadcast[0].shape, dtype=object)
    flat = [array.reshape(-1) for array in broadcast]
    result.reshape(-1)[:] = [function(*entries) for entries in zip(*flat, strict=True)]
    return result


def _objects(operand: Known) -> np.ndarray:
    entries = np.empty(operand.entries.shape, dtype=object)
    entries.reshape(-1)[:] = operand.numbers
    return entries


def _divided(node: Node, operands: list[Known]) -> list[Known]:
    """Divide; integers are cut towards zero, which is the floor for sizes."""
    division = operator.truediv if operands[0].dtype.is_floating_point else operator.floordiv
    return _elementwise(division)(node, operands)


def _cast(node: Node, operands: list[Known]) -> list[Known]:
    dtype = DTYPES.get(node.get("to"), torch.int64)
    convert: Callable[[Any], Any] = torch.sym_float if dtype.is_floating_point else torch.sym_int
    if dtype is torch.bool:
        convert = bool
    return [from_objects(_each(convert, [_objects(operands[0])]), dtype)]


def _chosen(node: Node, operands: list[Known]) -> list[Known]:
    arrays = [_objects(operand) for operand in operands]
    return [from_objects(_each(lambda c, a, b: a if bool(c) else b, arrays), operands[1].dtype)]


def _folded(function: Callable[[Any, Any], Any]) -> Callable[[Node, list[Known]], list[Known] | None]:
    """Return a reduction of vectors, the only ones that sizes come in."""

    def run(node: Node, operands: list[Known]) -> list[Known] | None:
        if operands[0].entries.ndim != 1:
            return None
        result = functools.reduce(function, operands[0].numbers)
        entries = np.empty((1,), dtype=object)
        entries[0] = result
        return [from_objects(entries if node.get("keepdims", 1) else entries.reshape(()), operands[0].dtype)]

    return run


def _root(value: Any) -> Any:
    return torch.sym_sqrt(value)


_ON_SYMBOLS: Mapping[str, Callable[[Node, list[Known]], list[Known] | None]] = {
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _divided,
    "Mod": _elementwise(operator.mod),
    "Neg": _elementwise(operator.neg),
    "Abs": _elementwise(abs),
    "Floor": _elementwise(math.floor),
    "Ceil": _elementwise(math.ceil),
    "Sqrt": _elementwise(_root),
    "Max": _elementwise(torch.sym_max),
    "Min": _elementwise(torch.sym_min),
    "Equal": _comparison(operator.eq),
    "Greater": _comparison(operator.gt),
    "GreaterOrEqual": _comparison(operator.ge),
    "Less": _comparison(operator.lt),
    "LessOrEqual": _comparison(operator.le),
    "Cast": _cast,
    "Where": _chosen,
    "ReduceProd": _folded(operator.mul),
    "ReduceSum": _folded(operator.add),
    "ReduceMax": _folded(torch.sym_max),
    "ReduceMin": _folded(torch.sym_min),
}


def shape_of(node: Node, sizes: Sequence[Any]) -> Known:
    """Return the result of Shape, with its `start` and `end`."""
    chosen = list(sizes)[slice(node.get("start", 0), node.get("end"))]
    entries = np.empty((len(chosen),), dtype=object)
    entries[:] = chosen
    return from_objects(entries, torch.int64)


def as_known(array: np.ndarray, dtype: torch.dtype, held: Any = None) -> Known:
    """Return a constant of the file as known numbers."""
    return Known(array.astype(numpy_dtype(dtype), copy=False), dtype, held)
