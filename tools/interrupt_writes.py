"""Stop the compiler at random moments of its work, over and over, and look at what lies under the output's name.

    python tools/interrupt_writes.py --runs 60 --seed 0 [--kind KIND]... [--write]

Each run starts `python -m sbp_compile` onto a name that already holds a file, and ends it with SIGKILL (kill), SIGINT
(interrupt, Ctrl-C) or SIGTERM (terminate) after a random time, most of them while files are written; or starts two at
once (race); or writes to a disk that is too small for the file (full), or to a folder that is mounted read-only.
Afterwards the name must hold the old file, intact, or a new one that is complete and loads; after everything but
SIGKILL nothing else may lie beside it. Exit code 1 if that was ever otherwise. `full` and `read-only` mount a file
system of their own in a user namespace, and are left out where the system allows none.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from sbp_compile.atomic import write_atomically
from sbp_compile.emit.source_file import is_unchanged

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "interrupted-writes.md"
OUTPUTS = ("small.onnx", "external.onnx", "small.ts", "small.pt2", "small.safetensors")
KINDS = ("kill", "interrupt", "terminate", "race", "full", "read-only")
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
EXIT_CODES = {"interrupt": {0, 130, -signal.SIGINT}, "terminate": {0, 143, -signal.SIGTERM}, "race": {0}}
MOUNTS = {
    "full": "mount -t tmpfs -o size={size} tmpfs {folder} && cp {files} {folder}",
    "read-only": "cp {files} {folder} && mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}",
}
# The files as they were, and no other name: what is left in a mounted folder can be seen only from inside.
SCRIPT = """{mount} || exit 90
{command}
code=$?
for file in {files}; do cmp "$file" {folder}/$(basename "$file") || exit 91; done
[ "$(ls -A {folder} | wc -l)" = "{number}" ] || exit 92
exit $code"""
NO_MOUNTS = 90
TRIES = 5  # for a moment at which the run is not over


class Subject(nn.Module):
    """A network whose files take a while to write: 1 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 1800), nn.ReLU(), nn.Linear(1800, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Bench:
    """A model file, how long it takes to compile, and the files that are there before each run."""

    model: Path
    old: Path
    seconds: dict[str, tuple[float, float]]


def command(model: Path, output: Path) -> list[str]:
    """The command line of one run."""
    extra = ["--external-data"] if output.name.startswith("external") else []
    return [sys.executable, "-m", "sbp_compile", str(model), "-o", str(output), "-q", *extra]


def start(model: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start one run, in a process group of its own."""
    return subprocess.Popen(
        command(model, output),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def prepare(folder: Path) -> Bench:
    """Write the model and one old file of each kind, and measure when writing begins and how long a run takes."""
    torch.manual_seed(0)
    model, old = folder / "model.pt", folder / "old"
    old.mkdir()
    sbp_compile.save_model(Subject(), torch.randn(2, 256), model)
    seconds = {}
    for name in OUTPUTS:
        begin = time.monotonic()
        process = start(model, old / name)
        first = 0.0
        while process.poll() is None:
            if not first and any(path.name.startswith(".") for path in old.iterdir()):
                first = time.monotonic() - begin
            time.sleep(0.005)
        if process.returncode:
            raise SystemExit(((process.stderr and process.stderr.read()) or b"").decode())
        seconds[name] = (first, time.monotonic() - begin)
    torch.manual_seed(1)
    sbp_compile.save_model(Subject(), torch.randn(2, 256), model)
    return Bench(model, old, seconds)


def loads(path: Path) -> bool:
    """Whether a file is complete: its runtime loads it and it computes something finite."""
    x = torch.ones(2, 256)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path))
        return bool(torch.isfinite(torch.as_tensor(session.run(None, {"x": x.numpy()})[0])).all())
    if path.suffix == ".pt2":
        return bool(torch.isfinite(torch.export.load(path).module()(x)).all())
    if path.suffix == ".ts":
        return bool(torch.isfinite(torch.jit.load(path)(x)).all())  # type: ignore[no-untyped-call]
    source = path.with_suffix(".py").read_text()
    space: dict[str, object] = {"__name__": "generated"}
    exec(source, space)
    network = space["Network"]()  # type: ignore[operator]
    network.load_state_dict(load_file(path))
    return is_unchanged(source) and bool(torch.isfinite(network(x)).all())


def family(folder: Path, name: str) -> set[str]:
    """The names in a folder that belong to an output."""
    return {path.name for path in folder.iterdir() if path.name.startswith(Path(name).stem)}


def fault(folder: Path, bench: Bench, name: str, kind: str) -> str:
    """What is wrong in a folder after a run; empty if nothing is."""
    if not (folder / name).exists():
        return "there is no file under the output's name"
    try:
        complete = loads(folder / name)
    except Exception as error:  # whatever the loaders raise on a broken file
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if not complete:
        return "the file computes something that is not finite"
    if kind == "kill":
        return ""
    left = {path.name for path in folder.iterdir()} - family(folder, name)
    if left:
        return f"left behind: {sorted(left)}"
    expected = len(family(bench.old, name))
    return "" if len(family(folder, name)) == expected else f"files: {sorted(family(folder, name))}"


def outcome(folder: Path, bench: Bench, name: str) -> str:
    """Which file the name holds."""
    same = (folder / name).read_bytes() == (bench.old / name).read_bytes()
    return "old" if same else "new"


def run(kind: str, name: str, bench: Bench, random_source: random.Random, folder: Path) -> tuple[str, str]:
    """Do one run; returns (what the name holds, what is wrong)."""
    if kind in MOUNTS:
        return mounted(kind, name, bench, folder)
    for _ in range(TRIES):
        lay_out(bench, name, folder)
        processes = [start(bench.model, folder / name) for _ in range(2 if kind == "race" else 1)]
        if kind not in SIGNALS or wait(processes[0], folder, bench.seconds[name], random_source):
            break
        processes[0].communicate()
    if kind in SIGNALS:
        processes[0].send_signal(SIGNALS[kind])
    for process in processes:
        _, errors = process.communicate()
        last = (errors.decode().splitlines() or [""])[-1]
        if b"Traceback" in errors and b"sbp_compile" in errors:  # not that of an interpreter that just starts
            return "", f"a traceback: {last}"
        if kind in EXIT_CODES and process.returncode not in EXIT_CODES[kind]:
            return "", f"exit code {process.returncode}: {last}"
    return outcome(folder, bench, name), fault(folder, bench, name, kind)


def lay_out(bench: Bench, name: str, folder: Path) -> None:
    """Put the old files of an output into a folder, and nothing else."""
    for path in folder.iterdir():
        path.unlink()
    for other in family(bench.old, name):
        (folder / other).write_bytes((bench.old / other).read_bytes())


def wait(
    process: subprocess.Popen[bytes], folder: Path, seconds: tuple[float, float], random_source: random.Random
) -> bool:
    """Wait to a random moment of a run; whether it is still running then.

    Four of five moments come after the first temporary file appeared, more of them early: what is timed while the
    machine is busy may be over sooner.
    """
    first, whole = seconds
    delay = random_source.uniform(0, whole)
    if random_source.random() < 0.8:
        while process.poll() is None and not any(path.name.startswith(".") for path in folder.iterdir()):
            time.sleep(0.002)
        delay = (whole - first) * random_source.random() ** 2
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    return process.poll() is None


def mounted(kind: str, name: str, bench: Bench, folder: Path) -> tuple[str, str]:
    """Do one run in a file system of its own, which must fail with exit code 7 and change nothing."""
    target = folder / "mounted"
    target.mkdir()
    files = [bench.old / other for other in sorted(family(bench.old, name))]
    values = {
        "folder": target,
        "files": " ".join(map(str, files)),
        "number": len(files),
        "size": sum(file.stat().st_size for file in files) + (1 << 20),
        "command": " ".join(command(bench.model, target / name)),
    }
    script = SCRIPT.format(mount=MOUNTS[kind].format(**values), **values)
    found = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == NO_MOUNTS:
        return "not possible here", ""
    if found.returncode != 7 or "Traceback" in found.stderr:
        return "", f"exit code {found.returncode}: {found.stderr.strip()[-300:]}"
    return "old", ""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=60, metavar="N", help="of each kind (default 60)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default 0)")
    made.add_argument("--kind", action="append", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    made.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    return made


def all_runs(kinds: Sequence[str], number: int, seed: int, bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, what the name holds, what is wrong) of each run."""
    source = random.Random(seed)
    for kind in kinds:
        for position in track(range(number), description=kind, console=Console(stderr=True)):
            name = OUTPUTS[position % len(OUTPUTS)]
            with tempfile.TemporaryDirectory() as folder:
                held, wrong = run(kind, name, bench, source, Path(folder))
            yield kind, held, f"{name}: {wrong}" if wrong else ""


def page(rows: Sequence[str], options: argparse.Namespace) -> str:
    """Return the page of results."""
    return "\n".join(
        [
            "# Interrupted writes",
            "",
            f"`python tools/interrupt_writes.py --runs {options.runs} --seed {options.seed} --write`, torch "
            f"{torch.__version__}, Linux. Each run writes onto a name that",
            "already holds a file; the first three kinds stop it at a random moment while it runs, four in five of",
            f"them after the first temporary file appeared. Outputs in turn: {', '.join(OUTPUTS)}.",
            "",
            "| what happens | runs | old file left | new file written | wrong |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Wrong would be: no file under the name, one that does not load, a traceback, an exit code that is not",
            "documented, or (after everything but SIGKILL) anything else in the folder. After SIGKILL, which no",
            "program can handle, a temporary folder may stay; its name begins with a dot.",
            "",
        ]
    )


def main() -> int:
    """Do the runs, print what was wrong and the table; returns the exit code."""
    options = parser().parse_args()
    # A shell starts what runs in its background with Ctrl-C ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = options.kind or KINDS
    held: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder))
        for kind, found, wrong in all_runs(kinds, options.runs, options.seed, bench):
            held[kind]["wrong" if wrong else found] += 1
            if wrong:
                faults.append(f"{kind}: {wrong}")
                print(faults[-1], flush=True)
    rows = [
        f"| {kind} | {sum(counts.values())} | {counts['old']} | {counts['new']} | {counts['wrong']} |"
        for kind, counts in held.items()
    ]
    print("\n".join(rows))
    if options.write:
        write_atomically(RESULT, page(rows, options))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
