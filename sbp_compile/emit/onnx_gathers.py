"""Gathers of columns as gathers of rows, which onnxruntime copies faster.

A gather along the last axis copies entry by entry, for every example anew, about 7 ns each. A transposition takes about
0.3 ns an entry, rows are copied whole, and a matrix product reads its operand transposed at no cost
(docs/results/gathers.md).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

FEWEST_COLUMNS = 64
MOST_TRANSPOSED = 16
"""Entries for each one that is read: beyond, transposing costs more than it saves."""


def gather_rows(graph: gs.Graph) -> None:
    """Transpose what is gathered from and what comes of it, where matrix products alone read it."""
    outputs = {id(value) for value in graph.outputs}
    for node in list(graph.nodes):
        if node.op == "Gather" and _pays(node) and id(node.outputs[0]) not in outputs:
            taken = node.outputs[0]
            products = list(taken.outputs)
            if products and all(_is_product_of(product, taken) for product in products):
                _transpose(graph, node)
                for product in products:
                    product.op, product.attrs = "Gemm", {**product.attrs, "transA": 1}


def _pays(gather: gs.Node) -> bool:
    """Whether it takes enough columns of a matrix, known beforehand."""
    data, index = gather.inputs
    if not isinstance(index, gs.Constant) or len(index.shape) != 1 or isinstance(data, gs.Constant):
        return False
    if data.shape is None or len(data.shape) != 2 or gather.attrs.get("axis", 0) not in {1, -1}:
        return False
    columns, taken = data.shape[1], index.shape[0]
    return isinstance(columns, int) and taken >= FEWEST_COLUMNS and columns <= MOST_TRANSPOSED * taken


def _is_product_of(node: gs.Node, left: gs.Tensor) -> bool:
    """Whether it multiplies `left`, from the left alone and as it lies, with a constant matrix."""
    if node.op not in {"Gemm", "MatMul"} or node.inputs[0] is not left or node.attrs.get("transA"):
        return False
    right = node.inputs[1]
    return isinstance(right, gs.Constant) and len(right.shape) == 2


def _transpose(graph: gs.Graph, gather: gs.Node) -> None:
    data, index = gather.inputs
    taken = gather.outputs[0]
    name = f"{taken.name}.columns"
    while name in graph.tensors():
        name = f"{name}_"
    turned = gs.Variable(name, data.dtype)
    graph.nodes.append(gs.Node("Transpose", f"{gather.name}.columns", {"perm": [1, 0]}, [data], [turned]))
    gather.inputs = [turned, index]
    gather.attrs["axis"] = 0
    taken.shape = None
