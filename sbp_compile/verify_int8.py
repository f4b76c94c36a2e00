"""How far an 8-bit file is from the exact one: told, not judged, since rounding to 8 bits has no tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes import Note, Program
from sbp_compile.capture.array_file import read_arrays
from sbp_compile.emit.int8 import Feed
from sbp_compile.errors import InputError
from sbp_compile.verify_inputs import inputs_of

LABELS = "labels"
BATCH = 32


@dataclass(frozen=True)
class Calibration:
    """Example inputs in batches, and the right class of each example where it is known."""

    feeds: tuple[Feed, ...]
    examples: int
    labels: NDArray[np.generic] | None = None


def load_calibration(path: str | Path, program: Program) -> Calibration:
    """Read an .npz file with one array for each input name, and `labels` (one integer for each example) if there are.

    Raises `InputError`.
    """
    arrays = read_arrays(path)
    is_input = LABELS in {entry.shown for entry in program.inputs}
    labels = None if is_input else arrays.pop(LABELS, None)
    tensors = inputs_of(arrays, path, program)
    for entry, value in zip(program.inputs, tensors, strict=True):
        if not bool(value.isfinite().all()):
            raise InputError(
                f"input {entry.shown!r} in {str(path)!r} has values that are NaN or infinite, and no range of 8 bits "
                "holds them; leave these examples out"
            )
    examples = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    if labels is not None and (labels.shape != (examples,) or labels.dtype.kind not in "iu"):
        raise InputError(
            f"{LABELS!r} in {str(path)!r} has shape {list(labels.shape)} and dtype {labels.dtype}; give one integer "
            f"for each of the {examples} examples"
        )
    return Calibration(tuple(_feeds(program, tensors)), examples, labels)


def _feeds(program: Program, tensors: Sequence[Tensor]) -> Iterator[Feed]:
    """Batches of examples where every leading axis is dynamic, else everything at once."""
    entries = list(zip(program.inputs, tensors, strict=True))
    moving = [entry.sizes and not entry.is_static(0) for entry, _ in entries]
    size = tensors[0].shape[0] if all(moving) else 0
    step = BATCH if all(moving) else 1
    for start in range(0, size or 1, step):
        yield {
            entry.shown: (value[start : start + step] if size else value).numpy() for entry, value in entries
        }


def fidelity(exact: Path, quantised: Path, calibration: Calibration) -> Note:
    """Run both files on the calibration examples and tell how far they are apart."""
    wanted, found = (_outputs(path, calibration.feeds) for path in (exact, quantised))
    errors = [_errors(a, b) for a, b in zip(wanted, found, strict=True) if a.dtype.kind == "f"]
    parts = [f"{calibration.examples} calibration examples"]
    if errors:
        largest, mean = (max(column) for column in zip(*errors, strict=True))
        parts.append(
            f"outputs differ by {largest:.1%} of the largest at most, {mean:.1%} in the root mean square"
        )
    first, other = wanted[0], found[0]
    if first.ndim == 2 and first.shape[1] > 1 and first.dtype.kind == "f":
        classes, others = first.argmax(1), other.argmax(1)
        parts.append(f"the same class for {np.mean(classes == others):.1%}")
        if calibration.labels is not None and len(classes) == calibration.examples:
            before, after = (np.mean(given == calibration.labels) for given in (classes, others))
            parts.append(f"accuracy {after:.1%} (float: {before:.1%})")
    return Note("int8", ", ".join(parts))


def _outputs(path: Path, feeds: Sequence[Feed]) -> list[NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}
    runs = [
        session.run(None, {name: value for name, value in feed.items() if name in taken}) for feed in feeds
    ]
    return [np.concatenate(parts) if parts[0].ndim else parts[0] for parts in zip(*runs, strict=True)]


def _errors(a: NDArray[np.generic], b: NDArray[np.generic]) -> tuple[float, float]:
    """Largest and root mean square difference over the largest and the root mean square value."""
    first, second = (torch.as_tensor(value).to(torch.float64) for value in (a, b))
    difference = first - second
    largest, mean = float(first.abs().max()), float(first.square().mean().sqrt())
    return (
        float(difference.abs().max()) / (largest or 1.0),
        float(difference.square().mean().sqrt()) / (mean or 1.0),
    )
