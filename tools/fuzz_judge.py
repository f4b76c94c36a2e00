"""One mutant in a process of its own: what became of it, in which time and memory."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz_formats import FORMATS

SECONDS = 10.0  # of processor time, for a refusal; what is read is compiled, which takes its time
LONGEST = 60.0  # by the clock, other work on the machine included
MEMORY = 2 * 10**9
HARD_MEMORY = 12 * 2**30  # of address space: the machine's other work goes on
DOCUMENTED = frozenset({0, 2, 3, 4, 5})
EVERY = 40  # how many networks are loaded for one that is compiled
EVERY_BESIDE = 200  # of what is given beside a network, which is the same each time
DEFECT = 99


@dataclass(frozen=True)
class Outcome:
    """What became of a file: an exit code or a defect, with its first line.

    `seconds`: of processor time; `memory`: the peak, in bytes.
    """

    name: str
    code: int
    defect: str
    message: str
    seconds: float
    memory: int

    @property
    def is_read(self) -> bool:
        """Whether a network was made of it."""
        return self.code == 0


def judged(name: str, content: bytes, *, seed: int = 0, whole: bool | None = None) -> Outcome:
    """Load a file of a format (the name's first part) in a forked process, or compile it if `whole`."""
    kind_of_file = name.partition(":")[0]
    if whole is None:
        every = EVERY if FORMATS[kind_of_file].option is None else EVERY_BESIDE
        whole = ":crafted:" in name or random.Random(f"whole {seed} {name}").randrange(every) == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        path.write_bytes(content)
        entry = FORMATS[kind_of_file]
        entry.prepare()
        run = functools.partial(_in_its_folder, entry.compile if whole else entry.load, path)
        found = in_a_process(name, run)
        left = sorted(entry.name for entry in Path(folder).iterdir())
        wanted = ["model.bin", "small.onnx"] if whole and found.code == 0 else ["model.bin"]
        if not found.defect and left != wanted:
            return Outcome(name, found.code, f"it left {left}", found.message, found.seconds, found.memory)
    return found


def _in_its_folder(run: Callable[[Path], tuple[int, str]], path: Path) -> tuple[int, str]:
    """Run where a file that is made by a relative name shows."""
    os.chdir(path.parent)
    return run(path)


def in_a_process(name: str, run: Callable[[], tuple[int, str]]) -> Outcome:
    """Run something that gives (exit code, message) in a forked process, and watch its time and memory."""
    reading, writing = os.pipe()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks of processes with threads: they are idle
        child = os.fork()
    if not child:
        _in_the_child(run, writing)
    os.close(writing)
    status, usage = _ended(child, start + LONGEST)
    elapsed, seconds = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    with open(reading, "rb") as pipe:  # noqa: PTH123  # a descriptor
        text = pipe.read().decode(errors="replace")
    code, memory = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
    message = text.strip().splitlines()[-1] if text.strip() else ""
    defect = ""
    if elapsed >= LONGEST or (code and seconds >= SECONDS):
        defect = f"{elapsed:.0f} s, {seconds:.0f} s of processor time"
    elif code < 0:
        defect = f"signal {-code}"
    elif code not in DOCUMENTED:
        defect = f"exit code {code}"
    elif code and "\n" in text.strip():
        defect = "more than one line of error"
    elif memory > MEMORY:
        defect = f"{memory / 1e9:.1f} GB"
    return Outcome(name, code, defect, message, seconds, memory)


def _in_the_child(run: Callable[[], tuple[int, str]], writing: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (HARD_MEMORY, HARD_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code, text = DEFECT, "no result"
    with open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        code, text = run()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
    with contextlib.suppress(OSError):
        os.write(writing, text[-4000:].encode(errors="replace"))
    os._exit(code)


def _ended(child: int, until: float) -> tuple[int, resource.struct_rusage]:
    """Wait for a child's end, and end it when its time is over."""
    pause = 0.002
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.perf_counter() > until:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
