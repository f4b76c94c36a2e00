"""The options of the command line that say what is written and how."""

from __future__ import annotations

import argparse
from pathlib import Path

from sbp_compile.output_options import WEIGHTS, OutputOptions, option_names


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the output file to the parser."""
    group = parser.add_argument_group("output file")
    group.add_argument(
        "--opset",
        type=_opset,
        metavar="N",
        help="opset of an .onnx file (20, or 18 with average pools; of an ONNX model its own)",
    )
    group.add_argument(
        "--external-data",
        action="store_true",
        help="weights of an .onnx file in a second file beside it (always so beyond 2 GB)",
    )
    group.add_argument(
        "--fp16",
        action="store_true",
        help="weights and computation in half precision; inputs and outputs stay as they are",
    )
    group.add_argument(
        "--fp16-io", action="store_true", help="with --fp16: inputs and outputs in half precision, too"
    )
    group.add_argument(
        "--int8",
        type=Path,
        metavar="NPZ",
        help="an .onnx file in 8 bits, calibrated on the example inputs in NPZ (and compared by its 'labels')",
    )
    recipes = parser.add_argument_group("recipes (docs/recipes.md)")
    recipes.add_argument(
        "--recipe", type=Path, metavar="FILE", help="write which channels were kept and removed, and why"
    )
    recipes.add_argument(
        "--apply",
        type=Path,
        metavar="FILE",
        help="put the masks of a recipe into this checkpoint of the same architecture first",
    )


def output_options(options: argparse.Namespace) -> OutputOptions:
    """Return what was asked of the output file."""
    return OutputOptions(**{name: getattr(options, name) for name in option_names()})


def written_paths(options: argparse.Namespace) -> list[Path]:
    """Return every file that a run writes, the network first."""
    beside = [options.output.with_suffix(".py")] if options.output.suffix == WEIGHTS else []
    return [options.output, *beside, *(path for path in (options.json, options.recipe) if path is not None)]


def _opset(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an opset")
    return int(text)
