"""What tools/bench.py measured, as a file and as a page."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment

PEERS = ("torch-pruning, careful", "torch-pruning, usual", "OpenVINO pruning")
OURS, DENSE, MINIMAL, FEWEST, TUNED = "ours", "dense", "minimal", "fewest", "tuned"
PEAK_SIZE = 1536
HEADER = """\
# Benchmark

Masked networks in onnxruntime {onnxruntime}, {processor}; all files of a row take turns in one process, with 95%
intervals. "dense": the plain architecture, no noise layers left. "minimal": built by hand from the kept counts, for
timing only: with constants at padded borders it is another function. "fewest": ours with `--target none`. "ours":
the default. "tuned": ours with `--tune` at one thread and batch 1. Masks: the paper's counts, or half of all
channels behind every norm at random.

![speed-up over dense against the ratio of multiply-adds](bench.svg)

Commands:

{commands}

"""


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


@dataclass
class Results:
    """All rows, in the order of the networks; peaks in multiply-adds per second by threads.

    `failed`: by network and tool, why there is nothing to compare with (empty: there is).
    """

    rows: list[Row] = field(default_factory=list)
    peaks: dict[int, float] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path | None) -> Results:
        """What a file holds; nothing where there is none."""
        if path is None or not path.exists():
            return cls()
        held = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(row) for row in held["rows"]]
        peaks = {int(threads): rate for threads, rate in held["peaks"].items()}
        return cls(rows, peaks, held["failed"], held["commands"])

    def write(self, path: Path) -> None:
        """Write everything."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    def put(self, row: Row) -> None:
        """Add a row in the place of an earlier one."""
        key = (row.network, row.threads, row.batch)
        self.rows = [held for held in self.rows if (held.network, held.threads, held.batch) != key] + [row]


def _row(held: Mapping[str, Any]) -> Row:
    """A row as it was before it became JSON."""
    ratios = {name: tuple(ratio) for name, ratio in held["ratios"].items()}
    return Row(**{**held, "ratios": ratios, "warnings": tuple(held["warnings"])})


TITLES = ("network", "threads", "batch", "MACs left", "dense", "minimal", "fewest", "ours", "tuned", "over dense",
          "over minimal", "over fewest", "tuned over ours", "of the peak: dense, minimal, ours")  # fmt: skip


def line(row: Row, peaks: Mapping[int, float]) -> str:
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


def page(found: Results) -> str:
    """docs/results/bench.md."""
    rows, peaks = found.rows, found.peaks
    commands = "\n".join(f"    {command}" for command in found.commands)
    table = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|", *(line(row, peaks) for row in rows)]
    doubts = sorted({f"- {row.network}, batch {row.batch}: {text}" for row in rows for text in row.warnings})
    parts = [
        HEADER.format(**environment(), commands=commands),
        "\n".join(summary(rows)),
        "\n".join(
            f"- Peak (a {PEAK_SIZE}^3 matrix product), {n} threads: {rate / 1e9:.0f} G MACs/s"
            for n, rate in peaks.items()
        ),
        "\n" + "\n".join(table) + "\n",
    ]
    others = ["\n## Other tools\n", *peer_lines(found), ""] if found.failed else []
    doubtful = ["\n## Doubts\n", *doubts, ""] if doubts else []
    return "\n".join([*parts, *others, *doubtful])


def peer_lines(found: Results) -> Iterator[str]:
    """A line for each network and tool: how much faster ours is at batch 1, or why there is no comparison."""
    yield "Ours (the default) over what each tool made, where that is exact, at batch 1.\n"
    yield "| network | tool | 1 thread | 2 threads |"
    yield "|---|---|---|---|"
    for network, failures in found.failed.items():
        for tool, reason in failures.items():
            ratios = {
                row.threads: _speed_up(row.ratios[tool])
                for row in found.rows
                if row.network == network and row.batch == 1 and tool in row.ratios
            }
            yield f"| {network} | {tool} | {ratios.get(1, reason)} | {ratios.get(2, '')} |"
