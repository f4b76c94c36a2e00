"""Compact masked networks with this compiler and with the tools that people use, side by side.

    make compare                                        the default list, written to docs/results/compare.md
    python tools/compare.py --network resnet18:hidden --tool sbp_compile --tool onnxslim

Every tool runs in a process of its own with a time limit; what it raises is its row. A tool that is not installed is a
row too: `make compare` installs all of them, pinned, in an environment of their own. Exit code 1 where this compiler is
not exact, or where a tool's result is exact and smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from compare_page import Row, cells, page, version, versions, violations
from networks import NETWORKS
from peer_case import Spec
from peers import TOOLS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.timing import compare

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "compare.md"
DEFAULT = (
    "lenet5:before norm", "vgg16_bn:before norm", "vgg16_bn:after norm", "resnet18:before norm", "resnet18:after norm",
    "resnet50:after norm", "resnet_preact:before norm", "resnext:after norm", "se_resnet:hidden",
    "mobilenet_v1:before norm", "mobilenet_v2:after norm", "mobilenet_v3:hidden", "efficientnet:before norm",
    "shufflenet_v2:after norm", "densenet:before norm", "googlenet:after norm", "unet:before norm",
    "autoencoder:after norm", "m5:after norm", "mlp_mixer:hidden", "vit:hidden", "bert:hidden",
)  # fmt: skip


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
    add(
        "--network",
        action="append",
        metavar="NAME:PLACEMENT",
        help="of the zoo; tools/NAME: tools/networks.py",
    )
    add("--tool", action="append", choices=list(TOOLS), help="default: all")
    add("--share", type=float, default=0.5, help="of the noise units that are off (default: 0.5)")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=300.0, help="seconds for each tool and network (default: 300)")
    add(
        "--budget", type=float, default=10.0, help="seconds of timing for each network; 0: none (default: 10)"
    )
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
    package = TOOLS[tool].package if tool in TOOLS else None
    if package is not None and version(package) is None:
        return {"failure": "not installed"}
    command = [sys.executable, str(ROOT / "tools" / "peers.py"), tool, json.dumps(asdict(spec)), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failure": f"took longer than {limit:g} s"}
    result = folder / "result.json"
    if not result.exists():
        lines = done.stderr.strip().splitlines() or [""]
        return {"failure": f"crashed with exit code {done.returncode}: {lines[-1][:120]}"}
    row: Row = json.loads(result.read_text())
    return row


if __name__ == "__main__":
    sys.exit(main())
