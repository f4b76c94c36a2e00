"""The proof: original and small network compared on the same inputs, in float64 and in onnxruntime.

One measure everywhere: the error of b against a is max|a - b| / max|a| for each output (0/0 is equal), over the entries
at which a is finite. Tolerances: 1e-12 in float64; in float32 1e-5, or three times the original's own float32 error
against float64 where that is larger (the report says so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from passes.ir.interpret import run
from passes.ir.program import Input, Origin, Program
from sbp_compile.errors import InputError, VerificationError

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NOISE_FACTOR = 3.0


@dataclass(frozen=True)
class Verification:
    """Largest errors found, the tolerance each was held to, and on how many examples."""

    float64_error: float
    onnx_error: float | None
    onnx_tolerance: float | None
    examples: int
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """One verification input with the original's outputs: in its own dtype and in float64 (flat, tensors only)."""

    inputs: tuple[Tensor, ...]
    own: tuple[Any, ...]
    exact: tuple[Any, ...]


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a| over the entries at which a is finite; infinite where shapes differ or b is not finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    finite = torch.isfinite(a)
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    difference = float((a - b).abs().max())
    if difference == 0.0:
        return 0.0
    scale = float(a.abs().max())
    error = difference / scale if scale else float("inf")
    return error if error == error else float("inf")


def verification_inputs(program: Program, examples: Sequence[Tensor], seed: int = 0) -> list[tuple[Tensor, ...]]:
    """The example inputs, and random ones like them at two batch sizes where the batch is dynamic."""
    generator = torch.Generator().manual_seed(seed)
    found = [tuple(example.detach().cpu() for example in examples)]
    for batch in (1, 3):
        found.append(
            tuple(
                _random_like(example, _resized(entry, example, batch), generator)
                for entry, example in zip(program.inputs, examples, strict=True)
            )
        )
    return found


def _resized(entry: Input, example: Tensor, batch: int) -> tuple[int, ...]:
    shape = list(example.shape)
    if shape and entry.sizes[0] != entry.other_sizes[0]:
        shape[0] = batch
    return tuple(shape)


def _random_like(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    example = example.detach().cpu()
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not example.is_floating_point():
        low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 1)
        return torch.randint(low, high + 1, shape, generator=generator).to(example.dtype)
    values = example.to(torch.float64)
    values = values[torch.isfinite(values)]
    scale = float(values.std()) if values.numel() > 1 else 1.0
    centre = float(values.mean()) if values.numel() else 0.0
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise * (scale or 1.0) + centre).to(example.dtype)


def load_inputs(path: str | Path, program: Program) -> tuple[Tensor, ...]:
    """Verification inputs from an .npz file with one array for each input name. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(f"cannot read inputs from {str(path)!r}: {error}; expected an .npz file of arrays") from error
    names = [entry.name for entry in program.inputs]
    if set(arrays) != set(names) and len(arrays) == len(names) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if set(arrays) != set(names):
        raise InputError(f"inputs in {str(path)!r} are named {sorted(arrays)}, the model's are {sorted(names)}")
    return tuple(_checked(entry, torch.from_numpy(np.ascontiguousarray(arrays[entry.name]))) for entry in program.inputs)


def _checked(entry: Input, value: Tensor) -> Tensor:
    fits = value.ndim == len(entry.sizes) and all(
        size == wanted or wanted != other
        for size, wanted, other in zip(value.shape, entry.sizes, entry.other_sizes, strict=True)
    )
    if not fits:
        wanted_shape = [
            size if size == other else "any" for size, other in zip(entry.sizes, entry.other_sizes, strict=True)
        ]
        raise InputError(f"input {entry.name!r} has shape {list(value.shape)}, the model takes {wanted_shape}")
    if value.is_floating_point() != entry.dtype.is_floating_point:
        raise InputError(f"input {entry.name!r} is {value.dtype}, the model takes {entry.dtype}")
    return value.to(entry.dtype)


def verify_float64(original: Program, small: Program, references: Sequence[Reference]) -> float:
    """The largest error of the small Program against the original one. Raises VerificationError above 1e-12."""
    worst = 0.0
    for reference in references:
        results = run(small, reference.inputs)
        for position, (a, b) in enumerate(zip(reference.exact, results, strict=True)):
            error = _output_error(a, b)
            if not error <= FLOAT64_TOLERANCE:
                where = first_difference(original, small, reference.inputs)
                raise VerificationError(
                    f"output {position} differs by {error:.1e} in float64 (tolerance {FLOAT64_TOLERANCE:.0e}); "
                    f"the networks part at {where}; please report this as a bug"
                )
            worst = max(worst, error)
    return worst


def _output_error(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a == b or (isinstance(a, Tensor) == isinstance(b, Tensor)) else float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return relative_error(a, b)


def first_difference(original: Program, small: Program, inputs: Sequence[Tensor]) -> str:
    """The first value, in the original's order, that the small network does not reproduce."""
    held: dict[str, tuple[Tensor, tuple[Tensor | None, ...]]] = {}

    def remember(node: fx.Node, value: Any) -> None:
        origin: Origin | None = node.meta.get("origin")
        if origin is not None and isinstance(value, Tensor):
            held[origin.name] = (value, origin.kept)

    run(small, inputs, remember)
    parted: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        origin: Origin | None = node.meta.get("origin")
        if parted or origin is None or origin.name not in held or not isinstance(value, Tensor):
            return
        mine, kept = held[origin.name]
        for axis, index in enumerate(kept):
            if index is not None:
                value = value.index_select(axis, index)
        if relative_error(value, mine) > FLOAT64_TOLERANCE:
            parted.append(f"{node.name} ({node.target}{', in ' + node.meta['module'] if node.meta.get('module') else ''})")

    run(original, inputs, compare)
    return parted[0] if parted else "no single value that both compute"


