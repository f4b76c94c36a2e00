"""The benchmark as a figure: speed-up over dense against the ratio of multiply-adds, with the ideal line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sbp_compile.atomic import atomic_path

SHOWN = ("minimal", "ours", "tuned")
MARKERS = ("s", "o", "^")


class Row(Protocol):
    """What is drawn of a row of the benchmark."""

    @property
    def network(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def macs(self) -> Mapping[str, int]: ...
    @property
    def medians(self) -> Mapping[str, float]: ...


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure: a panel for each number of threads and batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    settings = sorted({(row.threads, row.batch) for row in rows})
    threads = sorted({setting[0] for setting in settings})
    columns = max(len([one for one in settings if one[0] == number]) for number in threads)
    figure, grid = pyplot.subplots(
        len(threads),
        columns,
        figsize=(5 * columns, 4.5 * len(threads)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for line, number in zip(grid, threads, strict=True):
        batches = [batch for count, batch in settings if count == number]
        for axes, batch in zip(line, batches, strict=False):
            chosen = [row for row in rows if (row.threads, row.batch) == (number, batch)]
            _panel(axes, chosen)
            axes.set_title(f"{number} thread{'s' * (number > 1)}, batch {batch}")
    grid[0][0].legend()
    for line in grid:
        line[0].set_ylabel("speed-up over dense")
    for axes in grid[-1]:
        axes.set_xlabel("multiply-adds, dense over small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    """Points of one setting on logarithmic axes, the networks named at ours."""
    largest = 1.0
    for name, marker in zip(SHOWN, MARKERS, strict=True):
        found = [row for row in rows if name in row.medians]
        ratios = [row.macs["dense"] / row.macs[name] for row in found]
        speed_ups = [row.medians["dense"] / row.medians[name] for row in found]
        axes.loglog(ratios, speed_ups, marker, label=name, fillstyle="none")
        largest = max([largest, *ratios, *speed_ups])
        if name == "ours":
            for row, x, y in zip(found, ratios, speed_ups, strict=True):
                place = {"textcoords": "offset points", "xytext": (5, -8)}
                axes.annotate(row.network, (x, y), fontsize=7, **place)
    axes.loglog([1, largest], [1, largest], "k:", linewidth=0.8, label="ideal")
