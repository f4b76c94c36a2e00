"""Transposed convolutions whose output padding reaches the stride, which torch has (up to the dilation) and ONNX not.

Output padding lets the result go on at its end: as many entries less are cut off there. Where fewer are cut off to
begin with, a zero tap at the end of the kernel adds `dilation` entries, of the bias alone.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs


def spell_output_padding(graph: gs.Graph) -> None:
    """Give such layers pads that differ on both sides in the place of output padding."""
    for node in graph.nodes:
        if node.op == "ConvTranspose" and isinstance(node.inputs[1], gs.Constant):
            _spell(node)


def _spell(node: gs.Node) -> None:
    weight: np.ndarray = node.inputs[1].values
    rank = weight.ndim - 2
    added = list(node.attrs.get("output_padding", [0] * rank))
    strides = node.attrs.get("strides", [1] * rank)
    if all(more < stride for more, stride in zip(added, strides, strict=True)):
        return
    dilations = node.attrs.get("dilations", [1] * rank)
    pads = list(node.attrs.get("pads", [0] * 2 * rank))
    taps = [0] * rank
    for axis, more in enumerate(added):
        if pads[rank + axis] < more:
            taps[axis] = 1
            pads[rank + axis] += dilations[axis]
        pads[rank + axis] -= more
    if any(taps):
        widths = [(0, 0), (0, 0), *((0, more) for more in taps)]
        name = f"{node.inputs[1].name}.{node.name}"
        node.inputs[1] = gs.Constant(name, np.pad(weight, widths))
    node.attrs.pop("output_padding")
    node.attrs.update(pads=pads, kernel_shape=list(node.inputs[1].values.shape[2:]))
