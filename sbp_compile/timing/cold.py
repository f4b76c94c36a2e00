"""What a fresh process sees of a model: size, time to load, first run, memory.

Each probe is a process of its own, so that nothing is warm and its memory is its own: `python -m
sbp_compile.timing.cold MODEL JSON` prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from sbp_compile.errors import ModelFileError
from sbp_compile.timing.inputs import Shapes, make_inputs
from sbp_compile.timing.session import declared_inputs, open_session

PROBES = 3
KIBIBYTE = 1024


@dataclass(frozen=True)
class ColdStart:
    """Medians over fresh processes: bytes of the file (external data too), seconds, bytes of memory added."""

    model: str
    file_bytes: int
    load_s: float
    first_run_s: float
    peak_bytes: int


def cold_start(
    name: str,
    path: Path,
    *,
    batch: int = 1,
    threads: int = 1,
    provider: str = "cpu",
    shapes: Shapes | None = None,
    seed: int = 0,
    probes: int = PROBES,
) -> ColdStart:
    """Load and run a model in fresh processes; raises ModelFileError where such a process fails."""
    asked = {
        "name": name,
        "batch": batch,
        "threads": threads,
        "provider": provider,
        "shapes": dict(shapes or {}),
        "seed": seed,
    }
    command = [sys.executable, "-m", "sbp_compile.timing.cold", str(path.resolve()), json.dumps(asked)]
    seen = []
    for _ in range(probes):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_root())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelFileError(f"{name} fails in a fresh process: {last[:300]}")
        seen.append(json.loads(done.stdout))
    return ColdStart(
        name,
        file_bytes(path),
        statistics.median(entry["load_s"] for entry in seen),
        statistics.median(entry["first_run_s"] for entry in seen),
        int(statistics.median(entry["peak_bytes"] for entry in seen)),
    )


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the files beside it that hold its weights."""
    model = onnx.load(str(path), load_external_data=False)
    locations: set[str] = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in sorted(locations))


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str]) -> None:
    """Probe one model in this process."""
    path, asked = Path(arguments[0]), json.loads(arguments[1])
    _forget_peak()
    before = _peak_bytes()
    start = time.perf_counter()
    session = open_session(asked["name"], path, provider=asked["provider"], threads=asked["threads"])
    loaded = time.perf_counter()
    declared = declared_inputs(session)
    inputs = make_inputs(
        asked["name"], declared, batch=asked["batch"], shapes=asked["shapes"], seed=asked["seed"]
    )
    began = time.perf_counter()
    session.run(None, inputs)
    found: dict[str, Any] = {"load_s": loaded - start, "first_run_s": time.perf_counter() - began}
    print(json.dumps({**found, "peak_bytes": max(0, _peak_bytes() - before)}))


def _forget_peak() -> None:
    """Let Linux count the peak anew: importing onnxruntime has one that hides a small model."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The largest resident memory so far; Linux counts kibibytes, macOS bytes."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * KIBIBYTE
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


if __name__ == "__main__":
    main(sys.argv[1:])
