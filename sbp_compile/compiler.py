"""The compiler's contents page: capture, passes, verification, emission, in a straight line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from passes import Pipeline, PassError, Program, Step, default_pipeline
from passes.ir.interpret import run
from passes.ir.cost import count
from sbp_compile.atomic import atomic_path
from sbp_compile.baseline import plain_architecture
from sbp_compile.capture.export import DynamicBatch, export_module, quiet_export
from sbp_compile.capture.model_file import LoadedModel
from sbp_compile.capture.program import program_from_export
from sbp_compile.emit.module import CompiledModule, emit_graph_module
from sbp_compile.emit.onnx_file import onnx_model, save_onnx
from sbp_compile.errors import InputError, UnsupportedModelError, UsageError
from sbp_compile.report import Report, build_report
from sbp_compile.verify import Reference, Verification, load_inputs, verification_inputs, verify_float64, verify_onnx

SUFFIXES = (".onnx", ".pt2")


@dataclass
class Compiled:
    """The small network: as a torch module, as a Program, and what was done to get there."""

    module: CompiledModule
    program: Program
    original: Program
    dense: Program
    report: Report
    output_names: tuple[str | None, ...]
    references: tuple[Reference, ...] = field(repr=False, default=())
    source_hash: str = ""

    def save(self, path: str | Path) -> None:
        """Write the network, verified in onnxruntime before the file gets its name.

        `.onnx` writes ONNX, `.pt2` an exported program. Raises UsageError for another suffix, OutputError where the
        path cannot be written, VerificationError where the file computes something else than the original.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise UsageError(f"output {path.name!r} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        start = time.perf_counter()
        with atomic_path(path) as temporary:
            if path.suffix == ".onnx":
                self._write_onnx(temporary)
            else:
                self._write_exported(temporary)
        self.report = dataclasses.replace(
            self.report, seconds={**self.report.seconds, "emission": time.perf_counter() - start}
        )

    def onnx_bytes(self, program: Program | None = None) -> bytes:
        """The ONNX file of the small network (or of another Program of the same interface) as bytes, unverified."""
        model = onnx_model(program or self.program, self.output_names, self.metadata())
        return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]

    def metadata(self) -> dict[str, str]:
        """What is written into the file about it."""
        kept = ", ".join(f"{layer.name}={layer.kept}/{layer.channels}" for layer in self.report.layers)
        return {
            "sbp_compile.version": version(),
            "sbp_compile.source_sha256": self.source_hash,
            "sbp_compile.kept_channels": kept,
            "sbp_compile.macs": f"{self.report.after.macs} of {self.report.before.macs}",
        }

    def _write_onnx(self, path: Path) -> None:
        save_onnx(onnx_model(self.program, self.output_names, self.metadata()), path)
        if self.references:
            error, tolerance, providers = verify_onnx(path, self.references, self.program, self.output_names)
            assert self.report.verification is not None
            proof = dataclasses.replace(
                self.report.verification, onnx_error=error, onnx_tolerance=tolerance, providers=providers
            )
            self.report = dataclasses.replace(self.report, verification=proof)

    def _write_exported(self, path: Path) -> None:
        network = emit_graph_module(self.program)
        args = tuple(torch.zeros(entry.sizes, dtype=entry.dtype) for entry in self.program.inputs)
        shapes = {
            entry.name: {
                axis: torch.export.Dim.AUTO
                for axis, (size, other) in enumerate(zip(entry.sizes, entry.other_sizes, strict=True))
                if size != other
            }
            for entry in self.program.inputs
        }
        with quiet_export():
            exported = torch.export.export(network, args, dynamic_shapes=shapes, strict=False)
            exported.example_inputs = None
            torch.export.save(exported, path)


