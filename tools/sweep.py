"""One trained network under many thresholds and criteria: error, multiply-adds and latency of each, and what is best.

    python tools/sweep.py model.ckpt [--data PATH] [--criteria snr macs bmrs] [--ray ADDRESS] -o sweep.json

`model.ckpt` is the checkpoint of a run of tools/train.py with noise layers. Every point is a compiled network, measured
on all test images and, as a file in onnxruntime, timed beside the dense one. A point is best (Pareto) where no other is
as accurate and faster. Writes the points (.json) and a figure (.png). Points are measured one after the other here, or
by the workers of a Ray cluster (`--ray auto`, `--ray HOST:PORT`, or `--ray local` for one of this machine's own), each
on its own worker: compare latencies only where the workers are alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from paper_measure import runner

from sbp_compile.atomic import atomic_path, write_atomically
from sbp_compile.compiler import compile as compile_network
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.nn import NetworkCosts, bmrs_n, bmrs_u, prune, prune_to_macs, snr_above
from sbp_compile.timing import compare
from sbp_compile.training import evaluate, load, to_tensor
from sbp_compile.training.checkpoint import read_state
from sbp_compile.training.restore import restored

SNR = (0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)
MACS = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)
BITS = (4, 8, 12)


@dataclass(frozen=True)
class Point:
    """One way to decide which units go: `snr` above, `macs` to a share of the dense network's, `bmrs_n`, `bmrs_u`."""

    criterion: str
    value: float = 0.0

    def apply(self, module: nn.Module, example: torch.Tensor) -> None:
        """Switch units of `module` off."""
        if self.criterion == "macs":
            prune(module, snr_above(0.0))  # thresholds of 0: the budget alone decides
            prune_to_macs(NetworkCosts(module, example), self.value)
            return
        criteria: dict[str, Callable[[], Any]] = {
            "snr": lambda: snr_above(self.value),
            "bmrs_n": bmrs_n,
            "bmrs_u": lambda: bmrs_u(self.value),
        }
        prune(module, criteria[self.criterion]())


@dataclass(frozen=True)
class Task:
    """What every worker needs to know: where the files are, and how long to time (0 s: not at all)."""

    checkpoint: str
    data: str | None
    batch: int
    threads: int
    budget: float


def points(criteria: Sequence[str]) -> Iterator[Point]:
    """Yield the points of the criteria asked for."""
    families = {
        "snr": [Point("snr", value) for value in SNR],
        "macs": [Point("macs", value) for value in MACS],
        "bmrs": [Point("bmrs_n"), *(Point("bmrs_u", bits) for bits in BITS)],
    }
    for name in criteria:
        yield from families[name]


def measure(task: Task, point: Point) -> dict[str, Any]:
    """Compile the network under one criterion and measure the file; a budget that cannot be met is a row saying so."""
    torch.set_num_threads(task.threads)
    about = read_state(Path(task.checkpoint)).about
    data = load(about["dataset"], Path(task.data) if task.data else None)
    pixels, labels = to_tensor(data.test_images), torch.from_numpy(data.test_labels)
    module, _ = restored(Path(task.checkpoint), pixels[:2])
    try:
        point.apply(module, pixels[:2])
    except UsageError as error:
        return {**asdict(point), "refused": str(error)}
    compiled = compile_network(module, pixels[:2])
    row: dict[str, Any] = {
        **asdict(point),
        "macs": compiled.report.after.macs,
        "dense_macs": compiled.report.before.macs,
    }
    if not task.budget:
        return row | {"error": evaluate(compiled.module, pixels, labels)}
    with tempfile.TemporaryDirectory() as name:
        small, dense = Path(name) / "small.onnx", Path(name) / "dense.onnx"
        compiled.save(small)
        compiled.write_onnx(dense, compiled.dense)
        return row | {"error": evaluate(runner(small), pixels, labels)} | timed(task, dense, small)


