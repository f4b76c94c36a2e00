"""Compact masked networks with this compiler and with the tools that people use, side by side.

    make compare                                        the default list, written to docs/results/compare.md
    python tools/compare.py --network ResNet-18:hidden --tool sbp_compile --tool onnxslim

Every tool runs in a process of its own with a time limit; what it raises is its row. A tool that is not installed is a row
too: `make compare` installs all of them, pinned, in an environment of their own. Exit code 1 where this compiler is not
exact, or where a tool's result is exact and smaller.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS
from peer_case import Spec
from peers import TOOLS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare, environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "compare.md"
PLACEMENTS = ("before norm", "after norm", "hidden")
OURS, MASKED = "sbp_compile", "masked"
PACKAGES = ("torch-pruning", "openvino", "onnxsim", "onnxslim", "torch-simplify")
DEFAULT = (
    *(f"tools/{name}:{placement}" for name in ("LeNet-5",) for placement in PLACEMENTS[:2]),
)

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write; the exit code is returned."""
    options = parser().parse_args(arguments)
    specs = [spec_of(text, options.share, options.seed) for text in options.network or DEFAULT]
    tools = options.tool or list(TOOLS)
    rows: list[Row] = []
    for spec in specs:
        rows += compared(spec, tools, options.limit, options.budget)
        for row in rows[-len(tools) :]:
            print(cells(row), flush=True)
    wrong = violations(rows)
    print("\n".join(("", *wrong)) if wrong else "\nno violations")
    content = {"environment": versions(), "share": options.share, "rows": rows, "violations": wrong}
    if options.json:
        write_atomically(options.json, json.dumps(content, indent=1) + "\n")
    if options.write:
        write_atomically(RESULT, page(rows, wrong, options.share))
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--network", action="append", metavar="NAME:PLACEMENT", help="of the zoo; tools/NAME: tools/networks.py")
    add("--tool", action="append", choices=list(TOOLS), help="default: all")
    add("--share", type=float, default=0.5, help="of the noise units that are off (default: 0.5)")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=300.0, help="seconds for each tool and network (default: 300)")
    add("--budget", type=float, default=10.0, help="seconds of timing for each network; 0: none (default: 10)")
    add("--json", type=Path, help="write all numbers to this file")
    add("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    return made


def spec_of(text: str, share: float, seed: int) -> Spec:
    """Read NAME:PLACEMENT; hidden units are called otherwise in tools/networks.py."""
    name, _, placement = text.partition(":")
    source, slash, own = name.partition("/")
    if slash and source == "tools" and own in NETWORKS:
        return Spec("tools", own, "after activation" if placement == "hidden" else placement, share, seed)
    return Spec("zoo", name, placement, share, seed)


def compared(spec: Spec, tools: Sequence[str], limit: float, budget: float) -> list[Row]:
    """Return one row for each tool; latencies are measured together, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        rows, files = [], {}
        for number, tool in enumerate(tools):
            place = Path(folder) / str(number)
            place.mkdir()
            rows.append({"network": spec.title(), "tool": tool, **measured(spec, tool, place, limit)})
            if (place / "result.onnx").exists():
                files[tool] = place / "result.onnx"
        if budget and len(files) > 1:
            found = compare(files, batch=1, budget_s=budget)
            for model in found.models:
                row = next(row for row in rows if row["tool"] == model.name)
                row["latency_us"] = model.median_s * 1e6
    return rows


def measured(spec: Spec, tool: str, folder: Path, limit: float) -> Row:
    """Run one tool in a process; a missing package, a crash and a time-out are rows."""
    package = TOOLS[tool].package
    if package is not None and version(package) is None:
        return {"failure": "not installed"}
    command = [sys.executable, str(ROOT / "tools" / "peers.py"), tool, json.dumps(asdict(spec)), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failure": f"took longer than {limit:.0f} s"}
    result = folder / "result.json"
    if not result.exists():
        lines = done.stderr.strip().splitlines() or [""]
        return {"failure": f"crashed with exit code {done.returncode}: {lines[-1][:120]}"}
    row: Row = json.loads(result.read_text())
    return row


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


def exact(row: Row) -> bool:
    """Whether the tool returned a network that computes what the masked one does."""
    return "error" in row and row["error"] <= row["bound"]


def violations(rows: Sequence[Row]) -> list[str]:
    """Return a line wherever ours is not exact, or a tool that is exact has fewer multiply-adds."""
    lines = []
    for ours in (row for row in rows if row["tool"] == OURS):
        if not exact(ours):
            lines.append(f"VIOLATION {ours['network']}: {OURS} is not exact: {told(ours)}")
            continue
        for row in rows:
            if row["network"] == ours["network"] and exact(row) and row.get("macs", ours["macs"]) < ours["macs"]:
                lines.append(
                    f"VIOLATION {row['network']}: {row['tool']} is exact and has {row['macs']:,} multiply-adds, "
                    f"{OURS} {ours['macs']:,} ({ours['macs'] / row['macs']:.3f} times as many)"
                )
    return lines


def told(row: Row) -> str:
    """Return the error, or why there is none."""
    return f"error {row['error']:.1e}" if "error" in row else row["failure"]


def cells(row: Row) -> str:
    """Return a row of the table."""
    error = f"{row['error']:.1e}" if "error" in row else ""
    kind = {"float64": "64", "float32": "32", "float32, OpenVINO": "32, OpenVINO"}.get(row.get("measured", ""), "")
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
        signs = [sum(size > 1 for size in sizes), sum(size == 1 for size in sizes), sum(size < 1 for size in sizes)]
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


HEADER = """\
# Side by side

{count} masked networks ({percent:.0f}% of the noise units off at random), each compacted by this compiler and by tools that
people use for it, every tool in a process of its own.

- **Exact**: max|a - b| / max|a| against the masked network in float64, over {inputs} inputs (scales 1 to 1000). Tools that return
  a torch module are measured in float64 (64: bound 1e-12), tools that return a file in onnxruntime or OpenVINO in float32 (32:
  1e-5, or three times what the network's own float32 arithmetic differs by).
- **MACs** of convolutions and matrix products at batch 1, counted by one counter from the shapes onnxruntime sees (for OpenVINO from
  its own graph). **Parameters**: floating-point numbers in the file.
- **Latency**: microseconds in onnxruntime, batch 1, one thread, interleaved ([how](../latency.md)).
- All but `masked` and `sbp_compile` get the network with its noise, its biases and its batch norms folded into its layers
  beforehand (in float64, checked), so that each masked channel is a zero filter.

What each tool is asked to do:

- **torch-pruning, usual**: its dependency graph; every channel that is masked for all readers of its group goes.
  **careful**: only channels that reach all readers as zero. (Which those are is found by running the network with redrawn weights.)
- **OpenVINO pruning**: `convert_model`, `apply_pruning_transformation`; it removes zero channels. Its weights are written back to ONNX
  for onnxruntime, where the names of its operations allow.
- **onnxsim**: `simplify`; **pruning, share**: `apply_structured_pruning` behind it with the share of masked units, layer by layer;
  **pruning, exact**: with one ranking of all channels, and the largest share (bisected) that is exact.
- **onnxslim**: `slim`.
- **torch-simplify**: `simplify(..., fuse_bn=False)` (its own fusion rounds to float32). It imports three classes of torchvision for
  `isinstance` only; where torchvision is missing it gets empty ones.

{versions}

Command: `make compare`

"""
TABLE = "| network | tool | exact | error | MACs | parameters | latency | notes |\n|---|---|---|---|---|---|---|---|\n"
SUMMARY = """\
| tool | exact | wrong | failed | larger / equal / smaller than ours where exact | MACs over ours | latency over ours |
|---|---|---|---|---|---|---|
"""


def page(rows: Sequence[Row], wrong: Sequence[str], share: float) -> str:
    """Return the page of results."""
    head = HEADER.format(
        count=len({row["network"] for row in rows}),
        percent=100 * share,
        inputs=6,
        versions=", ".join(f"{name} {value}" for name, value in versions().items()) + ".",
    )
    goals = "\n".join(f"- {line}" for line in wrong) or (
        "Both goals hold: ours is exact on every network, and no exact result of another tool has fewer multiply-adds."
    )
    body = "\n".join(cells(row) for row in rows)
    return f"{head}{SUMMARY}" + "\n".join(summary(rows)) + f"\n\n## Goals\n\n{goals}\n\n## All rows\n\n{TABLE}{body}\n"


if __name__ == "__main__":
    sys.exit(main())
