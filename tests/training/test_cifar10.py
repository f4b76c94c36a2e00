import hashlib
import io
import tarfile

import numpy as np
import pytest

from sbp_compile.training import DatasetError, cifar10, load

NAMES = (*cifar10.TRAIN, cifar10.TEST)


def batch(number, records=2):
    rows = np.zeros((records, cifar10.RECORD), dtype=np.uint8)
    rows[:, 0] = np.arange(records) + number
    rows[:, 1:1025], rows[:, 1025:2049], rows[:, 2049:] = 10 * number, 10 * number + 1, 10 * number + 2
    rows[:, 1 + 32] = 200  # red, second row, first column
    return rows.tobytes()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(batch(number))
    return tmp_path


def archive(folder, monkeypatch):
    path = folder / cifar10.ARCHIVE
    with tarfile.open(path, "w:gz") as file:
        for number, name in enumerate(NAMES):
            entry = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            entry.size = 2 * cifar10.RECORD
            file.addfile(entry, io.BytesIO(batch(number)))
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_records_become_colour_images_with_labels(folder):
    data = load("cifar10", folder)
    assert data.train_images.shape == (10, 3, 32, 32)
    assert data.train_labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert data.test_labels.tolist() == [5, 6]
    assert data.test_images[0, :, 0, 0].tolist() == [50, 51, 52]
    assert data.test_images[0, 0, 1, 0] == 200


def test_the_archive_holds_the_same(folder, tmp_path_factory, monkeypatch):
    path = archive(tmp_path_factory.mktemp("archive"), monkeypatch)
    for where in (path, path.parent):
        for one, other in zip(*(vars(load("cifar10", p)).values() for p in (folder, where)), strict=True):
            assert np.array_equal(one, other)


def test_an_archive_with_other_contents_is_refused(folder, monkeypatch):
    path = archive(folder, monkeypatch)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="SHA-256"):
        load("cifar10", path)


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match=r"cifar-10-binary.tar.gz is missing: fetch.*--data PATH"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "whole records"), (b"\0" * 99, "99 bytes"), (None, "label")]
)
def test_a_damaged_file_is_named_with_its_fault(folder, content, message):
    content = batch(20) if content is None else content
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"data_batch_3.*{message}"):
        load("cifar10", folder)
