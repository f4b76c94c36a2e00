"""Verification and benchmark on CUDA: onnxruntime and TorchScript, float32 with and without TF32, float16.

    python tools/bench_cuda.py [--network NAME]... [--batch 1,16,64,256] [--budget S] [--write]

The networks of tools/bench.py. Exactness is judged in float32 with TF32 off, by the compiler's own proof on the CUDA
provider. For each kind of arithmetic the dense network and the small one (widths of that target) take turns. `make
bench-cuda` installs what it needs. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_networks import CASES, Case
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import numpy as np

import sbp_compile
from passes import TARGETS, default_pipeline
from sbp_compile.atomic import write_atomically
from sbp_compile.compiler import Compiled
from sbp_compile.emit.module import compiled_module, emit_graph_module
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.timing import compare, environment, require_provider
from sbp_compile.timing.statistics import median_interval

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
WARM_UP_RUNS = 10
SAMPLE_S = 2e-3
FEWEST_ROUNDS = 9


@dataclass(frozen=True)
class Arithmetic:
    """A kind of arithmetic: the target whose widths it likes, onnxruntime's provider, torch's settings."""

    name: str
    target: str
    provider: str
    dtype: torch.dtype
    tf32: bool


KINDS = (
    Arithmetic("float32", "cuda", "cuda", torch.float32, tf32=False),
    Arithmetic("TF32", "cuda-tf32", "cuda-tf32", torch.float32, tf32=True),
    Arithmetic("float16", "cuda-fp16", "cuda", torch.float16, tf32=False),
)

Speed = tuple[float, float, tuple[float, float, float]]
"""Seconds of dense and small, and the ratio with its interval."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--batch", default="1,16,64,256", metavar="N[,N]")
    parser.add_argument("--budget", type=float, default=5.0, metavar="S", help="seconds for each row (5)")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device: nothing was checked, nothing was timed")
        require_provider("cuda")
        lines = list(report(options))
    except CompileError as error:
        print(f"bench_cuda: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        card = torch.cuda.get_device_name().lower().replace(" ", "-")
        write_atomically(RESULTS / f"bench-cuda-{card}.md", text)
    return 0


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page: a line for each network, runtime, arithmetic and batch size."""
    yield f"# Benchmark on CUDA: {torch.cuda.get_device_name()}"
    yield ""
    versions = f"torch {torch.__version__}, onnxruntime {environment()['onnxruntime']}"
    yield f"Command: `python tools/bench_cuda.py --batch {options.batch} --budget {options.budget:g}`; {versions}."
    yield "Paper (its own card): LeNet-500-300 1.08x, LeNet-5 1.91x, VGG-like 1.74x."
    yield ""
    yield "| network | error on CUDA | runtime | arithmetic | batch | dense | small | speed-up |"
    yield "|---|---|---|---|---|---|---|---|"
    batches = [int(part) for part in options.batch.split(",")]
    for case in CASES:
        if not options.network or case.name in options.network:
            with tempfile.TemporaryDirectory() as folder:
                yield from network_lines(case, Path(folder), batches, options.budget)


def network_lines(case: Case, folder: Path, batches: Sequence[int], budget: float) -> Iterator[str]:
    """Prove one network on the GPU and time it in every way."""
    torch.manual_seed(0)
    network, example = case.make(), torch.rand(2, *case.shape)
    for kind in KINDS:
        compiled = sbp_compile.compile(
            network, example, pipeline=default_pipeline(target=TARGETS[kind.target])
        )
        files = onnx_files(compiled, folder, kind)
        error = proven_on_cuda(compiled)
        for batch in batches:
            found = compare(files, batch=batch, provider=kind.provider, budget_s=budget)
            ratio = found.ratios[0]
            times = (found.models[0].median_s, found.models[1].median_s)
            speed = (*times, (ratio.ratio, ratio.ci_low, ratio.ci_high))
            yield line(case.name, error, "onnxruntime", kind, batch, speed)
        modules = scripts(compiled, kind.dtype, torch.device("cuda"))
        for batch in batches:
            x = torch.rand(batch, *case.shape, dtype=kind.dtype, device="cuda")
            with tf32(allowed=kind.tf32):
                speed = compare_modules(modules, x, budget, torch.cuda.synchronize)
            yield line(case.name, error, "TorchScript", kind, batch, speed)


def onnx_files(compiled: Compiled, folder: Path, kind: Arithmetic) -> dict[str, Path]:
    """Dense and small as files of that arithmetic; the small one is proven before it has its name."""
    half = kind.dtype == torch.float16
    small, dense = folder / f"small-{kind.name}.onnx", folder / f"dense-{kind.name}.onnx"
    compiled.save(small, fp16=half)
    replace(compiled, program=compiled.dense, references=()).save(dense, fp16=half)
    return {"dense": dense, "small": small}


def proven_on_cuda(compiled: Compiled) -> float:
    """The largest error of the small file; raises UsageError where onnxruntime did not start its CUDA provider."""
    proof = compiled.report.verification
    if proof is None or proof.file_error is None or "CUDAExecutionProvider" not in proof.runtimes:
        raise UsageError(
            "onnxruntime could not start its CUDA provider; check the driver and the CUDA libraries"
        )
    return proof.file_error


def scripts(compiled: Compiled, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Dense and small as traced, frozen TorchScript on a device."""
    found = {}
    for name, program in (("dense", compiled.dense), ("small", compiled.program)):
        module = compiled_module(emit_graph_module(program, dtype), compiled.call).eval().to(device)
        example = compiled.examples[0].to(device, dtype)
        found[name] = torch.jit.freeze(torch.jit.trace(module, (example,)))  # type: ignore[no-untyped-call]
    return found


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow TF32 in torch's matrix products and convolutions, or forbid it, within a block."""
    held: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [entry.allow_tf32 for entry in held]
    for entry in held:
        entry.allow_tf32 = allowed
    try:
        yield
    finally:
        for entry, value in zip(held, before, strict=True):
            entry.allow_tf32 = value


def compare_modules(
    modules: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    budget: float,
    synchronize: Callable[[], object],
) -> Speed:
    """Time two modules in turns (A B B A) on one input; the ratio is the first one's time over the second's."""
    names, order = list(modules), random.Random(0)
    with torch.no_grad():
        runs = {name: _calibrated(modules[name], x, synchronize) for name in names}
        samples: dict[str, list[float]] = {name: [] for name in names}
        logs: list[float] = []
        end = time.perf_counter() + budget
        while len(logs) < FEWEST_ROUNDS or time.perf_counter() < end:
            sequence = order.sample(names, len(names))
            total = dict.fromkeys(names, 0.0)
            for name in (*sequence, *reversed(sequence)):
                seconds = _seconds(modules[name], x, runs[name], synchronize)
                samples[name].append(seconds)
                total[name] += math.log(seconds) / 2
            logs.append(total[names[0]] - total[names[1]])
    low, high = median_interval(np.array(logs))
    ratio = (math.exp(statistics.median(logs)), math.exp(low), math.exp(high))
    return statistics.median(samples[names[0]]), statistics.median(samples[names[1]]), ratio


def _calibrated(module: Callable[[Tensor], Tensor], x: Tensor, synchronize: Callable[[], object]) -> int:
    """How many runs make a sample."""
    _seconds(module, x, WARM_UP_RUNS, synchronize)
    return max(1, math.ceil(SAMPLE_S / _seconds(module, x, WARM_UP_RUNS, synchronize)))


def _seconds(
    module: Callable[[Tensor], Tensor], x: Tensor, runs: int, synchronize: Callable[[], object]
) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        module(x)
    synchronize()
    return (time.perf_counter() - start) / runs


def line(network: str, error: float, runtime: str, kind: Arithmetic, batch: int, speed: Speed) -> str:
    """One row of the table."""
    dense, small, (ratio, low, high) = speed
    cells = (
        network,
        f"{error:.1e}",
        runtime,
        kind.name,
        str(batch),
        f"{dense * 1e6:,.1f} us",
        f"{small * 1e6:,.1f} us",
        f"{ratio:.2f}x ({low:.2f} to {high:.2f})",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
