"""Measure perceptrons over sequences as products of matrices, and as MatMul and Add, in onnxruntime.

python tools/perceptron_cost.py [--write]; sbp_compile/emit/onnx_perceptrons.py writes the first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from cost_table import add_row, asked, finish, graph_model, ratio_cells

from sbp_compile.emit.onnx_perceptrons import flatten_perceptrons
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "perceptrons.md"
BLOCKS = 3
CASES = ((16, 32, 64), (65, 64, 128), (197, 192, 384), (128, 256, 512))
HEADER = f"""\
# Perceptrons over sequences as products of matrices

{BLOCKS} blocks x + linear(act(linear(norm(x)))): time with MatMul and Add, as torch's exporter writes a linear layer of
a sequence, over the time with Gemm on all positions at once (sbp_compile/emit/onnx_perceptrons.py); above 1 that is
faster. onnxruntime {{onnxruntime}}, one thread, {{processor}}.

Command: `python tools/perceptron_cost.py --write`

| positions | channels | hidden | act | batch | faster | 95% interval |
|---|---|---|---|---|---|---|
"""


def blocks(positions: int, channels: int, hidden: int, act: str, flat: bool) -> bytes:
    """The network as an ONNX model, float32."""
    generator = np.random.default_rng(0)
    nodes: list[gs.Node] = []

    def call(operator: str, *inputs: gs.Tensor, size: int = channels, **attributes: int) -> gs.Tensor:
        result = gs.Variable(f"v{len(nodes)}", dtype=np.float32, shape=("batch", positions, size))
        nodes.append(gs.Node(operator, result.name, attributes, list(inputs), [result]))
        return result

    def constant(*sizes: int) -> gs.Constant:
        values = generator.standard_normal(sizes).astype(np.float32) / np.sqrt(sizes[0])
        return gs.Constant(f"c{len(nodes)}_{len(sizes)}", values.astype(np.float32))

    x = value = gs.Variable("x", dtype=np.float32, shape=("batch", positions, channels))
    for _ in range(BLOCKS):
        scale = gs.Constant(f"scale{len(nodes)}", np.ones(channels, np.float32))
        inner = call("LayerNormalization", value, scale, axis=-1)
        inner = call(
            "Add",
            call("MatMul", inner, constant(channels, hidden), size=hidden),
            constant(hidden),
            size=hidden,
        )
        inner = call(act, inner, size=hidden)
        inner = call("Add", call("MatMul", inner, constant(hidden, channels)), constant(channels))
        value = call("Add", value, inner)
    graph = gs.Graph(nodes, [x], [value], opset=20)
    if flat:
        flatten_perceptrons(graph)
    return graph_model(graph)


def main() -> None:
    """Measure and print, or write, the table."""
    options = asked(__doc__, 2.0)
    rows: list[str] = []
    for case in CASES:
        for act in ("Gelu", "Relu"):
            models = {str(flat): blocks(*case, act, flat) for flat in (False, True)}
            for batch in (1, 16):
                found = compare(models, batch=batch, budget_s=options.budget).ratios[0]
                add_row(rows, (*case, act.lower(), batch, *ratio_cells(found)))
    finish(options, RESULT, HEADER.format(**environment()), rows)


if __name__ == "__main__":
    main()
