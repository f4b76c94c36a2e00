"""Measure when a gather in front of a linear layer pays: Gather + Gemm + Relu against Gemm + Relu with zero columns.

python tools/gather_cost.py [--write]; `CountingModel` in passes/ir/cost.py is fitted to its table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from passes.ir.cost import CountingModel
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "gather.md"
CASES = ((784, 245, 160), (784, 114, 76), (784, 392, 500), (512, 256, 512), (288, 144, 283), (288, 72, 52))
HEADER = """\
# A gather in front of a linear layer

Time of y = relu(W x + b) with zero columns over the time with a gather of the needed inputs; above 1 the gather is
faster. onnxruntime {onnxruntime}, one thread, {processor}. "taken": what the default cost model decides; it
takes a gather only where it pays at batch 1 and does not cost at batch 64.

Command: `python tools/gather_cost.py --write`

| inputs | needed | outputs | multiply-adds saved | batch 1 | batch 64 | taken |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each cell")
    options = parser.parse_args()
    rows = []
    for inputs, needed, outputs in CASES:
        models = {
            "zeros": network(inputs, needed, outputs, False),
            "gather": network(inputs, needed, outputs, True),
        }
        cells = []
        for batch in (1, 64):
            ratio = compare(models, batch=batch, budget_s=options.budget).ratios[0]
            cells.append(f"{ratio.ratio:.2f} ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})")
        saved = (inputs - needed) * outputs
        taken = "yes" if CountingModel().gather_pays(needed, saved) else "no"
        rows.append(f"| {inputs} | {needed} | {outputs} | {saved:,} | {cells[0]} | {cells[1]} | {taken} |")
        print(rows[-1], flush=True)
    if options.write:
        write_atomically(RESULT, HEADER.format(**environment()) + "\n".join(rows) + "\n")


def network(inputs: int, needed: int, outputs: int, gather: bool) -> bytes:
    """An ONNX model of the layer, with or without the gather."""
    random = np.random.default_rng(0)
    width = needed if gather else inputs
    constants = [
        numpy_helper.from_array(random.standard_normal((outputs, width), dtype=np.float32), "weight"),
        numpy_helper.from_array(random.standard_normal(outputs, dtype=np.float32), "bias"),
    ]
    nodes, x = [], "x"
    if gather:
        index = np.sort(random.permutation(inputs)[:needed]).astype(np.int64)
        constants.append(numpy_helper.from_array(index, "index"))
        nodes.append(helper.make_node("Gather", ["x", "index"], ["selected"], axis=1))
        x = "selected"
    nodes.append(helper.make_node("Gemm", [x, "weight", "bias"], ["z"], transB=1))
    nodes.append(helper.make_node("Relu", ["z"], ["y"]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", inputs), ("y", outputs))
    ]
    graph = helper.make_graph(nodes, "layer", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
