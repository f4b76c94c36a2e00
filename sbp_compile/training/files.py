"""Reading data files: checked against the SHA-256 of their decompressed bytes, every fault one line."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

from sbp_compile.errors import InputError


class DatasetError(InputError):
    """A data file is missing, damaged, or not of the expected format."""


def contents(path: Path, sha256: str | None) -> bytes:
    """Return the bytes of a file, decompressed if it is gzip; checked if a checksum of those bytes is given.

    Raises DatasetError for a file that cannot be read or has other contents.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): fetch the file again or check the path"
        ) from error
    check(path, raw, sha256)
    return raw


def check(path: Path, raw: bytes, sha256: str | None) -> None:
    """Raise DatasetError unless `raw`, read from `path`, has that SHA-256 (None: whatever it has)."""
    if sha256 and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DatasetError(
            f"{path}: contents have SHA-256 {found[:16]}..., expected {sha256[:16]}...: fetch it again"
        )
