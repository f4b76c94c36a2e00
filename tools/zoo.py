"""Compile every network of tests/zoo with masks at several places, and hold the result against a bound.

    python tools/zoo.py [--network NAME]... [--placement P]... [--share 0.3,0.5,0.9] [--seed S] [--onnx [none|one|all]]
                        [--jobs N] [--json FILE] [--rows FILE...] [--write]

Networks run in processes of their own, so that a crash is a row and not the end. Exit code 1 if
anything failed or was not exact. `--write` puts docs/results/zoo.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from zoo_page import page
from zoo_rows import Row, Task, failed, measure

from sbp_compile.atomic import write_atomically
from tests.zoo import PLACEMENTS, ZOO

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "zoo.md"
ONNX_SHARE = 0.5
WIDTH = 180


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all")
    made.add_argument(
        "--placement", action="append", choices=PLACEMENTS, metavar="P", help=f"of {', '.join(PLACEMENTS)}"
    )
    made.add_argument(
        "--share",
        type=_shares,
        default=(0.3, 0.5, 0.9),
        metavar="S,...",
        help="of units masked in each layer",
    )
    made.add_argument("--seed", type=int, default=0, help="of weights, masks and inputs (default 0)")
    made.add_argument(
        "--onnx",
        nargs="?",
        choices=("none", "one", "all"),
        default="one",
        const="all",
        help=f"shares that go through onnxruntime too (default: one, {ONNX_SHARE} or else the first)",
    )
    made.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at a time"
    )
    made.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one process")
    made.add_argument("--json", type=Path, metavar="FILE", help="every row with everything that was measured")
    made.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="show the rows of earlier --json files; run nothing",
    )
    made.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    return made


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows = load(options.rows) if options.rows else measure_all(options, console)
    order = {name: number for number, name in enumerate(ZOO)}
    rows.sort(key=lambda row: (order[row.network], PLACEMENTS.index(row.placement), row.share))
    console.print(table(rows))
    failures = [row for row in rows if row.failure]
    console.print(f"{len(rows) - len(failures)} exact, {len(failures)} failed")
    save(options.json, rows)
    if options.write:
        write_atomically(RESULT, page(rows, options.seed))
    return 1 if failures else 0


def measure_all(options: argparse.Namespace, console: Console) -> list[Row]:
    """Run everything that was asked for, with a bar; the rows as they came."""
    tasks, rows = make_tasks(options), list[Row]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("zoo", total=len(tasks))
        for task, found in run(tasks, options.jobs, options.limit):
            rows += found
            save(options.json, rows)  # what is there survives an interrupt
            progress.update(bar, advance=1, description=f"{task.network}, {task.placement}")
    return rows


def load(paths: Sequence[Path]) -> list[Row]:
    """The rows of files that `save` wrote; of a row that is in several, the last."""
    found: dict[tuple[str, str, float], Row] = {}
    for path in paths:
        for data in json.loads(path.read_text(encoding="utf-8")):
            row = Row.from_dict(data)
            found[row.network, row.placement, row.share] = row
    return list(found.values())


def save(path: Path | None, rows: Sequence[Row]) -> None:
    """Write all rows as JSON, if a file was asked for."""
    if path is not None:
        write_atomically(path, json.dumps([row.to_dict() for row in rows], indent=1) + "\n")


def make_tasks(options: argparse.Namespace) -> list[Task]:
    """One task for each network and placement."""
    one = ONNX_SHARE if ONNX_SHARE in options.share else options.share[0]
    onnx = {"none": (), "one": (one,), "all": options.share}[options.onnx]
    return [
        Task(name, placement, options.share, options.seed, onnx)
        for name in dict.fromkeys(options.network or ZOO)
        for placement in dict.fromkeys(options.placement or PLACEMENTS)
    ]


class Worker:
    """A process that measures one task after the other, and what is known of the one it is at."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.rows: list[Row] = []
        self.began = 0.0
        self._launch()

    def _launch(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_work, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def begin(self, task: Task) -> None:
        self.task, self.rows, self.began = task, [], time.monotonic()
        self.pipe.send(task)

    def receive(self) -> bool:
        """Take what is in the pipe: a row, or the task's end; returns whether the task has ended."""
        try:
            row = self.pipe.recv()
        except EOFError:
            self.process.join()
            self.replace(f"the process ended with code {self.process.exitcode}")
            return True
        if row is not None:
            self.rows.append(row)
        return row is None

    def replace(self, reason: str) -> None:
        """Give the task up and start a fresh process."""
        assert self.task is not None
        share = self.task.shares[min(len(self.rows), len(self.task.shares) - 1)]
        family = self.task.architecture.family
        self.rows.append(failed(Row(self.task.network, family, self.task.placement, share), reason))
        self.stop()
        self._launch()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    """The process: for each task its rows as they come, then None."""
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            for row in measure(pipe.recv()):
                pipe.send(row)
            pipe.send(None)


def run(tasks: Sequence[Task], jobs: int, limit: float) -> Iterator[tuple[Task, list[Row]]]:
    """Every task with its rows, in the order in which they end."""
    pending = list(reversed(tasks))
    workers = [Worker() for _ in range(min(jobs, len(tasks)))]
    try:
        while pending or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task is None and pending:
                    worker.begin(pending.pop())
            busy = [worker for worker in workers if worker.task is not None]
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                ended = worker.pipe in ready and worker.receive()
                if not ended and time.monotonic() - worker.began > limit:
                    worker.replace(f"not done after {limit:.0f} s")
                    ended = True
                if ended and worker.task is not None:
                    yield worker.task, worker.rows
                    worker.task = None
    finally:
        for worker in workers:
            worker.stop()


def table(rows: Sequence[Row]) -> Table:
    """What was measured, a line for each row."""
    made = Table(box=SIMPLE)
    for heading in ("network", "masks at", "share"):
        made.add_column(heading, overflow="fold")
    for heading in ("float64", "onnxruntime", "MACs", "parameters", "gap", "seconds"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("kept although masked; operators without a rule; failures", overflow="fold")
    for row in rows:
        made.add_row(row.network, row.placement, f"{row.share:g}", *_cells(row))
    return made


def _cells(row: Row) -> tuple[str, ...]:
    if row.failure:
        return ("", "", "", "", "", "", f"[red]{escape(row.failure)}[/red]")
    file = "-" if row.file_error is None else f"{row.file_error:.0e} of {row.file_tolerance:.0e}"
    told = [f"{number} {why}" for why, number in row.kept.items()]
    told += [f"no rule: {number} {operator}" for operator, number in row.opaque.items()]
    told += [f"{row.unsized} layers without sizes are not counted"] if row.unsized else []
    return (
        f"{row.float64_error:.0e}",
        file,
        f"{row.macs[0]:,} > {row.macs[1]:,}",
        f"{row.parameters[0]:,} > {row.parameters[1]:,}",
        f"{row.gap:.1%}",
        f"{sum(row.seconds.values()):.1f}",
        "; ".join(told),
    )


if __name__ == "__main__":
    raise SystemExit(main())
