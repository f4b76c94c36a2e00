"""The options of the command line that say what the model file does not: network, example inputs, dynamic axes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbp_compile.capture.model_file import LoadedModel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SHAPE[:DTYPE[:LOW..HIGH]]",
        help="an example input, such as x=1x3x224x224:float32 or tokens=2x16:int64:0..999; once for each input",
    )
    model.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="NAME:AXIS=SIZE[,...]",
        help="axes of any size, such as x:0=batch,2=height (default: the batch alone)",
    )
    model.add_argument(
        "--arch",
        metavar="MODULE:FACTORY",
        help="for weights: the class or function that makes the network; it is imported and called",
    )
    model.add_argument("--arch-args", metavar="JSON", help="""its arguments, such as '{"width": 32}'""")
    model.add_argument("--checkpoint-key", metavar="KEY", help="which entry of a checkpoint dictionary")
    model.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle whole modules: runs whatever code the file's author put there",
    )


def load(options: argparse.Namespace) -> LoadedModel:
    """Read the model file that the options name; errors as in `sbp_compile.load_model`."""
    from sbp_compile.capture.architecture import parse_arguments
    from sbp_compile.capture.example_inputs import parse_axes
    from sbp_compile.capture.load import load_model

    return load_model(
        options.model,
        example_inputs=_examples(options.input),
        fallback_inputs=_arrays(options.inputs),
        dynamic_axes=parse_axes(options.dynamic),
        arch=options.arch,
        arch_args=() if options.arch_args is None else parse_arguments(options.arch_args),
        checkpoint_key=options.checkpoint_key,
        trust_pickle=options.trust_pickle,
    )


def _examples(texts: list[str]) -> dict[str, Any] | None:
    """Return the example inputs by name, or by position where they have none."""
    from sbp_compile.capture.example_inputs import parse_input
    from sbp_compile.errors import UsageError

    found: dict[str, Any] = {}
    for position, text in enumerate(texts):
        name, tensor = parse_input(text, position)
        name = name or str(position)
        if name in found:
            raise UsageError(f"--input {text!r}: {name!r} is given twice")
        found[name] = tensor
    return found or None


def _arrays(path: Path | None) -> dict[str, Any] | None:
    from sbp_compile.capture.array_file import as_tensor, read_arrays

    return (
        None if path is None else {name: as_tensor(name, array) for name, array in read_arrays(path).items()}
    )