def timed(task: Task, dense: Path, small: Path) -> dict[str, float]:
    """Return the small file's median seconds and how much faster than the dense one it is, with a 95% interval."""
    timing = compare(
        {"dense": dense, "small": small}, batch=task.batch, threads=task.threads, budget_s=task.budget
    )
    ratio = timing.ratios[0]
    return {
        "seconds": timing.models[1].median_s,
        "speed": ratio.ratio,
        "speed_low": ratio.ci_low,
        "speed_high": ratio.ci_high,
    }


def locally(task: Task, wanted: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Measure the points one after the other."""
    for point in wanted:
        yield measure(task, point)


def over_ray(address: str, task: Task, wanted: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Measure the points on a Ray cluster, in their order; raises UsageError where there is none."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'sbp-compile[ray]'") from error
    paths = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
    environment = {"env_vars": {"PYTHONPATH": ":".join(paths)}}
    try:
        ray.init(None if address == "local" else address, runtime_env=environment, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--ray {address}: no cluster could be reached ({reason}); try --ray local"
        ) from error
    try:
        worker = ray.remote(num_cpus=task.threads)(measure)
        for pending in [worker.remote(task, point) for point in wanted]:
            yield ray.get(pending)
    finally:
        ray.shutdown()


def mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Set `best` where no other row is at least as accurate and as cheap, and better in one of the two."""
    cost = "seconds" if any("seconds" in row for row in rows) else "macs"
    fine = [row for row in rows if "error" in row]
    for row in fine:
        here = (row["error"], row[cost])
        row["best"] = not any(
            other["error"] <= here[0] and other[cost] <= here[1] and (other["error"], other[cost]) != here
            for other in fine
        )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw error against multiply-adds, and against latency where it was measured; the best points are joined."""
    from matplotlib.figure import Figure

    costs = [("macs", "multiply-adds")]
    if any("seconds" in row for row in rows):
        costs.append(("seconds", "latency, s"))
    figure = Figure(figsize=(5.0 * len(costs), 4.0), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        fine = [row for row in rows if row.get(key)]
        for criterion in dict.fromkeys(row["criterion"] for row in fine):
            chosen = [row for row in fine if row["criterion"] == criterion]
            axis.plot([r[key] for r in chosen], [r["error"] for r in chosen], "o", label=criterion)
        best = sorted((row[key], row["error"]) for row in fine if row["best"])
        axis.plot(*zip(*best, strict=True), "k--", linewidth=1)
        axis.set(xscale="log", xlabel=label, ylabel="test error, %")
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def show(row: dict[str, Any]) -> str:
    """Return one line on a point."""
    name = f"{row['criterion']} {row['value']:g}"
    if "refused" in row:
        return f"{name}: {row['refused']}"
    timed = f", {row['seconds'] * 1e6:.0f} us, {row['speed']:.2f}x" if "seconds" in row else ""
    return f"{name}: error {row['error']:.2f} %, {row['macs']:,} MACs{timed}"


def run(options: argparse.Namespace) -> None:
    """Measure and write."""
    restored_about = read_state(options.checkpoint).about
    data = str(options.data.resolve()) if options.data else None
    task = Task(str(options.checkpoint.resolve()), data, options.batch, options.threads, options.budget)
    wanted = list(points(options.criteria))
    rows = []
    found = over_ray(options.ray, task, wanted) if options.ray else locally(task, wanted)
    for row in found:
        print(show(row), flush=True)
        rows.append(row)
    mark_best(rows)
    content = {"about": restored_about, "task": asdict(task), "points": rows}
    write_atomically(options.output, json.dumps(content, indent=1))
    draw(rows, options.output.with_suffix(".png"))
    best = [show(row) for row in rows if row.get("best")]
    print("\n".join(["best:", *best]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path)
    add("--data", type=Path, help="where the data set's files are, if not at the usual place")
    add("--criteria", nargs="+", choices=("snr", "macs", "bmrs"), default=["snr", "macs", "bmrs"])
    add("--batch", type=int, default=1)
    add("--threads", type=int, default=1)
    add("--budget", type=float, default=3.0, help="seconds for each timing; 0: no files, no times")
    add("--ray", metavar="ADDRESS", help="local, auto, or the address of a cluster")
    add("-o", "--output", type=Path, required=True, metavar="JSON")
    options = parser.parse_args(argv)
    try:
        run(options)
    except CompileError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
