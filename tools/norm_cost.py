"""Measure the exact forms of a layer norm whose input has constant channels, alone and between two linear layers.

python tools/norm_cost.py [--write]; LARGEST_SHARE in passes/rules/normalization.py is taken from its table.

whole: Linear(n, n), LayerNormalization over n, Linear(n, n), constant channels computed like the others;
written out: Linear(n, k), mean and variance of n entries from k of them and constants, Linear(k, n);
padded: Linear(n, k), Pad to n, LayerNormalization over n, Slice to k, Linear(k, n).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "norms.md"
WIDTHS, SHARES = (384, 768, 1024), (0.25, 0.5, 0.75, 0.9)
CONDITIONS = ((1, 1), (1, 64), (16, 64))  # batch, tokens
HEADER = """\
# A layer norm over channels of which some are constant

k of n channels depend on the input, the others are 0 for every input (a masked residual stream). Time of the whole
norm over the time of a form that computes k channels alone, with the statistics of all n; above 1 that form is faster.
"block": with a linear layer in front and one behind. onnxruntime {onnxruntime}, one thread, {processor}.

What pays is that both neighbours shrink: alone the fused norm of all n is mostly the fastest. A layer norm is
written out where at most 75% of its channels stay. The padded form is as fast, but would be met as new by every
further run of the passes.

Command: `python tools/norm_cost.py --write`

| n | k | batch x tokens | norm: written out | norm: padded | block: written out | block: padded |
|---|---|---|---|---|---|---|
"""


class Model:
    """An ONNX graph under construction, float32, x of shape (batch, tokens, width)."""

    def __init__(self, width: int) -> None:
        self.random = np.random.default_rng(0)
        self.width = width
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.last = "x"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def call(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.last = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [self.last], **attributes))
        return self.last

    def vector(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape, dtype=np.float32))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def linear(self, inputs: int, outputs: int) -> None:
        product = self.call("MatMul", self.last, self.vector(inputs, outputs))
        self.call("Add", product, self.vector(outputs))

    def finish(self, tokens: int, outputs: int) -> bytes:
        self.nodes[-1].output[0] = "y"
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", tokens, size])
            for name, size in (("x", self.width), ("y", outputs))
        ]
        graph = helper.make_graph(self.nodes, "norm", values[:1], values[1:], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def whole(model: Model, n: int, k: int) -> None:
    """The fused norm over n entries."""
    model.call("LayerNormalization", model.last, model.vector(n), model.vector(n), axis=-1)


def padded(model: Model, n: int, k: int) -> None:
    """The fused norm over k entries and zeros."""
    x = model.call("Pad", model.last, model.constant(np.array([0, 0, 0, 0, 0, n - k])))
    y = model.call("LayerNormalization", x, model.vector(n), model.vector(n), axis=-1)
    model.call("Slice", y, *(model.constant(np.array([value])) for value in (0, k, 2)))


def written_out(model: Model, n: int, k: int) -> None:
    """What passes/rules/normalization.py emits."""
    x, axes = model.last, model.constant(np.array([-1]))

    def share(value: str) -> str:
        return model.call("Mul", model.call("ReduceMean", value, axes), model.number(k / n))

    mean = share(x)
    centred = model.call("Sub", x, mean)
    kept = share(model.call("Mul", centred, centred))
    gone = model.call("Mul", model.call("Mul", mean, mean), model.number(1 - k / n))
    variance = model.call("Add", model.call("Add", kept, gone), model.number(1e-5))
    root = model.call("Reciprocal", model.call("Sqrt", variance))
    scaled = model.call("Mul", model.call("Mul", centred, root), model.vector(k))
    model.call("Add", scaled, model.vector(k))


FORMS: dict[str, Callable[[Model, int, int], None]] = {
    "whole": whole, "written out": written_out, "padded": padded,
}  # fmt: skip


def networks(n: int, k: int, tokens: int, block: bool) -> dict[str, bytes]:
    """The three forms, alone or between linear layers."""
    found = {}
    for name, form in FORMS.items():
        width = n if name == "whole" else k
        model = Model(n if block else width)
        if block:
            model.linear(n, width)
        form(model, n, k)
        if block:
            model.linear(width, n)
        found[name] = model.finish(tokens, n if block else width)
    return found


def rows(budget: float) -> Iterator[str]:
    """The table, line by line."""
    for n in WIDTHS:
        for share in SHARES:
            for batch, tokens in CONDITIONS:
                k, cells = round(n * share), []
                for block in (False, True):
                    result = compare(networks(n, k, tokens, block), batch=batch, budget_s=budget)
                    cells += [f"{ratio.ratio:.2f}" for ratio in result.ratios]
                yield f"| {n} | {k} | {batch} x {tokens} | {' | '.join(cells)} |"


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each pair of cells")
    options = parser.parse_args()
    found = []
    for row in rows(options.budget):
        print(row, flush=True)
        found.append(row)
    if options.write:
        write_atomically(RESULT, HEADER.format(**environment()) + "\n".join(found) + "\n")


if __name__ == "__main__":
    main()
