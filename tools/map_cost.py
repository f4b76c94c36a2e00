"""Measure when a constant map behind a layer pays: the same masked network with a map, and with a channel that stays.

python tools/map_cost.py [--write]; `CountingModel.map_pays` in passes/ir/cost.py is fitted to its table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from passes import CountingModel, Program, default_pipeline, this_cpu
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

ADD = torch.ops.aten.add.Tensor
RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "maps.md"
HEADER = """\
# A constant map behind a layer, or a channel that stays

Four padded 3x3 convolutions with relus; the masked channels of each leave constants behind, which meet the zero padding
of the next. Time with one channel kept for them over the time with their contribution added as a map of the layer's
output; above 1 the map is faster. Widths are those that the processor runs fast (`--target`, the default), in both.
"taken": whether the compiler adds maps by default. onnxruntime {onnxruntime}, one thread, {processor}.

Command: `python tools/map_cost.py --budget {budget:g} --write`

| channels | kept | size | parameters: channel | map | batch 1 | batch 16 | taken |
|---|---|---|---|---|---|---|---|
"""
CASES = (
    (32, 16, 8),
    (32, 16, 16),
    (32, 16, 32),
    (64, 32, 16),
    (64, 32, 32),
    (64, 32, 56),
    (64, 20, 32),
    (64, 28, 16),
    (64, 36, 16),
    (64, 48, 16),
    (32, 12, 32),
    (32, 8, 32),
    (32, 4, 32),
)


@dataclass(frozen=True)
class Maps(CountingModel):
    """The default model, but for maps, which it always or never takes."""

    answer: bool = True

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return self.answer and saved_macs > 0


class Layers(nn.Module):
    """Padded convolutions, each masked before its bias and relu."""

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4))
        masks = torch.zeros(4, channels, 1, 1)
        for mask in masks:
            mask[torch.randperm(channels)[:kept]] = 1.0
        self.masks: Tensor
        self.register_buffer("masks", masks)
        self.biases = nn.Parameter(torch.rand(4, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer, mask, bias in zip(self.layers, self.masks, self.biases, strict=True):
            x = torch.relu(layer(x) * mask + bias)
        return x.mean((2, 3))


def measure(channels: int, kept: int, size: int, budget: float) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    network, example = Layers(channels, kept).eval(), torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        models, parameters = {}, []
        for name, cost in (("channel", Maps(answer=False)), ("map", Maps(answer=True))):
            pipeline = default_pipeline(cost, target=this_cpu())
            compiled = sbp_compile.compile(network, example, pipeline=pipeline)
            models[name] = Path(folder) / f"{name}.onnx"
            compiled.save(models[name])
            parameters.append(compiled.report.after.parameters)
        pipeline = default_pipeline(target=this_cpu())
        default = sbp_compile.compile(network, example, pipeline=pipeline, verify=False)
        cells = []
        for batch in (1, 16):
            ratio = compare(models, batch=batch, budget_s=budget).ratios[0]
            cells.append(f"{ratio.ratio:.2f} ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})")
    return (
        f"| {channels} | {kept} | {size} | {parameters[0]:,} | {parameters[1]:,} | {cells[0]} | {cells[1]} "
        f"| {'yes' if has_map(default.program) else 'no'} |"
    )


def has_map(program: Program) -> bool:
    """Whether a constant that differs by position is added somewhere."""
    held = [program.held(x) for node in program.calls() if node.target is ADD for x in node.all_input_nodes]
    return any(constant is not None and constant.shape[-2:].numel() > 1 for constant in held)


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each cell")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(*case, options.budget))
        print(rows[-1], flush=True)
    if options.write:
        head = HEADER.format(**environment(), budget=options.budget)
        write_atomically(RESULT, head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
