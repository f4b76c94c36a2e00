"""What a comparison found: numbers for programs, a table for people."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime
from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class ModelTiming:
    """Times of one model; a sample is the mean of `runs_per_sample` runs in a row.

    `median_s`, `p5_s`, `p95_s` and `p99_s` are seconds per run over the samples; `throughput` is batch / median_s, in
    examples per second; `with_copies_s` is the median of single runs from host memory to host memory, once a round.
    """

    name: str
    median_s: float
    p95_s: float
    throughput: float
    samples: int
    runs_per_sample: int
    p5_s: float = 0.0
    p99_s: float = 0.0
    with_copies_s: float = 0.0


@dataclass(frozen=True)
class Ratio:
    """Time of the `first` model over time of the `other`: above 1 the other is faster. 95% interval."""

    first: str
    other: str
    ratio: float
    ci_low: float
    ci_high: float

    @property
    def excludes_one(self) -> bool:
        """Whether the interval shows a difference at all."""
        return self.ci_low > 1 or self.ci_high < 1


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; `stopped` says whether the interval's target or the time budget ended it."""

    models: tuple[ModelTiming, ...]
    ratios: tuple[Ratio, ...]
    batch: int
    threads: int
    provider: str
    spinning: bool
    target_half_width: float
    half_width: float
    budget_s: float
    seed: int
    elapsed_s: float
    loads: int
    rounds: int
    stopped: Literal["target", "budget"]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain dicts, lists, numbers and strings, ready for json.dump."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        yield self._how_it_ended()
        for ratio in self.ratios:
            if not ratio.excludes_one:
                yield f"no difference shown between {escape(ratio.first)} and {escape(ratio.other)}"
        for warning in self.warnings:
            yield f"[yellow]warning:[/yellow] {escape(warning)}"

    def table(self) -> Table:
        """Tabulate the models: median, p95, throughput, samples, speed-up over the first and its interval."""
        table = Table(title=escape(self._conditions()), title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("model", overflow="fold")
        for heading in ("median", "p95", "examples/s", "speed-up", "95% interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for model in self.models:
            table.add_row(*_cells(model), *self._speed_up(model.name))
        return table

    def _conditions(self) -> str:
        spinning = "spinning on during a run" if self.spinning else "no spinning"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)} ({spinning})"
        return f"batch {self.batch}, provider {self.provider}, {threads}"

    def _speed_up(self, name: str) -> tuple[str, str]:
        found = next((ratio for ratio in self.ratios if ratio.other == name), None)
        if found is None:
            return ("1" if self.ratios else "", "")
        return f"{_factor(found.ratio)}x", f"{_factor(found.ci_low)} to {_factor(found.ci_high)}"

    def _how_it_ended(self) -> str:
        why = {"target": "interval reached its target", "budget": "time budget ended"}[self.stopped]
        width = f"half width {self.half_width:.1%}, target {self.target_half_width:.1%}"
        taken = f"{self.loads} loads, {self.models[0].samples} samples of each, {self.elapsed_s:.1f} s"
        return f"{why}: {width}; {taken}"


def environment() -> dict[str, str | int]:
    """Where the numbers were taken: versions of onnxruntime and Python, processor, cores that may be used."""
    return {
        "onnxruntime": str(onnxruntime.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
    }


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cells(model: ModelTiming) -> tuple[str, ...]:
    return escape(model.name), _time(model.median_s), _time(model.p95_s), f"{model.throughput:,.0f}"


def _factor(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
