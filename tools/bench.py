"""The benchmark: what the compiler makes, against the dense network and the minimal one, in onnxruntime.

    python tools/bench.py [--network NAME]... [--batch 1,16,64] [--threads 1,2] [--budget S] [--tune S]
                          [--peers] [--json FILE] [--write]

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from bench_figure import draw
from bench_networks import CASES, SHARE, Case, without_constants
from onnx import TensorProto, helper
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from passes import CountingModel, default_pipeline, this_cpu
from sbp_compile.atomic import write_atomically
from sbp_compile.compiler import Compiled
from sbp_compile.timing import Comparison, compare, environment, progress_bar
from sbp_compile.timing.session import open_session
from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "bench.md"
FIGURE = RESULT.with_suffix(".svg")
PEAK_SIZE = 1536
PEERS = ("torch-pruning, careful", "torch-pruning, usual", "OpenVINO pruning")
OURS, DENSE, MINIMAL, FEWEST, TUNED = "ours", "dense", "minimal", "fewest", "tuned"
HEADER = """\
# Benchmark

Masked networks in onnxruntime {onnxruntime}, {processor}; all files of a row take turns in one process, with 95%
intervals. "dense": the plain architecture, no noise layers left. "minimal": built by hand from the kept counts, for
timing only: with constants at padded borders it is another function. "fewest": ours with `--target none`. "ours":
the default. "tuned": ours with `--tune {tune:g}` at one thread and batch 1. Masks: the paper's counts, or half of all
channels behind every norm at random.

![speed-up over dense against the ratio of multiply-adds](bench.svg)

Command: `{command}`

"""


@dataclass(frozen=True, eq=False)
class PlainMinimum(CountingModel):
    """Nothing that a network built by hand would not have: no gathers, no maps."""

    def gathers_pay(self, copies: Sequence[tuple[int, int]], saved_macs: int) -> bool:
        return False

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return False


@dataclass(frozen=True)
class Row:
    """One network at one batch size and number of threads: seconds by file, and ours over the others."""

    network: str
    batch: int
    threads: int
    macs: dict[str, int]
    medians: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    warnings: tuple[str, ...]
    is_convolutional: bool
    paper: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    console, rows = Console(soft_wrap=True), list[Row]()
    failed: dict[tuple[str, str], str] = {}
    peaks = {threads: peak(threads) for threads in options.threads}
    for case in CASES:
        if options.network and case.name not in options.network:
            continue
        with tempfile.TemporaryDirectory() as folder:
            files, macs, note = build(case, Path(folder), options.tune)
            console.print(f"{case.name}: {note}", markup=False, highlight=False)
            peers = peer_files(case, Path(folder)) if options.peers else {}
            shown = {name: path for name, path in peers.items() if isinstance(path, Path)}
            failed |= {(case.name, name): path for name, path in peers.items() if isinstance(path, str)}
            for threads in options.threads:
                for batch in options.batch:
                    with progress_bar(console) as progress:
                        found = compare(
                            files | (shown if batch == 1 else {}),
                            batch=batch,
                            threads=threads,
                            budget_s=options.budget,
                            progress=progress,
                        )
                    rows.append(row_of(case, found, macs))
                    console.print(line(rows[-1], peaks), markup=False, highlight=False)
                    if options.json is not None:
                        write_atomically(
                            options.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n"
                        )
    text = page(rows, peaks, failed, options, arguments)
    console.print("\n".join(summary(rows)), markup=False, highlight=False)
    if options.write:
        write_atomically(RESULT, text)
        draw(rows, FIGURE)
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--network", action="append", choices=[case.name for case in CASES], metavar="NAME")
    made.add_argument("--batch", type=_numbers, default=(1, 16, 64), metavar="N[,N]")
    made.add_argument("--threads", type=_numbers, default=(1, 2), metavar="N[,N]")
    made.add_argument("--budget", type=float, default=30.0, metavar="S", help="seconds for each row (30)")
    made.add_argument("--tune", type=float, default=30.0, metavar="S", help="seconds for each network (30)")
    made.add_argument("--peers", action="store_true", help="other tools, too, at batch 1")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
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


TITLES = ("network", "threads", "batch", "MACs left", "dense", "minimal", "fewest", "ours", "tuned", "over dense",
          "over minimal", "over fewest", "tuned over ours", "of the peak: dense, minimal, ours")  # fmt: skip


def line(row: Row, peaks: dict[int, float]) -> str:
    """One row of the table; speed-ups are those of ours."""
    times = [
        f"{row.medians[name] * 1e6:,.0f} us" if name in row.medians else ""
        for name in (DENSE, MINIMAL, FEWEST, OURS, TUNED)
    ]
    ups = [_speed_up(row.ratios[name]) for name in (DENSE, MINIMAL, FEWEST)]
    ups.append(_times(row.ratios[TUNED]) if TUNED in row.ratios else "")
    shares = [
        f"{row.macs[name] * row.batch / row.medians[name] / peaks[row.threads]:.0%}"
        for name in (DENSE, MINIMAL, OURS)
    ]
    left = f"{row.macs[OURS] / row.macs[DENSE]:.1%}"
    cells = [row.network, str(row.threads), str(row.batch), left, *times, *ups, ", ".join(shares)]
    return f"| {' | '.join(cells)} |"


def _speed_up(ratio: tuple[float, float, float]) -> str:
    """How much faster ours is, from its time over the other's."""
    return _times((1 / ratio[0], 1 / ratio[2], 1 / ratio[1]))


