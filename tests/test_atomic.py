"""A file is written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from sbp_compile.atomic import atomic_file, atomic_path, write_atomically
from sbp_compile.errors import OutputError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_content_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "report.json", "é")
    assert (tmp_path / "report.json").read_bytes() == "é".encode()
    assert names(tmp_path) == ["report.json"]


def test_the_temporary_name_lies_in_the_same_folder_and_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "small.onnx") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"
        assert not (tmp_path / "small.onnx").exists()
        temporary.write_bytes(b"model")
    assert (tmp_path / "small.onnx").read_bytes() == b"model"


def write_half(target: Path, interruption: type[BaseException]) -> None:
    with atomic_file(target) as file:
        file.write(b"half of the n")
        raise interruption


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_writer_leaves_the_old_file_and_no_other(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "small.onnx"
    target.write_bytes(b"old")
    with pytest.raises(interruption):
        write_half(target, interruption)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["small.onnx"]


def test_a_new_file_has_the_usual_mode_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "new", b"")
    finally:
        os.umask(old)
    kept = tmp_path / "kept"
    kept.touch()
    kept.chmod(0o600)
    write_atomically(kept, b"")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"folder '.*/nowhere' does not exist; create it first"):
        write_atomically(tmp_path / "nowhere" / "small.onnx", b"")
    assert not names(tmp_path)


def test_a_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "small.onnx").mkdir()
    with pytest.raises(OutputError, match="is a directory; give a file name"):
        write_atomically(tmp_path / "small.onnx", b"")
    assert names(tmp_path) == ["small.onnx"]


def test_a_refusal_of_the_system_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(OutputError, match=r"cannot write '.*small.onnx': permission denied"):
        write_atomically(tmp_path / "small.onnx", b"")


def test_a_full_disk_is_an_output_error_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), atomic_file(tmp_path / "small.onnx"):
        raise OSError(28, "No space left on device")
    assert not names(tmp_path)


def test_a_pipe_is_written_into_and_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(tmp_path / "pipe", "report")
        assert os.read(reader, 100) == b"report"
    finally:
        os.close(reader)
    with pytest.raises(OutputError, match="is a device or a pipe"), atomic_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()


def test_a_name_that_is_too_long_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="file name too long"):
        write_atomically(tmp_path / f"{'a' * 300}.onnx", b"")
