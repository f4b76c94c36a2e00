"""Linear layers of sequences that follow each other position by position, on one matrix of all positions.

    x (batch, positions, n) -> MatMul, Add -> Gelu -> MatMul, Add -> y              becomes
    x -> Reshape (batch * positions, n) -> Gemm -> Gelu -> Gemm -> Reshape -> y

onnxruntime adds a bias within Gemm, which takes matrices only, and else in a pass over all entries of its own
(docs/results/perceptrons.md). A layer alone stays as it is: it would pay for both reshapes, and may be part of another
fusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from sbp_compile.emit.onnx_names import fresh_name

POINTWISE = frozenset(
    {"Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Mul",
     "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh"}
)  # fmt: skip
DTYPES = (np.float32, np.float64)
FEWEST_AXES = 3


@dataclass(frozen=True, eq=False)
class _Layer:
    """A product with a constant matrix and the sum with a constant vector behind it, if there is one."""

    product: gs.Node
    sum: gs.Node | None
    bias: gs.Constant | None

    @property
    def x(self) -> gs.Tensor:
        return self.product.inputs[0]

    @property
    def weight(self) -> gs.Constant:
        return self.product.inputs[1]

    @property
    def last(self) -> gs.Node:
        return self.product if self.sum is None else self.sum

    @property
    def result(self) -> gs.Tensor:
        return self.last.outputs[0]


@dataclass(frozen=True, eq=False)
class _Between:
    """What leads from the results of layers to what one layer reads: those layers, calls, and all values on the way."""

    sources: list[_Layer]
    nodes: list[gs.Node]
    values: list[gs.Tensor]


def flatten_perceptrons(graph: gs.Graph) -> None:
    """Write layers that read what others give, and those others, as products of matrices."""
    outputs = {id(value) for value in graph.outputs}
    layers = {id(layer.product): layer for layer in _layers(graph, outputs)}
    by_last = {id(layer.last): layer for layer in layers.values()}
    found = {
        layer: between for layer in layers.values() if (between := _between(layer.x, by_last)) is not None
    }
    chained = _closed(found, outputs)
    flat = {id(value) for between in chained.values() for value in between.values}
    members = {id(layer.product): layer for layer in chained}
    for between in chained.values():
        members |= {id(layer.product): layer for layer in between.sources}
        for value in between.values:
            value.shape = None
    taken, turned = set(graph.tensors()), dict[int, gs.Tensor]()
    for layer in members.values():
        _write(graph, layer, flat, turned, taken)


def _layers(graph: gs.Graph, outputs: set[int]) -> Iterator[_Layer]:
    for node in graph.nodes:
        if node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant) or not _is_sequence(node):
            continue
        result = node.outputs[0]
        following = result.outputs[0] if len(result.outputs) == 1 and id(result) not in outputs else None
        bias = None if following is None else _bias(following, result, node.inputs[1].shape[1])
        yield _Layer(node, None if bias is None else following, bias)


def _is_sequence(product: gs.Node) -> bool:
    """Whether it multiplies more than a matrix, all sizes but one known, with a constant matrix."""
    x, weight, result = product.inputs[0], product.inputs[1], product.outputs[0]
    if isinstance(x, gs.Constant) or len(weight.shape) != 2 or weight.dtype not in DTYPES:
        return False
    if (
        x.shape is None
        or result.shape is None
        or len(x.shape) < FEWEST_AXES
        or len(result.shape) != len(x.shape)
    ):
        return False
    return (
        list(x.shape[:-1]) == list(result.shape[:-1])
        and _dynamic(result.shape) <= 1
        and result.shape[-1] == weight.shape[1]
    )


def _dynamic(shape: Sequence[int | str]) -> int:
    return sum(not isinstance(size, int) for size in shape)


def _bias(node: gs.Node, result: gs.Tensor, channels: int) -> gs.Constant | None:
    if node.op != "Add":
        return None
    other = (
        next(value for value in node.inputs if value is not result)
        if len({*map(id, node.inputs)}) == 2
        else None
    )
    fits = isinstance(other, gs.Constant) and list(other.shape) == [channels]
    return other if fits else None


def _between(x: gs.Tensor, by_last: dict[int, _Layer]) -> _Between | None:
    """What a layer's input comes from, if by pointwise calls from layers alone."""
    found = _Between([], [], [])
    pending, seen = [x], {id(x)}
    while pending:
        value = pending.pop()
        node = value.inputs[0] if value.inputs else None
        if node is None:
            return None
        found.values.append(value)
        if id(node) in by_last:
            found.sources.append(by_last[id(node)])
            continue
        operands = _operands(node, value)
        if not operands:
            return None
        found.nodes.append(node)
        pending += [operand for operand in operands if id(operand) not in seen]
        seen |= {id(operand) for operand in operands}
    return found


def _operands(node: gs.Node, result: gs.Tensor) -> list[gs.Tensor]:
    """The values that a pointwise call combines entry by entry; none where it does something else as well."""
    if node.op not in POINTWISE or result.shape is None:
        return []
    present = [value for value in node.inputs if not value.is_empty()]
    values = [value for value in present if not isinstance(value, gs.Constant)]
    vectors = all(len(value.shape) <= 1 for value in present if isinstance(value, gs.Constant))
    alike = all(value.shape is not None and list(value.shape) == list(result.shape) for value in values)
    return values if vectors and alike else []


def _closed(found: dict[_Layer, _Between], outputs: set[int]) -> dict[_Layer, _Between]:
    """Those layers between which and their sources nothing else reads a value."""
    while True:
        inside = {id(node) for between in found.values() for node in between.nodes}
        inside |= {id(layer.product) for layer in found}
        left = {
            layer: between
            for layer, between in found.items()
            if all(
                id(value) not in outputs and all(id(reader) in inside for reader in value.outputs)
                for value in between.values
            )
        }
        if len(left) == len(found):
            return left
        found = left


def _write(
    graph: gs.Graph, layer: _Layer, flat: set[int], turned: dict[int, gs.Tensor], taken: set[str]
) -> None:
    """One layer as Gemm, with the reshapes that it needs in front and behind."""
    x, result = layer.x, layer.result
    if id(x) not in flat:
        if id(x) not in turned:
            turned[id(x)] = _reshape(graph, x, [-1, layer.weight.shape[0]], f"{x.name}.rows", taken)
        x = turned[id(x)]
    operands = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
    layer.product.outputs.clear()
    layer.last.outputs.clear()
    name = f"{layer.product.name}.rows"
    if id(result) in flat:
        graph.nodes.append(gs.Node("Gemm", name, inputs=operands, outputs=[result]))
        return
    rows = gs.Variable(fresh_name(f"{result.name}.rows", taken), dtype=result.dtype)
    graph.nodes.append(gs.Node("Gemm", name, inputs=operands, outputs=[rows]))
    sizes = [size if isinstance(size, int) else -1 for size in result.shape]
    _reshape(graph, rows, sizes, result, taken)


def _reshape(
    graph: gs.Graph, x: gs.Tensor, sizes: list[int], result: gs.Tensor | str, taken: set[str]
) -> gs.Tensor:
    """A reshape of x to a value, or to a new one of that name."""
    if isinstance(result, str):
        result = gs.Variable(fresh_name(result, taken), dtype=x.dtype)
    shape = gs.Constant(fresh_name(f"{result.name}.sizes", taken), np.array(sizes, np.int64))
    graph.nodes.append(gs.Node("Reshape", f"{result.name}.reshape", inputs=[x, shape], outputs=[result]))
    return result
