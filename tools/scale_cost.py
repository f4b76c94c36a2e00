"""Measure a scale and a shift of each channel behind a sum of two layers: product and sum, or one batch normalisation.

python tools/scale_cost.py [--write]; sbp_compile/emit/onnx_norms.py writes the second.
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

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "channel-scales.md"
CHANNELS, SIZES, BATCHES = (30, 32, 64), (8, 32), (1, 16)
BLOCKS = 3
HEADER = """\
# A scale and a shift of each channel, as two nodes or one

{blocks} blocks of relu(scale * (conv(x) + conv(x)) + shift), 3x3 and 1x1, n channels; time with Mul and Add over the
time with a BatchNormalization of mean 0, variance 1 and epsilon 0; above 1 that is faster. onnxruntime {onnxruntime},
one thread, {processor}.

Command: `python tools/scale_cost.py --write`

| n | size | batch | one node | 95% interval |
|---|---|---|---|---|
"""


def network(channels: int, size: int, one_node: bool) -> bytes:
    """The blocks as an ONNX model, float32."""
    random, nodes, constants = np.random.default_rng(0), list[Any](), list[Any]()

    def vector(*shape: int) -> str:
        values = random.standard_normal(shape, dtype=np.float32) / np.sqrt(
            np.prod(shape[1:], dtype=np.float32)
        )
        return constant(values)

    def constant(values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, np.float32), f"c{len(constants)}"))
        return str(constants[-1].name)

    def call(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    last = "x"
    for _ in range(BLOCKS):
        wide = call("Conv", last, vector(channels, channels, 3, 3), pads=[1, 1, 1, 1])
        both = call("Add", wide, call("Conv", last, vector(channels, channels, 1, 1)))
        scale, shift = random.standard_normal((2, channels), dtype=np.float32)
        if one_node:
            rest = np.zeros(channels), np.ones(channels)
            parts = [constant(values) for values in (scale, shift, *rest)]
            last = call("BatchNormalization", both, *parts, epsilon=0.0)
        else:
            product = call("Mul", both, constant(scale.reshape(-1, 1, 1)))
            last = call("Add", product, constant(shift.reshape(-1, 1, 1)))
        last = call("Relu", last)
    nodes[-1].output[0] = "y"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, size, size])
        for name in "xy"
    ]
    graph = helper.make_graph(nodes, "scales", values[:1], values[1:], constants)
    return checked(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def main() -> None:
    """Measure and print, or write, the table."""
    options = asked(__doc__, 3.0)
    rows: list[str] = []
    for channels in CHANNELS:
        for size in SIZES:
            models = {str(one): network(channels, size, one) for one in (False, True)}
            for batch in BATCHES:
                found = compare(models, batch=batch, budget_s=options.budget).ratios[0]
                add_row(rows, (channels, size, batch, *ratio_cells(found)))
    finish(options, RESULT, HEADER.format(**environment(), blocks=BLOCKS), rows)


if __name__ == "__main__":
    main()
