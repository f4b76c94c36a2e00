"""Compile a model of some gigabytes in a process of its own, and measure its largest memory.

    python tools/large_model.py --gigabytes 3 [--write]

A chain of linear layers in float32, every second unit off; compiled, proven and written as `python -m sbp_compile`
does, with the peak of each stage. Exit code 1 if that took more than three times the model's size, beside what torch
and onnxruntime take before there is a model.
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

import sbp_compile
from passes import default_pipeline, this_cpu
from sbp_compile.capture import load_model
from sbp_compile.compiler import compile_file

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "large-model.md"
WIDTH = 8192
PROMISE = 3.0


NOTES = """\
What there is of each weight:

- reading: the file's tensors and the network's, which are then the same memory as the captured Program's constants;
- compiling: these, and each weight with its scale folded in, until it is cut; the cut weights of the minimal network
  and of the one with other widths. A mask of zeros and ones leaves float32 numbers, and these are held in float32. The
  noise of a trained network does not: a weight that is scaled by it takes twice the memory until it is rounded at
  emission (tensors of a chain of 8 such layers: 4.1 times the model at the peak, 3.2 times with a mask);
- while a weight is looked at, this one in float64; so a model with few, huge layers takes more than one with many;
- verifying: the model, the small network twice (as a Program and as a module), one weight in float64. Where outputs are
  classes, the original also runs with weights that are moved a little, all of them in float64;
- describing: the plain dense network, for its sizes, until they are noted;
- writing: the small network up to five times: Program, module, and three of the ONNX model while onnx-graphsurgeon
  writes it; afterwards the model that is saved and its bytes, then onnxruntime's.

`sbp_compile.compile` copies the module's weights, since its owner may go on training it: once the model more.
"""


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


class Stages:
    """The largest resident memory of each stage, in gigabytes, looked at ten times a second."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.stage = "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Stages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, text: str) -> None:
        """Begin a stage, named by what stands in front of a colon."""
        self.stage = text.partition(":")[0]
        print(f"{resident():6.2f} GB  {text}", flush=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0.0), resident())


def resident() -> float:
    """Return the gigabytes that the process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


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
    compile_small()
    fixed = resident()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "large.pt"
        write_model(layers, width, path)
        start = time.perf_counter()
        with Stages() as stages:
            compile_large(path, layers, width, stages)
        seconds = time.perf_counter() - start
    peak = max(stages.peaks.values())
    times = (peak - fixed) / size
    print(
        f"{size:.2f} GB of weights, {seconds:.0f} s, {peak:.2f} GB, {fixed:.2f} GB of it before there was a model: "
        f"{times:.2f} times"
    )
    for stage, held in stages.peaks.items():
        print(f"{held:6.2f} GB  {stage}")
    if options.write:
        command = f"python tools/large_model.py --gigabytes {options.gigabytes:g} --width {width} --write"
        verdict = "reached" if times <= PROMISE else "**not reached**"
        rows = "".join(
            f"| {stage} | {held:.2f} | {(held - fixed) / size:.2f} |\n"
            for stage, held in stages.peaks.items()
        )
        RESULT.write_text(
            f"# A large model\n\n    {command}\n\n"
            f"{layers} linear layers of {width} x {width} in float32, {size:.2f} GB, every second unit off: compiled, "
            f"proven and written in {seconds:.0f} s, with at most {peak:.2f} GB of resident memory. {fixed:.2f} GB of "
            f"that torch and onnxruntime take before there is a model; the rest is {times:.2f} times the model's size. "
            f"The aim of {PROMISE:.0f} times is {verdict}.\n\n"
            f"| stage | GB | times the model, without the {fixed:.2f} GB |\n| --- | ---: | ---: |\n{rows}\n{NOTES}",
            encoding="utf-8",
        )
    return int(times > PROMISE)


def compile_small() -> None:
    """Compile a model of no size, so that all libraries are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = sbp_compile.compile(Large(1, 8), torch.randn(2, 8))
        compiled.save(Path(folder) / "small.onnx")


def write_model(layers: int, width: int, path: Path) -> None:
    """Write the weights of a random model."""
    torch.manual_seed(0)
    torch.save(Large(layers, width).state_dict(), path)


def compile_large(path: Path, layers: int, width: int, stages: Stages) -> None:
    """Do what the command line does."""
    stages.begin("reading the model")
    arguments = {"layers": layers, "width": width}
    model = load_model(path, example_inputs=torch.randn(2, width), arch=Large, arch_args=arguments)
    pipeline = default_pipeline(target=this_cpu())
    compiled = compile_file(model, pipeline=pipeline, copy=False, progress=stages.begin)
    stages.begin("writing and verifying the file")
    compiled.save(path.with_name("small.onnx"))


if __name__ == "__main__":
    sys.exit(main())
