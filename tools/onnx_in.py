"""Export the networks of tests/zoo as ONNX, compile the files, and count how many come out exact.

    python tools/onnx_in.py [--network NAME]... [--exporter dynamo|legacy] [--opset N]... [--json FILE] [--write]

Each network is masked (half of the channels behind their norms) and exported at batch 2: by torch's exporter at opset
18, and by its older one (TorchScript), which writes opsets 11 to 17 as most files in the world have them, with noise
layers as the constants they are in eval mode. Each file then goes the way of the command line: read, compared with the
same file in onnxruntime at three batch sizes, shrunk, written and compared again. Beside that the network as it was
read is compared with the module itself, and multiply-adds with what the module compiles to. `--json` keeps rows as they
come, and goes on where an earlier run stopped; `--write` puts docs/results/onnx-in.md. Exit code 1 if a file that the
exporter wrote could not be compiled.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree  # for its leaves; this is a tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from kept_rows import first_line, keep, kept_rows
from noise_constants import with_constants

from sbp_compile.atomic import write_atomically
from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from sbp_compile.capture.load import load_model
from sbp_compile.compiler import compile as compile_module
from sbp_compile.compiler import compile_file
from sbp_compile.errors import CompileError
from tests.zoo import ZOO, masked_network

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "onnx-in.md"
OLDER = (11, 13, 15, 17)
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One file: who wrote it in which opset, and what came of it.

    `export`: why there is no file; `refusal`: why it was not compiled; `error`: of the network as read against the
    module; `file_error`: of the small file against onnxruntime on the original; `written`: the small file's opset;
    `macs`, `module_macs`: multiply-adds of what the file and the module compile to.
    """

    network: str
    exporter: str
    opset: int
    export: str = ""
    refusal: str = ""
    error: float = 0.0
    file_error: float = 0.0
    written: int = 0
    macs: int = 0
    module_macs: int = 0
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.export and not self.refusal


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", action="append", choices=sorted(ZOO), metavar="NAME", help="default: all"
    )
    parser.add_argument("--exporter", choices=("dynamo", "legacy"), help="default: both")
    parser.add_argument("--opset", action="append", type=int, metavar="N", help=f"of the older one: {OLDER}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here as they come")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    rows = kept_rows(options.json, Row)
    for name in options.network or sorted(ZOO):
        for exporter, opset in files(options.exporter, options.opset):
            if (name, exporter, opset) not in {(row.network, row.exporter, row.opset) for row in rows}:
                with quiet():
                    rows.append(measure(name, exporter, opset))
                print(*_cells(rows[-1]), sep=" | ", flush=True)
                keep(options.json, rows)
    if options.write:
        write_atomically(RESULT, page(rows))
    return 0 if all(row.exact for row in rows if not row.export) else 1


def files(exporter: str | None, opsets: Sequence[int] | None) -> list[tuple[str, int]]:
    """Return which files are made of a network: who writes them, in which opset."""
    found = [("dynamo", 18), *(("legacy", opset) for opset in opsets or OLDER)]
    return [entry for entry in found if exporter in (None, entry[0])]


def measure(name: str, exporter: str, opset: int) -> Row:
    """Export, read, compile and compare one network."""
    architecture = ZOO[name]
    network = masked_network(architecture, "after norm", 0.5)
    inputs = architecture.example()
    row: dict[str, Any] = {"network": name, "exporter": exporter, "opset": opset}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export(network, inputs, path, exporter, opset, dynamic=architecture.dynamic_batch)
        except Exception as error:  # whatever torch raises: a row of the table, not the end
            return Row(**row, export=first_line(error))
        start = time.perf_counter()
        try:
            with torch.no_grad():
                read = _pytree.tree_leaves(onnx_network(load_onnx(path))(*inputs))
            compiled = compile_file(load_model(path, example_inputs=inputs))
            compiled.save(path.with_name("small.onnx"))
        except CompileError as error:
            return Row(**row, refusal=first_line(error), seconds=time.perf_counter() - start)
        except Exception as error:  # a bug of ours: it must show in the table
            told = f"BUG: {type(error).__name__}: {first_line(error)}"
            return Row(**row, refusal=told, seconds=time.perf_counter() - start)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            wanted = [value for value in _pytree.tree_leaves(network(*inputs)) if isinstance(value, Tensor)]
        proof = compiled.report.verification
        assert proof is not None
        return Row(
            **row,
            error=max(_difference(a, b) for a, b in zip(wanted, read, strict=True)),
            file_error=proof.file_error or 0.0,
            written=onnx.load(str(path.with_name("small.onnx"))).opset_import[0].version,
            macs=compiled.report.after.macs,
            module_macs=compile_module(network, inputs, verify=False).report.after.macs,
            seconds=seconds,
        )


