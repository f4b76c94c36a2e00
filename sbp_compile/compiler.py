"""The compiler's contents page: capture, passes, verification, emission, in a straight line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from passes import Canonicalize, Note, PassError, Pipeline, Program, Step, default_pipeline, this_cpu
from sbp_compile.baseline import plain_architecture
from sbp_compile.capture.call import Call, captured_call
from sbp_compile.capture.example_inputs import exported_flags
from sbp_compile.capture.export import DynamicBatch, evaluating, export_module, quiet_export
from sbp_compile.capture.interface import Interface
from sbp_compile.capture.model_file import LoadedModel
from sbp_compile.capture.program import program_from_export
from sbp_compile.emit.module import CompiledModule, compiled_module, emit_graph_module
from sbp_compile.emit.onnx_file import onnx_model, save_onnx
from sbp_compile.errors import InputError, UnsupportedModelError, UsageError
from sbp_compile.output_options import OutputOptions, option_names
from sbp_compile.recipe import Recipe
from sbp_compile.recipe_layers import LayerRecipe, Trace, layer_recipes, tracing
from sbp_compile.refill import refilled
from sbp_compile.report import Report, build_report
from sbp_compile.save import save_verified
from sbp_compile.verify import (
    Reference,
    Verification,
    make_reference,
    verify_capture,
    verify_finite,
    verify_float64,
)
from sbp_compile.verify_inputs import check_inputs, load_inputs, random_inputs
from sbp_compile.verify_reader import verify_reader


@dataclass
class Compiled:
    """The small network: as a torch module, as a Program, and what was done to get there.

    `original`: the captured network; `call`: how the arguments and results are nested; `output_names`: one for each
    flat result, None where it is no tensor; `interface`: of the ONNX file that it was, if it was one.
    """

    module: CompiledModule
    program: Program
    original: Program
    report: Report
    call: Call
    examples: tuple[Tensor, ...]
    output_names: tuple[str | None, ...]
    references: tuple[Reference, ...] = field(repr=False, default=())
    source_hash: str = ""
    layers: tuple[LayerRecipe, ...] = field(repr=False, default=())
    applied: Recipe | None = field(repr=False, default=None)
    interface: Interface | None = field(repr=False, default=None)

    @property
    def dense(self) -> Program:
        """The original's plain architecture at full width, made anew each time."""
        return plain_architecture(self.original)

    def recipe(self) -> Recipe:
        """Return what was removed and why, in a form that another checkpoint can be compiled by."""
        return Recipe.of(self.original, self.layers, self.applied)

    def save(self, path: str | Path, **options: Any) -> None:
        """Write the network; what was written is compared with the original before the file gets its name.

        The suffix says what: `.onnx`; `.pt2`, an exported program; `.ts` or `.pt`, TorchScript; `.safetensors`, the
        weights, with a readable torch module beside them (`<name>.py`). `options`: those of
        `sbp_compile.output_options.OutputOptions`.

        Raises `UsageError` for another suffix or an option that does not fit, `OutputError` where the path cannot be
        written, `UnsupportedModelError` where the format cannot hold the network, `VerificationError` where the file
        computes something else than the original; nothing is left behind.
        """
        start = time.perf_counter()
        proof = save_verified(self, Path(path), _output_options(options))
        if proof is not None:
            self.report = dataclasses.replace(self.report, notes=(*self.report.notes, *proof.notes))
            self._proven(file_error=proof.error, file_tolerance=proof.tolerance, runtimes=proof.runtimes)
        seconds = {**self.report.seconds, "emission": time.perf_counter() - start}
        self.report = dataclasses.replace(self.report, seconds=seconds)

    def write_onnx(self, path: Path, program: Program | None = None) -> None:
        """Write the small network, or another Program of the same interface, as ONNX without verifying it."""
        model = onnx_model(
            program or self.program, self.output_names, self.metadata(), interface=self.interface
        )
        save_onnx(model, path)

    def metadata(self) -> dict[str, str]:
        """Return what is written into the file about it."""
        kept = ", ".join(f"{layer.name}={layer.kept}/{layer.channels}" for layer in self.report.layers)
        return {
            "sbp_compile.version": version(),
            "sbp_compile.source_sha256": self.source_hash,
            "sbp_compile.kept_channels": kept,
            "sbp_compile.macs": f"{self.report.after.macs} of {self.report.before.macs}",
        }

    def _proven(self, **found: Any) -> None:
        assert self.report.verification is not None
        proof = dataclasses.replace(self.report.verification, **found)
        self.report = dataclasses.replace(self.report, verification=proof)


def _output_options(options: Mapping[str, Any]) -> OutputOptions:
    unknown = sorted(options.keys() - set(option_names()))
    if unknown:
        raise UsageError(f"save has no option {unknown[0]!r}; it has {', '.join(option_names())}")
    return OutputOptions(**options)


