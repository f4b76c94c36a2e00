"""Writers that are killed, that race, and that run out of space: the old file or the new one, never between.

tools/interrupt_writes.py does this to the whole command line, for minutes; here it is done to the writing alone.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sbp_compile
from sbp_compile.__main__ import main
from sbp_compile.atomic import atomic_folder
from sbp_compile.errors import OutputError
from tests.emit.test_onnx_file import Large

ROOT = Path(__file__).resolve().parent.parent
STALE = r"small\.onnx\.[0-9a-f]{16}\.data"

# Writes new pairs over and over: a large file named after its content, and a small one that refers to it.
WRITER = f"""
import hashlib, os, sys
from pathlib import Path
from sbp_compile.atomic import atomic_folder
target, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while number:
    content = os.urandom(1 << 16) * 4
    name = f"small.onnx.{{hashlib.sha256(content).hexdigest()[:16]}}.data"
    with atomic_folder(target, stale=r"{STALE}") as temporary:
        temporary.with_name(name).write_bytes(content)
        temporary.write_text(name)
    number -= 1
"""


def start(target: Path, number: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(target), str(number)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def assert_complete(target: Path) -> str:
    """The small file is there, and the file that it names has the content that it is named after."""
    name = target.read_text()
    content = target.with_name(name).read_bytes()
    assert name == f"small.onnx.{hashlib.sha256(content).hexdigest()[:16]}.data"
    return name


def test_a_writer_that_is_killed_leaves_a_complete_pair(tmp_path: Path) -> None:
    source, target = random.Random(0), tmp_path / "small.onnx"
    start(target, 1).communicate()
    found = set()
    for _ in range(12):
        before = target.read_text()
        process = start(target)
        while target.read_text() == before:
            assert process.poll() is None
        time.sleep(source.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found.add(assert_complete(target))
    assert len(found) == 12
    start(target, 1).communicate()
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".data")]) == 1


def test_two_writers_of_one_name_take_turns(tmp_path: Path) -> None:
    target = tmp_path / "small.onnx"
    writers = [start(target, 40) for _ in range(2)]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["small.onnx", assert_complete(target)])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk does, for every way of writing."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def compiled() -> sbp_compile.Compiled:
    torch.manual_seed(0)
    return sbp_compile.compile(Large().eval(), torch.randn(4, 32))


@pytest.mark.parametrize("name", ["a.onnx", "b.onnx", "c.pt2", "d.ts", "e.safetensors"])
def test_no_space_for_a_file_is_one_line_and_leaves_the_old_one_alone(
    name: str, compiled: sbp_compile.Compiled, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"old")
    options = {"external_data": True} if name == "b.onnx" else {}
    with (
        pytest.raises(OutputError, match=r"(?i)cannot write .*file too large") as found,
        file_size_limit(2000),
    ):
        compiled.save(tmp_path / name, **options)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


MOUNT = "mount -t tmpfs -o size=64k,{mode} tmpfs {folder}"
FULL = """
import sys
from pathlib import Path
from sbp_compile.atomic import atomic_folder
from sbp_compile.errors import OutputError
target = Path(sys.argv[1]) / "small.onnx"
try:
    with atomic_folder(target) as temporary:
        temporary.with_name("small.onnx.data").write_bytes(bytes(40_000))
        temporary.write_bytes(bytes(40_000))
except OutputError as error:
    print(error)
print([path.name for path in target.parent.iterdir()])
"""


@pytest.mark.parametrize(
    ("mode", "reason"), [("rw", "no space left on device"), ("ro", "read-only file system")]
)
def test_a_disk_that_is_full_or_read_only_is_one_line_and_stays_empty(
    mode: str, reason: str, tmp_path: Path
) -> None:
    mount = MOUNT.format(mode=mode, folder=tmp_path)
    script = f'{mount} || exit 90\nexec "{sys.executable}" -c "$0" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, FULL, str(tmp_path)]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if found.returncode in {1, 90} and not found.stdout:
        pytest.skip("the system allows no file system of one's own")
    assert found.stdout.splitlines() == [f"cannot write '{tmp_path}/small.onnx': {reason}", "[]"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_its_exit_code_and_what_was_begun_is_removed(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        with atomic_folder(tmp_path / "small.onnx") as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), number)
            time.sleep(10)
        raise AssertionError

    monkeypatch.setattr("sbp_compile.cli.main", run)
    assert main() == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("raised", [RuntimeError("unexpected"), OutputError("cannot write")])
def test_a_signal_that_a_library_makes_another_exception_of_is_still_an_interrupt(
    raised: Exception,
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException as error:
            raise raised from error

    monkeypatch.setattr("sbp_compile.cli.run", run)
    monkeypatch.setattr(sys, "argv", ["sbp_compile", "model.pt", "-o", "small.onnx"])
    before = signal.getsignal(number)
    assert main() == code
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == "sbp_compile: error: interrupted; nothing was written\n"
