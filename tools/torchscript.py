"""Trace the networks of tests/zoo, and capture the traces in two ways: by the reader, and by torch's converter.

    python tools/torchscript.py [--network NAME]... [--write]

Each network is masked (half of the channels behind its norms), traced in float64 at batch 2, saved and loaded. What is
captured is compared with the module itself at batch 2 and 3. torch's converter is not public
(`torch._export.converter.TS2EPConverter`) and stands here for comparison alone. `--write` puts
docs/results/torchscript.md. Exit code 1 if the reader failed or was not exact.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree  # for its leaves; this is a tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.capture.export import export_module
from sbp_compile.capture.torchscript import load_torchscript
from tests.zoo import ZOO, masked_network

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "torchscript.md"
TOLERANCE = 1e-12
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Outcome:
    """How a capture went: the error at batch 2 and 3 (None where it does not run there), or why there is none."""

    errors: tuple[float | None, float | None] = (None, None)
    reason: str = ""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return all(error is not None and error <= TOLERANCE for error in self.errors)

    @property
    def text(self) -> str:
        if self.reason:
            return self.reason[:70].replace("|", "/")
        return ", ".join("other batch refused" if error is None else f"{error:.0e}" for error in self.errors)


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all"
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    rows = {}
    for name in options.network or sorted(ZOO):
        with quiet():
            rows[name] = measure(name)
        print(name, *(outcome.text for outcome in rows[name]), sep=" | ", flush=True)
    if options.write:
        write_atomically(RESULT, page(rows))
    return 0 if all(reader.exact for reader, _ in rows.values()) else 1


def measure(name: str) -> tuple[Outcome, Outcome]:
    """Return how the reader and the converter did on one network."""
    architecture = ZOO[name]
    network = masked_network(architecture, "after norm", 0.5)
    dtype = torch.float64
    try:
        wanted = traced(network.to(dtype), cast(architecture.example(), dtype))
    except RuntimeError:  # a network that makes float32 values inside
        dtype = torch.float32
        wanted = traced(network.to(dtype), cast(architecture.example(), dtype))
    batches = [cast(architecture.example(), dtype), cast(architecture.example(3), dtype)]
    return outcome(read, wanted, network, batches), outcome(convert, wanted, network, batches)


def traced(network: nn.Module, inputs: Inputs) -> bytes:
    """Return the bytes of the network's trace."""
    buffer = io.BytesIO()
    with torch.no_grad():
        script = torch.jit.trace(network, inputs, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(script, buffer)
    return buffer.getvalue()


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
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Outcome(reason=lines[0], seconds=time.perf_counter() - start)
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


def page(rows: dict[str, tuple[Outcome, Outcome]]) -> str:
    """Return the results as a page."""
    total = len(rows)
    reader, converter = (sum(row[which].exact for row in rows.values()) for which in (0, 1))
    lines = [
        "# Traces of the zoo",
        "",
        f"Of {total} traced networks the reader captures {reader} exactly (error at most {TOLERANCE:.0e} in float64 at "
        f"batch 2 and 3), torch's converter {converter}. Networks with half of the channels behind their norms masked; "
        f"error is max|a - b| / max|a| against the module that was traced (in float32 where a network makes float32 "
        f"values itself), torch {torch.__version__}.",
        "",
        "Command: `python tools/torchscript.py --write`",
        "",
        "| network | reader: error at batch 2, at 3 | seconds | converter | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, (ours, theirs) in rows.items():
        lines.append(f"| {name} | {ours.text} | {ours.seconds:.0f} | {theirs.text} | {theirs.seconds:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
