"""TorchScript archives: screened, loaded by torch, and read into a plain module.

What `torch.jit.load` may execute: `__setstate__` methods written in the archive's own code, and the constructors of
custom C++ classes; it imports no Python. Its reader of pickles takes a tensor's size and place for granted (2.13 reads
outside of the record). So it is given an archive written anew from records that were checked: no such method or class,
every tensor inside its storage, every storage inside its record. What the code computes is not run on loading, and
torchscript_reader.py runs it call by call, with the operators that a model file may call and no others.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from sbp_compile.capture.export import quiet_export
from sbp_compile.capture.file_archive import Archive, Digest, Record, write_archive
from sbp_compile.capture.pickle_screen import StoredTensor, check_tensors, foreign_classes
from sbp_compile.capture.torchscript_reader import GraphNetwork, graph_network
from sbp_compile.errors import ModelFileError, UnsupportedModelError

_CODE = "code/"
_KEPT = re.compile(
    r"version|byteorder|constants\.pkl|data\.pkl|(constants|data)/\d+|code/[\w/]+\.py|\.data/(version|serialization_id)"
)
_DROPPED = re.compile(
    r"code/.*\.debug_pkl|code/.*\.bytecode|extra/.*|traced_inputs(\.pkl|/\d+)|bytecode(\.pkl|/.*)|\.format_version"
    r"|\.storage_alignment|mobile_debug_handles\.pkl|attributes\.pkl|tensors/\d+"
)
_TRACED = "traced_inputs.pkl"
_CLASSES = re.compile(r"__torch__\..*|torch\.jit\._pickle\.\w+")
_CUSTOM_CLASS = re.compile(r"__torch__\.torch\.classes\..*")
_RUN_ON_LOADING = frozenset({"__setstate__", "__getstate__"})
_MOST_CODE = 2**22


@dataclass(frozen=True)
class TorchScript:
    """A loaded archive.

    `script`: as torch loaded it, in eval mode; `network`: the same calls as a plain module; `traced`: what the trace's
    example inputs looked like, None for a scripted module; `sha256`: of the records that were loaded.
    """

    script: torch.jit.ScriptModule
    network: GraphNetwork
    traced: tuple[StoredTensor, ...] | None
    sha256: str


def load_torchscript(file: IO[bytes]) -> TorchScript:
    """Read an archive of `torch.jit.save`.

    Raises `ModelFileError` for one that is damaged or may run code on loading, `UnsupportedModelError` for a graph that
    cannot be read (objects, state that changes, methods that cannot be inlined).
    """
    archive = Archive(file, compressed=_CODE)
    digest, buffer = Digest(), io.BytesIO()
    write_archive(digest.watch(_screened(archive)), buffer)
    traced = _traced(archive)
    buffer.seek(0)
    try:
        with quiet_export():
            script = torch.jit.load(buffer, map_location="cpu")  # type: ignore[no-untyped-call]
        if getattr(script, "training", False):
            script.eval()
        network = graph_network(script)
    except (ModelFileError, UnsupportedModelError):
        raise
    except (
        Exception
    ) as error:  # torch documents no closed list of what it raises on code that it cannot compile
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelFileError(f"torch {torch.__version__} cannot load the TorchScript ({lines[0]})") from error
    return TorchScript(script, network, traced, digest.hexdigest())


def _screened(archive: Archive) -> Iterator[Record]:
    names = archive.names
    for name in names:
        if not _KEPT.fullmatch(name) and not _DROPPED.fullmatch(name):
            raise ModelFileError(f"record {name!r} is none of a TorchScript archive")
    for pickled, folder in (("constants.pkl", "constants/"), ("data.pkl", "data/")):
        _check_pickle(archive, pickled, folder)
    for name in names:
        if name.startswith(_CODE) and name.endswith(".py"):
            _check_code(name, archive.read(name))
    for name in names:
        if _KEPT.fullmatch(name):
            yield name, archive.read(name)


def _check_pickle(archive: Archive, name: str, folder: str) -> Any:
    content = archive.read(name)
    for found in foreign_classes(io.BytesIO(content)):
        if not _CLASSES.fullmatch(found):
            raise ModelFileError(f"record {name!r} refers to {found!r}, which no TorchScript archive needs")
        if _CUSTOM_CLASS.fullmatch(found):
            raise ModelFileError(
                f"record {name!r} holds an object of the C++ class {found.removeprefix('__torch__.')!r}, whose code "
                "runs on loading; quantised and TensorRT modules cannot be compiled: use the floating-point module"
            )
    return check_tensors(content, lambda key: archive.size(folder + key))


def _check_code(name: str, content: bytes) -> None:
    """Refuse methods that run on loading, and what is no code (TorchScript's grammar is part of Python's)."""
    if len(content) > _MOST_CODE:
        raise ModelFileError(
            f"record {name!r} has {len(content)} bytes of code; at most {_MOST_CODE} are read"
        )
    try:
        tree = ast.parse(content.decode())
        defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ModelFileError(f"record {name!r} is not TorchScript code ({error})") from error
    for method in defined:
        if method in _RUN_ON_LOADING:
            raise ModelFileError(
                f"record {name!r} defines {method}, code that runs on loading (as quantised modules have it); "
                "use the floating-point module"
            )


def _traced(archive: Archive) -> tuple[StoredTensor, ...] | None:
    """Return shapes and dtypes of the example inputs of a trace; their values are not in the file."""
    if archive.size(_TRACED) is None:
        return None
    found = check_tensors(
        archive.read(_TRACED), lambda key: None if archive.size(f"traced_inputs/{key}") is None else 2**62
    )
    inputs = found.get("forward") if isinstance(found, Mapping) else None
    if not isinstance(inputs, list) or not all(isinstance(entry, StoredTensor) for entry in inputs):
        return None
    return tuple(inputs)


def runs_on_the_cpu(script: torch.jit.ScriptModule) -> bool:
    """Whether nothing in a script's code names another device, so that it can be run here as it is."""
    return re.search(r'Device = prim::Constant\[value="(?!cpu)', str(script.inlined_graph)) is None
