"""CIFAR-10 in its original binary format: six files of records, or the archive that they come in.

A record is one byte of label, then 3072 bytes of pixels: red, green and blue planes of 32x32
(https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version").
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbp_compile.training.files import DatasetError, check, contents

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
RECORD = 1 + 3 * 32 * 32
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # of the compressed file

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_cifar10(path: Path) -> tuple[Split, Split]:
    """Return training and test images, uint8 (N, 3, 32, 32), each with labels, int64 (N,).

    `path`: the archive `cifar-10-binary.tar.gz`, which is checked against its SHA-256; the folder of its six files;
    or a folder that holds either. Files on their own are checked for whole records and labels below 10: no checksums
    are published for them. Raises DatasetError.
    """
    files = _archived(path) if path.is_file() else _found(path)
    train = [_records(name, raw) for name, raw in files[:-1]]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return (images, labels), _records(*files[-1])


def _found(folder: Path) -> list[tuple[str, bytes]]:
    for place in (folder, folder / FOLDER):
        if all((place / name).is_file() for name in (*TRAIN, TEST)):
            return [(str(place / name), contents(place / name, None)) for name in (*TRAIN, TEST)]
    if (folder / ARCHIVE).is_file():
        return _archived(folder / ARCHIVE)
    raise DatasetError(
        f"{folder / ARCHIVE} is missing: fetch the binary version from the authors' page and copy it there, "
        "or pass --data PATH"
    )


def _archived(path: Path) -> list[tuple[str, bytes]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check the path") from error
    check(path, raw, ARCHIVE_SHA256)
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return [(f"{path}:{name}", _member(archive, name)) for name in (*TRAIN, TEST)]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"{FOLDER}/{name}")
    assert file is not None, "the checksum says that it is there"
    return file.read()


def _records(name: str, raw: bytes) -> Split:
    if not raw or len(raw) % RECORD:
        raise DatasetError(f"{name}: {len(raw)} bytes, expected whole records of {RECORD}: fetch it again")
    table = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    labels = table[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise DatasetError(
            f"{name}: a label of {labels.max()}, expected 0 to 9: not CIFAR-10's binary format"
        )
    return table[:, 1:].reshape(-1, 3, 32, 32).copy(), labels
