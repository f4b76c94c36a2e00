"""Make TorchScript archives of the networks of tests/zoo, and capture and compile them.

    python tools/torchscript.py [--network NAME]... [--form traced|scripted|frozen]... [--capture] [--json FILE]
                                [--write]

Each network is masked (half of the channels behind its norms) and becomes three archives in float64: traced at batch 2,
scripted as far as torch.jit.script takes it, and frozen (the script, else the trace), which folds norms into
convolutions and makes attributes constants. Noise layers are no TorchScript: in scripts the constants stand that they
are in eval mode. Each archive is loaded and captured by the reader, and compared with the module itself at batch 2 and
3; then it goes through the compiler, whose proof compares with the script as torch runs it. Traces and scripts are
captured by torch's converter, too, for comparison alone: it is not public
(`torch._export.converter.TS2EPConverter`). `--capture` stops behind the reader. `--json` keeps rows as they come, and
goes on where an earlier run stopped; `--write` puts docs/results/torchscript.md.
Exit code 1 if the reader failed or was not exact.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree  # for its leaves; this is a tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from kept_rows import first_line, keep, kept_rows
from noise_constants import with_constants

from sbp_compile.atomic import write_atomically
from sbp_compile.capture.export import export_module
from sbp_compile.capture.load import load_model
from sbp_compile.capture.torchscript import load_torchscript
from sbp_compile.compiler import compile as compile_module
from sbp_compile.compiler import compile_file
from sbp_compile.errors import CompileError
from tests.zoo import ZOO, masked_network

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "torchscript.md"
TOLERANCE = 1e-12
FORMS = ("traced", "scripted", "frozen")
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Outcome:
    """How a capture went: the error at batch 2 and 3 (None where it does not run there), or why there is none.

    `is_refused`: by an error of ours, which names what it is.
    """

    errors: tuple[float | None, float | None] = (None, None)
    reason: str = ""
    is_refused: bool = False
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return all(error is not None and error <= TOLERANCE for error in self.errors)

    @property
    def text(self) -> str:
        if self.reason:
            return self.reason[:70].replace("|", "/")
        return ", ".join("other batch refused" if error is None else f"{error:.0e}" for error in self.errors)


@dataclass(frozen=True)
class Row:
    """One archive, and what came of it.

    `absent`: why there is none; `compiled`: the proof's error in float64; `refusal`: why there is no proof; `macs`,
    `module_macs`: multiply-adds of what the archive and the module compile to.
    """

    network: str
    form: str
    absent: str = ""
    reader: Outcome = Outcome()
    converter: Outcome | None = None
    compiled: float = -1.0
    refusal: str = ""
    macs: int = 0
    module_macs: int = 0

    @property
    def exact(self) -> bool:
        return self.reader.exact and not self.refusal


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all"
    )
    parser.add_argument("--form", action="append", choices=FORMS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here as they come")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--capture", action="store_true", help="neither compile nor convert")
    options = parser.parse_args(arguments)
    rows = kept_rows(options.json, _row)
    for name in options.network or sorted(ZOO):
        for form in options.form or FORMS:
            if (name, form) in {(row.network, row.form) for row in rows}:
                continue
            with quiet():
                rows.append(measure(name, form, capture_only=options.capture))
            print(*_cells(rows[-1]), sep=" | ", flush=True)
            keep(options.json, rows)
    if options.write:
        write_atomically(RESULT, page(rows))
    return 0 if all(row.exact for row in rows if not row.absent) else 1


def measure(name: str, form: str, *, capture_only: bool = False) -> Row:
    """Make one archive, capture it in both ways, and compile it."""
    architecture = ZOO[name]
    network = masked_network(architecture, "after norm", 0.5)
    for dtype in (torch.float64, torch.float32):  # the second for networks that make float32 values inside
        batches = [cast(architecture.example(), dtype), cast(architecture.example(3), dtype)]
        try:
            network = network.to(dtype)
            with torch.no_grad():
                network(*batches[0])
            break
        except RuntimeError:
            continue
    try:
        content = archive(network, batches[0], form)
    except Exception as error:  # whatever torch raises: a row of the table, not the end
        return Row(name, form, absent=first_line(error))
    original = network
    if form == "frozen":  # a function of its own where torch folds a norm into what others read, too
        original = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    row = Row(name, form, reader=outcome(read, content, original, batches))
    if capture_only:
        return row
    if form != "frozen":
        row = replace(row, converter=outcome(convert, content, network, batches))
    return compiled(row, content, network, batches[0])


def compiled(row: Row, content: bytes, network: nn.Module, inputs: Inputs) -> Row:
    """Return the row with what the compiler made of the archive."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.ts"
            path.write_bytes(content)
            found = compile_file(load_model(path, example_inputs=inputs))
    except CompileError as error:
        return replace(row, refusal=first_line(error))
    except Exception as error:  # a bug of ours: it must show in the table
        return replace(row, refusal=f"BUG: {type(error).__name__}: {first_line(error)}")
    proof = found.report.verification
    assert proof is not None
    module = compile_module(network, inputs, verify=False)
    return replace(
        row,
        compiled=proof.float64_error,
        macs=found.report.after.macs,
        module_macs=module.report.after.macs,
    )


def archive(network: nn.Module, inputs: Inputs, form: str) -> bytes:
    """Return the bytes of the network's archive; whatever torch raises where there is none."""
    if form == "traced":
        script: Any = traced(network, inputs)
    else:
        try:
            script = scripted(network, inputs)
        except Exception:
            if form == "scripted":
                raise
            script = traced(network, inputs)
        if form == "frozen":
            script = torch.jit.freeze(script)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    return buffer.getvalue()