def version() -> str:
    """Return the tool's version, `unknown` where it is not installed."""
    try:
        return importlib.metadata.version("sbp-compile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def compile(  # noqa: A001  # the public name; torch.compile and re.compile have it too
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: DynamicBatch = True,
    dynamic_shapes: Any = None,
    verify: bool = True,
    inputs: Sequence[tuple[Tensor, ...]] = (),
    pipeline: Pipeline | None = None,
    recipe: Recipe | None = None,
    fill: bool = False,
) -> Compiled:
    """Return the small network that computes what `module` computes in eval mode.

    `example_inputs`: a tensor or the tuple of positional arguments, in the dtype of use; `kwargs`: keyword
    arguments. `dynamic_batch`, `dynamic_shapes`: see `sbp_compile.capture.export_module`. `verify`: compare
    with the original now and at each save. `inputs`: further inputs to verify on (one tuple of tensors each,
    in the order of the network's inputs). `pipeline`: the passes, those for this processor if not given
    (`passes.default_pipeline(target=passes.this_cpu())`).
    `recipe`: masks of another checkpoint to put into this one; the function is then that of the masked module.
    `fill`: switch the pruned channels with the highest signal-to-noise ratio on where a width is padded anyway; the
    function is then that of the module with these channels on (`sbp_compile.refill`).

    The module is left as it was, and shares no memory with the result. Raises `UsageError`, `InputError`,
    `UnsupportedModelError` or `VerificationError`.
    """
    for name, value, wanted in (("pipeline", pipeline, Pipeline), ("recipe", recipe, Recipe)):
        if value is not None and not isinstance(value, wanted):
            raise UsageError(f"`{name}` (={type(value).__name__}) must be a {wanted.__name__}")
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    times: dict[str, float] = {}
    with _timed(times, "capture"):
        exported = export_module(
            module, args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes
        )
        call = captured_call(exported, args, kwargs or {})
    tensors = call.tensors(args, kwargs or {})

    def as_given(*args: Any, **kwargs: Any) -> Any:
        with evaluating(module):
            return module(*args, **kwargs)

    return compile_exported(
        exported,
        call,
        tensors,
        verify=verify,
        inputs=inputs,
        pipeline=pipeline,
        seconds=times,
        own=as_given,
        recipe=recipe,
        fill=fill,
    )


def compile_file(model: LoadedModel, **options: Any) -> Compiled:
    """Do the same for a loaded model file; it must bring example inputs.

    `options`: those of `compile_exported`. The result may share the loaded tensors with `copy=False`.
    """
    args = model.example_inputs
    if args is None:
        flags = " ".join(exported_flags(model.exported_program))
        raise InputError(f"the model file brings no example inputs: add {flags}, or --inputs data.npz")
    try:
        call = captured_call(model.exported_program, args, model.kwargs)
    except ValueError as error:
        raise InputError(f"the model file's example inputs do not fit its program: {error}") from error
    tensors = call.tensors(args, model.kwargs)
    return compile_exported(
        model.exported_program,
        call,
        tensors,
        own=model.own,
        axis_names=model.axis_names,
        interface=model.interface,
        parting=model.parting,
        source_hash=model.sha256,
        **options,
    )