def _times(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows say together."""
    slower = [row for row in rows if row.ratios[MINIMAL][1] > 1.02]
    names = ", ".join(f"{row.network} ({row.threads} threads, batch {row.batch})" for row in slower)
    yield f"- Slower than minimal (interval above 1.02): {len(slower)} of {len(rows)} rows. {names}".rstrip()
    chosen = [row for row in rows if row.is_convolutional and row.batch == 1]
    if chosen:
        mean = math.exp(-sum(math.log(row.ratios[MINIMAL][0]) for row in chosen) / len(chosen))
        yield f"- Over the minimal network, convolutional ones at batch 1: {mean:.2f}x in the geometric mean."
    for row in rows:
        if row.paper is not None and row.batch == 1 and row.threads == 1:
            yield f"- {row.network}: {1 / row.ratios[DENSE][0]:.2f}x over dense; the paper has {row.paper}x."


def page(
    rows: Sequence[Row],
    peaks: dict[int, float],
    failed: dict[tuple[str, str], str],
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
) -> str:
    """docs/results/bench.md."""
    command = " ".join(["python tools/bench.py", *(sys.argv[1:] if arguments is None else arguments)])
    table = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|", *(line(row, peaks) for row in rows)]
    doubts = sorted({f"- {row.network}, batch {row.batch}: {text}" for row in rows for text in row.warnings})
    parts = [
        HEADER.format(**environment(), command=command, tune=options.tune),
        "\n".join(summary(rows)),
        "\n".join(
            f"- Peak (a {PEAK_SIZE}^3 matrix product), {n} threads: {rate / 1e9:.0f} G MACs/s"
            for n, rate in peaks.items()
        ),
        "\n" + "\n".join(table) + "\n",
    ]
    others = ["\n## Other tools\n", *peer_lines(rows, failed), ""] if options.peers else []
    doubtful = ["\n## Doubts\n", *doubts, ""] if doubts else []
    return "\n".join([*parts, *others, *doubtful])


def peer_files(case: Case, folder: Path) -> dict[str, Path | str]:
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
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = place / "result.json"
        row = json.loads(result.read_text()) if result.exists() else {"failure": done.stderr.strip()[-200:]}
        is_exact = (
            "file_error" in row and row["file_error"] <= row["file_bound"] and row["error"] <= row["bound"]
        )
        if is_exact and (place / "result.onnx").exists():
            found[tool] = place / "result.onnx"
        else:
            found[tool] = row.get("failure") or f"not exact: error {row.get('error', math.nan):.1e}"
    return found


def peer_lines(rows: Sequence[Row], failed: dict[tuple[str, str], str]) -> Iterator[str]:
    """A line for each network and tool: how much faster ours is at batch 1, or why there is no comparison."""
    yield "Ours (the default) over what each tool made, where that is exact, at batch 1.\n"
    yield "| network | tool | 1 thread | 2 threads |"
    yield "|---|---|---|---|"
    for network in dict.fromkeys(row.network for row in rows):
        for tool in PEERS:
            ratios = {
                row.threads: _speed_up(row.ratios[tool])
                for row in rows
                if row.network == network and row.batch == 1 and tool in row.ratios
            }
            reason = failed.get((network, tool), "")
            yield f"| {network} | {tool} | {ratios.get(1, reason)} | {ratios.get(2, '')} |"


if __name__ == "__main__":
    raise SystemExit(main())
