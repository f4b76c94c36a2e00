"""Half-precision files: weights and computation in float16, the interface as asked, held to 1e-2."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import sbp_compile
from sbp_compile.errors import UnsupportedModelError, UsageError, VerificationError
from tests.networks import Images, Masked, assert_close, run_onnx


@pytest.fixture(scope="module")
def images() -> tuple[nn.Module, sbp_compile.Compiled]:
    torch.manual_seed(0)
    module = Images().eval()
    return module, sbp_compile.compile(module, torch.randn(2, 2, 9, 11))


def types(path: Path) -> tuple[set[int], set[int]]:
    """Element types of the interface and of the weights."""
    graph = onnx.load(path).graph
    interface = {entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)}
    return interface, {tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1}


def test_weights_are_halved_and_the_interface_is_not(
    images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    module, compiled = images
    compiled.save(tmp_path / "small.onnx", fp16=True)
    assert types(tmp_path / "small.onnx") == ({TensorProto.FLOAT}, {TensorProto.FLOAT16})
    proof = compiled.report.verification
    assert proof is not None
    assert proof.file_error is not None
    assert 1e-6 < proof.file_error < proof.file_tolerance == 1e-2
    x = torch.randn(3, 2, 9, 11)
    assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0], 1e-2)


def test_the_interface_is_halved_on_request(
    images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    module, compiled = images
    compiled.save(tmp_path / "small.onnx", fp16=True, fp16_io=True)
    assert types(tmp_path / "small.onnx") == ({TensorProto.FLOAT16}, {TensorProto.FLOAT16})
    x = torch.randn(3, 2, 9, 11)
    assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x.half())[0], 1e-2)


@pytest.mark.parametrize("fp16_io", [False, True])
def test_an_exported_program_can_be_halved(
    fp16_io: bool, images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    module, compiled = images
    compiled.save(tmp_path / "small.pt2", fp16=True, fp16_io=fp16_io)
    x = torch.randn(3, 2, 9, 11)
    result = torch.export.load(tmp_path / "small.pt2").module()(x.half() if fp16_io else x)
    assert result.dtype == (torch.float16 if fp16_io else torch.float32)
    assert_close(module(x).detach(), result.detach(), 1e-2)


def test_the_next_file_is_in_full_precision_again(
    images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    _, compiled = images
    compiled.save(tmp_path / "half.onnx", fp16=True)
    compiled.save(tmp_path / "small.onnx")
    assert types(tmp_path / "small.onnx") == ({TensorProto.FLOAT}, {TensorProto.FLOAT})
    assert compiled.report.verification is not None
    assert compiled.report.verification.file_tolerance == 1e-5


class Scaled(Masked):
    """Weights, activations or results beyond what half precision holds."""

    def __init__(self, weight: float, activation: float) -> None:
        super().__init__()
        self.activation = activation
        with torch.no_grad():
            self.second.weight *= weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)) * self.mask * self.activation
        return self.second(hidden) / self.activation


def test_a_weight_beyond_the_range_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Scaled(1e6, 1.0), torch.randn(4, 6))
    with pytest.raises(UnsupportedModelError, match=r"values beyond the range of torch\.float16"):
        compiled.save(tmp_path / "small.onnx", fp16=True)
    assert not list(tmp_path.iterdir())


class Overflowing(nn.Module):
    """The square of a large number and its root: beyond the range in between."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1000).square().sum(1).sqrt()


def test_an_overflow_on_the_way_is_found_though_the_runtime_may_compute_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Overflowing(), torch.randn(4, 6))
    with pytest.raises(UnsupportedModelError, match=r"the value \w+ \(aten\S+\) reaches .* without fp16"):
        compiled.save(tmp_path / "small.onnx", fp16=True)
    assert not list(tmp_path.iterdir())


class Cancelling(nn.Module):
    """What is left of a difference of large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() + 1000.0).sqrt() - 1000.0**0.5


def test_a_loss_of_precision_is_a_disagreement_that_names_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Cancelling(), torch.randn(4, 6))
    with pytest.raises(VerificationError, match="part at the rounding to float16; write the network without"):
        compiled.save(tmp_path / "small.onnx", fp16=True)
    assert not list(tmp_path.iterdir())


class Large(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e6


def test_an_output_beyond_the_range_is_refused_at_a_halved_interface(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Large(), torch.randn(4, 6))
    with pytest.raises(UnsupportedModelError, match=r"an output reaches .* beyond the range of float16"):
        compiled.save(tmp_path / "small.onnx", fp16=True, fp16_io=True)


class Classes(Masked):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y.argmax(1)


def test_classes_are_compared_up_to_ties_of_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classes().eval()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    compiled.save(tmp_path / "small.onnx", fp16=True)
    x = torch.randn(64, 6)
    agreement = np.mean((run_onnx(tmp_path / "small.onnx", x)[1] == module(x)[1]).numpy())
    assert agreement > 0.95


def test_a_halved_interface_alone_is_refused(
    images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="fp16_io needs fp16"):
        images[1].save(tmp_path / "small.onnx", fp16_io=True)


@pytest.mark.parametrize("option", ["opset", "external_data"])
def test_options_of_onnx_files_are_refused_for_others(
    option: str, images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is for \.onnx outputs, not for 'small\.pt2'"):
        images[1].save(tmp_path / "small.pt2", **{option: 18})


def test_an_unknown_option_is_named(images: tuple[nn.Module, sbp_compile.Compiled], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save has no option 'half'; it has opset, external_data, fp16"):
        images[1].save(tmp_path / "small.onnx", half=True)