def compile_exported(
    exported: ExportedProgram,
    call: Call,
    examples: Sequence[Tensor],
    *,
    verify: bool = True,
    inputs: Sequence[tuple[Tensor, ...]] = (),
    input_file: Path | None = None,
    pipeline: Pipeline | None = None,
    seconds: Mapping[str, float] | None = None,
    own: Callable[..., Any] | None = None,
    recipe: Recipe | None = None,
    fill: bool = False,
    axis_names: Mapping[str, Mapping[int, str]] | None = None,
    interface: Interface | None = None,
    parting: Callable[[Sequence[Tensor]], str] | None = None,
    source_hash: str | None = None,
    copy: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """Do the same for an exported program, the call it was captured with and example tensors.

    `input_file`: an .npz with further inputs to verify on. `own`: the network as the user runs it, to compare with; the
    exported program itself if there is nothing else. `recipe`, `fill`: see `compile`. `axis_names`: of dynamic axes, by
    input and axis. `interface`, `parting`: see `LoadedModel`. `source_hash`: of the original, that of its graph and
    constants if not given. `copy`: the exported program's tensors; without it nobody may change them from now on.
    `progress`: is told what is being done.
    """
    times = dict(seconds or {})
    progress("reading the graph")
    with _timed(times, "capture"):
        labels = interface.inputs if interface else None
        original = program_from_export(exported, axis_names, labels, copy=copy)
        if recipe is not None:
            original = recipe.apply(original)
            own, parting = _as_module(original, call), None
    feeds = [check_inputs(original, feed) for feed in (examples, *inputs)]
    if input_file is not None:
        feeds.append(load_inputs(input_file, original))
    steps: list[Trace] = []
    pipeline = pipeline or default_pipeline(target=this_cpu())
    filled: tuple[Note, ...] = ()
    if fill:
        with _timed(times, "filling"):
            changed, filled = refilled(original, pipeline)
            if changed is not original:
                original, own, parting = changed, _as_module(changed, call), None
    with _timed(times, "passes"):
        small, notes = _run_passes(pipeline, original, steps, progress)
    references: tuple[Reference, ...] = ()
    proof = None
    if verify:
        progress("verifying in float64")
        with _timed(times, "verification"):
            devices = [tensor.device for tensor in examples]
            references, skipped = _references(own or exported.module(), call, original, feeds, devices)
            notes = (*notes, *skipped)
            verify_capture(references)
            notes = (*notes, *verify_finite(references))
            if parting is not None:
                verify_reader(original, references, parting)
            error = verify_float64(original, small, references)
            proof = Verification(error, sum(_batch(entry.inputs) for entry in references))
    progress("describing what was done")
    layers = layer_recipes(original, small, steps)
    notes = (*_batch_notes(original), *filled, *notes, *(recipe.notes(layers) if recipe else ()))
    dense = plain_architecture(original).outline
    original.constants.free_dropped()
    report = build_report(dense, small, steps, notes, verification=proof, seconds=times)
    return Compiled(
        compiled_module(emit_graph_module(small), call),
        small,
        original,
        report,
        call,
        feeds[0],
        interface.outputs if interface else _output_names(original, call),
        references,
        _hash(original) if source_hash is None else source_hash,
        layers,
        recipe,
        interface,
    )


def _as_module(program: Program, call: Call) -> CompiledModule:
    """Return a changed original as it would be used; noise becomes constants first, computed in float64."""
    return compiled_module(emit_graph_module(Canonicalize()(program).program), call)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _run_passes(
    pipeline: Pipeline, original: Program, steps: list[Trace], progress: Callable[[str], None]
) -> tuple[Program, tuple[Note, ...]]:
    number = itertools.count(1)
    trace = tracing(original)
    progress("compiling")

    def noted(step: Step) -> Trace:
        progress(f"compiling: {next(number)} passes done, the last {step.name}")
        return trace(step)

    def remember(step: Step) -> None:
        assert isinstance(step, Trace)
        steps.append(step)

    try:
        result = pipeline.with_callback(remember, noted)(original)
    except PassError as error:
        raise UnsupportedModelError(str(error)) from error
    original.constants.free_dropped()
    return result.program, result.notes


def _references(
    own: Callable[..., Any],
    call: Call,
    original: Program,
    given: Sequence[tuple[Tensor, ...]],
    devices: Sequence[torch.device],
) -> tuple[tuple[Reference, ...], tuple[Note, ...]]:
    """Return the original's outputs on the given inputs and on random ones, and a note for each that it refuses.

    The original runs where the examples were, the rest of the proof on the CPU.
    """
    found, notes = [], []
    for number, feed in enumerate((*given, *random_inputs(original, given[0]))):
        args, kwargs = call.nest_arguments(
            value.to(device) for value, device in zip(feed, devices, strict=True)
        )
        try:
            with torch.no_grad(), quiet_export():
                results = call.flat_results(own(*args, **kwargs))
        except Exception as error:  # whatever the operators of the user's model raise
            shapes = [list(tensor.shape) for tensor in feed]
            if number >= len(given):
                notes.append(
                    Note("verification", f"the original fails on inputs of shapes {shapes}: left out")
                )
                continue
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"the original fails on inputs of shapes {shapes}: {reason[0]}") from error
        own_results = [value.cpu() if isinstance(value, Tensor) else value for value in results]
        found.append(make_reference(original, feed, own_results))
    return tuple(found), tuple(notes)


def _batch(inputs: Sequence[Tensor]) -> int:
    return next((value.shape[0] for value in inputs if value.ndim), 1)


def _batch_notes(program: Program) -> list[Note]:
    """Say so where no leading axis is dynamic."""
    leading = [(entry.sizes[0], entry.other_sizes[0]) for entry in program.inputs if entry.sizes]
    if not leading or any(size != other for size, other in leading):
        return []
    return [Note("batch", f"fixed to {leading[0][0]}: the small network takes no other batch size")]


def _output_names(program: Program, call: Call) -> tuple[str | None, ...]:
    tensors = [isinstance(result, fx.Node) and not _is_number(result) for result in program.outputs]
    return call.output_names(tensors, [entry.name for entry in program.inputs])


def _is_number(result: fx.Node) -> bool:
    """Whether a call gives a size or another plain number."""
    return result.op == "call_function" and "dtype" not in result.meta


def _hash(program: Program) -> str:
    """Return the SHA-256 of the captured graph and its constants."""
    digest = hashlib.sha256(str(program.graph).encode())
    for name in sorted(program.constants):
        digest.update(name.encode())
        digest.update(program.constants[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
