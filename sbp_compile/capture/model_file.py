"""The model file: a captured model with its example inputs, loaded without its code and without pickle.

docs/model-file.md describes the format.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sbp_compile.atomic import atomic_file
from sbp_compile.capture import file_archive as layout
from sbp_compile.capture.export import DynamicBatch, export_module, quiet_export
from sbp_compile.capture.file_archive import Archive, Digest, Record, write_archive
from sbp_compile.capture.file_inputs import pack_inputs, unpack_inputs
from sbp_compile.capture.interface import Interface
from sbp_compile.capture.screen import screen
from sbp_compile.errors import InputError, ModelFileError, UnsupportedModelError

_FORMAT = "sbp_compile model"
_VERSION = 1


@dataclass(frozen=True)
class LoadedModel:
    """What a model file holds.

    `example_inputs`: the positional arguments of the saved call, None for a .pt2 file that brings none.
    `kwargs`: its keyword arguments. `metadata`: tool and torch version, for files of `save_model`.
    `sha256`: of the records of the program and its tensors, 64 hexadecimal digits. `own`: the network as its user runs
    it, where that is something else than the exported program. `axis_names`: of dynamic axes, by input and axis.
    `interface`: of the ONNX file it was. `parting`: where `own` is another runtime's run of a graph that was
    translated, names the first value at which the two part for some inputs.
    """

    exported_program: ExportedProgram
    example_inputs: tuple[Any, ...] | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    own: Callable[..., Any] | None = None
    axis_names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    interface: Interface | None = None
    parting: Callable[[Sequence[Tensor]], str] | None = None


def save_model(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: DynamicBatch = True,
) -> None:
    """Capture `module` and write it with its example inputs to `path`, which may have any extension.

    `example_inputs`: a tensor, or the tuple of positional arguments; `kwargs`: keyword arguments.
    `dynamic_batch`: see `export_module`; the module is left as it was. Same model and inputs, same bytes.
    Raises `InputError` for inputs that cannot be saved, `UnsupportedModelError` for a model that cannot be
    captured or stored without pickle, `OutputError` when `path` cannot be written; nothing is left behind
    then.
    """
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(args, tuple):
        raise InputError(f"example_inputs (={type(args).__name__}) must be a tensor or a tuple of arguments")
    pack_inputs(args, dict(kwargs or {}))  # refuse what cannot be saved before the work of a capture
    program = export_module(module, args, kwargs, dynamic_batch=dynamic_batch)
    save_program(program, args, dict(kwargs or {}), path, name=type(module).__name__)


def save_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    name: str = "the program",
) -> None:
    """Write an exported program with example inputs to a model file; errors as in `save_model`."""
    inputs = pack_inputs(args, kwargs)
    try:
        archive = _serialise(program)
        with atomic_file(path) as file:
            write_archive(_records(archive, inputs, _namespaces(program)), file)
    except ModelFileError as error:
        raise UnsupportedModelError(f"{name} cannot be stored without pickle: {error}") from error


def load_program(path: Path, namespaces: Collection[str] = ()) -> LoadedModel:
    """Read a file of `save_model`, or a .pt2 file without pickled payloads; `ModelFileError` for anything else."""
    with path.open("rb") as file:
        return _load(file, namespaces)


def _serialise(program: ExportedProgram) -> Archive:
    program.example_inputs = None  # torch would pickle them
    buffer = io.BytesIO()
    try:
        with quiet_export():
            torch.export.save(program, buffer)
    except Exception as error:
        raise ModelFileError(f"torch.export.save refused it ({error})") from error
    return Archive(buffer)


def _records(archive: Archive, inputs: tuple[bytes, bytes], namespaces: Collection[str]) -> Iterator[Record]:
    digest = Digest()
    yield from digest.watch(screen(archive, namespaces))
    yield layout.INPUTS_TREE, inputs[0]
    yield layout.INPUTS, inputs[1]
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "tool_version": _tool_version(),
        "torch_version": str(torch.__version__),
        "sha256": digest.hexdigest(),
    }
    yield layout.METADATA, json.dumps(metadata).encode()


def _load(file: IO[bytes], namespaces: Collection[str]) -> LoadedModel:
    archive = Archive(file)
    digest, buffer = Digest(), io.BytesIO()
    write_archive(digest.watch(screen(archive, namespaces)), buffer)
    metadata = _metadata(archive)
    args, kwargs = _inputs(archive) if metadata else (None, {})
    return LoadedModel(_deserialise(buffer), args, kwargs, metadata, digest.hexdigest())


def _metadata(archive: Archive) -> dict[str, Any]:
    """Return the metadata of a file of ours, {} for another .pt2 file."""
    if archive.size(layout.METADATA) is None:
        return {}
    try:
        metadata = json.loads(archive.read(layout.METADATA))
        version = metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{layout.METADATA} is damaged ({error!r})") from error
    if version != _VERSION:
        raise ModelFileError(
            f"format version {version!r} is not known here (expected {_VERSION}); update sbp-compile"
        )
    return dict(metadata)


def _inputs(archive: Archive) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return unpack_inputs(archive.read(layout.INPUTS_TREE), archive.read(layout.INPUTS))


def _deserialise(buffer: io.BytesIO) -> ExportedProgram:
    """Give torch a screened archive; what it still does not like becomes one error."""
    buffer.seek(0)
    with _logged_reason() as logged, quiet_export():
        # torch only warns of a graph that has no valid Python text.
        warnings.filterwarnings("error", message="Unable to execute the generated python source code")
        try:
            return torch.export.load(buffer)
        except Exception as error:
            reason = logged.reason or error
            lines = [line for line in str(reason).splitlines() if line.strip()] or [type(reason).__name__]
            raise ModelFileError(
                f"torch {torch.__version__} cannot load the program ({lines[-1].strip()})"
            ) from error


class _Reason(logging.Filter):
    """Keeps torch's first error to itself: torch logs it and then raises another that says less."""

    reason: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info, tuple):
            self.reason = self.reason or record.exc_info[1]
        return False


@contextmanager
def _logged_reason() -> Iterator[_Reason]:
    logger, reason = logging.getLogger("torch.export"), _Reason()
    logger.addFilter(reason)
    try:
        yield reason
    finally:
        logger.removeFilter(reason)


def _namespaces(program: ExportedProgram) -> set[str]:
    """Return the namespaces of the operators the program calls: the user's own model is trusted."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return {target.partition(".")[0] for target in targets}


def _tool_version() -> str:
    try:
        return importlib.metadata.version("sbp-compile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (run from its source folder)"