def export(
    network: nn.Module, inputs: Inputs, path: Path, exporter: str, opset: int, *, dynamic: bool
) -> None:
    """Write a network by torch's exporter or by its older one, with a dynamic batch where it has one."""
    if exporter == "dynamo":
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch} for _ in inputs) if dynamic else None
        torch.onnx.export(
            network, inputs, path, dynamo=True, opset_version=opset, dynamic_shapes=shapes, external_data=False,
            verbose=False,
        )  # fmt: skip
        return
    names = [f"input.{number}" for number in range(len(inputs))]
    axes = {name: {0: "batch"} for name in names} if dynamic else None
    with_constants(network, inputs)
    torch.onnx.export(
        network, inputs, str(path), dynamo=False, opset_version=opset, input_names=names, dynamic_axes=axes
    )


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings and what they print."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _cells(row: Row) -> list[str]:
    if not row.exact:
        told = f"no file: {row.export}" if row.export else row.refusal
        return [
            row.network,
            f"{row.exporter} {row.opset}",
            told[:200].replace("|", "/"),
            "",
            "",
            "",
            f"{row.seconds:.0f}",
        ]
    against = "same" if row.macs == row.module_macs else f"{row.macs / max(row.module_macs, 1):.3f}"
    return [
        row.network,
        f"{row.exporter} {row.opset}",
        f"{row.error:.0e}",
        f"{row.file_error:.0e}",
        str(row.written),
        against,
        f"{row.seconds:.0f}",
    ]


def page(rows: Sequence[Row]) -> str:
    """Return the results as a page."""
    lines = [
        "# ONNX files of the zoo",
        "",
        "Networks with half of the channels behind their norms masked, exported as ONNX by torch's exporter (dynamo) "
        "and by its older one (legacy), read and compiled: exact means that what was read agrees with onnxruntime on "
        "the original file at three batch sizes (within 1e-5, or ten times what the graph itself loses to rounding in "
        "float32), and the small file with both. "
        f"torch {torch.__version__}, onnx {onnx.__version__}.",
        "",
        "Command: `python tools/onnx_in.py --write`",
        "",
        *_totals(rows),
        "",
        "Errors are max|a - b| / max|a| in float32: of the network as read against the module it was exported from, "
        "and of the small file against onnxruntime on the original. Multiply-adds are against what the module itself "
        "compiles to. BERT at opsets below 17, which have no LayerNormalization, has its norms as means, squares and "
        "roots, and keeps 9% more.",
        "",
        "Refused: a GRU with `linear_before_reset=0` (Keras' older kind), which torch does not have. It could be "
        "written out over its steps, for one length alone, into a dozen operators for each step, which take longer "
        "than the layer even with half of its units.",
        "",
        "| network | file | read against module | small file | its opset | multiply-adds | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in sorted(rows, key=_order)]
    return "\n".join(lines) + "\n"


def _totals(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| file | written by the exporter | exact | refused | multiply-adds as from the module |",
        "|---|---|---|---|---|",
    ]
    for exporter, opset in sorted({(row.exporter, row.opset) for row in rows}):
        mine = [row for row in rows if (row.exporter, row.opset) == (exporter, opset)]
        exact = [row for row in mine if row.exact]
        refused = sum(bool(row.refusal) for row in mine)
        same = sum(row.macs <= row.module_macs for row in exact)
        written = sum(not row.export for row in mine)
        lines.append(f"| {exporter} {opset} | {written} of {len(mine)} | {len(exact)} | {refused} | {same} |")
    return lines


def _order(row: Row) -> Any:
    return row.network, row.exporter, row.opset


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
