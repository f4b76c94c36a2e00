"""The command line: `python -m sbp_compile model.pt -o small.onnx`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.markup import escape

from sbp_compile.atomic import is_stream, refuse_unless_writable, write_atomically
from sbp_compile.cli_output import add_output_options, output_options, written_paths
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.interruption import INTERRUPTIONS, interrupted_exit_code
from sbp_compile.model_options import add_model_options, load
from sbp_compile.output_options import WEIGHTS
from sbp_compile.tuning_options import (
    add_tuning_options,
    check_tuning_options,
    keep_times,
    tuned,
    tuning_files,
)

if TYPE_CHECKING:
    from rich.console import Console

    from sbp_compile.compiler import Compiled
    from sbp_compile.timing import Progress

DESCRIPTION = """\
Turns a network trained with Structured Bayesian Pruning (or masked by any other method) into the small
dense network that is left: the same function, the same inputs and outputs, written as an ONNX file (or .pt2,
TorchScript, or weights with readable source).

Channels that are switched off or constant are removed together with everything that depended on them;
what they contributed goes into the weights that stay. Before the file gets its name it is compared with
the original, in float64 and as it was written. If the two disagree, nothing is written."""

EPILOG = """\
examples:
  python -m sbp_compile model.pt -o small.onnx
  python -m sbp_compile model.pt -o small.onnx --time --batch 1,64
  python -m sbp_compile model.pt -o small.onnx --inputs images.npz --json report.json
  python -m sbp_compile traced.ts -o small.onnx --input x=1x3x224x224:float32 --dynamic x:0=batch,2=height
  python -m sbp_compile weights.safetensors -o small.onnx --arch networks:ResNet --input 1x3x224x224

Files of sbp_compile.save_model(module, example_inputs, "model.pt") bring everything. ONNX files, TorchScript
archives and .pt2 files bring the network, state dicts and safetensors the weights alone. Nothing is unpickled that
could run code, unless --trust-pickle says so.

exit codes:
  0  written and verified
  1  an error of the compiler itself: please report it
  2  an option is missing, or has a value that cannot be used
  3  the model file is missing, damaged, of an unknown format, or unsafe to load
  4  the inputs do not fit the model
  5  the model cannot be compiled exactly
  6  the small network disagrees with the original: nothing was written
  7  the output cannot be written
  130  interrupted
  143  ended by SIGTERM"""


# Written out, since the passes take a second to import; a test compares.
TARGET_NAMES = ("cpu", "cpu-avx512", "cpu-avx2", "cpu-neon", "cuda", "cuda-tf32", "cuda-fp16", "none")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: the options and their texts."""
    parser = _Parser(
        prog="python -m sbp_compile",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        type=Path,
        help="a model file, recognised by its content; docs/command-line.md lists the formats",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="where to write; the suffix says what: .onnx, .pt2, .ts or .pt (TorchScript), .safetensors "
        "(weights, and a readable .py beside them)",
    )
    parser.add_argument(
        "--fewest-macs",
        action="store_true",
        help="gather channels wherever that saves a multiply-add (default: where it saves time)",
    )
    parser.add_argument(
        "--target",
        choices=TARGET_NAMES,
        default="cpu",
        metavar="T",
        help=f"whose fast widths to choose: {', '.join(TARGET_NAMES)} (cpu: this one; none: the fewest channels)",
    )
    parser.add_argument(
        "--fill",
        choices=("best",),
        help="where a width is padded, switch the pruned channels with the highest signal-to-noise ratio on (another "
        "function: the report says which, and the proof is against it)",
    )
    add_output_options(parser)
    add_model_options(parser)
    add_tuning_options(parser)
    proof = parser.add_argument_group("proof")
    proof.add_argument(
        "--inputs", type=Path, metavar="NPZ", help="verify on these inputs too: one array for each input name"
    )
    proof.add_argument("--no-verify", action="store_true", help="write without comparing (not recommended)")
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--time", action="store_true", help="time the plain dense network against the small one"
    )
    timing.add_argument(
        "--batch", type=_numbers, default=(1,), metavar="N[,N]", help="batch sizes to time (1)"
    )
    timing.add_argument("--threads", type=_number, default=1, metavar="N", help="threads to time with (1)")
    timing.add_argument(
        "--provider",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to time (cpu); cuda: see docs/cuda.md",
    )
    output = parser.add_argument_group("report")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the report for machines")
    output.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    output.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Bad input never shows a traceback."""
    if "--version" in arguments:
        from sbp_compile.compiler import version

        print(f"sbp_compile {version()}")
        return 0
    try:
        run(build_parser().parse_args(arguments))
    except INTERRUPTIONS:
        return _fail("interrupted; nothing was written", interrupted_exit_code() or 130)
    except Exception as error:
        if (code := interrupted_exit_code()) is not None:  # what a library made of the interrupt
            return _fail("interrupted; nothing was written", code)
        if isinstance(error, CompileError):
            return _fail(str(error), error.exit_code)
        if "--traceback" in arguments:
            raise
        kind = f"{type(error).__name__}: {error}"
        return _fail(f"{kind} (a bug of the compiler: please report it, with what --traceback shows)", 1)
    return 0


def _fail(message: str, code: int) -> int:
    """Print one line; only the lines to paste that a message ends with stay lines."""
    first, *more = message.splitlines() or [""]
    pasted = [line for line in more if line.startswith("    ")]
    head = " ".join([first, *(line for line in more if line not in pasted)])
    print("\n".join([f"sbp_compile: error: {' '.join(head.split())}", *pasted]), file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> None:
    """Compile from file to file."""
    _check(options)
    from sbp_compile.report.console import ReportConsole

    console = ReportConsole(quiet=options.quiet)
    with _one_line_warnings():
        compiled = _compile(options, console)
        timings = _time(options, compiled, console) if options.time else []
    if options.recipe is not None:
        compiled.recipe().save(options.recipe)
    if options.json is not None:
        content = {**compiled.metadata(), **compiled.report.to_dict(), "timings": timings}
        write_atomically(options.json, json.dumps(content, indent=2) + "\n")


def _check(options: argparse.Namespace) -> None:
    """Refuse before any work what cannot end well."""
    output_options(options).check(options.output)
    check_tuning_options(options)
    if options.time and options.output.suffix != ".onnx":
        raise UsageError(f"--time needs an .onnx output, not {options.output.name!r}")
    if options.time:
        from sbp_compile.timing import require_provider

        require_provider(options.provider)
    taken = {os.path.realpath(path): what for what, path in _read_paths(options).items()}
    for path in (*written_paths(options), *tuning_files(options)):
        if path in (options.json, options.recipe) and is_stream(path):
            continue
        refuse_unless_writable(path)
        place = os.path.realpath(path)
        if place in taken:
            raise UsageError(f"{str(path)!r} is {taken[place]} itself; give the output another name")
        taken[place] = "another output"
    if options.output.suffix == WEIGHTS:
        from sbp_compile.save import refuse_to_overwrite

        refuse_to_overwrite(options.output)


def _read_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Return every file that a run reads, by what it is called: none of them is written over."""
    tuning_file = options.tuning_file if options.tune is None else None
    paths = {
        "the model": options.model,
        "the recipe to apply": options.apply,
        "the file of --inputs": options.inputs,
        "the file of --int8": options.int8,
        "the file of --tuning-file": tuning_file,
    }
    return {what: path for what, path in paths.items() if path is not None}


