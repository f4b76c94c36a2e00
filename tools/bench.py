"""The benchmark: what the compiler makes, against the dense network and the minimal one, in onnxruntime.

    python tools/bench.py [--network NAME]... [--batch 1,16,64] [--threads 1,2] [--budget S] [--tune S]
                          [--peers [S]] [--json FILE] [--write]

For each network four files are timed in turns in one process:

- dense: the plain architecture, without noise layers, as onnxruntime optimises it;
- minimal: built by hand from the kept counts, for timing only (where constants meet a zero padding it is another
  function);
- fewest: ours with `--target none`, exact;
- ours: what the compiler writes by default for this processor, exact;
- tuned: with `--tune` at one thread and batch 1 (left out with `--tune 0`);
- with `--peers`, in the rows of batch 1: what other tools make of it, where that is exact. They need the environment
  of `make compare`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from bench_figure import draw
from bench_networks import CASES, SHARE, Case, without_constants
from bench_page import (
    DENSE,
    FEWEST,
    MINIMAL,
    OURS,
    PEAK_SIZE,
    PEERS,
    TUNED,
    Results,
    Row,
    line,
    page,
    summary,
)
from onnx import TensorProto, helper
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from passes import Copied, CountingModel, default_pipeline, this_cpu
from sbp_compile.atomic import write_atomically
from sbp_compile.compiler import Compiled
from sbp_compile.timing import Comparison, compare, progress_bar
from sbp_compile.timing.session import open_session
from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "bench.md"
FIGURE = RESULT.with_suffix(".svg")


@dataclass(frozen=True, eq=False)
class PlainMinimum(CountingModel):
    """Nothing that a network built by hand would not have: no gathers, no maps."""

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        return False

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    found = Results.read(options.json)
    found.commands.append(shlex.join(["python", "tools/bench.py", *(arguments or sys.argv[1:])]))
    for threads in options.threads:
        found.peaks[threads] = max(peak(threads), found.peaks.get(threads, 0.0))
    for case in CASES:
        if not options.network or case.name in options.network:
            with tempfile.TemporaryDirectory() as folder:
                measure(case, Path(folder), found, options, console)
    console.print("\n".join(summary(found.rows)), markup=False, highlight=False)
    if options.write:
        write_atomically(RESULT, page(found))
        found.write(RESULT.with_suffix(".json"))
        draw(found.rows, FIGURE)
    return 0


def measure(case: Case, folder: Path, found: Results, options: argparse.Namespace, console: Console) -> None:
    """All rows of one network; what is there already is replaced."""
    files, macs, note = build(case, folder, options.tune)
    console.print(f"{case.name}: {note}", markup=False, highlight=False)
    peers = peer_files(case, folder, options.peers) if options.peers else {}
    for name, made in peers.items():
        found.failed.setdefault(case.name, {})[name] = made if isinstance(made, str) else ""
    shown = {name: made for name, made in peers.items() if isinstance(made, Path)}
    for threads in options.threads:
        for batch in options.batch:
            with progress_bar(console) as progress:
                compared = compare(
                    files | (shown if batch == 1 else {}),
                    batch=batch,
                    threads=threads,
                    budget_s=options.budget,
                    progress=progress,
                )
            found.put(row_of(case, compared, macs))
            console.print(line(found.rows[-1], found.peaks), markup=False, highlight=False)
            if options.json is not None:
                found.write(options.json)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--network", action="append", choices=[case.name for case in CASES], metavar="NAME")
    made.add_argument("--batch", type=_numbers, default=(1, 16, 64), metavar="N[,N]")
    made.add_argument("--threads", type=_numbers, default=(1, 2), metavar="N[,N]")
    made.add_argument("--budget", type=float, default=30.0, metavar="S", help="seconds for each row (30)")
    made.add_argument("--tune", type=float, default=30.0, metavar="S", help="seconds for each network (30)")
    made.add_argument(
        "--peers",
        type=float,
        nargs="?",
        const=600.0,
        metavar="S",
        help="other tools, too, at batch 1; each gets so many seconds for a network (600)",
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="keep all rows there, with those of earlier runs"
    )
    made.add_argument(
        "--write", action="store_true", help=f"write {RESULT.name}, its figure and all rows as JSON"
    )
    return made


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def build(case: Case, folder: Path, tune: float) -> tuple[dict[str, Path], dict[str, int], str]:
    """The files of a network, ours first, their multiply-adds, and what tuning says."""
    torch.manual_seed(0)
    network, example = case.make(), torch.rand(2, *case.shape)
    made = {
        OURS: sbp_compile.compile(network, example),
        FEWEST: sbp_compile.compile(network, example, pipeline=default_pipeline()),
    }
    said = "not tuned"
    if tune:
        tuner = OnnxruntimeTuner(LayerTimes.of_this_machine(), tune)
        pipeline = default_pipeline(target=this_cpu(), tuner=tuner)
        made[TUNED] = sbp_compile.compile(network, example, pipeline=pipeline)
        said = next(note.text for note in made[TUNED].report.notes if note.where == "tuning")
    files = {name: folder / f"{name}.onnx" for name in (OURS, DENSE, MINIMAL, *list(made)[1:])}
    for name, compiled in made.items():
        compiled.save(files[name])
    made[OURS].write_onnx(files[DENSE], made[OURS].dense)
    made[MINIMAL] = _minimal(case, network, example)
    made[MINIMAL].write_onnx(files[MINIMAL])
    macs = {name: compiled.report.after.macs for name, compiled in made.items()}
    return files, {**macs, DENSE: made[OURS].report.before.macs}, said


def _minimal(case: Case, network: torch.nn.Module, example: torch.Tensor) -> Compiled:
    by_hand = case.by_hand() if case.by_hand is not None else without_constants(network)
    return sbp_compile.compile(by_hand, example, pipeline=default_pipeline(PlainMinimum()))


def row_of(case: Case, found: Comparison, macs: dict[str, int]) -> Row:
    """What was measured at one batch size and number of threads."""
    return Row(
        case.name,
        found.batch,
        found.threads,
        macs,
        {entry.name: entry.median_s for entry in found.models},
        {ratio.other: (ratio.ratio, ratio.ci_low, ratio.ci_high) for ratio in found.ratios},
        tuple(found.warnings),
        case.is_convolutional,
        case.paper,
    )


def peak(threads: int) -> float:
    """Multiply-adds per second of one large matrix product, the fastest of some runs."""
    matrix = np.random.default_rng(0).standard_normal((PEAK_SIZE, PEAK_SIZE)).astype(np.float32)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [PEAK_SIZE, PEAK_SIZE]) for name in ("x", "y")
    ]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph(
        [node], "peak", ends[:1], ends[1:], [onnx.numpy_helper.from_array(matrix, "weight")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = open_session("peak", model.SerializeToString(), provider="cpu", threads=threads)
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        session.run(None, {"x": matrix})
        best = min(best, time.perf_counter() - start)
    return PEAK_SIZE**3 / best


def peer_files(case: Case, folder: Path, seconds: float) -> dict[str, Path | str]:
    """What each tool made of a network, by name: an exact file for batch 1, or why there is none."""
    spec = {"source": "bench", "network": case.name, "placement": "", "share": SHARE}
    found: dict[str, Path | str] = {}
    for number, tool in enumerate(PEERS):
        place = folder / f"peer{number}" / "out"
        place.mkdir(parents=True)
        command = [
            sys.executable,
            str(Path(__file__).with_name("peers.py")),
            tool,
            json.dumps(spec),
            str(place),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            found[tool] = f"not done within {seconds:.0f} s"
            continue
        result = place / "result.json"
        row = json.loads(result.read_text()) if result.exists() else {"failure": done.stderr.strip()[-200:]}
        is_exact = (
            "file_error" in row and row["file_error"] <= row["file_bound"] and row["error"] <= row["bound"]
        )
        if is_exact and (place / "result.onnx").exists():
            found[tool] = place / "result.onnx"
        elif "failure" not in row and row["error"] <= row["bound"] and "file_error" not in row:
            found[tool] = f"exact, but {row['note']}"  # what has no ONNX file is timed nowhere
        else:
            found[tool] = row.get("failure") or f"not exact: error {row.get('error', math.nan):.1e}"
    return found


if __name__ == "__main__":
    raise SystemExit(main())
