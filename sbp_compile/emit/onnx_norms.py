"""x * scale + shift for each channel as one batch normalisation, which onnxruntime merges and runs on blocked channels.

As a product and a sum it leaves the blocked layout, and neither is fused with an activation behind
(docs/results/channel-scales.md). Mean 0, variance 1 and epsilon 0 leave scale and shift exactly as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from sbp_compile.emit.onnx_names import fresh_name

RANK = 4


def normalise_channels(graph: gs.Graph) -> None:
    """Replace such a product and sum of images, where nothing else reads the product."""
    outputs = {id(value) for value in graph.outputs}
    taken = set(graph.tensors())
    for node in graph.nodes:
        if node.op == "Add":
            found = next(_scaled(node, outputs), None)
            if found is not None:
                _replace(node, *found, taken)


def _scaled(add: gs.Node, outputs: set[int]) -> Iterator[tuple[gs.Tensor, np.ndarray, np.ndarray]]:
    """(x, scale, shift) of a sum, in one dtype."""
    for product, other in (add.inputs, add.inputs[::-1]):
        shift = _by_channel(other)
        node = product.inputs[0] if product.inputs else None
        if shift is None or node is None or node.op != "Mul":
            continue
        if len(product.outputs) != 1 or id(product) in outputs:
            continue
        for x, factor in (node.inputs, node.inputs[::-1]):
            scale = _by_channel(factor)
            if scale is not None and scale.shape == shift.shape and _fits(x, scale):
                yield x, scale, shift


def _by_channel(tensor: gs.Tensor) -> np.ndarray | None:
    """The numbers of a constant of shape (channels, 1, 1) or (1, channels, 1, 1)."""
    if not isinstance(tensor, gs.Constant):
        return None
    shape = tuple(tensor.shape)
    if len(shape) == RANK and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != RANK - 1 or shape[1:] != (1, 1):
        return None
    return np.asarray(tensor.values.reshape(-1))


def _fits(x: gs.Tensor, scale: np.ndarray) -> bool:
    return (
        not isinstance(x, gs.Constant)
        and x.shape is not None
        and len(x.shape) == RANK
        and x.shape[1] == scale.size
        and x.dtype == scale.dtype
        and bool(np.issubdtype(scale.dtype, np.floating))
    )


def _replace(add: gs.Node, x: gs.Tensor, scale: np.ndarray, shift: np.ndarray, taken: set[str]) -> None:
    parts = {"scale": scale, "shift": shift, "mean": np.zeros_like(scale), "variance": np.ones_like(scale)}
    constants = []
    for label, values in parts.items():
        constants.append(gs.Constant(fresh_name(f"{add.outputs[0].name}.{label}", taken), values))
    add.op, add.attrs, add.inputs = "BatchNormalization", {"epsilon": 0.0}, [x, *constants]
