"""What tools/latency.py shows and writes beside its tables: copies, fresh processes, CSV, a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from sbp_compile.atomic import atomic_path
from sbp_compile.errors import UsageError
from sbp_compile.timing import ColdStart, Comparison

COLUMNS = ("provider", "threads", "batch", "model", "p5_s", "median_s", "p95_s", "p99_s", "with_copies_s",
           "throughput", "speed_up", "ci_low", "ci_high", "samples")  # fmt: skip
FIGURES = (".png", ".svg", ".pdf")
MEBIBYTE = 1 << 20


def copies_table(comparison: Comparison) -> Table:
    """Medians on the device, and from the host's memory to the host's memory."""
    table = Table(title="with copies", title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("model", "on the device", "with copies", "speed-up"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    first = comparison.models[0].with_copies_s
    for model in comparison.models:
        times = (model.median_s, model.with_copies_s)
        table.add_row(
            escape(model.name), *(f"{value * 1e6:,.1f} us" for value in times), f"{first / times[1]:.2f}x"
        )
    return table


def cold_table(starts: Sequence[ColdStart]) -> Table:
    """A row for each model."""
    table = Table(title="fresh processes", title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("model", "file", "load", "first run", "memory"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for start in starts:
        sizes = [f"{value / MEBIBYTE:,.2f} MiB" for value in (start.file_bytes, start.peak_bytes)]
        times = [f"{value * 1e3:,.2f} ms" for value in (start.load_s, start.first_run_s)]
        table.add_row(escape(start.model), sizes[0], *times, sizes[1])
    return table


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """A line for each model and setting; speed-ups are over the first model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for found in comparisons:
        ratios = {ratio.other: (ratio.ratio, ratio.ci_low, ratio.ci_high) for ratio in found.ratios}
        for model in found.models:
            times = (model.p5_s, model.median_s, model.p95_s, model.p99_s, model.with_copies_s)
            setting = (found.provider, found.threads, found.batch, model.name)
            speed_up = ratios.get(model.name, (1.0, 1.0, 1.0))
            writer.writerow((*setting, *times, model.throughput, *speed_up, model.samples))
    return text.getvalue()


def check_figure(path: Path) -> None:
    """Raise UsageError where matplotlib could not tell the format."""
    if path.suffix not in FIGURES:
        raise UsageError(f"figure {path.name!r} must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw speed-ups over the first model with their intervals, a group of bars for each setting."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(comparisons), 4), layout="constrained")
    names = [ratio.other for ratio in comparisons[0].ratios]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        found = [next(ratio for ratio in entry.ratios if ratio.other == name) for entry in comparisons]
        places = [at + (number - (len(names) - 1) / 2) * width for at in range(len(found))]
        heights = [ratio.ratio for ratio in found]
        errors = [
            [ratio.ratio - ratio.ci_low for ratio in found],
            [ratio.ci_high - ratio.ratio for ratio in found],
        ]
        axes.bar(places, heights, width, yerr=errors, capsize=3, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = [f"{entry.provider}\n{entry.threads} threads\nbatch {entry.batch}" for entry in comparisons]
    axes.set_xticks(range(len(comparisons)), labels)
    axes.set_ylabel(f"speed-up over {comparisons[0].models[0].name}")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)
