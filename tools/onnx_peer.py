"""Read the ONNX files of tests/zoo by this package's reader and by onnx2torch, and compare both with onnxruntime.

    python tools/onnx_peer.py [--network NAME]... [--exporter dynamo|legacy] [--json FILE] [--write]

Each network is masked (half of the channels behind its norms) and exported at batch 2, by torch's exporter (opset 18)
or its older one (opset 13). Exact: what was read agrees with onnxruntime on the file within 1e-5 in float32, at batch 2
and 3. onnx2torch is no dependency: tools/compare-requirements.txt has it, `make compare` installs it. It imports
torchvision for two operators that no file here has; an empty module stands in where that is not installed. `--json`
keeps rows as they come, and goes on where an earlier run stopped; `--write` puts docs/results/onnx-peer.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree  # for its leaves; this is a tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from absent_package import import_without
from kept_rows import keep, kept_rows
from onnx_in import export, quiet

from sbp_compile.atomic import write_atomically
from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from tests.zoo import ZOO, masked_network

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "onnx-peer.md"
OPSETS = {"dynamo": 18, "legacy": 13}
TOLERANCE = 1e-5
READERS = ("ours", "onnx2torch")
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One file: the largest error of each reader (None where it gives nothing), why there is none, and seconds."""

    network: str
    exporter: str
    errors: tuple[float | None, ...] = (None, None)
    reasons: tuple[str, ...] = ("", "")
    seconds: tuple[float, ...] = (0.0, 0.0)
    export: str = ""

    def is_exact(self, reader: int) -> bool:
        """Whether a reader's network agrees with onnxruntime."""
        error = self.errors[reader]
        return error is not None and error <= TOLERANCE


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all"
    )
    parser.add_argument("--exporter", choices=OPSETS, default="dynamo", help="default: dynamo")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here as they come")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    rows = kept_rows(options.json, Row)
    for name in options.network or sorted(ZOO):
        if (name, options.exporter) in {(row.network, row.exporter) for row in rows}:
            continue
        with quiet():
            rows.append(measure(name, options.exporter))
        print(*_cells(rows[-1]), sep=" | ", flush=True)
        keep(options.json, rows)
    if options.write:
        write_atomically(RESULT, page(rows))
    return 0


def measure(name: str, exporter: str) -> Row:
    """Export one network, and read the file in both ways."""
    architecture = ZOO[name]
    network = masked_network(architecture, "after norm", 0.5)
    calls = [architecture.example(), *([architecture.example(3)] if architecture.dynamic_batch else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        dynamic = architecture.dynamic_batch
        try:
            export(network, calls[0], path, exporter, OPSETS[exporter], dynamic=dynamic)
        except Exception as error:  # whatever torch raises: a row of the table, not the end
            return Row(name, exporter, export=_line(error))
        wanted = [in_onnxruntime(path, call) for call in calls]
        found = [tried(read, path, calls, wanted) for read in (ours, theirs)]
    errors, reasons, seconds = zip(*found, strict=True)
    return Row(name, exporter, errors, reasons, seconds)


def in_onnxruntime(path: Path, inputs: Inputs) -> list[Tensor]:
    """Return the file's outputs, as onnxruntime computes them."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(value) for value in session.run(None, feeds)]


def ours(path: Path) -> nn.Module:
    """Read by this package."""
    return onnx_network(load_onnx(path))


@functools.cache
def onnx2torch() -> Any:
    """Import it, without torchvision where that is not installed."""
    return import_without("onnx2torch", "torchvision")


def theirs(path: Path) -> nn.Module:
    """Read by onnx2torch."""
    network: nn.Module = onnx2torch().convert(str(path))
    return network.eval()


def tried(
    read: Callable[[Path], nn.Module], path: Path, calls: Sequence[Inputs], wanted: Sequence[list[Tensor]]
) -> tuple[float | None, str, float]:
    """Return (largest error, why there is none, seconds of reading)."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            network = read(path)
            seconds = time.perf_counter() - start
            found = [_pytree.tree_leaves(network(*call)) for call in calls]
        pairs = [pair for a, b in zip(wanted, found, strict=True) for pair in zip(a, b, strict=True)]
        return max(difference(a, b) for a, b in pairs), "", seconds
    except Exception as error:  # whatever a reader raises: a row of the table, not the end
        return None, _line(error), time.perf_counter() - start


def difference(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|a|; infinity for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]}"


def _cells(row: Row) -> list[str]:
    if row.export:
        return [row.network, row.exporter, f"no file: {row.export[:80]}", ""]
    told = [
        reason[:80].replace("|", "/") if error is None else f"{error:.0e}"
        for error, reason in zip(row.errors, row.reasons, strict=True)
    ]
    return [row.network, row.exporter, *told]


def page(rows: Sequence[Row]) -> str:
    """Return the results as a page."""
    lines = [
        "# ONNX files through another reader",
        "",
        "Networks of tests/zoo with half of the channels behind their norms masked, as torch's exporters write them at "
        "batch 2 (dynamo: opset 18; legacy, the older one: opset 13), read by this package and by onnx2torch "
        f"{importlib.metadata.version('onnx2torch')}. Exact: within {TOLERANCE:.0e} of onnxruntime on the file, in "
        "float32, at batch 2 and 3. Errors are max|a - b| / max|a|. "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}.",
        "",
        "Command: `python tools/onnx_peer.py --json out/onnx-peer.json --exporter legacy`, then "
        "`python tools/onnx_peer.py --json out/onnx-peer.json --write`",
        "",
        *_totals(rows),
        "",
        "| network | exporter | this package | onnx2torch |",
        "|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda row: (row.network, row.exporter))
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in ordered)]) + "\n"


def _totals(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| exporter | files that it wrote | exact by this package | exact by onnx2torch |",
        "|---|---|---|---|",
    ]
    for exporter in OPSETS:
        mine = [row for row in rows if row.exporter == exporter]
        made = [row for row in mine if not row.export]
        exact = [sum(row.is_exact(reader) for row in made) for reader in range(len(READERS))]
        lines.append(
            f"| {exporter} {OPSETS[exporter]} | {len(made)} of {len(mine)} | {exact[0]} | {exact[1]} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
