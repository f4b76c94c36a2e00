"""Compare the latency of ONNX models in onnxruntime; `python tools/latency.py --help` says how."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from latency_output import check_figure, cold_table, copies_table, csv_text, plot

from sbp_compile.atomic import write_atomically
from sbp_compile.errors import CompileError, OutputError, UsageError
from sbp_compile.timing import (
    ColdStart,
    Comparison,
    Profile,
    cold_start,
    compare,
    environment,
    profile,
    profile_table,
    progress_bar,
    require_provider,
)
from sbp_compile.timing.inputs import Shapes

DESCRIPTION = """\
Times ONNX models in onnxruntime and says how much faster each is than the first, with a 95% interval.

The models take turns in one process (A B B A, in random order), so that a busy or a warming machine is slow
for all of them alike, and are loaded afresh several times, because each load runs a little differently.
Timing goes on until the interval is as narrow as --target asks, or until --budget is over; the output says
which. Inputs are random, made from what the models declare, and already on the device: copies are timed
apart (--copies)."""

EPILOG = """\
examples:
  python tools/latency.py dense.onnx small.onnx
  python tools/latency.py dense.onnx small.onnx --batch 1,16,64 --threads 1,2 --json out.json --plot out.png
  python tools/latency.py dense.onnx small.onnx --profile --cold
  python tools/latency.py a.onnx b.onnx --shape tokens=batch,128      (every axis of the input 'tokens')
  python tools/latency.py a.onnx b.onnx --shape height=224 --shape width=224      (named axes)

exit codes:
  0  timed; warnings, if any, are printed below the table
  2  an option cannot be used, or the provider is missing
  3  a model file is missing, or is not an ONNX model
  4  the inputs are not determined or do not fit: --shape or --batch is needed
  5  a model has inputs that are no tensors of numbers
  7  an output file cannot be written

docs/latency.md says how the interval is made, and what these numbers do not cover."""


class _Parser(argparse.ArgumentParser):
    """Reports a bad option like every other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned."""
    try:
        options = _parser().parse_args(arguments)
        _run(options)
    except CompileError as error:
        print(f"latency: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("latency: stopped", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    for path in (options.json, options.csv, options.plot):
        if path is not None:
            _check_writable(path)
    if options.plot is not None:
        check_figure(options.plot)
    for provider in options.provider:
        require_provider(provider)
    models, shapes = _names(options.models), dict(options.shape)
    found, console = environment(), Console()
    settings = [
        Setting(provider, threads, batch)
        for provider in options.provider
        for threads in options.threads
        for batch in options.batch
    ]
    comparisons: list[Comparison] = []
    for setting in settings:
        comparisons.append(_compare(options, models, shapes, setting))
        console.print(comparisons[-1])
        if options.copies:
            console.print(copies_table(comparisons[-1]))
    profiles = _profiles(models, shapes, settings, console) if options.profile else []
    starts = _cold_starts(models, shapes, settings[0], console) if options.cold else []
    console.print(f"{found['processor']}, {found['cores']} cores, onnxruntime {found['onnxruntime']}")
    if options.json is not None:
        content = {
            "environment": found,
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "profiles": [{**asdict(setting), **asdict(entry)} for setting, entry in profiles],
            "cold_starts": [asdict(start) for start in starts],
        }
        write_atomically(options.json, json.dumps(content, indent=2) + "\n")
    if options.csv is not None:
        write_atomically(options.csv, csv_text(comparisons))
    if options.plot is not None:
        plot(comparisons, options.plot)


@dataclass(frozen=True)
class Setting:
    """Under which models are run."""

    provider: str
    threads: int
    batch: int


def _profiles(
    models: dict[str, Path], shapes: Shapes, settings: Sequence[Setting], console: Console
) -> list[tuple[Setting, Profile]]:
    found = []
    for setting in settings:
        entries = [profile(name, path, shapes=shapes, **asdict(setting)) for name, path in models.items()]
        console.print(f"batch {setting.batch}, provider {setting.provider}, {setting.threads} threads")
        console.print(profile_table(entries))
        found += [(setting, entry) for entry in entries]
    return found


def _cold_starts(
    models: dict[str, Path], shapes: Shapes, setting: Setting, console: Console
) -> list[ColdStart]:
    starts = [cold_start(name, path, shapes=shapes, **asdict(setting)) for name, path in models.items()]
    console.print(cold_table(starts))
    return starts


def _compare(
    options: argparse.Namespace, models: dict[str, Path], shapes: Shapes, setting: Setting
) -> Comparison:
    with progress_bar(Console(stderr=True)) as progress:
        return compare(
            models,
            batch=setting.batch,
            threads=setting.threads,
            provider=setting.provider,
            shapes=shapes,
            target_half_width=options.target,
            budget_s=options.budget,
            seed=options.seed,
            progress=progress,
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="latency.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        type=Path,
        metavar="model.onnx",
        help="the first one is what the others are compared with",
    )
    add(
        "--provider",
        type=_listed,
        default=["cpu"],
        metavar="cpu,cuda",
        help="where to run, one table each (default: cpu); TF32 is off on cuda",
    )
    add(
        "--threads",
        type=_batches,
        default=[1],
        metavar="1,2",
        help="threads within an operator, one table each (default: 1)",
    )
    add(
        "--batch",
        type=_batches,
        default=[1],
        metavar="1,16,64",
        help="batch sizes, one table each (default: 1)",
    )
    add(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="NAME=SIZES",
        help="an input's whole shape, or a named axis' size; needed for dynamic axes other than the batch",
    )
    add(
        "--target",
        type=float,
        default=0.02,
        metavar="FRACTION",
        help="half width to reach (default: 0.02, 2%%)",
    )
    add("--budget", type=float, default=30.0, metavar="SECONDS", help="time per batch size (default: 30)")
    add("--seed", type=int, default=0, metavar="N", help="of the inputs and the order (default: 0)")
    add("--copies", action="store_true", help="also show runs with copies to and from the device")
    add("--profile", action="store_true", help="also show where the time goes, by onnxruntime's profiler")
    add(
        "--cold",
        action="store_true",
        help="also show file size, and time to load, first run and memory in fresh processes (first setting)",
    )
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    add("--csv", type=Path, metavar="FILE", help="also write a line for each model and setting")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw speed-ups with their intervals (.png, .svg, .pdf)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _batches(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _shape(text: str) -> tuple[str, int | list[int | str]]:
    name, equals, sizes = text.partition("=")
    if not (name and equals and sizes):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=SIZES, such as tokens=batch,128")
    parts: list[int | str] = [part if part == "batch" else _positive(part) for part in sizes.split(",")]
    return name, parts


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names where they tell the models apart, else paths, numbered where even those repeat."""
    short = [path.name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return {_numbered(names, at): path for at, path in enumerate(paths)}


def _numbered(names: Sequence[str], at: int) -> str:
    earlier = names[:at].count(names[at])
    return f"{names[at]} #{earlier + 1}" if earlier else names[at]


def _check_writable(path: Path) -> None:
    """Raise OutputError before minutes are spent on numbers that would be lost."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: give a file in a folder that exists and is writable")


if __name__ == "__main__":
    sys.exit(main())
