"""Measure exactness: masked networks against their compiled forms, in float64 and in onnxruntime.

python tools/exactness.py [--masked 0.5] [--network NAME] writes docs/results/exactness.md with `--write`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from networks import NETWORKS, PLACEMENTS, Places, as_trained

import sbp_compile
from sbp_compile.atomic import write_atomically

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "exactness.md"
HEADER = """\
# Exactness

Networks with {percent}% of the noise units at the named place switched off at random, compiled and compared with the
masked network on three inputs (six examples). Error: max|a - b| / max|a|. float64: before rounding (bound 1e-12).
onnxruntime: the float32 file against the float32 network (bound 1e-5, or three times the network's own float32 error
where that is larger). MACs: dense over compiled.

Command: `python tools/exactness.py --write`

| network | noise | float64 | onnxruntime | bound | MACs |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masked", type=float, default=0.5)
    parser.add_argument("--network", choices=sorted(NETWORKS), action="append")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.network or NETWORKS:
        for placement in PLACEMENTS:
            row = measure(name, placement, options.masked)
            if row is not None:
                rows.append(row)
                print(row, flush=True)
    if options.write:
        write_atomically(RESULT, HEADER.format(percent=round(100 * options.masked)) + "\n".join(rows) + "\n")


def measure(name: str, placement: str, masked: float) -> str | None:
    """One row of the table; None where the network has no such place."""
    torch.manual_seed(0)
    network = as_trained(NETWORKS[name](Places(placement)), masked)
    if not any(isinstance(module, sbp_compile.nn.LogNormalNoise) for module in network.modules()):
        return None
    example = torch.randn(2, *network.shape)  # type: ignore[misc]
    compiled = sbp_compile.compile(network, example)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "small.onnx")
    proof, report = compiled.report.verification, compiled.report
    assert proof is not None
    ratio = f"{report.before.macs / report.after.macs:.2f}x" if report.after.macs else "all removed"
    return (
        f"| {name} | {placement} | {proof.float64_error:.1e} | {proof.file_error:.1e} | {proof.file_tolerance:.1e} "
        f"| {ratio} |"
    )


if __name__ == "__main__":
    main()
