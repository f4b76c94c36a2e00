"""Writing a file so that its final name never holds half of it."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sbp_compile.errors import OutputError

_OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it gets the final name only if the block ends well.

    The temporary file exists and is empty; it keeps `path`'s suffix, for writers that look at it. On any
    exception, an interrupt included, it is removed and whatever was at `path` stays as it was.

    Raises `OutputError` as `refuse_unless_writable` does, and when the system refuses a write (a full disk, for
    example).
    """
    target = Path(path)
    temporary = _create_beside(target)
    try:
        with _system_errors(target):
            yield temporary
            _publish(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file opened for writing and reading; see `atomic_path` for what happens at the end."""
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        yield file


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, stale: str = "", check: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Yield `path`'s name in a temporary folder beside it, for a file that has companions.

    If the block ends well, the files `<stem>.*` there get their places, `path` itself last; each of them appears
    whole or not at all, and two writers of one folder take turns. Then older files go whose whole name matches the
    regular expression `stale`: a companion that is named after its content is replaced in one step so, together
    with the file that refers to it. `check` is called while no other writer can come between, and may refuse. The
    temporary folder goes in any case. Errors as in `atomic_path`.
    """
    target = Path(path)
    refuse_unless_writable(target)
    with _system_errors(target):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.stem[:32]}-", dir=target.parent))
    try:
        with _system_errors(target):
            yield folder / target.name
            with _turn(target.parent):
                if check is not None:
                    check()
                _publish_all(folder, target, stale)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish_all(folder: Path, target: Path, stale: str) -> None:
    written = sorted(folder.glob(f"{glob.escape(target.stem)}.*"), key=lambda path: path.name == target.name)
    names = {path.name for path in written}
    for path in written:
        _publish(path, target.with_name(path.name))
    for old in target.parent.iterdir() if stale else ():
        if re.fullmatch(stale, old.name) and old.name not in names:
            old.unlink(missing_ok=True)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, where the system has such locks: it needs no file and ends with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` in one step; see `atomic_path` for the errors.

    A stream (`is_stream`) is written into instead, behind what it holds.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    if is_stream(target):
        with _system_errors(target), target.open("ab") as stream:
            stream.write(data)
        return
    with atomic_file(target) as file:
        file.write(data)


def is_stream(path: Path) -> bool:
    """Whether what lies there is written into and never replaced: a device, a pipe, an open file of this process."""
    if str(path).startswith(_OPEN_FILES):
        return True
    with _system_errors(path):
        return path.exists() and not path.is_file() and not path.is_dir()


def refuse_unless_writable(path: Path) -> None:
    """Raise `OutputError` for a directory, a device, and a name or folder where no file can be made."""
    with _system_errors(path):
        if path.is_dir():
            raise OutputError(f"cannot write {str(path)!r}: it is a directory; give a file name")
        if is_stream(path):
            raise OutputError(
                f"cannot write {str(path)!r}: it is a device or a pipe, and a file would take its place; give a file "
                "name"
            )
        if not path.parent.is_dir():
            raise OutputError(
                f"cannot write {str(path)!r}: folder {str(path.parent)!r} does not exist; create it first"
            )
    if not os.access(path.parent, os.W_OK):
        is_mounted_so = hasattr(os, "statvfs") and os.statvfs(path.parent).f_flag & os.ST_RDONLY
        reason = (
            "read-only file system" if is_mounted_so else f"no permission to write in {str(path.parent)!r}"
        )
        raise OutputError(f"cannot write {str(path)!r}: {reason}")


def _create_beside(target: Path) -> Path:
    """Create the temporary file in the target's folder: a rename is atomic only within one file system."""
    refuse_unless_writable(target)
    with _system_errors(target):
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem[:32]}-", suffix=target.suffix, dir=target.parent
        )
    os.close(handle)
    return Path(name)


@contextmanager
def _system_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {str(target)!r}: {_reason(error)}") from error


def _publish(temporary: Path, target: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(_wanted_mode(target))
    temporary.replace(target)


def _wanted_mode(target: Path) -> int:
    """Return the mode of the file replaced, else what `open` would give (mkstemp's own is private)."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