def _compile(options: argparse.Namespace, console: Console) -> Compiled:
    from passes import TARGETS, FewestMacs, default_pipeline, this_cpu
    from sbp_compile.capture.array_file import check_arrays
    from sbp_compile.compiler import compile_file
    from sbp_compile.recipe import load_recipe

    table = this_cpu() if options.target == "cpu" else TARGETS[options.target]
    recipe = None if options.apply is None else load_recipe(options.apply)
    if options.int8 is not None:
        check_arrays(options.int8)
    with _stages(options, console) as progress:
        progress(0.0, "reading the model")
        target, tuner = tuned(options, table, progress)
        pipeline = default_pipeline(FewestMacs() if options.fewest_macs else None, target, tuner)
        model = load(options)
        compiled = compile_file(
            model,
            verify=not options.no_verify,
            input_file=options.inputs,
            pipeline=pipeline,
            recipe=recipe,
            fill=options.fill is not None,
            copy=False,
            progress=lambda text: progress(0.0, text),
        )
        keep_times(options, tuner)
        progress(1.0, "writing and verifying")
        compiled.save(options.output, **dataclasses.asdict(output_options(options)))
    console.print(compiled.report)
    console.print(
        f"[bold]{escape(str(options.output))}[/bold]: {_proof(compiled, int8=options.int8 is not None)}",
        highlight=False,
        soft_wrap=True,
    )
    return compiled


@contextmanager
def _stages(options: argparse.Namespace, console: Console) -> Iterator[Progress]:
    """Show what is being done; while layers are timed, by a bar without a thread of its own."""
    if options.tune is not None:
        from sbp_compile.timing import progress_bar

        with progress_bar(console) as progress:
            yield progress
    elif console.is_terminal:
        with console.status("") as status:
            yield lambda fraction, text: status.update(text)
    else:
        yield lambda fraction, text: None


def _proof(compiled: Compiled, *, int8: bool) -> str:
    proof = compiled.report.verification
    if proof is None:
        return "written without verification"
    what = "the float file that the 8-bit one is made of" if int8 else "as written"
    runtimes = " and ".join(name.removesuffix("ExecutionProvider") for name in proof.runtimes)
    return (
        f"same function: error {proof.float64_error:.1e} in float64, {proof.file_error:.1e} {what} "
        f"(run by {runtimes}; tolerance {proof.file_tolerance:.0e}), on {proof.examples} examples"
    )


def _time(options: argparse.Namespace, compiled: Compiled, console: Console) -> list[dict[str, Any]]:
    """Time both networks as files: models beyond 2 GB cannot be handed over as bytes."""
    from sbp_compile.timing import compare, progress_bar

    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.onnx", "small": options.output}
        compiled.write_onnx(files["dense"], compiled.dense)
        if options.int8 is not None:
            files = {"dense": files["dense"], "small": Path(folder) / "small.onnx", "int8": options.output}
            compiled.write_onnx(files["small"])
        for batch in options.batch:
            with progress_bar(console) as progress:
                comparison = compare(
                    files,
                    batch=batch,
                    threads=options.threads,
                    provider=options.provider,
                    progress=progress,
                )
            console.print(comparison)
            found.append(comparison.to_json())
    return found


def _number(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings of ours as one line each; others' are not for the user of a command line."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("sbp_compile"):
            print(f"sbp_compile: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
