"""Measure when a gather on one edge of a network pays: the same masked network compiled without gathers and with all.

python tools/adapter_cost.py [--write]; `CountingModel` in passes/ir/cost.py is fitted to its table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from passes import Copied, CountingModel, default_pipeline
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "adapters.md"
HEADER = """\
# Gathers on single edges

Four residual blocks x + conv(relu(conv(x))), 3x3, on feature maps of the given size, or four dense ones, each of which
concatenates to its input a quarter as many channels, conv(relu(x)), 1x1; or one linear layer behind a relu.
Masked at random: what the first layer of each block reads ("read"; "dense" of the dense ones), what its second layer
adds ("add", and "add const" where a masked channel leaves a constant), or both; the stream itself keeps all channels.
Time without gathers (the coupling keeps the union) over the time with a gather on every such edge; above 1 the gathers
are faster. "taken": how
many of the edges the default cost model cuts; it looks at one edge at a time, at example sizes, and not at widths.
onnxruntime {onnxruntime}, one thread, {processor}.

Command: `python tools/adapter_cost.py --budget {budget:g} --stride {stride} --write`

| channels | size | kept | masked | MACs saved by gathers | batch 1 | batch 16 | taken |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """Channels of the stream, height and width (0: linear layers), kept channels, what is masked."""

    channels: int
    size: int
    kept: int
    masked: str


CASES = tuple(
    Case(channels, size, kept, masked)
    for channels, size in ((16, 32), (32, 32), (64, 28), (128, 14), (256, 14), (256, 7))
    for kept in (3 * channels // 4, channels // 2, channels // 4)
    for masked in ("read", "add", "add const", "both")
) + tuple(
    Case(channels, size, kept, "dense")
    for channels, size in ((32, 32), (64, 32), (128, 16), (256, 8))
    for kept in (3 * channels // 4, channels // 2, channels // 4)
) + tuple(
    Case(inputs, 0, kept, f"{outputs} outputs")
    for inputs, kept, outputs in (
        (784, 245, 160), (784, 114, 76), (784, 392, 500), (512, 256, 512), (288, 144, 283), (288, 72, 52),
    )
)  # fmt: skip


class Always:
    """A cost model that takes every gather, or none."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        return self.answer

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return False


class Counting(CountingModel):
    """The default model, counting how often it says yes."""

    asked = 0
    taken = 0

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        answer = super().gathers_pay(copies, saved_macs)
        type(self).asked += 1
        type(self).taken += answer
        return answer


class Masked(nn.Module):
    """A constant multiplication that keeps some channels."""

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        mask = torch.zeros(channels)
        mask[torch.randperm(channels)[:kept]] = 1.0
        self.register_buffer("mask", mask.reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask  # type: ignore[operator]


class Block(nn.Module):
    """x + conv(relu(conv(x))), masked where the case says."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.channels
        self.reads = Masked(width, case.kept) if case.masked in {"read", "both"} else nn.Identity()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.adds = Masked(width, case.kept) if case.masked != "read" else nn.Identity()
        self.bias = nn.Parameter(torch.randn(width, 1, 1) * float(case.masked == "add const"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.adds(self.second(torch.relu(self.first(self.reads(x))))) + self.bias
        return torch.relu(x + y)


class DenseBlock(nn.Module):
    """Concatenates what a layer makes of some of the channels."""

    def __init__(self, inputs: int, case: Case) -> None:
        super().__init__()
        self.reads = Masked(inputs, inputs * case.kept // case.channels)
        self.layer = nn.Conv2d(inputs, case.channels // 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(self.reads(torch.relu(x)))], 1)


def network(case: Case) -> tuple[nn.Module, Tensor]:
    """The masked network and an example."""
    torch.manual_seed(0)
    if case.size == 0:
        layer = nn.Linear(case.channels, int(case.masked.split()[0]))
        layer.weight.data[:, torch.randperm(case.channels)[case.kept :]] = 0.0
        return nn.Sequential(layer, nn.ReLU()), torch.randn(2, case.channels)
    stem = nn.Conv2d(8, case.channels, 1)
    inner: list[nn.Module] = [Block(case) for _ in range(4)]
    if case.masked == "dense":
        inner = [DenseBlock(case.channels + number * (case.channels // 4), case) for number in range(4)]
    blocks = nn.Sequential(stem, *inner)
    return blocks, torch.randn(2, 8, case.size, case.size)


def measure(case: Case, budget: float) -> str:
    """One row of the table."""
    module, example = network(case)
    Counting.asked = Counting.taken = 0
    sbp_compile.compile(module.eval(), example, pipeline=default_pipeline(Counting()), verify=False)
    with tempfile.TemporaryDirectory() as folder:
        models, macs = {}, []
        for name, model in (("union", Always(False)), ("gathers", Always(True))):
            compiled = sbp_compile.compile(module, example, pipeline=default_pipeline(model))
            models[name] = Path(folder) / f"{name}.onnx"
            compiled.save(models[name])
            macs.append(compiled.report.after.macs)
        cells = []
        for batch in (1, 16):
            ratio = compare(models, batch=batch, budget_s=budget).ratios[0]
            cells.append(f"{ratio.ratio:.2f} ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})")
    return (
        f"| {case.channels} | {case.size or 'linear'} | {case.kept} | {case.masked} | {macs[0] - macs[1]:,} "
        f"| {cells[0]} | {cells[1]} | {Counting.taken} of {Counting.asked} |"
    )


def rows(budget: float, stride: int) -> Iterator[str]:
    """The table's rows, printed as they come."""
    for case in CASES[::stride]:
        row = measure(case, budget)
        print(row, flush=True)
        yield row


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each cell")
    parser.add_argument("--stride", type=int, default=1, help="only every N-th case")
    options = parser.parse_args()
    table = list(rows(options.budget, options.stride))
    if options.write:
        head = HEADER.format(**environment(), budget=options.budget, stride=options.stride)
        write_atomically(RESULT, head + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
