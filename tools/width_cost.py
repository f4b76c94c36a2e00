"""Measure what a layer's width costs in onnxruntime: chains of equal layers of many widths, interleaved.

    python tools/width_cost.py [--seconds S] [--batch 1,16] [--write]

The tables of passes/targets.py are fitted to what this prints. Each figure is the fastest of all runs: what else the
machine does can only add time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from passes.targets import Layer, Target, this_cpu
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment
from sbp_compile.timing.session import open_session
from sbp_compile.tuning.layer_models import input_sizes, layer_model

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "widths.md"
DEPTH = 4
WIDTHS = (8, 12, 13, 15, 16, 17, 20, 24, 28, 30, 31, 32, 33, 35, 36, 40, 44, 45, 47, 48, 56, 60, 63, 64, 66, 72, 80,
          96, 100, 126, 127, 128)  # fmt: skip
HEADER = """\
# Widths

Four equal layers with relus, as many channels in as out; microseconds in onnxruntime {onnxruntime}, one thread,
{processor}; the fastest of all runs. In brackets what `{target}` of passes/targets.py estimates.

Command: `python tools/width_cost.py --seconds {seconds:g} --batch {batch} --write`

What it shows for a processor with blocks of 16 channels: a convolution costs the same from 20 to 32 channels in steps
of 4, and more in between, where onnxruntime leaves its blocked kernels. Just above a block (17, 33, 35) the unblocked
way is still cheaper than a whole further block for one image of 28x28; depthwise layers always lose without it. Widths
of linear layers cost what their multiply-adds cost. Less than a block of channels is read without blocks, so a 1x1
convolution of 8 to 15 channels is slower than one of 16.
The unblocked way computes whole vectors of 16 positions, so an image of 7x7 costs what one of 8x8 does there.

"""


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its kernel size (0: linear), and whether a depthwise 3x3 stands in front of each."""

    name: str
    kernel: int
    depthwise: bool = False


KINDS = (Kind("3x3", 3), Kind("1x1", 1), Kind("depthwise 3x3, 1x1", 1, depthwise=True), Kind("linear", 0))


def chain(kind: Kind, size: int, width: int) -> list[tuple[Layer, int, int]]:
    """DEPTH layers of one width, on images of size x size."""
    rank, positions = (0, 1) if kind.kernel == 0 else (2, size * size)
    layers = [Layer(rank, max(kind.kernel, 1) ** 2, positions)]
    if kind.depthwise:
        layers.insert(0, Layer(rank, 9, positions, groups=width, is_depthwise=True))
    return DEPTH * [(layer, width, width) for layer in layers]


def fastest(kind: Kind, size: int, batch: int, seconds: float) -> dict[int, float]:
    """The fastest run of each width, in seconds; all widths take turns."""
    generator = np.random.default_rng(0)
    runs = []
    for width in WIDTHS:
        layers = chain(kind, size, width)
        session = open_session(f"{kind.name} {width}", layer_model(layers, batch), provider="cpu", threads=1)
        shape = input_sizes(layers[0][0], width, batch)
        feed = {"x": generator.standard_normal(shape).astype(np.float32)}
        session.run(None, feed)
        runs.append((width, session, feed))
    best = dict.fromkeys(WIDTHS, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for width, session, feed in runs:
            start = time.perf_counter()
            session.run(None, feed)
            best[width] = min(best[width], time.perf_counter() - start)
    return best


def estimate(target: Target, kind: Kind, size: int, batch: int, width: int) -> float:
    """What a target's table says of the same chain, in seconds."""
    return batch * sum(target.seconds(*each) for each in chain(kind, size, width))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="for each row (default 8)")
    parser.add_argument("--batch", default="1,16", metavar="N[,N]", help="batch sizes (default 1,16)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    console, target = Console(soft_wrap=True), this_cpu()
    batches = [int(part) for part in options.batch.split(",")]
    cases = [
        (kind, size, batch)
        for kind in KINDS
        for size in ((28, 7) if kind.kernel else (1,))
        for batch in batches
    ]
    lines = [f"| layers, size, batch | {' | '.join(map(str, WIDTHS))} |", "|---" * (len(WIDTHS) + 1) + "|"]
    for kind, size, batch in track(cases, console=console, transient=True):
        best = fastest(kind, size, batch, options.seconds)
        cells = []
        for width in WIDTHS:
            guess = "" if target is None else f" ({estimate(target, kind, size, batch, width) * 1e6:.0f})"
            cells.append(f"{best[width] * 1e6:.0f}{guess}")
        lines.append(f"| {kind.name}, {size}, {batch} | {' | '.join(cells)} |")
    text = HEADER.format(
        **environment(),
        target="none" if target is None else target.name,
        seconds=options.seconds,
        batch=options.batch,
    )
    console.print("\n".join(lines), markup=False, highlight=False)
    if options.write:
        write_atomically(RESULT, text + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