def traced(network: nn.Module, inputs: Inputs) -> Any:
    """Return the network's trace."""
    with torch.no_grad():
        return torch.jit.trace(network, inputs, strict=False, check_trace=False)  # type: ignore[no-untyped-call]


def scripted(network: nn.Module, inputs: Inputs) -> Any:
    """Return the network's script, with its noise layers as constants."""
    with_constants(network, inputs)
    for part in network.modules():
        for cls in type(part).__mro__:
            if not cls.__module__.startswith("torch."):
                evaluate_annotations(cls)
    return torch.jit.script(network)


def evaluate_annotations(cls: type) -> None:
    """Replace annotations that a future import left as texts, which torch.jit.script cannot read."""
    functions = [entry for entry in vars(cls).values() if isinstance(entry, types.FunctionType)]
    for owner in (cls, *functions):
        own = vars(cls).get("__annotations__", {}) if owner is cls else owner.__annotations__
        if any(isinstance(entry, str) for entry in own.values()):
            hints = typing.get_type_hints(owner)
            owner.__annotations__ = {key: hints[key] for key in own}


def read(content: bytes, inputs: Inputs) -> ExportedProgram:
    """Capture by the package's reader."""
    return export_module(load_torchscript(io.BytesIO(content)).network, inputs)


def convert(content: bytes, inputs: Inputs) -> ExportedProgram:
    """Capture by torch's converter."""
    from torch._export.converter import TS2EPConverter

    script = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    converter: Any = TS2EPConverter
    program: ExportedProgram = converter(script, inputs).convert()
    return program


def outcome(
    capture: Callable[[bytes, Inputs], ExportedProgram],
    content: bytes,
    network: nn.Module,
    batches: list[Inputs],
) -> Outcome:
    """Capture and compare."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            program = capture(content, batches[0]).module()
    except Exception as error:  # whatever torch raises: a row of the table, not the end
        refused = isinstance(error, CompileError)
        return Outcome(reason=first_line(error), is_refused=refused, seconds=time.perf_counter() - start)
    first, other = (difference(network, program, inputs) for inputs in batches)
    return Outcome((first, other), seconds=time.perf_counter() - start)


def difference(network: nn.Module, program: nn.Module, inputs: Inputs) -> float | None:
    """Return max|a - b| / max|a| over the outputs; None where the captured program refuses the inputs."""
    with torch.no_grad():
        wanted = _pytree.tree_leaves(network(*inputs))
        try:
            got = _pytree.tree_leaves(program(*inputs))
        except (RuntimeError, AssertionError):
            return None
    pairs = [(a.double(), b.double()) for a, b in zip(wanted, got, strict=True) if isinstance(a, Tensor)]
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300) for a, b in pairs)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return the inputs with their floats in another dtype."""
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence tracing's and the converter's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _row(**entry: Any) -> Row:
    for way in ("reader", "converter"):
        if entry[way] is not None:
            entry[way] = Outcome(**{**entry[way], "errors": tuple(entry[way]["errors"])})
    return Row(**entry)


def _cells(row: Row) -> list[str]:
    if row.absent:
        return [row.network, row.form, f"no archive: {row.absent[:90]}".replace("|", "/"), "", "", ""]
    if row.compiled < 0 and not row.refusal:
        return [row.network, row.form, row.reader.text, "not tried", "", ""]
    against = "same" if row.macs == row.module_macs else f"{row.macs / max(row.module_macs, 1):.3f}"
    proof = row.refusal[:120].replace("|", "/") if row.refusal else f"{row.compiled:.0e}"
    converter = "" if row.converter is None else row.converter.text
    return [row.network, row.form, row.reader.text, proof, "" if row.refusal else against, converter]


def page(rows: Sequence[Row]) -> str:
    """Return the results as a page."""
    lines = [
        "# TorchScript archives of the zoo",
        "",
        "Networks with half of the channels behind their norms masked, traced, scripted and frozen (the script, or the "
        "trace where torch.jit.script does not take the network). *Captured exactly*: the error is at most "
        f"{TOLERANCE:.0e} in float64 at batch 2 and 3, against the module that the archive was made of (in "
        "float32, and equal, where a network makes float32 values itself); of a frozen one against the script as torch "
        "runs it, since torch.jit.freeze folds a norm into a linear layer that has other readers, too: tabular_resnet "
        "is another function then. *Compiled exactly*: the proof's error in float64 against the script as torch runs "
        "it is within its tolerance. Error is max|a - b| / max|a|. "
        f"torch {torch.__version__}.",
        "",
        "Command: `python tools/torchscript.py --write`",
        "",
        *_totals(rows),
        "",
        "Multiply-adds are against what the module itself compiles to.",
        "",
        "| network | archive | reader: error at batch 2, at 3 | compiled: error | multiply-adds | converter |",
        "|---|---|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda row: (row.network, FORMS.index(row.form)))
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in ordered]
    return "\n".join(lines) + "\n"


def _totals(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| archive | made by torch | captured exactly | refused by name | failed | compiled exactly, of those tried "
        "| multiply-adds as from the module | captured exactly by torch's converter, of those tried |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        mine = [row for row in rows if row.form == form]
        made = [row for row in mine if not row.absent]
        tried = [row for row in made if row.compiled >= 0 or row.refusal]
        exact = [row for row in tried if row.exact]
        refused = sum(row.reader.is_refused for row in made)
        converted = [row.converter for row in made if row.converter is not None]
        cells = [
            form,
            f"{len(made)} of {len(mine)}",
            sum(row.reader.exact for row in made),
            refused,
            sum(not (row.reader.exact or row.reader.is_refused) for row in made),
            f"{len(exact)} of {len(tried)}",
            f"{sum(row.macs <= row.module_macs for row in exact)} of {len(exact)}",
            f"{sum(way.exact for way in converted)} of {len(converted)}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
