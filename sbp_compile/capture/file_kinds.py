"""What kind of file something is, seen from its bytes alone; nothing is ever unpickled."""

from __future__ import annotations

import enum
import zipfile
from pathlib import Path
from typing import IO

from sbp_compile.errors import ModelFileError

UNDERSTOOD = (
    "understood are files of sbp_compile.save_model, .pt2 files (torch.export.save) without pickled parts, TorchScript "
    "archives, ONNX models, state dicts, safetensors and, if you trust them, pickled modules"
)


class Kind(enum.Enum):
    """The formats that are read; the value is what a message calls one."""

    PROGRAM = "an exported program"
    TORCHSCRIPT = "a TorchScript archive"
    PICKLE = "a file of torch.save"
    SAFETENSORS = "a safetensors file"
    ONNX = "an ONNX model"


_ZIP, _EMPTY_ZIP = b"PK\x03\x04", b"PK\x05\x06"
_SIGNATURES = (
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a compiled program or library"),
)
_LARGEST_HEADER = 100_000_000  # what the safetensors library itself reads


def recognise(path: Path) -> Kind:
    """Return the kind of a file that can be read; else `ModelFileError` says what it is."""
    if not path.exists():
        raise ModelFileError(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise ModelFileError(f"{str(path)!r} is a directory or a device, not a model file; {UNDERSTOOD}")
    try:
        with path.open("rb") as file:
            found = _kind(file)
    except OSError as error:
        raise ModelFileError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if isinstance(found, str):
        raise ModelFileError(f"{str(path)!r} is {found}")
    return found


def _kind(file: IO[bytes]) -> Kind | str:
    """Return the kind, or what is said of a file that is refused."""
    head = file.read(64)
    if not head:
        return "empty"
    if head.startswith((_ZIP, _EMPTY_ZIP)):
        return _kind_of_zip(file)
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return Kind.PICKLE
    if _starts_safetensors(head, file.seek(0, 2)):
        return Kind.SAFETENSORS
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return f"{kind}; {UNDERSTOOD}"
    if head[:1] == b"\x08" and head[1:2] <= b"\x20" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return Kind.ONNX
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model; {UNDERSTOOD}"
    return f"of a format that is not known; {UNDERSTOOD}"


def _starts_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= min(_LARGEST_HEADER, max(size - 8, 0))


def _kind_of_zip(file: IO[bytes]) -> Kind | str:
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # zipfile documents no closed list of what it raises on damaged data
        return "a truncated or damaged archive (its directory cannot be read)"
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner:
        return Kind.PROGRAM
    if "constants.pkl" in inner:
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.PICKLE
    if "serialized_exported_program.json" in names:
        return f"an exported program of an old torch; export it again. {UNDERSTOOD}"
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy archive of arrays, not a model; {UNDERSTOOD}"
    return f"a zip archive without a model in it; {UNDERSTOOD}"
