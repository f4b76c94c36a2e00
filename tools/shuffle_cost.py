"""Measure a channel shuffle as one gather against reshape, transpose, reshape; both between two convolutions.

python tools/shuffle_cost.py [--write]; passes/compose_readings.py rests on its table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "shuffle.md"
CASES = ((240, 28, 3), (116, 28, 2), (232, 14, 2), (464, 7, 2), (960, 7, 3))
HEADER = """\
# A channel shuffle as a gather

Time of conv 1x1, relu, shuffle, depthwise 3x3 with the shuffle as reshape, transpose, reshape over the time with the
shuffle as one gather; above 1 the gather is faster. onnxruntime {onnxruntime}, one thread, {processor}.

The two cost the same, so compose_readings writes every channel shuffle as an index_select: any subset of channels can
be kept then, and fold_permutations can move it into weights.

Command: `python tools/shuffle_cost.py --write`

| channels | positions | groups | batch 1 | batch 8 |
|---|---|---|---|---|
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
    for channels, size, groups in CASES:
        models = {
            "views": network(channels, size, groups, gather=False),
            "gather": network(channels, size, groups, gather=True),
        }
        cells = []
        for batch in (1, 8):
            ratio = compare(models, batch=batch, budget_s=options.budget).ratios[0]
            cells.append(f"{ratio.ratio:.2f} ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})")
        rows.append(f"| {channels} | {size} x {size} | {groups} | {cells[0]} | {cells[1]} |")
        print(rows[-1], flush=True)
    if options.write:
        write_atomically(RESULT, HEADER.format(**environment()) + "\n".join(rows) + "\n")


def network(channels: int, size: int, groups: int, *, gather: bool) -> bytes:
    """An ONNX model with a shuffle between two convolutions."""
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.standard_normal(shape, dtype=np.float32), name)
        for name, shape in (("first", (channels, channels, 1, 1)), ("second", (channels, 1, 3, 3)))
    ]
    nodes = [helper.make_node("Conv", ["x", "first"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    if gather:
        order = np.arange(channels).reshape(groups, -1).T.flatten()
        constants.append(numpy_helper.from_array(order.astype(np.int64), "order"))
        nodes.append(helper.make_node("Gather", ["b", "order"], ["c"], axis=1))
    else:
        shapes = {"split": [-1, groups, channels // groups, size, size], "merged": [-1, channels, size, size]}
        constants += [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
        nodes.append(helper.make_node("Reshape", ["b", "split"], ["d"]))
        nodes.append(helper.make_node("Transpose", ["d"], ["e"], perm=[0, 2, 1, 3, 4]))
        nodes.append(helper.make_node("Reshape", ["e", "merged"], ["c"]))
    nodes.append(helper.make_node("Conv", ["c", "second"], ["y"], group=channels, pads=[1, 1, 1, 1]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, size, size])
        for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "shuffle", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
