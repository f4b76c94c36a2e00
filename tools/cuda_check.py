"""Check and time everything that runs on CUDA: the noise layer, the compiled module, the ONNX file in onnxruntime.

python tools/cuda_check.py MODEL [--write] compiles a model file, checks it on the GPU with TF32 off, and times the
small network against the dense one. `make cuda` installs what it needs. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.capture import load_model
from sbp_compile.compiler import Compiled, compile_file
from sbp_compile.errors import CompileError, UsageError, VerificationError
from sbp_compile.nn import LogNormalNoise
from sbp_compile.timing import compare, environment, require_provider
from sbp_compile.verify import relative_error

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BOUND = 1e-5


def main() -> int:
    """Check, time, print or write; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", default="1,16,64,256")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device: nothing was checked, nothing was timed")
        require_provider("cuda")
        card = torch.cuda.get_device_name()
        text = report(options.model, [int(part) for part in options.batch.split(",")], card)
    except CompileError as error:
        print(f"cuda_check: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    if options.write:
        write_atomically(RESULTS / f"cuda-{card.lower().replace(' ', '-')}.md", text)
    return 0


def report(model: Path, batches: list[int], card: str) -> str:
    """Return the page: errors of each check and the table of times."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    compiled = compile_file(load_model(model))
    lines = [
        f"# CUDA: {card}",
        "",
        f"Command: `python tools/cuda_check.py {model} --write`, torch {torch.__version__}, "
        f"onnxruntime {environment()['onnxruntime']}. TF32 off.",
        "",
        f"- noise layer, CUDA against CPU: {checked('noise layer', noise_error()):.1e}",
        f"- compiled module, CUDA against CPU: {checked('module', module_error(compiled)):.1e}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        small, dense = Path(folder) / "small.onnx", Path(folder) / "dense.onnx"
        compiled.save(small)
        proof = compiled.report.verification
        assert proof is not None
        if "CUDAExecutionProvider" not in proof.runtimes:
            raise UsageError(
                "onnxruntime could not start its CUDA provider; check the driver and the CUDA libraries"
            )
        lines += [f"- ONNX file, {' and '.join(proof.runtimes)}: {proof.file_error:.1e}", ""]
        compiled.write_onnx(dense, compiled.dense)
        lines += ["| batch | dense | small | speed-up |", "|---|---|---|---|"]
        for batch in batches:
            found = compare({"dense": dense, "small": small}, batch=batch, provider="cuda")
            times = [f"{entry.median_s * 1e6:.1f} us" for entry in found.models]
            ratio = found.ratios[0]
            interval = f"{ratio.ci_low:.2f} to {ratio.ci_high:.2f}"
            lines.append(f"| {batch} | {times[0]} | {times[1]} | {ratio.ratio:.2f}x ({interval}) |")
    return "\n".join(lines) + "\n"


def checked(name: str, error: float) -> float:
    """Return the error, or raise VerificationError where it is above the bound."""
    if not error <= BOUND:
        raise VerificationError(f"{name}: error {error:.1e} on CUDA (bound {BOUND:.0e})")
    return error


def noise_error() -> float:
    """Return the largest error of the noise layer's statistics on CUDA."""
    layer = LogNormalNoise(256)
    with torch.no_grad():
        layer.mu.uniform_(-20, 5)
        layer.log_sigma.uniform_(-20, 5)
        here = [layer.mean(), layer.snr(), layer.kl()]
        layer.cuda()
        there = [layer.mean(), layer.snr(), layer.kl()]
    return max(relative_error(a, b.cpu()) for a, b in zip(here, there, strict=True))


def module_error(compiled: Compiled) -> float:
    """Return the error of the compiled module on CUDA, on its example."""
    args, kwargs = compiled.call.nest_arguments(compiled.examples)
    there_args, there_kwargs = compiled.call.nest_arguments([value.cuda() for value in compiled.examples])
    with torch.no_grad():
        here = compiled.call.flat_results(compiled.module(*args, **kwargs))
        there = compiled.call.flat_results(compiled.module.cuda()(*there_args, **there_kwargs))
    compiled.module.cpu()
    return max(relative_error(a, b.cpu()) for a, b in zip(here, there, strict=True))


if __name__ == "__main__":
    sys.exit(main())
