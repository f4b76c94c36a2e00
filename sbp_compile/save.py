"""Writing the small network: one function for each kind of file, each proven before the file gets its name."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from torch import Tensor

from passes.ir.pipeline import Note
from passes.ir.program import Program
from sbp_compile.atomic import atomic_folder
from sbp_compile.capture.call import Call
from sbp_compile.capture.interface import Interface
from sbp_compile.capture.model_file import save_program
from sbp_compile.emit.exported import exported_program
from sbp_compile.emit.half import with_half_interface
from sbp_compile.emit.int8 import quantised
from sbp_compile.emit.module import CompiledModule, compiled_module, emit_graph_module
from sbp_compile.emit.onnx_file import external_data_pattern, onnx_model, save_onnx
from sbp_compile.emit.opsets import opset_of
from sbp_compile.emit.source_file import is_unchanged, load_source, network_source
from sbp_compile.emit.torchscript import TracedCall, load_torchscript, refuse_frozen_sizes, torchscript_bytes
from sbp_compile.emit.weights import load_weights, save_weights
from sbp_compile.errors import OpsetWarning, OutputError
from sbp_compile.output_options import EXPORTED, INT8_OPSET, ONNX, TORCHSCRIPT, WEIGHTS, OutputOptions
from sbp_compile.verify import Reference, verify_module, verify_onnx
from sbp_compile.verify_half import ROUNDED_TO_HALF, half_references, verify_half_arithmetic
from sbp_compile.verify_inputs import random_inputs
from sbp_compile.verify_int8 import fidelity, load_calibration

if TYPE_CHECKING:
    from sbp_compile.compiler import Compiled


@dataclass(frozen=True)
class FileProof:
    """What the comparison of a written file with the original found; `runtimes`: what ran the file."""

    error: float
    tolerance: float
    runtimes: tuple[str, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Output:
    """The network in the precision that it is written in, and what it is compared with (nothing: no proof)."""

    program: Program
    dtype: torch.dtype | None
    module: CompiledModule
    call: Call
    examples: tuple[Tensor, ...]
    names: tuple[str | None, ...]
    references: tuple[Reference, ...]
    metadata: Mapping[str, str]
    options: OutputOptions
    interface: Interface | None

    @property
    def cause(self) -> str | None:
        """Where values part that should not, if that is known without a search."""
        return ROUNDED_TO_HALF if self.options.fp16 else None


def save_verified(compiled: Compiled, path: Path, options: OutputOptions) -> FileProof | None:
    """Write `compiled` to `path`; None if it carries no references to compare with.

    Raises as `Compiled.save` says; nothing is left behind then.
    """
    options.check(path)
    output = _output(compiled, options)
    refuse_to_overwrite(path)
    stale = external_data_pattern(path.name) if path.suffix == ONNX else ""
    with atomic_folder(path, stale=stale, check=lambda: refuse_to_overwrite(path)) as temporary:
        return _WRITERS[path.suffix](output, temporary)


def refuse_to_overwrite(path: Path) -> None:
    """Raise `OutputError` where a file would go that is not ours alone: Python source beside weights."""
    source = path.with_suffix(".py")
    if path.suffix != WEIGHTS or not source.exists():
        return
    if not source.is_file() or not is_unchanged(source.read_text(encoding="utf-8", errors="replace")):
        raise OutputError(
            f"cannot write {str(source)!r} beside {path.name!r}: there is such a file that sbp_compile did not "
            "write, or that was changed since; give the output another name"
        )


def _output(compiled: Compiled, options: OutputOptions) -> _Output:
    program, module, references = compiled.program, compiled.module, compiled.references
    examples = compiled.examples
    if options.fp16:
        if options.fp16_io:
            program = with_half_interface(program)
            examples = tuple(value.half() if value.is_floating_point() else value for value in examples)
        module = compiled_module(emit_graph_module(program, torch.float16), compiled.call)
        references = half_references(compiled.original, references, interface=options.fp16_io)
        verify_half_arithmetic(program, references, compiled.output_names)
    return _Output(
        program,
        torch.float16 if options.fp16 else None,
        module,
        compiled.call,
        examples,
        compiled.output_names,
        references,
        compiled.metadata(),
        options,
        compiled.interface,
    )


def _write_onnx(output: _Output, path: Path) -> FileProof | None:
    model = _onnx_model(output)
    if output.options.int8 is not None:
        return _write_int8(output, model, path, output.options.int8)
    save_onnx(model, path, external_data=output.options.external_data)
    del model  # the runtime has weights of its own
    if not output.references:
        return None
    return FileProof(
        *verify_onnx(path, output.references, output.program, output.names, output.cause, output.dtype)
    )


def _write_int8(output: _Output, model: onnx.ModelProto, path: Path, examples: Path) -> FileProof | None:
    """The exact file is proven as always and then quantised; how far that takes it is a note."""
    calibration = load_calibration(examples, output.program)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.onnx"
        save_onnx(model, exact)
        proof = None
        if output.references:
            proof = FileProof(*verify_onnx(exact, output.references, output.program, output.names))
        save_onnx(quantised(model, exact, calibration.feeds), path)
        note = fidelity(exact, path, calibration)
    return None if proof is None else replace(proof, notes=(note,))


def _onnx_model(output: _Output) -> onnx.ModelProto:
    """Return the model in the opset that was asked for, else in that of the file it came from, as far as that goes."""
    asked, interface = output.options.opset, output.interface
    wanted = interface
    if interface is not None and output.options.int8 is not None:
        wanted = replace(interface, opset=max(interface.opset, INT8_OPSET))
    model = onnx_model(
        output.program, output.names, output.metadata, opset=asked, dtype=output.dtype, interface=wanted
    )
    if asked is None and interface is not None and opset_of(model) != interface.opset:
        warnings.warn(
            f"the small network cannot be written in opset {interface.opset}, which the file has; it is written in "
            f"opset {opset_of(model)}",
            OpsetWarning,
            stacklevel=2,
        )
    return model


def _write_exported(output: _Output, path: Path) -> FileProof | None:
    exported = exported_program(output.module, output.program, output.call)
    proof = _proven_in_torch(output, exported.module())
    args, kwargs = output.call.nest_arguments(output.examples)
    save_program(exported, args, kwargs, path)
    return proof


def _write_torchscript(output: _Output, path: Path) -> FileProof | None:
    network, traced = output.module.network, TracedCall.of(output.call, output.examples)
    path.write_bytes(torchscript_bytes(network, traced, output.examples))
    script = load_torchscript(path)
    refuse_frozen_sizes(script, network, traced, random_inputs(output.program, output.examples))
    return _proven_in_torch(output, lambda *args, **kwargs: script(*traced.arguments(*args, **kwargs)))


def _write_source(output: _Output, path: Path) -> FileProof | None:
    modules = {node.name: node.meta["module"] for node in output.program.graph.nodes if "module" in node.meta}
    ranks = {node.name: info.rank for node, info in output.program.infos.items()}
    source = network_source(output.module.network, output.call, modules, ranks, path.stem)
    python = path.with_suffix(".py")
    python.write_text(source.text, encoding="utf-8", newline="\n")
    save_weights(source.tensors, path, output.metadata)
    return _proven_in_torch(output, load_source(python, load_weights(path)))


def _proven_in_torch(output: _Output, module: Callable[..., object]) -> FileProof | None:
    if not output.references:
        return None
    cause = output.cause or "the file alone"
    found = verify_module(module, output.call, output.references, output.names, cause)
    return FileProof(*found, ("torch",))


_WRITERS: Mapping[str, Callable[[_Output, Path], FileProof | None]] = {
    ONNX: _write_onnx,
    EXPORTED: _write_exported,
    **dict.fromkeys(TORCHSCRIPT, _write_torchscript),
    WEIGHTS: _write_source,
}
