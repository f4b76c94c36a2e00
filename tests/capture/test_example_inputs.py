"""Example inputs and dynamic axes, from what a user types."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbp_compile.capture import load_model
from sbp_compile.capture.example_inputs import bind, parse_axes, parse_input
from sbp_compile.errors import InputError, UnsupportedModelError, UsageError
from tests.networks import Images


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("x=1x3x224x224:float32", "x", (1, 3, 224, 224), torch.float32),
        ("x=2x6", "x", (2, 6), torch.float32),
        ("7", "", (7,), torch.float32),
        ("scale=scalar:float64", "scale", (), torch.float64),
        ("mask=4x1:bool", "mask", (4, 1), torch.bool),
        ("größe=3:complex64", "größe", (3,), torch.complex64),
        ("nothing=0x3:float16", "nothing", (0, 3), torch.float16),
    ],
)
def test_an_input_is_described_by_name_shape_and_dtype(
    text: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found, tensor = parse_input(text)
    assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype)


def test_integers_stay_in_their_range() -> None:
    assert set(parse_input("x=1000:int64")[1].tolist()) == {0, 1}
    assert set(parse_input("x=1000:int8:-2..2")[1].tolist()) == {-2, -1, 0, 1, 2}


def test_the_same_words_give_the_same_values() -> None:
    assert torch.equal(parse_input("x=9")[1], parse_input("x=9")[1])
    assert not torch.equal(parse_input("x=9")[1], parse_input("y=9", 1)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "cannot be read; write NAME=SHAPE"),
        ("x=", "cannot be read; write NAME=SHAPE"),
        ("x=1,3", "cannot be read; write NAME=SHAPE"),
        ("x=1x-3", "cannot be read; write NAME=SHAPE"),
        ("x=1:float31", "dtype 'float31' is not one of float32"),
        ("x=1:int64:5..2", r"the range must be LOW\.\.HIGH"),
        ("x=1:float32:0..2", r"the range must be LOW\.\.HIGH, of an integer input"),
        ("x=99999x99999x99", r"would take \d+ GiB"),
    ],
)
def test_what_describes_no_input_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_input(text)


def test_dynamic_axes_are_named() -> None:
    assert parse_axes(["x:0=batch,2=height", "mask:0=batch", "x:3=width"]) == {
        "x": {0: "batch", 2: "height", 3: "width"},
        "mask": {0: "batch"},
    }
    assert parse_axes(["0=batch"]) == {"": {0: "batch"}}
    for text in ("x", "x:batch", "x:0=1st", "x:-1=last", "x:0=a;1=b", "x:0=a,0=b"):
        with pytest.raises(UsageError, match="--dynamic"):
            parse_axes([text])


def function(x: Tensor, scale: float = 1.0, *, mask: Tensor) -> None:
    """A signature."""


def test_inputs_are_bound_by_name_or_position() -> None:
    x, mask = torch.ones(2), torch.zeros(2)
    for given in ({"mask": mask, "x": x}, {"0": x, "mask": mask}, {"0": x, "2": mask}):
        args, kwargs = bind(function, given, "net")
        assert args == (x,)
        assert kwargs == {"mask": mask}
    with pytest.raises(InputError, match="net needs mask too: add --input mask=SHAPE:DTYPE"):
        bind(function, {"x": x}, "net")
    with pytest.raises(InputError, match="net has no input 'y'; its inputs are x, scale, mask"):
        bind(function, {"x": x, "y": x}, "net")


def loaded(tmp_path: Path, module: nn.Module, **options: Any) -> Any:
    torch.save(module.state_dict(), tmp_path / "w.pt")
    return load_model(tmp_path / "w.pt", arch=module, **options)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layer(x) if y is None else self.layer(x) + y[:, :1]


def test_named_axes_take_any_size_and_others_one(tmp_path: Path) -> None:
    axes = {"": {0: "n", 2: "height", 3: "width"}}
    model = loaded(tmp_path, Images(), example_inputs=torch.randn(1, 2, 1, 6), dynamic_axes=axes)
    run = model.exported_program.module()
    for shape in ((1, 2, 9, 5), (4, 2, 3, 8)):
        assert run(torch.randn(shape)).shape == (shape[0], 3, *shape[2:])
    fixed = loaded(
        tmp_path, Images(), example_inputs=torch.randn(2, 2, 6, 6), dynamic_axes={"x": {2: "height"}}
    )
    assert fixed.axis_names == {"x": {2: "height"}}
    assert fixed.exported_program.module()(torch.randn(2, 2, 9, 6)).shape == (2, 3, 9, 6)
    with pytest.raises(AssertionError, match="Guard failed"):
        fixed.exported_program.module()(torch.randn(3, 2, 6, 6))


def test_one_name_in_front_of_several_inputs_is_one_size(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 3), "y": torch.randn(2, 5)}
    axes = {"x": {0: "batch"}, "y": {0: "batch", 1: "width"}}
    run = loaded(tmp_path, TwoInputs(), example_inputs=inputs, dynamic_axes=axes).exported_program.module()
    assert run(torch.randn(7, 3), torch.randn(7, 2)).shape == (7, 3)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"z": {0: "batch"}}, InputError, "has no input 'z'; its inputs are x"),
        ({"x": {5: "batch"}}, InputError, r"--dynamic x:5: input 'x' has shape \[2, 3\], no axis 5"),
        (
            {"x": {1: "width"}},
            UnsupportedModelError,
            "--dynamic x:1: the code of TwoInputs of .* fixes the size to 3",
        ),
    ],
)
def test_axes_that_cannot_be_dynamic_are_named(
    axes: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        loaded(tmp_path, TwoInputs(), example_inputs=torch.randn(2, 3), dynamic_axes=axes)
