"""Measure ways to multiply some columns of a matrix with weights in onnxruntime, interleaved, the fastest of all runs.

    python tools/gather_cost.py [--seconds S] [--write]

`sbp_compile/emit/onnx_gathers.py` goes by what this prints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment
from sbp_compile.timing.session import open_session

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "gathers.md"
COLUMNS, TAKEN, OUTPUTS = 784, 245, 160
IMAGE = 28, 28
BATCHES = (1, 4, 16, 64)
HEADER = f"""\
# Gathers of columns

{TAKEN} of {COLUMNS} columns times {OUTPUTS} rows of weights: microseconds in onnxruntime {{onnxruntime}}, one thread,
{{processor}}, the fastest of all runs. "slice" reads the first columns, which is another function: the bound. "one
kernel": a convolution as large as its image, zero columns among its weights. Compress on rows is the fastest way by up
to 5%; a gather it is all the same, for the size of what Compress gives is known to no shape inference, and our own
reader of files refuses it.

Command: `python tools/gather_cost.py --seconds {{seconds:g}} --write`

"""

Array = NDArray[np.generic]


def models() -> dict[str, bytes]:
    """The ways, each from x (batch, COLUMNS) to y (batch, OUTPUTS)."""
    generator = np.random.default_rng(0)
    index = np.sort(generator.permutation(COLUMNS)[:TAKEN])
    weight = generator.standard_normal((OUTPUTS, TAKEN)).astype(np.float32)
    spread = np.zeros((OUTPUTS, COLUMNS), np.float32)
    spread[:, index] = weight
    node, plain = helper.make_node, helper.make_node("Gemm", ["read", "weight"], ["y"], transB=1)
    turned = helper.make_node("Gemm", ["read", "weight"], ["y"], transA=1, transB=1)
    kept: dict[str, Array] = {"index": index, "weight": weight}
    ends: dict[str, Array] = {
        "start": np.array([0]), "end": np.array([TAKEN]), "axis": np.array([1]), "weight": weight
    }  # fmt: skip
    return {
        "slice": _model([node("Slice", ["x", "start", "end", "axis"], ["read"]), plain], ends),
        "gather": _model([node("Gather", ["x", "index"], ["read"], axis=1), plain], kept),
        "zero columns": _model([node("Gemm", ["x", "weight"], ["y"], transB=1)], {"weight": spread}),
        "compress": _model(
            [node("Compress", ["x", "kept"], ["read"], axis=1), plain],
            {"kept": np.isin(np.arange(COLUMNS), index), "weight": weight},
        ),
        "one kernel": _model(
            [
                node("Reshape", ["x", "image"], ["images"]),
                node("Conv", ["images", "weight"], ["found"]),
                node("Flatten", ["found"], ["y"]),
            ],
            {"image": np.array([-1, 1, *IMAGE]), "weight": spread.reshape(OUTPUTS, 1, *IMAGE)},
        ),
        "transpose, compress": _model(
            [
                node("Transpose", ["x"], ["turned"], perm=[1, 0]),
                node("Compress", ["turned", "kept"], ["read"], axis=0),
                turned,
            ],
            {"kept": np.isin(np.arange(COLUMNS), index), "weight": weight},
        ),
        "transpose, gather": _model(
            [
                node("Transpose", ["x"], ["turned"], perm=[1, 0]),
                node("Gather", ["turned", "index"], ["read"], axis=0),
                turned,
            ],
            kept,
        ),
    }


def _model(nodes: Sequence[onnx.NodeProto], constants: dict[str, Array]) -> bytes:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", COLUMNS), ("y", OUTPUTS))
    ]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "columns", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def fastest(sessions: dict[str, object], batch: int, seconds: float) -> dict[str, float]:
    """The fastest run of each, in seconds; they take turns."""
    x = np.random.default_rng(1).standard_normal((batch, COLUMNS)).astype(np.float32)
    best = dict.fromkeys(sessions, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, session in sessions.items():
            for _ in range(5):
                start = time.perf_counter()
                session.run(None, {"x": x})  # type: ignore[attr-defined]
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each row (default 3)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    sessions = {
        name: open_session(name, content, provider="cpu", threads=1) for name, content in models().items()
    }
    lines = [f"| batch | {' | '.join(sessions)} |", "|---" * (len(sessions) + 1) + "|"]
    for batch in BATCHES:
        best = fastest(sessions, batch, options.seconds)
        lines.append(f"| {batch} | {' | '.join(f'{best[name] * 1e6:.1f}' for name in sessions)} |")
    text = HEADER.format(**environment(), seconds=options.seconds) + "\n".join(lines) + "\n"
    print(text)
    if options.write:
        write_atomically(RESULT, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
