"""Measure how compile time and memory grow: a chain and a dense block of 200, 1,000 and 4,000 convolutions.

python tools/compile_scaling.py [--write] [--sizes 200,1000,4000] compiles each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "compile-scaling.md"
PHASES = ("capture", "passes", "verification")
HEADER = """\
# How compile time grows

A chain of n masked 3x3 convolutions of 8 channels with tanh, and a dense block of n masked 1x1 convolutions that each
read everything made before them and add one channel (so its weights grow with n squared). Half of the channels masked.
Exponent: the slope of a line through log seconds over log n, by least squares. Capture is torch.export's own time.

torch {torch}, {processor}, {cores} cores. Command: `python tools/compile_scaling.py --write`

| network | convolutions | capture s | passes s | verification s | peak MiB |
|---|---|---|---|---|---|
"""


class Chain(nn.Module):
    """n convolutions of 8 channels, each masked."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(count))
        self.register_buffer(
            "masks", (torch.rand(count, 8, 1, 1) < 0.5).float().index_fill(1, torch.tensor(0), 1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, mask in zip(self.layers, self.masks, strict=True):  # type: ignore[arg-type]
            x = torch.tanh(layer(x)) * mask
        return x


class Dense(nn.Module):
    """n convolutions, each of which reads the input and what all before it made, masked, and adds one channel."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8 + number, 1, 1) for number in range(count))
        self.register_buffer("masks", (torch.rand(count) < 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        for layer, mask in zip(self.layers, self.masks, strict=True):  # type: ignore[arg-type]
            x = torch.cat((x, torch.tanh(layer(x)) * mask), 1)
        return x.mean((2, 3))


NETWORKS = {"chain": Chain, "dense block": Dense}


def measure(name: str, count: int) -> dict[str, Any]:
    """Compile one network and return its seconds and the peak memory in MiB."""
    torch.manual_seed(0)
    compiled = sbp_compile.compile(NETWORKS[name](count).eval(), torch.randn(2, 8, 4, 4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {phase: compiled.report.seconds[phase] for phase in PHASES} | {"peak": peak}


def exponent(counts: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log n."""
    xs, ys = [math.log(count) for count in counts], [math.log(value) for value in seconds]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def in_own_process(name: str, count: int) -> dict[str, Any]:
    """Measure in a fresh process, so that the peak is this network's own."""
    command = [sys.executable, __file__, "--inner", name, "--sizes", str(count)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sizes", default="200,1000,4000")
    parser.add_argument("--inner", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.sizes.split(",")]
    if options.inner:
        print(json.dumps(measure(options.inner, counts[0])))
        return
    lines = []
    for name in NETWORKS:
        found = [in_own_process(name, count) for count in counts]
        for count, row in zip(counts, found, strict=True):
            cells = " | ".join(f"{row[phase]:.1f}" for phase in PHASES)
            lines.append(f"| {name} | {count:,} | {cells} | {row['peak']:,.0f} |")
            print(lines[-1], flush=True)
        slopes = {phase: exponent(counts, [row[phase] for row in found]) for phase in (*PHASES, "peak")}
        lines.append(
            f"| {name} | exponent | " + " | ".join(f"{value:.2f}" for value in slopes.values()) + " |"
        )
        print(lines[-1], flush=True)
    if options.write:
        text = HEADER.format(torch=torch.__version__, **environment()) + "\n".join(lines) + "\n"
        write_atomically(RESULT, text)


if __name__ == "__main__":
    main()
