"""What the programs share that measure one way of writing something in ONNX against another."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import Ratio


def asked(description: str | None, budget: float) -> argparse.Namespace:
    """Read `--write` and `--budget`, by default `budget` seconds for each row."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--write", action="store_true")
    made.add_argument("--budget", type=float, default=budget, help="seconds for each row")
    return made.parse_args()


def ratio_cells(found: Ratio) -> list[str]:
    """Return the cells of a ratio and of its interval."""
    return [f"{found.ratio:.2f}", f"{found.ci_low:.2f} to {found.ci_high:.2f}"]


def add_row(rows: list[str], cells: Iterable[object]) -> None:
    """Append a table's line, and print it."""
    rows.append(f"| {' | '.join(map(str, cells))} |")
    print(rows[-1], flush=True)


def finish(options: argparse.Namespace, path: Path, header: str, rows: Iterable[str]) -> None:
    """Write the page, if that was asked for."""
    if options.write:
        write_atomically(path, header + "\n".join(rows) + "\n")


def checked(model: onnx.ModelProto) -> bytes:
    """Return the model as onnxruntime takes it."""
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def graph_model(graph: gs.Graph) -> bytes:
    """Return the model of a graph."""
    return checked(gs.export_onnx(graph.cleanup().toposort(), ir_version=10))
