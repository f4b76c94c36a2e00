"""Measure pools and concatenations of channels that fill their blocks, and of fewer that do not; and opsets.

python tools/pool_cost.py [--write]; passes/network.py and passes/targets.py go by it, and emit/onnx_file.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from cost_table import add_row, asked, checked, finish, ratio_cells

from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "pools.md"
KINDS = ("MaxPool", "AveragePool", "Concat")
FEW, WHOLE = 20, 32
SIZES, BATCHES = (16, 56), (1, 16)
BLOCKS = 3
HEADER = """\
# Pools and concatenations, and the channels that fill a block

{blocks} blocks of a 1x1 convolution and a 3x3 pool, or of two convolutions and their concatenation, {few} or {whole}
channels each. They stay packed through both only where they fill whole blocks (16 channels with AVX-512).
"fills": time with {few} channels over the time with {whole}, in opset 18; above 1 more channels are faster.
"opset": with {few} channels, time in opset 20 over the time in opset 18; above 1 the older one is faster.
onnxruntime {onnxruntime}, one thread, {processor}.

Command: `python tools/pool_cost.py --write`

| call | size | batch | fills | 95% interval | opset | 95% interval |
|---|---|---|---|---|---|---|
"""


def network(kind: str, channels: int, size: int, opset: int) -> bytes:
    """The blocks as an ONNX model, float32."""
    random, nodes, constants = np.random.default_rng(0), list[Any](), list[Any]()

    def layer(x: str, inputs: int) -> str:
        values = random.standard_normal((channels, inputs, 1, 1), dtype=np.float32) / np.sqrt(inputs)
        constants.append(numpy_helper.from_array(values.astype(np.float32), f"c{len(constants)}"))
        return call("Conv", x, str(constants[-1].name))

    def call(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [f"v{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    last, inputs = "x", channels
    for _ in range(BLOCKS):
        if kind == "Concat":
            last, inputs = call(kind, layer(last, inputs), layer(last, inputs), axis=1), 2 * channels
        else:
            last = call(kind, layer(last, inputs), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    layer(last, inputs)
    nodes[-1].output[0] = "y"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, size, size])
        for name in "xy"
    ]
    graph = helper.make_graph(nodes, "pools", values[:1], values[1:], constants)
    return checked(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def main() -> None:
    """Measure and print, or write, the table."""
    options = asked(__doc__, 3.0)
    rows: list[str] = []
    for kind in KINDS:
        for size in SIZES:
            few, whole = network(kind, FEW, size, 18), network(kind, WHOLE, size, 18)
            pairs = {"few": few, "whole": whole}, {"new": network(kind, FEW, size, 20), "old": few}
            for batch in BATCHES:
                cells: list[object] = [kind, size, batch]
                for models in pairs:
                    found = compare(models, batch=batch, budget_s=options.budget / 2).ratios[0]
                    cells += ratio_cells(found)
                add_row(rows, cells)
    finish(options, RESULT, HEADER.format(**environment(), blocks=BLOCKS, few=FEW, whole=WHOLE), rows)


if __name__ == "__main__":
    main()
