"""The zip container of torch's files: read with every check it allows, written reproducibly.

Where the records lie is torch's own layout, which it does not document; tests/capture/test_model_file.py
fails when a version of torch writes another one.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from sbp_compile.errors import ModelFileError

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/"
CONSTANTS_CONFIG = "data/constants/model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
FORMAT = "archive_format"

OWN = "sbp_compile/"
METADATA = OWN + "metadata.json"
INPUTS_TREE = OWN + "inputs.json"
INPUTS = OWN + "inputs.safetensors"

MOST_UNPACKED = 2**26
_ROOT = "archive/"
_EPOCH = (1980, 1, 1, 0, 0, 0)

Record = tuple[str, bytes]


class Archive:
    """The records of a .pt2 file, a TorchScript archive or a file of torch.save by their paths below its root folder.

    Only uncompressed records with plain relative paths are taken, so what is read can be no larger than the
    file; those under `compressed` (TorchScript's code) may be deflated, up to `MOST_UNPACKED` bytes together. Raises
    `ModelFileError` for anything else, and when a record's checksum does not fit.
    """

    def __init__(self, file: IO[bytes], *, compressed: str | None = None) -> None:
        self._compressed = compressed
        with _reading():
            self._zip = zipfile.ZipFile(file)
        self._records: dict[str, zipfile.ZipInfo] = {}
        root = self._root()
        for info in self._zip.infolist():
            name = info.filename.removeprefix(root)
            self._check(info, name)
            self._records[name] = info
        self._check_total(file)

    @property
    def names(self) -> list[str]:
        """The paths of all records, in the file's order."""
        return list(self._records)

    def size(self, name: str) -> int | None:
        """Return a record's size in bytes, None where there is none."""
        info = self._records.get(name)
        return None if info is None else info.file_size

    def read(self, name: str) -> bytes:
        """Return a record's content; its checksum is verified."""
        if name not in self._records:
            raise ModelFileError(f"record {name!r} is missing")
        info = self._records[name]
        with _reading(), self._zip.open(info) as record:
            content = record.read(info.file_size)  # zipfile checks the sum where a record ends
            if len(content) != info.file_size or record.read(1):
                raise ModelFileError(f"record {name!r} does not have the size that the directory says")
            return content

    def _root(self) -> str:
        names = self._zip.namelist()
        return names[0].partition("/")[0] + "/" if names else ""

    def _check(self, info: zipfile.ZipInfo, name: str) -> None:
        if name == info.filename or not name or not _is_plain(name):
            raise ModelFileError(
                f"record {info.filename!r} is not a plain path below the archive's root folder"
            )
        if name in self._records:
            raise ModelFileError(f"record {info.filename!r} is there twice")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        may_deflate = self._compressed is not None and name.startswith(self._compressed)
        deflated = info.compress_type == zipfile.ZIP_DEFLATED and may_deflate
        if not (stored or deflated) or info.flag_bits & 1:
            raise ModelFileError(
                f"record {info.filename!r} is compressed or encrypted; expected stored bytes"
            )

    def _check_total(self, file: IO[bytes]) -> None:
        total, available = sum(info.compress_size for info in self._records.values()), file.seek(0, 2)
        if total > available:
            raise ModelFileError(f"the records claim {total} bytes, but the file has {available}")
        packed = [info for info in self._records.values() if info.compress_type != zipfile.ZIP_STORED]
        unpacked = sum(info.file_size for info in packed)
        if unpacked > MOST_UNPACKED:
            raise ModelFileError(
                f"the compressed records claim {unpacked} bytes; at most {MOST_UNPACKED} are read"
            )


def write_archive(records: Iterable[Record], file: IO[bytes]) -> None:
    """Write records to a zip that torch reads, byte for byte the same for the same records."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(_ROOT + name, _EPOCH), content)


class Digest:
    """The SHA-256 of a sequence of records: of each the path, the length and the content."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, content: bytes) -> None:
        """Take in one record."""
        self._hash.update(f"{name}\0{len(content)}\0".encode())
        self._hash.update(content)

    def watch(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass records through, taking each in."""
        for name, content in records:
            self.add(name, content)
            yield name, content

    def hexdigest(self) -> str:
        """Return the digest of what was taken in so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def _is_plain(name: str) -> bool:
    return (
        all(part not in {"", ".", ".."} for part in name.split("/"))
        and name.isprintable()
        and "\\" not in name
    )


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever zipfile raises on damaged data into the one error users know."""
    try:
        yield
    except ModelFileError:
        raise
    except Exception as error:  # zipfile documents no closed list of them
        raise ModelFileError(f"the archive is truncated or damaged ({error})") from error
