"""The measure, ties, and where two networks part."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from passes import Program
from sbp_compile.emit import onnx_file
from sbp_compile.errors import VerificationError
from sbp_compile.verify import (
    first_difference,
    make_reference,
    relative_error,
    verify_float64,
    verify_onnx,
)
from tests.networks import Masked
from tests.passes.support import capture


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], math.inf),
        ([1.0, math.inf], [1.0, 5.0], 0.0),
        ([1.0, math.nan], [1.0, 5.0], 0.0),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0, math.inf], math.inf),
        ([math.nan], [1.0], 0.0),
    ],
)
def test_the_error_is_relative_to_the_largest_finite_value(
    a: list[float], b: list[float], error: float
) -> None:
    assert relative_error(torch.tensor(a), torch.tensor(b)) == error


def test_other_shapes_are_infinitely_wrong() -> None:
    assert relative_error(torch.ones(2), torch.ones(1, 2)) == math.inf


class Classes(nn.Module):
    """The class of the largest of three scores, two of which are always equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        with torch.no_grad():
            self.layer.weight[1], self.layer.bias[1] = self.layer.weight[0], self.layer.bias[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(1)


def changed(program: Program, name: str, row: int, by: float) -> Program:
    constants = {key: value.clone() for key, value in program.constants.items()}
    constants[name][row] += by
    return program.replace(constants=constants)


def test_ties_between_classes_may_fall_either_way() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    original = capture(Classes(), x)
    reference = make_reference(original, (x,), [])
    other = changed(original, "layer.bias", 1, 1e-9)
    assert verify_float64(original, other, [reference]) == 0.0


def test_another_class_is_an_error_where_there_is_no_tie() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    original = capture(Classes(), x)
    reference = make_reference(original, (x,), [])
    with pytest.raises(VerificationError, match="output 0 differs"):
        verify_float64(original, changed(original, "layer.bias", 2, 5.0), [reference])


@pytest.mark.parametrize(("layer", "place"), [("first", "linear"), ("second", "linear_1")])
def test_the_first_value_that_differs_is_named_with_its_layer(layer: str, place: str) -> None:
    x = torch.randn(3, 6)
    original = capture(Masked(), x)
    other = changed(original, f"{layer}.weight", 0, 1.0)
    assert first_difference(original, other, [x]) == f"{place} (aten.linear.default in {layer})"


def test_half_precision_is_held_to_its_own_tolerance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Masked().half(), torch.randn(4, 6).half())
    compiled.save(tmp_path / "small.onnx")
    proof = compiled.report.verification
    assert proof is not None
    assert proof.file_tolerance == pytest.approx(1e-2)
    assert proof.float64_error <= 1e-12


def test_onnxruntime_is_run_on_the_references(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6))
    compiled.write_onnx(tmp_path / "small.onnx")
    error, tolerance, providers = verify_onnx(
        tmp_path / "small.onnx", compiled.references, compiled.program, compiled.output_names
    )
    assert error <= tolerance == 1e-5
    assert "CPUExecutionProvider" in providers


class Quotient(nn.Module):
    """x over its largest entry, and a number that keeps a quotient of zeros finite."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(1, keepdim=True) + self.number)


def test_a_file_that_divides_zeros_where_the_network_does_not_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "keep_scalars", lambda program: program)
    compiled = sbp_compile.compile(Quotient(1e-12), torch.randn(2, 4))
    with pytest.raises(VerificationError, match="is NaN or infinite in onnxruntime for inputs of zeros"):
        compiled.save(tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "options"), [(0.0, {}), (1e-50, {}), (1e-12, {"fp16": True})])
def test_where_the_network_divides_zeros_itself_so_may_the_file(
    number: float, options: dict[str, bool], tmp_path: Path
) -> None:
    compiled = sbp_compile.compile(Quotient(number), torch.randn(2, 4))
    compiled.save(tmp_path / "small.onnx", **options)
    assert (tmp_path / "small.onnx").exists()
