"""Compile random networks and report every one that breaks a promise, shrunk to a minimal reproduction.

    python tools/fuzz.py --graphs 1000 --seed 0 --masks 4 --onnx-every 20

A graph is one network with one set of masks. Each is run through the passes and compared with the original
in float64; every K-th network goes through `sbp_compile.compile`, an ONNX file and onnxruntime as well. Exit
code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fuzz import checks, networks

Found = tuple[int, networks.Spec, checks.Outcome | checks.FuzzError, Callable[[networks.Spec], object]]


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--graphs", type=int, default=300, metavar="N", help="graphs to test (default 300)")
    made.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first network (default 0)"
    )
    made.add_argument(
        "--masks", type=int, default=3, metavar="M", help="sets of masks for each network (default 3)"
    )
    made.add_argument(
        "--onnx-every",
        type=int,
        default=0,
        metavar="K",
        help="every K-th network also through onnxruntime (0: none)",
    )
    made.add_argument(
        "--say-every",
        type=int,
        default=500,
        metavar="G",
        help="print the counts after each G graphs (default 500)",
    )
    made.add_argument(
        "--routes",
        action="store_true",
        help="with computed gathers and scatters, assignments, sampling, Fourier",
    )
    return made


def graphs(seed: int, masks: int, onnx_every: int, folder: Path, routes: bool = False) -> Iterator[Found]:
    """Networks from a seed on, without end, each with what was found."""

    def whole_path(spec: networks.Spec) -> checks.Outcome:
        return checks.check_compile(spec, folder)

    while True:
        spec = networks.spec_of(seed, networks.WITH_ROUTES if routes else networks.ALL_KINDS)
        for variant, found in checks.check_variants(spec, masks):
            yield seed, variant, found, checks.check_passes
        if onnx_every and seed % onnx_every == 0:
            masked = replace(spec, masks=seed // onnx_every % masks)
            try:
                yield seed, masked, whole_path(masked), whole_path
            except checks.FuzzError as failure:
                yield seed, masked, failure, whole_path
        seed += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    counts: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("graphs", total=options.graphs)
        source = graphs(options.seed, options.masks, options.onnx_every, Path(folder), options.routes)
        for number, (seed, spec, found, check) in zip(range(1, options.graphs + 1), source, strict=False):
            if isinstance(found, checks.FuzzError):
                counts["failed"] += 1
                report(console, spec, found, check)
            else:
                counts["rejected" if found.rejected else "passed"] += 1
                counts["shrunk"] += found.shrunk
            progress.update(task, advance=1, description=f"graphs, {counts['failed']} failed")
            if number % options.say_every == 0 or number == options.graphs:
                seconds = time.perf_counter() - start
                said = f"{summary(counts)}, in {seconds:.0f} s; seeds {options.seed} to {seed}"
                console.print(said, soft_wrap=True)
    return 1 if counts["failed"] else 0


def summary(counts: Mapping[str, int]) -> str:
    """The counts in words."""
    return (
        f"{counts['passed']} passed ({counts['shrunk']} of them shrank), {counts['rejected']} were no test, "
        f"{counts['failed']} failed"
    )


def report(
    console: Console, spec: networks.Spec, failure: checks.FuzzError, check: Callable[[networks.Spec], object]
) -> None:
    """Print a failure and the smallest network that shows it."""
    console.print(f"{failure}\n  {spec}", style="red", markup=False, highlight=False, soft_wrap=True)
    smaller, failure = checks.minimised(spec, failure, check)
    console.print(
        f"  minimal: {failure}\n{checks.description(smaller)}", markup=False, highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
