"""The files that tools/fuzz_files.py damages: what makes one of each format, and how it is read and compiled."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from torch import Tensor, nn

import sbp_compile
from passes.targets import Layer
from sbp_compile.capture import load_model
from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from sbp_compile.cli import main as command_line
from sbp_compile.compiler import Compiled, compile_file
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.recipe import load_recipe
from sbp_compile.tuning import LayerTimes, load_times
from sbp_compile.tuning.tuning_file import save_times
from sbp_compile.verify_inputs import load_inputs
from sbp_compile.verify_int8 import load_calibration


class Subject(nn.Module):
    """A convolution with a mask, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Linear(6, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 0.5, 0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x) * self.mask)
        return self.last(features.mean((2, 3)))  # type: ignore[no-any-return]


def subject() -> Subject:
    """Return the network, in eval mode, with the same weights each time."""
    torch.manual_seed(0)
    return Subject().eval()


def example() -> Tensor:
    """Return its example input."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@functools.cache
def network_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of `network_file`, which is deleted when this process ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def network_file() -> Path:
    """Return the network as a file, for what is given beside one."""
    path = Path(network_folder().name) / "network"
    sbp_compile.save_model(subject(), example(), path)
    return path


@functools.cache
def compiled() -> Compiled:
    """Return what the compiler makes of that file."""
    return compile_file(load_model(network_file()), verify=False)


# What makes each


def _exported(file: io.BytesIO) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(subject(), (example(),), dynamic_shapes=({0: batch},))
    program.example_inputs = None
    torch.export.save(program, file)


def _own(file: io.BytesIO) -> None:
    _through_a_file(lambda path: sbp_compile.save_model(subject(), example(), path), file)


def _traced(file: io.BytesIO) -> None:
    torch.jit.save(torch.jit.trace(subject(), example()), file)  # type: ignore[no-untyped-call]


def _state(file: io.BytesIO) -> None:
    torch.save({"state_dict": subject().state_dict(), "epoch": 3}, file)


def _old_state(file: io.BytesIO) -> None:
    torch.save(subject().state_dict(), file, _use_new_zipfile_serialization=False)


def _safetensors(file: io.BytesIO) -> None:
    file.write(safetensors.torch.save(subject().state_dict(), metadata={"format": "pt"}))


def _onnx(file: io.BytesIO) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] x) => (float[N, 4] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, stem_weight, stem_bias)
        m = Mul(c, mask)
        r = Relu(m)
        p = ReduceMean <axes = [2, 3], keepdims = 0> (r)
        y = Gemm <transB = 1> (p, last_weight, last_bias)
    }"""
    model = onnx.parser.parse_model(text)
    for name, value in subject().state_dict().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name.replace(".", "_")))
    file.write(model.SerializeToString())


def _through_a_file(write: Callable[[Path], object], file: io.BytesIO) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "made")
        file.write((Path(folder) / "made").read_bytes())


def _inputs(file: io.BytesIO) -> None:
    np.savez(file, x=example().numpy())


def _calibration(file: io.BytesIO) -> None:
    np.savez_compressed(file, x=example().numpy(), labels=np.array([1, 3]))


def _recipe(file: io.BytesIO) -> None:
    _through_a_file(compiled().recipe().save, file)


def _tuning(file: io.BytesIO) -> None:
    times = LayerTimes.of_this_machine()
    times.seconds = {(Layer(2, 9, 64), 3, width): 1e-6 * width for width in (2, 3, 4, 6)}
    _through_a_file(lambda path: save_times(path, times), file)


# How each is read: an error of the compiler's where it is refused


def _read_weights(path: Path) -> None:
    try:
        load_model(path, example_inputs=example())
    except UsageError as error:
        if "weights without a network" not in str(error):
            raise


def _read_inputs(path: Path) -> None:
    load_inputs(path, compiled().original)


def _read_calibration(path: Path) -> None:
    load_calibration(path, compiled().original)


def _read_recipe(path: Path) -> None:
    load_recipe(path).apply(compiled().original)


@dataclass(frozen=True)
class Format:
    """One format: what writes it, what reads it, and the command line's arguments but for the output.

    `is_zip`, `is_json`: what it is made of; `option`: by which it is given beside a network, None for a network.
    """

    write: Callable[[io.BytesIO], None]
    read: Callable[[Path], object]
    is_zip: bool = False
    is_json: bool = False
    flags: tuple[str, ...] = ()
    option: str | None = None

    @functools.cached_property
    def content(self) -> bytes:
        """The file, undamaged."""
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.write(file)
        return file.getvalue()

    def prepare(self) -> None:
        """Make what reading needs beside the file, so that no mutant's process has to."""
        if self.option is not None:
            compiled()

    def load(self, path: Path) -> tuple[int, str]:
        """Return the exit code and the message of reading a file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.read(path)
            except CompileError as error:
                return error.exit_code, str(error)
        return 0, ""

    def compile(self, path: Path) -> tuple[int, str]:
        """Return the exit code and the messages of the command line, which writes small.onnx beside the file."""
        given = [str(path)] if self.option is None else [str(network_file()), self.option, str(path)]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = command_line([*given, *self.flags, "-o", str(path.with_name("small.onnx")), "--quiet"])
        return code, errors.getvalue() if code else ""


def _load_example(path: Path) -> object:
    return load_model(path, example_inputs=example())


_SHAPE = ("--input", "2x3x8x8")
_NETWORK = (*_SHAPE, "--arch", f"{__name__}:Subject")
FORMATS = {
    "pt2": Format(_exported, _load_example, is_zip=True, flags=_SHAPE),
    "model-file": Format(_own, load_model, is_zip=True),
    "torchscript": Format(_traced, _load_example, is_zip=True, flags=_SHAPE),
    "state-dict": Format(_state, _read_weights, is_zip=True, flags=_NETWORK),
    "old-state-dict": Format(_old_state, _read_weights, flags=_NETWORK),
    "safetensors": Format(_safetensors, _read_weights, flags=_NETWORK),
    "onnx": Format(_onnx, lambda path: onnx_network(load_onnx(path))),
    "inputs": Format(_inputs, _read_inputs, is_zip=True, option="--inputs"),
    "calibration": Format(_calibration, _read_calibration, is_zip=True, option="--int8"),
    "recipe": Format(_recipe, _read_recipe, is_json=True, option="--apply"),
    "tuning": Format(_tuning, load_times, is_json=True, option="--tuning-file"),
}
