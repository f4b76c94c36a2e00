"""The options of the command line that say what is written and how."""

from __future__ import annotations

import argparse

from sbp_compile.output_options import OutputOptions, option_names


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the output file to the parser."""
    group = parser.add_argument_group("output file")
    group.add_argument("--opset", type=_opset, metavar="N", help="opset of an .onnx file (20)")
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


def output_options(options: argparse.Namespace) -> OutputOptions:
    """Return what was asked of the output file."""
    return OutputOptions(**{name: getattr(options, name) for name in option_names()})


def _opset(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an opset")
    return int(text)
