"""Compile networks of other packages as their authors wrote them, with half of all units masked.

    python tools/foreign.py [--network NAME]... [--package P]... [--jobs N] [--limit S] [--json FILE] [--write]

The packages (transformers, timm, pytorchcv, monai) are none of this project's: `make foreign` puts them into a folder.
Networks run in processes of their own, and those that stand in FILE already are not run again. Exit code 1 if one is
not exact. `--write` puts docs/results/foreign.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import torch
from foreign_images import monai_networks, pytorchcv_networks, timm_networks
from foreign_places import PACKAGES, PLACEMENTS
from foreign_transformers import networks as transformers_networks
from rich.console import Console
from zoo import WIDTH, load, run, save, table
from zoo_rows import Row, Task

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment
from tests.zoo import Architecture

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "foreign.md"
SHARE = 0.5
FOREIGN: dict[str, Architecture] = {
    **transformers_networks(),
    **timm_networks(),
    **pytorchcv_networks(),
    **monai_networks(),
}
NO_PLACE = "no such place"

HEADER = """# Networks of other packages

{networks} networks of {packages}, as their authors wrote them and with
random weights: with half of the units masked at random behind every convolution ("convolutions"), or between the two
linear maps of perceptrons ("hidden"; where a projection is fused, in front of the second). Each is compiled, compared
with the masked network in float64 (tolerance 1e-12), written as ONNX and compared in onnxruntime (1e-5, or three
times the network's own float32 error). Those of transformers and monai are of few layers and small widths
(tools/foreign_transformers.py, tools/foreign_images.py), the others as wide as they are. Every noise layer is the
constant that it multiplies by.

Command: `make foreign` (`python tools/foreign.py --json out/foreign.json --write`), torch {torch}, onnxruntime
{onnxruntime}, {processor}. "Gap" is what is left over the bound of [the zoo](zoo.md); "all gathers": where every
gather is taken that saves a multiply-add.

{summary}

| network | masks at | float64 | onnxruntime | MACs | parameters | gap | all gathers | without a rule | seconds |
|---|---|---|---|---|---|---|---|---|---|
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows = load([options.json]) if options.json is not None and options.json.exists() else []
    done = {(row.network, row.placement) for row in rows}
    names = [
        name
        for name, architecture in FOREIGN.items()
        if (not options.network or name in options.network)
        and (not options.package or architecture.family in options.package)
    ]
    tasks = [
        Task(name, placement, (SHARE,), options.seed, (SHARE,), "foreign:FOREIGN")
        for name in names
        for placement in PLACEMENTS
        if (name, placement) not in done
    ]
    for task, found in run(tasks, options.jobs, options.limit):
        found = found or [_without_place(task)]
        for row in found:
            console.print(
                f"{row.network}, {row.placement}: {row.failure or f'exact, {row.float64_error:.0e}'}"
            )
        rows += found
        save(options.json, rows)
    shown = [row for row in rows if row.failure != NO_PLACE]
    console.print(table(shown))
    failures = [row for row in shown if row.failure]
    console.print(f"{len(shown) - len(failures)} exact, {len(failures)} not compiled")
    if options.write:
        write_atomically(RESULT, page(shown))
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--network", action="append", choices=sorted(FOREIGN), metavar="NAME", help="default: all"
    )
    packages = sorted({architecture.family for architecture in FOREIGN.values()})
    made.add_argument("--package", action="append", choices=packages)
    made.add_argument("--seed", type=int, default=0, help="of weights, masks and inputs (default 0)")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    made.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="for one network")
    made.add_argument("--json", type=Path, metavar="FILE", help="rows, kept from run to run")
    made.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    return made


def _without_place(task: Task) -> Row:
    return Row(task.network, task.architecture.family, task.placement, SHARE, failure=NO_PLACE)


def page(rows: Sequence[Row]) -> str:
    """The whole page as Markdown."""
    found = environment()
    order = {name: number for number, name in enumerate(FOREIGN)}
    rows = sorted(rows, key=lambda row: (order[row.network], PLACEMENTS.index(row.placement)))
    good = [row for row in rows if not row.failure]
    header = HEADER.format(
        networks=len({row.network for row in rows}),
        packages=", ".join(_version(package) for package in dict.fromkeys(row.family for row in rows)),
        torch=torch.__version__,
        summary=f"{len(good)} of {len(rows)} are exact; the others are refused, with the reason below.",
        **{key: found[key] for key in ("onnxruntime", "processor")},
    )
    failures = "\n".join(f"- {row.network}, {row.placement}: {row.failure}" for row in rows if row.failure)
    return header + "\n".join(map(_line, good)) + "\n\n## Not compiled\n\n" + (failures or "None.") + "\n"


def _line(row: Row) -> str:
    assert row.file_error is not None
    assert row.file_tolerance is not None
    error = f"{row.file_error:.0e}"
    if row.file_tolerance > 1e-5:
        error += f" of {row.file_tolerance:.0e}"
    cells = (
        row.network, row.placement, f"{row.float64_error:.0e}", error, _ratio(row.macs), _ratio(row.parameters),
        f"{row.gap:.0%}", f"{row.gap_with_all_gathers:.0%}",
        ", ".join(f"{name.removeprefix('aten.')} ({number})" for name, number in row.opaque.items()),
        f"{sum(row.seconds.values()):.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _ratio(pair: tuple[int, int]) -> str:
    return f"{pair[0] / pair[1]:.2f}x" if pair[1] else "none left"


def _version(package: str) -> str:
    for found in importlib.metadata.distributions(name=package, path=[str(PACKAGES)]):
        return f"{package} {found.version}"
    return package


if __name__ == "__main__":
    raise SystemExit(main())
