"""Compile a model of some gigabytes in a process of its own, and measure its largest memory.

    python tools/large_model.py --gigabytes 3 [--write]

A chain of linear layers in float32, every second unit off; compiled, proven and written as `python -m sbp_compile`
does. Exit code 1 if that took more than three times the model's size.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.cli import main as command_line

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "large-model.md"
WIDTH = 16384
PROMISE = 3.0


class Large(nn.Module):
    """Layers of which every second unit is off."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.register_buffer("mask", (torch.arange(width) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x) * self.mask)
        return x


def watch(samples: list[tuple[float, float]], stop: threading.Event) -> None:
    """Note (seconds, resident gigabytes) until told to stop."""
    start = time.perf_counter()
    while not stop.wait(0.2):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append((time.perf_counter() - start, pages * resource.getpagesize() / 1e9))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of each layer ({WIDTH})")
    options = parser.parse_args()
    width = options.width
    layers = max(round(options.gigabytes * 1e9 / (4 * width**2)), 1)
    size = layers * 4 * width**2 / 1e9
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "large.pt"
        torch.manual_seed(0)
        torch.save(Large(layers, width).state_dict(), path)
        samples: list[tuple[float, float]] = []
        stop = threading.Event()
        threading.Thread(target=watch, args=(samples, stop), daemon=True).start()
        start = time.perf_counter()
        sizes = f'{{"layers": {layers}, "width": {width}}}'
        arguments = [str(path), "-o", str(Path(folder) / "small.onnx"), "--input", f"2x{width}"]
        code = command_line([*arguments, "--arch", f"{__name__}:Large", "--arch-args", sizes])
        seconds = time.perf_counter() - start
        stop.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"exit code {code}; {size:.2f} GB of weights, {seconds:.0f} s, {peak:.2f} GB: {peak / size:.1f} times"
    )
    for at, held in samples[:: max(len(samples) // 40, 1)]:
        print(f"{at:6.1f} s {held:6.2f} GB")
    if options.write and code == 0:
        command = f"python tools/large_model.py --gigabytes {options.gigabytes:g} --width {width} --write"
        verdict = "reached" if peak <= PROMISE * size else "**not reached**"
        RESULT.write_text(
            f"# A large model\n\n    {command}\n\n"
            f"{layers} linear layers of {width} x {width} in float32, {size:.2f} GB, every second unit off: compiled, "
            f"proven and written in {seconds:.0f} s, with at most {peak:.2f} GB of resident memory, {peak / size:.1f} "
            f"times the model's size. The aim of {PROMISE:.0f} times is {verdict}.\n",
            encoding="utf-8",
        )
    return int(code != 0 or peak > PROMISE * size)


if __name__ == "__main__":
    sys.exit(main())
