"""Measure what compiling costs: capture, passes, verification and emission apart, and peak memory.

python tools/compile_cost.py [--write] compiles a ResNet-50 with half of the noise units off, in a process of its own.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from networks import Places, ResNet50, as_trained

import sbp_compile
from sbp_compile.atomic import write_atomically
from sbp_compile.timing import environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "compile-cost.md"


def main() -> None:
    """Measure in a fresh process, so that the peak is the compiler's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        measure()
        return
    run = subprocess.run([sys.executable, __file__, "--inner"], capture_output=True, text=True, check=True)
    found = environment()
    text = (
        "# What compiling costs\n\nResNet-50 (224x224, 1000 classes) with noise after every batch norm, half of the "
        f"units switched off at random.\n\nCommand: `python tools/compile_cost.py --write`, torch {torch.__version__}, "
        f"Python {platform.python_version()}, onnxruntime {found['onnxruntime']}, {found['processor']}, "
        f"{found['cores']} cores.\n\n{run.stdout}"
    )
    print(text)
    if options.write:
        write_atomically(RESULT, text)


def measure() -> None:
    """Compile once and print the table."""
    torch.manual_seed(0)
    network = ResNet50(Places("after norm"))
    as_trained(network, 0.5)
    parameters = sum(value.numel() for value in network.state_dict().values())
    before = _peak_mib()
    compiled = sbp_compile.compile(network, torch.randn(2, *network.shape))
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "small.onnx")
    report, peak = compiled.report, _peak_mib()
    total = sum(report.seconds.values())
    print("| phase | seconds | share |\n|---|---|---|")
    for phase, seconds in report.seconds.items():
        print(f"| {phase} | {seconds:.1f} | {seconds / total:.0%} |")
    size = parameters * 4 / 2**20
    print(
        f"\nPeak memory {peak:,.0f} MiB, of which {before:,.0f} MiB (torch and the model) were there before; float32 "
        f"parameters {size:,.0f} MiB; the goal of 6 times that plus 1 GB is {6 * size + 1e9 / 2**20:,.0f} MiB.\n"
    )
    assert report.verification is not None
    print(
        f"Multiply-adds {report.before.macs:,} to {report.after.macs:,} "
        f"({report.before.macs / report.after.macs:.2f}x); error {report.verification.float64_error:.1e} in float64, "
        f"{report.verification.file_error:.1e} in onnxruntime."
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