def verify_onnx(
    model: str | Path | bytes, references: Sequence[Reference], small: Program, names: Sequence[str | None]
) -> tuple[float, float, tuple[str, ...]]:
    """(largest error, its tolerance, providers) of the file in onnxruntime. Raises VerificationError outside it."""
    providers = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.append("CUDAExecutionProvider")
    worst, limit = 0.0, FLOAT32_TOLERANCE[torch.float32]
    for provider in providers:
        session = _session(model, provider)
        for reference in references:
            results = _run_session(session, small, reference.inputs)
            error, tolerance, position = _compare(reference, results, names)
            if not error <= tolerance:
                raise VerificationError(
                    f"output {position!r} differs by {error:.1e} in onnxruntime ({provider}; tolerance {tolerance:.1e}); "
                    f"the values part at {_first_onnx_difference(model, small, reference.inputs)}"
                )
            worst, limit = max(worst, error), max(limit, tolerance)
    return worst, limit, tuple(providers)


def _session(model: str | Path | bytes, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    settings = [(provider, {"use_tf32": "0"})] if provider.startswith("CUDA") else [provider]
    return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, settings)


def _run_session(session: onnxruntime.InferenceSession, program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    taken = {entry.name for entry in session.get_inputs()}
    feeds = {
        entry.name: value.numpy()
        for entry, value in zip(program.inputs, inputs, strict=True)
        if entry.name in taken
    }
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


def _compare(
    reference: Reference, results: Sequence[Tensor], names: Sequence[str | None]
) -> tuple[float, float, str]:
    """(error, tolerance, output name) of the output that is furthest beyond its tolerance."""
    worst: tuple[float, float, str] = (0.0, FLOAT32_TOLERANCE[torch.float32], "")
    wanted = [position for position, name in enumerate(names) if name is not None]
    for position, result in zip(wanted, results, strict=True):
        own, exact = reference.own[position], reference.exact[position]
        if own.is_floating_point():
            tolerance = max(FLOAT32_TOLERANCE[own.dtype], NOISE_FACTOR * relative_error(exact, own))
            error = relative_error(own, result)
        else:
            agreed = own == exact
            tolerance, error = FLOAT32_TOLERANCE[torch.float32], float((own != result)[agreed].any())
        if error - tolerance > worst[0] - worst[1] or not worst[2]:
            worst = (error, tolerance, str(names[position]))
    return worst


def _first_onnx_difference(model: str | Path | bytes, small: Program, inputs: Sequence[Tensor]) -> str:
    """The first value of the small graph that onnxruntime computes differently from float64 by more than 1e-4."""
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
    outputs = {entry.name for entry in proto.graph.output}
    present = {name for node in proto.graph.node for name in node.output} - outputs
    nodes = [node for node in small.calls() if node.name in present and node in small.infos]
    for node in nodes:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.name))
    session = _session(proto.SerializeToString(), "CPUExecutionProvider")
    values = dict(zip([entry.name for entry in session.get_outputs()], _run_session(session, small, inputs), strict=True))
    parted: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        if not parted and node.name in values and relative_error(value, values[node.name]) > 1e-4:
            parted.append(f"{node.name} ({node.target})")

    run(small, inputs, compare)
    return parted[0] if parted else "the outputs alone"


def as_metadata(verification: Verification) -> Mapping[str, str]:
    """What the file says of its own proof."""
    return {"sbp_compile.float64_error": f"{verification.float64_error:.3e}"}