def version() -> str:
    """The tool's version, `unknown` where it is not installed."""
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
) -> Compiled:
    """The small network that computes what `module` computes in eval mode.

    `example_inputs`: a tensor or the tuple of positional arguments, in the dtype of use. `inputs`: further inputs to
    verify on (one tuple of tensors each, in the order of the network's inputs). The module is left as it was. Raises
    UnsupportedModelError, InputError or VerificationError.
    """
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    start = time.perf_counter()
    exported = export_module(module, args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    seconds = {"capture": time.perf_counter() - start}
    return compile_exported(
        exported, args, kwargs, verify=verify, inputs=inputs, pipeline=pipeline, seconds=seconds
    )


def compile_file(model: LoadedModel, **options: Any) -> Compiled:
    """The same for a loaded model file; it must bring example inputs."""
    if model.example_inputs is None:
        raise InputError("the model file brings no example inputs; save it with sbp_compile.save_model")
    compiled = compile_exported(model.exported_program, model.example_inputs, model.kwargs, **options)
    compiled.source_hash = model.sha256
    return compiled


def compile_exported(
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    inputs: Sequence[tuple[Tensor, ...]] = (),
    input_file: Path | None = None,
    pipeline: Pipeline | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Compiled:
    """The same for an exported program and one call's arguments; `input_file` is an .npz with further inputs."""
    times = dict(seconds or {})
    start = time.perf_counter()
    original = program_from_export(exported)
    times["capture"] = times.get("capture", 0.0) + time.perf_counter() - start
    if input_file is not None:
        inputs = [*inputs, load_inputs(input_file, original)]
    start = time.perf_counter()
    steps: list[Step] = []
    try:
        result = (pipeline or default_pipeline()).with_callback(steps.append)(original)
    except PassError as error:
        raise UnsupportedModelError(str(error)) from error
    small = result.program
    times["passes"] = time.perf_counter() - start
    dense = plain_architecture(original)
    report = build_report(dense, small, steps, result.notes, times)
    leaves = _flat_arguments(exported, args, kwargs or {})
    references: tuple[Reference, ...] = ()
    if verify:
        start = time.perf_counter()
        tensors = [leaves[position] for position in _tensor_positions(exported)]
        feeds = [*verification_inputs(original, tensors), *inputs]
        references = _references(exported, original, leaves, feeds)
        error = verify_float64(original, small, references)
        examples = sum(_batch(reference.inputs) for reference in references)
        times["verification"] = time.perf_counter() - start
        report = dataclasses.replace(
            report, verification=Verification(error, None, None, examples), seconds=dict(times)
        )
    module = CompiledModule(
        emit_graph_module(small), exported.call_spec.in_spec, exported.call_spec.out_spec, _tensor_positions(exported)
    )
    return Compiled(
        module, small, original, dense, report, output_names(exported, small), references, _hash(original)
    )


def _tensor_positions(exported: ExportedProgram) -> tuple[int, ...]:
    """Which flat arguments of a call are tensors (the others were fixed at capture)."""
    user = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return tuple(position for position, spec in enumerate(user) if isinstance(spec.arg, TensorArgument))


def _flat_arguments(exported: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    spec = exported.call_spec.in_spec
    assert spec is not None
    return list(spec.flatten_up_to((args, dict(kwargs))))


def _references(
    exported: ExportedProgram,
    original: Program,
    leaves: Sequence[Any],
    inputs: Sequence[tuple[Tensor, ...]],
) -> tuple[Reference, ...]:
    """The original's outputs on each input: by torch's own module in its dtype, and in float64."""
    own = exported.module()
    spec = exported.call_spec.in_spec
    assert spec is not None
    found = []
    for feed in inputs:
        filled = list(leaves)
        for position, value in zip(_tensor_positions(exported), feed, strict=True):
            filled[position] = value
        args, kwargs = spec.unflatten(filled)
        with torch.no_grad(), quiet_export():
            results = _results(exported, own(*args, **kwargs))
        found.append(Reference(tuple(feed), tuple(results), run(original, feed)))
    return tuple(found)


def _results(exported: ExportedProgram, tree: Any) -> list[Any]:
    spec = exported.call_spec.out_spec
    assert spec is not None
    return list(spec.flatten_up_to(tree))


def _batch(inputs: Sequence[Tensor]) -> int:
    return next((value.shape[0] for value in inputs if value.ndim), 1)


def output_names(exported: ExportedProgram, program: Program) -> tuple[str | None, ...]:
    """A name for each flat output: its dict keys, else output_0, ...; None for outputs that are no tensors."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    results = program.outputs
    names: list[str | None] = [None] * len(results)
    for path, position in _paths(spec.unflatten(list(range(len(results)))), ()):
        if isinstance(results[position], fx.Node):
            keys = [part for part in path if isinstance(part, str)]
            names[position] = ".".join(keys) if keys and len(keys) == len(path) else f"output_{position}"
    return tuple(names)


def _paths(tree: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int]]:
    if isinstance(tree, dict):
        return [entry for key, value in tree.items() for entry in _paths(value, (*path, str(key)))]
    if isinstance(tree, (list, tuple)):
        return [entry for key, value in enumerate(tree) for entry in _paths(value, (*path, key))]
    return [(path, tree)] if isinstance(tree, int) else []


def _hash(program: Program) -> str:
    """SHA-256 of the captured graph and its constants."""
    digest = hashlib.sha256(str(program.graph).encode())
    for name in sorted(program.constants):
        digest.update(name.encode())
        digest.update(program.constants[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
