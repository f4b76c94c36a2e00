"""The page of tools/compare.py: rows, a summary for each tool, and whether the goals hold."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.timing import environment

OURS = "sbp_compile"
SLOWER = 1.02
NONE_FASTER = "No exact result of another tool is faster than the default by more than 2%."
PACKAGES = ("torch-pruning", "openvino", "onnxsim", "onnxslim", "torch-simplify")

Row = dict[str, Any]

HEADER = """\
# Side by side

{count} masked networks ({percent:.0f}% of the noise units off at random), each compacted by this compiler and by tools
that people use for it, every tool in a process of its own.

- **Exact**: max|a - b| / max|a| against the masked network in float64, over 6 inputs (scales 1 to 1000). Tools that
  return a torch module are measured in float64 (64: bound 1e-12), tools that return a file in onnxruntime or OpenVINO
  in float32 (32: 1e-5, or three times what the network's own float32 arithmetic differs by). The ONNX file made of a
  module must keep that bound too.
- **MACs** of convolutions and matrix products at batch 1, counted by one counter from the shapes onnxruntime sees (for
  OpenVINO by the same formulas from its own graph). **Parameters**: floating-point numbers in the file.
- **Latency**: microseconds in onnxruntime, batch 1, one thread, interleaved ([how](../latency.md)).
- All but `masked` and `sbp_compile` get the network with its noise, its biases and its batch norms folded into its
  layers beforehand (in float64, checked), so that each masked channel is a zero filter.

What each tool is asked to do:

- **sbp_compile**: the default, with widths for this processor, and gathers where they save time; **--target none**: the
  fewest channels; **--fewest-macs**: gathers wherever that saves a multiply-add. The goal in multiply-adds is held to
  the smallest of the three, the times to the default.
- **torch-pruning, usual**: its dependency graph; every channel that is masked for all readers of its group goes. A
  group after which the network no longer runs is left whole. **careful**: only channels that reach all readers as
  zero, and no group that changes the result. Which channels these are is found by running the network, with its
  weights drawn afresh so that a unit that just does not fire counts as live.
- **OpenVINO pruning**: `convert_model`, `apply_pruning_transformation`; it removes zero channels. Its weights are
  written back to ONNX for onnxruntime where the names of its operations allow.
- **onnxsim**: `simplify`; **pruning, share**: `apply_structured_pruning` behind it with the share of masked units,
  layer by layer; **pruning, exact**: with one ranking of all channels, and the largest share (bisected) that is exact.
- **onnxslim**: `slim`.
- **torch-simplify**: `simplify(..., fuse_bn=False)`, since its own fusion rounds to float32. It imports three classes
  of torchvision, for `isinstance` only; where torchvision is missing it gets empty ones.

{versions}

Command: `make compare`

"""
SUMMARY = """\
Sizes and times are those of exact results, over ours on the same network (geometric mean).

| tool | exact | wrong | failed | MACs larger / equal / smaller | MACs over ours | latency over ours |
|---|---|---|---|---|---|---|
"""
TABLE = """\
| network | tool | exact | error | MACs | parameters | latency | notes |
|---|---|---|---|---|---|---|---|
"""


def exact(row: Row) -> bool:
    """Whether what the tool returned, and the file made of it, compute what the masked network does."""
    within = "error" in row and row["error"] <= row["bound"]
    return within and row.get("file_error", 0.0) <= row.get("file_bound", 0.0)


def violations(rows: Sequence[Row]) -> list[str]:
    """Return a line wherever ours is not exact, or a tool that is exact has fewer multiply-adds than our smallest."""
    own = [row for row in rows if row["tool"].startswith(OURS)]
    lines = [
        f"VIOLATION {row['network']}: {row['tool']} is not exact: {told(row)}"
        for row in own
        if not exact(row)
    ]
    smallest: dict[str, Row] = {}
    for row in filter(exact, own):
        held = smallest.setdefault(row["network"], row)
        smallest[row["network"]] = min(held, row, key=lambda entry: entry["macs"])
    for ours in smallest.values():
        for row in rows:
            if (
                row["network"] == ours["network"]
                and exact(row)
                and row.get("macs", ours["macs"]) < ours["macs"]
            ):
                lines.append(
                    f"VIOLATION {row['network']}: {row['tool']} is exact and has {row['macs']:,} multiply-adds, "
                    f"{ours['tool']} {ours['macs']:,} ({ours['macs'] / row['macs']:.3f} times as many)"
                    f"{timed(row, ours)}"
                )
    return lines


def page(rows: Sequence[Row], wrong: Sequence[str], share: float) -> str:
    """Return the page of results."""
    head = HEADER.format(
        count=len({row["network"] for row in rows}),
        percent=100 * share,
        versions=", ".join(f"{name} {value}" for name, value in versions().items()) + ".",
    )
    goals = "\n".join(f"- {line}" for line in wrong) or (
        "Both goals hold: ours is exact on every network, and no exact result of another tool has fewer multiply-adds."
    )
    body = "\n".join(cells(row) for row in rows)
    return (
        f"{head}{SUMMARY}"
        + "\n".join(summary(rows))
        + f"\n\n## Goals\n\n{goals}\n\n{faster(rows)}\n\n## All rows\n\n{TABLE}{body}\n"
    )


def faster(rows: Sequence[Row]) -> str:
    """Return where a tool whose result is exact is faster than the default by more than 2%."""
    own = {row["network"]: row for row in rows if row["tool"] == OURS and "latency_us" in row}
    found = [
        f"- {row['network']}: {row['tool']}{timed(row, own[row['network']])}"
        for row in rows
        if not row["tool"].startswith(OURS)
        and exact(row)
        and row["network"] in own
        and SLOWER * row.get("latency_us", math.inf) < own[row["network"]]["latency_us"]
    ]
    return "\n".join(
        ["Exact and faster than the default by more than 2%:" if found else NONE_FASTER, "", *found]
    ).rstrip()


def timed(row: Row, ours: Row) -> str:
    """Return both latencies, where they were measured."""
    if "latency_us" not in row or "latency_us" not in ours:
        return ""
    return f"; {row['latency_us']:.0f} us against our {ours['latency_us']:.0f} us"


def told(row: Row) -> str:
    """Return the error, or why there is none."""
    return f"error {row['error']:.1e}" if "error" in row else row["failure"]


def cells(row: Row) -> str:
    """Return a row of the table."""
    error = f"{row['error']:.1e}" if "error" in row else ""
    kind = {"float64": "64", "float32": "32", "float32, OpenVINO": "32, OpenVINO"}.get(
        row.get("measured", ""), ""
    )
    latency = f"{row['latency_us']:.0f}" if "latency_us" in row else ""
    notes = "; ".join(text for text in (row.get("failure"), row.get("note")) if text)
    fields = (
        row["network"],
        row["tool"],
        "yes" if exact(row) else "no" if error else "-",
        f"{error} ({kind})" if error else "",
        f"{row['macs']:,}" if "macs" in row else "",
        f"{row['parameters']:,}" if "parameters" in row else "",
        latency,
        notes.replace("|", "/"),
    )
    return f"| {' | '.join(fields)} |"


def summary(rows: Sequence[Row]) -> list[str]:
    """Return one line for each tool: how often exact, and its size and speed against ours where it is exact."""
    ours = {row["network"]: row for row in rows if row["tool"] == OURS}
    lines = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        own = [row for row in rows if row["tool"] == tool]
        right = [row for row in own if exact(row)]
        pairs = [(row, ours[row["network"]]) for row in right if row["network"] in ours]
        sizes = ratios(pairs, "macs")
        signs = [
            sum(size > 1 for size in sizes),
            sum(size == 1 for size in sizes),
            sum(size < 1 for size in sizes),
        ]
        fields = (
            tool,
            f"{len(right)} of {len(own)}",
            f"{sum('error' in row and not exact(row) for row in own)}",
            f"{sum('error' not in row for row in own)}",
            " / ".join(map(str, signs)),
            f"{statistics.geometric_mean(sizes):.2f}" if sizes else "",
            f"{statistics.geometric_mean(times):.2f}" if (times := ratios(pairs, "latency_us")) else "",
        )
        lines.append(f"| {' | '.join(fields)} |")
    return lines


def ratios(pairs: Sequence[tuple[Row, Row]], key: str) -> list[float]:
    """Return theirs over ours where both are known."""
    return [row[key] / ours[key] for row, ours in pairs if row.get(key) and ours.get(key)]


def version(package: str) -> str | None:
    """Return the installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return what ran where."""
    found = environment()
    tools = {package: version(package) or "not installed" for package in PACKAGES}
    return {
        **tools,
        "torch": torch.__version__,
        "onnxruntime": str(found["onnxruntime"]),
        "Python": platform.python_version(),
        "processor": str(found["processor"]),
        "cores": str(found["cores"]),
    }
