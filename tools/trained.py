"""Compile trained models and compare them with what they were: error, structure, multiply-adds, latency.

python tools/trained.py MODEL... [--write] takes files of tools/train.py (the `.json` log lies beside each) and the test
images of their data set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from paper_measure import runner

from sbp_compile.atomic import write_atomically
from sbp_compile.capture import load_model
from sbp_compile.compiler import Compiled, compile_file
from sbp_compile.timing import compare, environment
from sbp_compile.training import evaluate, predict
from sbp_compile.training.data import load, to_tensor

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "trained-models.md"
HEADER = """\
# Trained models, compiled

Networks trained by `tools/train.py` ([how](training.md)), compiled and run in onnxruntime on all test images. "Differ":
test images on which the file's prediction is not the masked model's. Latency: the compiled network against the dense
one (plain architecture, no noise arithmetic), one thread, interleaved, 95% interval. onnxruntime {onnxruntime},
{processor}.

Command: `python tools/trained.py runs/*.pt --write`

| network | data, seed | error % dense | masked | compiled | differ | kept | MACs | batch 1 | batch 64 |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each timing")
    options = parser.parse_args()
    rows = []
    for path in options.models:
        rows.append(measure(path, options.budget))
        print(rows[-1], flush=True)
    if options.write:
        write_atomically(RESULT, HEADER.format(**environment()) + "\n".join(rows) + "\n")


def measure(path: Path, budget: float) -> str:
    """One row of the table."""
    log: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    data = load(log["dataset"])
    images, labels = to_tensor(data.test_images), torch.from_numpy(data.test_labels)
    model = load_model(path)
    compiled = compile_file(model)
    with tempfile.TemporaryDirectory() as folder:
        small, dense = Path(folder) / "small.onnx", Path(folder) / "dense.onnx"
        compiled.save(small)
        compiled.write_onnx(dense, compiled.dense)
        run = runner(small)
        speeds = [speed({"dense": dense, "small": small}, batch, budget) for batch in (1, 64)]
        before, after = (
            predict(function, images).argmax(1) for function in (model.exported_program.module(), run)
        )
        differ = int((before != after).sum())
        cells = (
            {"lenet5": "LeNet-5", "lenet500300": "LeNet-500-300"}[log["network"]],
            f"{log['dataset']}, {log['seed']}",
            f"{log['dense_error']:.1f}",
            f"{log['masked_error']:.1f}",
            f"{evaluate(run, images, labels):.1f}",
            differ,
            "-".join(map(str, log["kept"])),
            f"{macs_ratio(compiled):.1f}x",
            *speeds,
        )
    return f"| {' | '.join(map(str, cells))} |"


def macs_ratio(compiled: Compiled) -> float:
    """Multiply-adds of the dense network over those of the small one."""
    return compiled.report.before.macs / compiled.report.after.macs


def speed(models: dict[str, Path], batch: int, budget: float) -> str:
    """The speed-up with its interval."""
    ratio = compare(models, batch=batch, budget_s=budget).ratios[0]
    return f"{ratio.ratio:.1f}x ({ratio.ci_low:.1f} to {ratio.ci_high:.1f})"


if __name__ == "__main__":
    main()
