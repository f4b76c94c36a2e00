"""The proof: original and small network on the same inputs, in float64 and as the file that was written.

One measure everywhere: the error of b against a is max|a - b| / max|a| for each output (0/0 is equal), over
the entries at which a is finite. Tolerances: 1e-12 in float64; in float32 1e-5, or three times the original's
own float32 error against float64 where that is larger (the report says so). Outputs that are no floats
(classes, comparisons) may also be what the original gives after a small change of its weights: ties count as
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from passes import Note
from passes.ir.interpret import run
from passes.ir.program import Origin, Program
from sbp_compile.capture.call import Call
from sbp_compile.capture.export import quiet_export
from sbp_compile.capture.program import read_constants
from sbp_compile.emit.module import emit_graph_module
from sbp_compile.errors import UnsupportedModelError, VerificationError

FLOAT64_TOLERANCE = 1e-12
TOLERANCES = {
    **dict.fromkeys((torch.float64, torch.complex128), 1e-12),
    **dict.fromkeys((torch.float32, torch.complex64), 1e-5),
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
CAPTURE_TOLERANCES = {
    **dict.fromkeys((torch.float64, torch.complex128), 1e-9),
    **dict.fromkeys((torch.float32, torch.complex64), 1e-2),
    torch.float16: 0.2,
    torch.bfloat16: 0.5,
}
NOISE_FACTOR = 3.0
TIE_MARGIN = 3e-5
ONNX_PARTING = 1e-4


@dataclass(frozen=True)
class Verification:
    """Largest errors found and on how many examples; of the file also the tolerance and what ran it."""

    float64_error: float
    examples: int
    file_error: float | None = None
    file_tolerance: float | None = None
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """One verification input with the original's flat outputs: in its own dtype and in float64.

    `dtypes`: the floating-point dtypes that the original computes in; the coarsest decides what is a rounding.
    `shifted`: the float64 outputs with weights a little to either side, where an output is discrete; what any
    of them has is as good as `exact`.
    """

    inputs: tuple[Tensor, ...]
    own: tuple[Any, ...]
    exact: tuple[Any, ...]
    dtypes: frozenset[torch.dtype]
    shifted: tuple[tuple[Any, ...], ...] = ()

    def tolerance(self, of: Mapping[torch.dtype, float]) -> float:
        """Return the tolerance of the coarsest dtype, from a table by dtype."""
        return max((of.get(dtype, 0.0) for dtype in self.dtypes), default=0.0)


def make_reference(
    original: Program, inputs: tuple[Tensor, ...], own: Sequence[Any], *, margin: float = TIE_MARGIN
) -> Reference:
    """Run the original in float64; where an output is discrete, also with weights `margin` to either side."""
    exact, dtypes = run(original, inputs), _floating_dtypes(original)
    if not any(_is_discrete(value) for value in exact):
        return Reference(inputs, tuple(own), exact, dtypes)
    sides = [(seed, sign) for seed in (0, 1) for sign in (1.0, -1.0)]
    shifted = tuple(run(_shifted(original, seed, sign * margin), inputs) for seed, sign in sides)
    return Reference(inputs, tuple(own), exact, dtypes, shifted)


def _floating_dtypes(program: Program) -> frozenset[torch.dtype]:
    values = [node.meta.get("dtype") for node in program.graph.nodes]
    found = [*(entry.dtype for entry in program.inputs), *program.output_dtypes, *values]
    return frozenset(dtype for dtype in found if dtype in TOLERANCES)


def _is_discrete(value: Any) -> bool:
    return isinstance(value, Tensor) and not has_fractions(value)


def has_fractions(value: Any) -> bool:
    """Whether something is a tensor of real or complex numbers, whose last digits may be rounded."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _shifted(program: Program, seed: int, margin: float) -> Program:
    """Return the Program with each float constant changed by a random multiple of `margin` times itself."""
    generator = torch.Generator().manual_seed(seed)

    def shift(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * (1 + margin * torch.randn(value.shape, generator=generator, dtype=value.dtype))

    return program.replace(constants={name: shift(value) for name, value in program.constants.items()})


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|a| over the entries at which a is finite.

    Infinite where the shapes differ, or where b is not finite and a is. Complex numbers count as two real ones.
    """
    if a.shape != b.shape:
        return float("inf")
    a, b = _real(a), _real(b)
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


def _real(value: Tensor) -> Tensor:
    value = value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).to(torch.float64)


def verify_capture(references: Sequence[Reference]) -> None:
    """Raise `UnsupportedModelError` where the model itself and what was captured of it are no rounding apart.

    A model may take another path for another batch size; torch.export follows the example's.
    """
    for reference in references:
        for position, (own, exact) in enumerate(zip(reference.own, reference.exact, strict=True)):
            if not has_fractions(own):
                continue
            _refuse_overflow(position, own, exact)
            error = relative_error(exact, own)
            if not error <= reference.tolerance(CAPTURE_TOLERANCES):
                shapes = [list(value.shape) for value in reference.inputs]
                raise UnsupportedModelError(
                    f"output {position} of the model differs by {error:.1e} from what torch.export captured, for "
                    f"inputs of shapes {shapes}: the model takes another path there; compile with "
                    "dynamic_batch=False and an example of the batch size that is used"
                )


def _refuse_overflow(position: int, own: Tensor, exact: Tensor) -> None:
    """Say so where the model's own dtype is too narrow for what it computes."""
    if own.shape == exact.shape and bool((torch.isfinite(exact) & ~torch.isfinite(own)).any()):
        raise UnsupportedModelError(
            f"output {position} of the model is NaN or infinite in {own.dtype} where it is finite in float64: it "
            "overflows on its way; compile it in a wider dtype, or give inputs of a usual size (--inputs)"
        )


def verify_finite(references: Sequence[Reference]) -> tuple[Note, ...]:
    """Return notes of values that cannot be compared; `UnsupportedModelError` where an output has no others."""
    notes = []
    for position in range(len(references[0].exact)):
        found = [reference.exact[position] for reference in references]
        if not all(has_fractions(value) for value in found):
            continue
        total = sum(value.numel() for value in found)
        broken = sum(int((~torch.isfinite(value)).sum()) for value in found)
        if broken == total > 0:
            raise UnsupportedModelError(
                f"output {position} of the model is NaN or infinite throughout, on every input that was tried: there "
                "is nothing to compare with; give inputs on which it is finite (--inputs), or see where it diverges"
            )
        if broken:
            text = f"{broken} of {total} values of output {position} are NaN or infinite in the original: not compared"
            notes.append(Note("verification", text))
    return tuple(notes)


def _refuse_infinite_constants(position: int, a: Tensor, b: Tensor, names: Sequence[str]) -> None:
    """Refuse a result in which infinite constants show otherwise than in the original."""
    if names and a.shape == b.shape and bool((torch.isfinite(a) != torch.isfinite(b)).any()):
        raise UnsupportedModelError(
            f"buffer {names[0]!r} has infinite values, and output {position} has NaN or infinite values that depend on "
            "the order of the computation: put the largest number in their place that the network needs, such as -1e9 "
            "in a mask"
        )


def verify_float64(original: Program, small: Program, references: Sequence[Reference]) -> float:
    """Return the largest error of the small Program; `VerificationError` above 1e-12.

    Raises `UnsupportedModelError` where infinite constants of the original decide on what is finite.
    """
    infinite = [
        name
        for name in read_constants(original.graph)
        if not original.constants.held(name).is_finite and bool(torch.isinf(original.constants[name]).any())
    ]
    worst = 0.0
    for reference in references:
        results = run(small, reference.inputs)
        for position, (a, b) in enumerate(zip(reference.exact, results, strict=True)):
            if has_fractions(a) and has_fractions(b):
                _refuse_infinite_constants(position, a, b, infinite)
            error = output_error(a, b, [other[position] for other in reference.shifted])
            if not error <= FLOAT64_TOLERANCE:
                raise VerificationError(
                    f"output {position} differs by {error:.1e} in float64 "
                    f"(tolerance {FLOAT64_TOLERANCE:.0e}); the networks part at "
                    f"{first_difference(original, small, reference.inputs)}; please report this as a bug"
                )
            worst = max(worst, error)
    return worst


def output_error(a: Any, b: Any, alternatives: Sequence[Any]) -> float:
    """Return the error of an output: relative for floats; else 0 where b equals a or an alternative in each entry."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if not _is_discrete(a):
        return relative_error(a, b)
    differs = a != b
    for other in alternatives:
        differs = differs & (other != b)
    return float(differs.any())


def first_difference(original: Program, small: Program, inputs: Sequence[Tensor]) -> str:
    """Name the first value, in the original's order, that the small network does not reproduce."""
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
            parted.append(described(node))

    run(original, inputs, compare)
    return parted[0] if parted else "no single value that both compute"


def described(node: fx.Node) -> str:
    """Return a value's name with its operator and the module it is computed in."""
    module = node.meta.get("module")
    return f"{node.name} ({node.target}{f' in {module}' if module else ''})"


def _written(names: Sequence[str | None]) -> list[tuple[int, str]]:
    """Return (position, name) of the outputs that a file has."""
    return [(position, name) for position, name in enumerate(names) if name is not None]


def verify_module(
    module: Callable[..., Any],
    call: Call,
    references: Sequence[Reference],
    names: Sequence[str | None],
    cause: str = "the file alone",
) -> tuple[float, float]:
    """Return (largest error, its tolerance) of what torch made of a file; `VerificationError` outside it.

    `module` takes the original's call; `cause`: where the values part, for the message.
    """
    positions = [position for position, _ in _written(names)]

    def run_one(inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = call.nest_arguments(inputs)
        with torch.no_grad(), quiet_export():
            results = call.flat_results(module(*args, **kwargs))
        return [results[position] for position in positions]

    return verify_file(run_one, references, names, "torch", lambda _: cause)


def verify_onnx(
    path: Path,
    references: Sequence[Reference],
    small: Program,
    names: Sequence[str | None],
    cause: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[float, float, tuple[str, ...]]:
    """Return (largest error, its tolerance, providers) of a file in onnxruntime.

    `cause`: where the values part, for the message (None: it is looked for). `dtype`: what the file computes in (None:
    the network's own).
    On the CPU, and on CUDA (TF32 off) where its provider is there. `VerificationError` outside the tolerance.
    """
    providers = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.append("CUDAExecutionProvider")
    found, used = [], []
    for provider in providers:
        with _runtime_failures():
            session = _session(path, provider)
        if provider not in session.get_providers():
            continue  # its libraries are not there, and the session fell back to the CPU

        def run_one(
            inputs: Sequence[Tensor], session: onnxruntime.InferenceSession = session
        ) -> list[Tensor]:
            with _runtime_failures():
                return _run_session(session, small, inputs)

        def locate(inputs: Sequence[Tensor]) -> str:
            return cause or _first_onnx_difference(path, small, inputs)

        found.append(verify_file(run_one, references, names, f"onnxruntime ({provider})", locate))
        _refuse_zeros_made_infinite(run_one, small, references[0].inputs, names, dtype)
        used.append(provider)
    return max(error for error, _ in found), max(limit for _, limit in found), tuple(used)


def _refuse_zeros_made_infinite(
    run_one: Callable[[Sequence[Tensor]], list[Tensor]],
    small: Program,
    inputs: Sequence[Tensor],
    names: Sequence[str | None],
    dtype: torch.dtype | None,
) -> None:
    """Refuse a file that gives NaN or infinity for inputs of zeros where the network does not.

    Random inputs never meet the number that keeps a quotient of zeros finite. How close the results are is not asked:
    of equal values rounding decides.
    """
    zeros = tuple(torch.zeros_like(value) if has_fractions(value) else value for value in inputs)
    try:
        results = run_one(zeros)
    except UnsupportedModelError:  # zeros may be no input that the network takes
        return
    if all(bool(torch.isfinite(result).all()) for result in results if has_fractions(result)):
        return
    with torch.no_grad():
        rounded = emit_graph_module(small, dtype)(*zeros)
    exact = run(small, zeros)
    for (position, name), result in zip(_written(names), results, strict=True):
        both = exact[position], rounded[position]
        if not all(has_fractions(value) for value in (*both, result)):
            continue
        if bool((~torch.isfinite(result) & torch.isfinite(both[0]) & torch.isfinite(both[1])).any()):
            raise VerificationError(
                f"output {name!r} is NaN or infinite in onnxruntime for inputs of zeros, where the network "
                "is not; write .pt2 instead, and please report this as a bug"
            )


@contextmanager
def _runtime_failures() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime documents no closed list
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"onnxruntime cannot run the network ({reason}); save it as .pt2, or compile the model in float32"
        ) from error


def verify_file(
    run_one: Callable[[Sequence[Tensor]], list[Tensor]],
    references: Sequence[Reference],
    names: Sequence[str | None],
    runtime: str,
    locate: Callable[[Sequence[Tensor]], str],
) -> tuple[float, float]:
    """Return (largest error, largest tolerance) of what `run_one` gives; `VerificationError` outside a tolerance.

    `locate`: where the values part for some inputs, for the message.
    """
    worst, limit = 0.0, 0.0
    for reference in references:
        for name, error, tolerance in _file_errors(reference, run_one(reference.inputs), names):
            if not error <= tolerance:
                raise VerificationError(
                    f"output {name!r} differs by {error:.1e} in {runtime} (tolerance {tolerance:.1e}); "
                    f"the values part at {locate(reference.inputs)}"
                )
            worst, limit = max(worst, error), max(limit, tolerance)
    return worst, limit


def _file_errors(
    reference: Reference, results: Sequence[Tensor], names: Sequence[str | None]
) -> list[tuple[str, float, float]]:
    """Return (name, error, tolerance) of each output."""
    found = []
    for (position, name), result in zip(_written(names), results, strict=True):
        own, exact = reference.own[position], reference.exact[position]
        others = [exact, *(other[position] for other in reference.shifted)]
        error = output_error(own, result, others) if own.dtype == result.dtype else float("inf")
        tolerance = 0.0
        if has_fractions(own):
            tolerance = max(reference.tolerance(TOLERANCES), NOISE_FACTOR * relative_error(exact, own))
        found.append((name, error, tolerance))
    return found


def _session(path: Path, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if provider.startswith("CUDA"):
        onnxruntime.preload_dlls()
    settings = [(provider, {"use_tf32": "0"})] if provider.startswith("CUDA") else [provider]
    return onnxruntime.InferenceSession(str(path), options, settings)


def _run_session(
    session: onnxruntime.InferenceSession, program: Program, inputs: Sequence[Tensor]
) -> list[Tensor]:
    taken = {entry.name for entry in session.get_inputs()}
    feeds = {
        entry.shown: value.numpy()
        for entry, value in zip(program.inputs, inputs, strict=True)
        if entry.shown in taken
    }
    return [torch.as_tensor(value) for value in session.run(None, feeds)]


def _first_onnx_difference(path: Path, small: Program, inputs: Sequence[Tensor]) -> str:
    """Name the first value of the small graph that onnxruntime computes otherwise by more than 1e-4.

    A copy of the file with more outputs is written next to it, where its external data are.
    """
    model = onnx.load(str(path), load_external_data=False)
    outputs = {entry.name for entry in model.graph.output}
    present = {name for node in model.graph.node for name in node.output} - outputs
    for node in small.calls():
        if node.name in present and node in small.infos:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.name))
    probe = path.with_name("probe.onnx")
    probe.write_bytes(model.SerializeToString())
    session = _session(probe, "CPUExecutionProvider")
    names = [entry.name for entry in session.get_outputs()]
    values = dict(zip(names, _run_session(session, small, inputs), strict=True))
    parted: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        found = values.get(node.name)  # of another shape where the file spells it otherwise
        if parted or found is None or found.shape != value.shape:
            return
        if relative_error(value, found) > ONNX_PARTING:
            parted.append(described(node))

    run(small, inputs, compare)
    return parted[0] if parted else "the outputs alone"
