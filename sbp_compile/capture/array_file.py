"""Arrays from .npz files: what one claims is checked against what is there before numpy makes an array of it.

An .npz file is a zip archive with one file of numpy's for each array. Pickled objects are never read; compressed arrays
are read as far as their sizes are in proportion to the file.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbp_compile.errors import InputError

_MOST_RATIO = 100  # of an array to what it is packed into; real data stay far below
_ALWAYS_READ = 2**28
_SUFFIX = ".npy"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NUMBERS = "biufc"  # numpy's kinds of booleans, integers, floats and complex numbers


def read_arrays(path: str | Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz file, by name; `InputError` for anything else."""
    with _reading(path) as file, zipfile.ZipFile(file) as archive:
        return {name: _read(archive, info) for name, info in _entries(archive, file)}


@contextmanager
def _reading(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file, and turn whatever reading it raises into the one error users know."""
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"cannot read inputs from {str(path)!r}: {(error.strerror or str(error)).lower()}"
        ) from error
    except Exception as error:  # numpy and zipfile document no closed list of what damaged files raise
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise InputError(
            f"cannot read inputs from {str(path)!r}: {reason}; expected an .npz file of numeric arrays"
        ) from error


def check_arrays(path: str | Path) -> None:
    """Refuse what `read_arrays` would, but for damage inside of the data, without reading those."""
    with _reading(path) as file, zipfile.ZipFile(file) as archive:
        for _, info in _entries(archive, file):
            _check(archive, info)


def as_tensor(name: str, array: NDArray[np.generic]) -> Tensor:
    """Return an array as a tensor of this machine's byte order; `InputError` where it has no numbers."""
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise InputError(f"input {name!r} has dtype {array.dtype}; expected numbers") from error


def _entries(archive: zipfile.ZipFile, file: IO[bytes]) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """Yield the arrays' names and records; refuse two of one name, and sizes out of proportion to the file."""
    records = archive.infolist()
    available = file.seek(0, 2)
    stored = sum(info.compress_size for info in records)
    if stored > available:
        raise ValueError(f"its records claim {stored} bytes, the file has {available}")
    claimed = sum(info.file_size for info in records)
    if claimed > max(_ALWAYS_READ, _MOST_RATIO * available):
        raise ValueError(
            f"it unpacks to {claimed} bytes, over {_MOST_RATIO} times its size; save it with numpy.savez"
        )
    names = set()
    for info in records:
        name = info.filename.removesuffix(_SUFFIX)
        if name in names:
            raise ValueError(f"array {name[:100]!r} is there twice")
        names.add(name)
        yield name, info


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[np.generic]:
    _check(archive, info)
    with archive.open(info) as record:
        return np.asarray(np.lib.format.read_array(record, allow_pickle=False))


def _check(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Refuse an array whose dtype is none of numbers, or whose shape is not that of the bytes that are there."""
    shown = repr(info.filename[:100])
    with archive.open(info) as record:
        try:
            header = _HEADERS.get(np.lib.format.read_magic(record))
        except ValueError as error:
            raise ValueError(f"{shown} is no array of numpy's") from error
        if header is None:
            raise ValueError(f"{shown} is of a version that numeric arrays do not have")
        shape, _, dtype = header(record)
        there = info.file_size - record.tell()
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"{shown} has dtype {str(dtype)[:100]}, not numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"{shown} claims shape {list(shape)} of {dtype}; it holds {there} bytes")
