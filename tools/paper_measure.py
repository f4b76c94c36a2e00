"""What a network of tools/train.py becomes: compiled, checked on all test images, timed against the dense one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from passes import FewestMacs, default_pipeline
from sbp_compile.capture import load_model
from sbp_compile.compiler import Compiled, compile_file
from sbp_compile.timing import compare
from sbp_compile.training import evaluate, load, predict, to_tensor

BATCHES = (1, 64)


def measure(path: Path, dataset: str, data: str | None, budget: float) -> dict[str, Any]:
    """Return errors, kept units, multiply-adds and speed-ups with their intervals.

    `kept`: of the network with the fewest multiply-adds, output channels of convolutions and inputs of linear layers;
    `macs`, `speed`: of what the compiler writes by default, the widths that this processor runs best.
    """
    images = load(dataset, Path(data) if data else None)
    pixels, labels = to_tensor(images.test_images), torch.from_numpy(images.test_labels)
    model = load_model(path)
    compiled = compile_file(model)
    fewest = compile_file(model, verify=False, pipeline=default_pipeline(FewestMacs())).report
    with tempfile.TemporaryDirectory() as name:
        small, dense = Path(name) / "small.onnx", Path(name) / "dense.onnx"
        compiled.save(small)
        compiled.write_onnx(dense, compiled.dense)
        run = runner(small)
        before, after = (predict(call, pixels).argmax(1) for call in (model.exported_program.module(), run))
        return {
            "error": evaluate(run, pixels, labels),
            "differ": int((before != after).sum()),
            "kept": [row.inputs_kept if row.kind == "linear" else row.kept for row in fewest.layers],
            "fewest_macs": fewest.after.macs,
            "macs": compiled.report.after.macs,
            "dense_macs": compiled.report.before.macs,
            "speed": {str(batch): speed(compiled, dense, small, batch, budget) for batch in BATCHES},
        }


def speed(compiled: Compiled, dense: Path, small: Path, batch: int, budget: float) -> list[float]:
    """Return how much faster the small file is than the dense one, with its 95% interval."""
    ratio = compare({"dense": dense, "small": small}, batch=batch, budget_s=budget).ratios[0]
    return [ratio.ratio, ratio.ci_low, ratio.ci_high]


def runner(path: Path) -> Any:
    """Return the file as a function from images to logits."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))

    return run
