"""Time every network of tests/zoo, masked, before and after compilation: nothing may get slower.

    python tools/zoo_speed.py [--network NAME]... [--placement P]... [--share S] [--budget SECONDS] [--json FILE]
                              [--write]

For each network, interleaved in one process, batch 1, one thread: the dense network with its noise folded into its
layers, the minimal one (`--target none`), and what the command line gives. `--json` keeps rows of earlier runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_cost
import torch
from peer_case import Spec, build

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
from passes import default_pipeline, this_cpu
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment
from tests.zoo import PLACEMENTS, ZOO

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "zoo-speed.md"
SLOWER = 1.02
HEADER = """\
# The zoo, timed

{count} of its {all} architectures, masked ({share:.0%} of the units of each noise layer off), onnxruntime
{onnxruntime}, {processor},
batch 1, one thread, the files of a network in turns. Dense: the network with its noise folded into its layers, as
onnxruntime optimises it. Minimal: `--target none`. Compiled: what the command line gives without options. The networks
are small (tests/zoo), so fixed costs weigh more than in use. Ratios: dense over minimal, dense over compiled, with the
95% interval of the latter; above 1 the compiled network is faster.

Command: `python tools/zoo_speed.py --json out/zoo-speed.json --write`

Faster than dense by 2% or more: {faster} of {count}; slower by 2% or more, the whole interval below 1 / 1.02: {slower}.
Geometric mean over dense: minimal {minimal:.2f}, compiled {compiled:.2f}.

| network | noise | dense us | minimal | compiled | interval |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One network: microseconds of the dense one, and how many times faster the others are."""

    network: str
    placement: str
    share: float
    dense: float
    minimal: float
    compiled: float
    low: float
    high: float

    @property
    def is_slower(self) -> bool:
        return self.high < 1 / SLOWER


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where something became slower."""
    options = parser().parse_args(arguments)
    rows = {}
    if options.json and options.json.exists():
        rows = {
            (row["network"], row["placement"]): Row(**row) for row in json.loads(options.json.read_text())
        }
    for row in measured(options, rows):
        rows[row.network, row.placement] = row
        print(line(row), "SLOWER" if row.is_slower else "", flush=True)
        if options.json:
            write_atomically(
                options.json, json.dumps([asdict(entry) for entry in rows.values()], indent=1) + "\n"
            )
    if options.write:
        write_atomically(RESULT, page(list(rows.values()), options.share))
    return int(any(row.is_slower for row in rows.values()))


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all")
    made.add_argument(
        "--placement", action="append", choices=PLACEMENTS, metavar="P", help="default: before norm"
    )
    made.add_argument(
        "--share", type=float, default=0.5, help="of the units of a layer that are off (default 0.5)"
    )
    made.add_argument(
        "--budget", type=float, default=4.0, help="seconds of timing for each network (default 4)"
    )
    made.add_argument("--json", type=Path, help="keep the rows there")
    made.add_argument("--again", action="store_true", help="measure rows that the file has already")
    made.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    return made


def measured(options: argparse.Namespace, held: Mapping[tuple[str, str], Row]) -> Iterator[Row]:
    """The networks that are asked for, one after the other; what cannot be exported is said and left out."""
    for name in options.network or list(ZOO):
        for placement in options.placement or ["before norm"]:
            if options.again or (name, placement) not in held:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        yield measure(
                            Spec("zoo", name, placement, options.share), Path(folder), options.budget
                        )
                    except Exception as error:
                        print(
                            f"{name}, {placement}: {type(error).__name__}: {str(error)[:100]}",
                            file=sys.stderr,
                        )


def measure(spec: Spec, folder: Path, budget: float) -> Row:
    """Export, compile twice and time."""
    (folder / "case").mkdir()
    case = build(spec, folder / "case")
    files = {
        "dense": folder / "dense.onnx",
        "minimal": folder / "minimal.onnx",
        "compiled": folder / "compiled.onnx",
    }
    onnx.save_model(case.folded_onnx(), str(files["dense"]))
    network = case.network32()
    example = tuple(value.float() if value.is_floating_point() else value for value in case.example)
    for label, target in (("minimal", None), ("compiled", this_cpu())):
        pipeline = default_pipeline(target=target)
        dynamic = ZOO[spec.network].dynamic_batch
        arguments = example if dynamic else tuple(value[:1] for value in example)
        sbp_compile.compile(network, arguments, pipeline=pipeline, dynamic_batch=dynamic).save(files[label])
        pinned = onnx_cost.pin_batch(onnx.load(str(files[label])), case.inputs32[0])
        onnx.save_model(pinned, str(files[label]))
    found = compare({label: str(path) for label, path in files.items()}, budget_s=budget)
    ratio = {entry.other: entry for entry in found.ratios}
    last = ratio["compiled"]
    return Row(
        spec.network,
        spec.placement,
        spec.share,
        found.models[0].median_s * 1e6,
        ratio["minimal"].ratio,
        last.ratio,
        last.ci_low,
        last.ci_high,
    )


def line(row: Row) -> str:
    """One line of the table."""
    cells = (
        row.network, row.placement, f"{row.dense:.0f}", f"{row.minimal:.2f}", f"{row.compiled:.2f}",
        f"{row.low:.2f} to {row.high:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(rows: Sequence[Row], share: float) -> str:
    """docs/results/zoo-speed.md."""
    ordered = sorted(rows, key=lambda row: row.compiled)
    head = HEADER.format(
        count=len(rows),
        all=len(ZOO),
        share=share,
        faster=sum(row.compiled >= SLOWER for row in rows),
        slower=sum(row.is_slower for row in rows),
        minimal=_mean([row.minimal for row in rows]),
        compiled=_mean([row.compiled for row in rows]),
        **{key: environment()[key] for key in ("onnxruntime", "processor")},
    )
    return head + "\n".join(map(line, ordered)) + "\n"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
