"""Models that once got past the compiler's own proof."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from sbp_compile.errors import UnsupportedModelError


class OtherPathForOne(nn.Module):
    """Another function for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] > 1 else -self.layer(x)


def test_a_model_that_takes_another_path_for_a_batch_of_one_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"takes another path .* dynamic_batch=False"):
        sbp_compile.compile(OtherPathForOne(), torch.randn(2, 4))


def test_the_same_model_compiles_for_the_batch_that_is_used() -> None:
    model, example = OtherPathForOne(), torch.randn(1, 4)
    compiled = sbp_compile.compile(model, example, dynamic_batch=False)
    assert torch.allclose(compiled.module(example), model(example))


class Function(nn.Module):
    """A linear layer and a function of it and the inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer, x)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_size_among_the_outputs_is_no_tensor(suffix: str, tmp_path: Path) -> None:
    model = Function(lambda layer, x: (layer(x), x.shape[0], None))
    compiled = sbp_compile.compile(model, torch.randn(3, 4))
    compiled.save(tmp_path / f"small{suffix}")
    assert compiled.output_names == ("output_0", None, None)
    assert compiled.module(torch.randn(5, 4))[1:] == (5, None)


def test_what_onnxruntime_cannot_run_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = Function(lambda layer, x: layer(x)).bfloat16()
    compiled = sbp_compile.compile(model, torch.randn(3, 4).bfloat16())
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime cannot run .* save it as \.pt2"):
        compiled.save(tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


class TwoSets(nn.Module):
    """One layer on two inputs of independent lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(y)


def test_two_leading_axes_of_independent_sizes_have_two_names(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim("n")}, "y": {0: torch.export.Dim("m")}}
    example = (torch.randn(3, 4), torch.randn(5, 4))
    sbp_compile.compile(TwoSets(), example, dynamic_shapes=shapes).save(tmp_path / "small.onnx")
    graph = onnx.load(tmp_path / "small.onnx").graph
    leading = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)]
    assert leading == ["batch", "y_0", "batch", "y_0"]


def test_weights_decide_the_dtype_not_an_input_that_is_cast_first(tmp_path: Path) -> None:
    model = Function(lambda layer, x: layer(x.float()))
    compiled = sbp_compile.compile(model, torch.randn(3, 4).half())
    compiled.save(tmp_path / "small.onnx")
    assert compiled.module(torch.randn(3, 4).half()).dtype == torch.float32


class TwoDtypes(TwoSets):
    """Inputs of two dtypes, brought to one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x) + self.layer(y.float())


@pytest.mark.parametrize("other", [torch.float16, torch.float64])
def test_inputs_keep_their_own_dtypes(other: torch.dtype, tmp_path: Path) -> None:
    example = (torch.randn(3, 4), torch.randn(3, 4).to(other))
    compiled = sbp_compile.compile(TwoDtypes(), example)
    compiled.save(tmp_path / "small.onnx")
    taken = [value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "small.onnx").graph.input]
    assert taken == [onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype) for value in example]


class Cast(nn.Module):
    """A linear layer whose result is cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).to(self.dtype)


@pytest.mark.parametrize(
    ("computed", "given"),
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_outputs_keep_their_dtype(computed: torch.dtype, given: torch.dtype, tmp_path: Path) -> None:
    model, example = Cast(given).to(computed), torch.randn(2, 4).to(computed)
    compiled = sbp_compile.compile(model, example)
    compiled.save(tmp_path / "small.onnx")
    assert compiled.module(example).dtype == given
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    result = session.run(None, {"x": example.numpy()})[0]
    assert torch.from_numpy(result).dtype == given


class OnlyEven(nn.Module):
    """Pairs the examples of a batch; fails on an odd number of them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise ValueError("odd")
        return x * 2.0


def test_a_batch_that_the_model_refuses_is_named_in_the_report() -> None:
    compiled = sbp_compile.compile(OnlyEven(), torch.randn(2, 4), dynamic_batch=False)
    assert not [note for note in compiled.report.notes if note.where == "verification"]
    shapes = ({0: torch.export.Dim.AUTO},)
    compiled = sbp_compile.compile(OnlyEven(), torch.randn(4, 4), dynamic_shapes=shapes)
    texts = [note.text for note in compiled.report.notes if note.where == "verification"]
    assert texts
    assert all("left out" in text for text in texts)
