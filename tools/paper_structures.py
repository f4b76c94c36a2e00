"""Time the paper's pruned structures against the dense networks, next to the paper's own speed-ups.

python tools/paper_structures.py [--write] masks LeNet-5 to 3-18-284-283 and LeNet-500-300 to 245-160-55, compiles them
and times them in onnxruntime with one thread, interleaved with the dense network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment
from sbp_compile.training import LeNet5, LeNet500300, keep_random

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "paper-structures.md"
STRUCTURES = (
    ("LeNet-5", LeNet5, (3, 18, 284, 283), 5.41),
    ("LeNet-500-300", LeNet500300, (245, 160, 55), 2.33),
)
HEADER = """\
# The paper's structures

Noise layers masked to the paper's counts, spread as in its LeNet-5 row: 284 of the 288 flattened values that the 18
live channels have. Speed-up of the compiled network over the dense one (plain architecture, no noise arithmetic) in
onnxruntime, one thread, interleaved, with a 95% interval; the paper's figure is its own CPU speed-up (batch size and
runtime unknown).

Command: `python tools/paper_structures.py --write`, onnxruntime {onnxruntime}, {processor}.

| network | kept | MACs | batch | dense | compiled | speed-up | paper |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each row")
    options = parser.parse_args()
    rows = []
    for name, network, kept, paper in STRUCTURES:
        for row in measure(name, network(), kept, paper, options.budget):
            rows.append(row)
            print(row, flush=True)
    if options.write:
        write_atomically(RESULT, HEADER.format(**environment()) + "\n".join(rows) + "\n")


def measure(
    name: str, network: LeNet5 | LeNet500300, kept: Sequence[int], paper: float, budget: float
) -> list[str]:
    """The rows of one network, a batch size each."""
    keep_random(network, kept)
    compiled = sbp_compile.compile(network.eval(), torch.rand(2, *network.input_shape))
    ratio = compiled.report.before.macs / compiled.report.after.macs
    rows = []
    for batch in (1, 64):
        with tempfile.TemporaryDirectory() as folder:
            models = {"dense": Path(folder) / "dense.onnx", "small": Path(folder) / "small.onnx"}
            compiled.write_onnx(models["dense"], compiled.dense)
            compiled.save(models["small"])
            found = compare(models, batch=batch, budget_s=budget)
        dense, small = (entry.median_s * 1e6 for entry in found.models)
        speed = found.ratios[0]
        rows.append(
            f"| {name} | {'-'.join(map(str, kept))} | {ratio:.2f}x | {batch} | {dense:,.1f} us | {small:,.1f} us "
            f"| {speed.ratio:.2f}x ({speed.ci_low:.2f} to {speed.ci_high:.2f}) | {paper}x |"
        )
    return rows


if __name__ == "__main__":
    main()
