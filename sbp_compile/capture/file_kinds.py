"""What kind of file something is, seen from its bytes alone; nothing is ever unpickled."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sbp_compile.errors import ModelFileError

UNDERSTOOD = (
    "understood are files of sbp_compile.save_model and .pt2 files (torch.export.save) without pickled parts"
)

_ZIP, _EMPTY_ZIP = b"PK\x03\x04", b"PK\x05\x06"
_SIGNATURES = (
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a compiled program or library"),
)
# What torch.save imports for a dict of tensors; anything else is somebody's class.
_TENSOR_GLOBAL = re.compile(
    r"torch\.(_utils|storage|nn\.parameter|serialization)\..*|torch\.\w*Storage|torch\.\w*[0-9]"
    r"|collections\.OrderedDict|numpy\..*|(__builtin__|builtins)\.(set|dict|list|int|float)"
)
_MOST_OPCODES = 2_000_000


def refuse_unless_archive(path: Path) -> None:
    """Return if `path` is an archive of an exported program; else `ModelFileError` says what it is."""
    if not path.exists():
        raise ModelFileError(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise ModelFileError(f"{str(path)!r} is a directory or a device, not a model file; {UNDERSTOOD}")
    try:
        with path.open("rb") as file:
            refusal = _refusal(file, path)
    except OSError as error:
        raise ModelFileError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if refusal:
        raise ModelFileError(refusal)


def _refusal(file: IO[bytes], path: Path) -> str | None:
    head = file.read(64)
    file.seek(0)
    if not head:
        return f"{str(path)!r} is empty"
    if head.startswith((_ZIP, _EMPTY_ZIP)):
        return _zip_refusal(file, path)
    if head[:1] == b"\x80" and head[1] <= 5:
        return _pickle_refusal(file, path)
    return f"{str(path)!r} is {_kind(head)}; {UNDERSTOOD}"


def _kind(head: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return (
            "a safetensors file: weights without a network; build the module, load them, and use save_model"
        )
    if head[:1] == b"\x08" and head[1:2] <= b"\x20" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return "an ONNX model; the compiler starts from the PyTorch module it was exported from"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    return "of a format that is not known"


def _zip_refusal(file: IO[bytes], path: Path) -> str | None:
    try:
        archive = zipfile.ZipFile(file)
        names = archive.namelist()
    except Exception:  # zipfile documents no closed list of what it raises on damaged data
        return f"{str(path)!r} is a truncated or damaged archive (its directory cannot be read)"
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner:
        return None
    if "constants.pkl" in inner:
        return f"{str(path)!r} is a TorchScript archive; use the module it was made from. {UNDERSTOOD}"
    if "data.pkl" in inner:
        with archive.open(next(name for name in names if name.endswith("/data.pkl"))) as pickled:
            return _pickle_refusal(pickled, path)
    if "serialized_exported_program.json" in names:
        return f"{str(path)!r} is an exported program of an old torch; export it again. {UNDERSTOOD}"
    if names and all(name.endswith(".npy") for name in names):
        return f"{str(path)!r} is a NumPy archive of arrays, not a model; {UNDERSTOOD}"
    return f"{str(path)!r} is a zip archive without a model in it; {UNDERSTOOD}"


def _pickle_refusal(file: IO[bytes], path: Path) -> str:
    """Name a pickled module or state dict, with the two lines that make a model file of it."""
    classes = [name for name in _globals(file) if not _TENSOR_GLOBAL.fullmatch(name)]
    target = f"sbp_compile.save_model(model, example_input, {path.stem + '.model'!r})"
    if classes:
        what, load = (
            f"a pickled object ({classes[0]})",
            f"model = torch.load({str(path)!r}, weights_only=False)",
        )
        note = "unpickling runs code from the file, so do this only where you trust it:"
    else:
        what = "a pickled state dict: weights without a network"
        load = f"model = ...; model.load_state_dict(torch.load({str(path)!r}, weights_only=True))"
        note = "build the module, then save it:"
    return f"{str(path)!r} is {what}; {UNDERSTOOD}; {note}\n    {load}\n    {target}"


def _globals(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted names that the pickles at the file's position would import, without running them."""
    for _ in range(8):  # torch's older format is several pickles in a row
        try:
            yield from _globals_of_one(file)
        except Exception:  # pickletools raises many kinds of error on what is no pickle
            return


def _globals_of_one(file: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
        if count > _MOST_OPCODES:
            return
