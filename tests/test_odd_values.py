"""Values and dtypes out of the ordinary, through every door: what docs/model-file.md says of them."""

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from sbp_compile.capture import load_model
from sbp_compile.compiler import compile_file
from sbp_compile.errors import InputError, UnsupportedModelError
from sbp_compile.verify import relative_error
from tests.capture.onnx_models import parsed

NAN, INFINITY = math.nan, math.inf


class Net(nn.Module):
    """Half of the hidden units are off."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 0]))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x) * self.mask))


def with_value(name: str, place: tuple[int, ...], value: float) -> Net:
    net = Net()
    with torch.no_grad():
        net.state_dict()[name][place] = value
    return net


def wanted_dtype(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


# Doors: each writes a network into a file and returns what was loaded of it.


def exported_file(net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.LoadedModel:
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (x,), dynamic_shapes=sizes)
    program.example_inputs = None
    torch.export.save(program, folder / "net.pt2")
    return load_model(folder / "net.pt2", example_inputs=x)


def own_file(net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.LoadedModel:
    sbp_compile.save_model(net, x, folder / "net.model")
    return load_model(folder / "net.model")


def trace(net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.LoadedModel:
    torch.jit.save(torch.jit.trace(net, x), folder / "net.ts")  # type: ignore[no-untyped-call]
    return load_model(folder / "net.ts", example_inputs=x)


def state(net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.LoadedModel:
    torch.save(net.state_dict(), folder / "net.ckpt")
    dtype = wanted_dtype(net)
    return load_model(folder / "net.ckpt", example_inputs=x, arch=lambda: Net(dtype).eval())


def onnx_file(net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.LoadedModel:
    names = {
        torch.float32: "float",
        torch.float64: "double",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
    }
    dtype = names[wanted_dtype(net)]
    model = parsed(f"""net ({dtype}[batch, 4] x) => ({dtype}[batch, 3] y) {{
        a = Gemm <transB = 1> (x, first_weight, first_bias)
        m = Mul(a, mask)
        r = Relu(m)
        y = Gemm <transB = 1> (r, second_weight, second_bias)
    }}""")
    for name, value in net.state_dict().items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        kind = onnx.TensorProto.DataType.Value(dtype.upper())
        model.graph.initializer.append(
            onnx.helper.make_tensor(name.replace(".", "_"), kind, value.shape, raw, raw=True)
        )
    onnx.save(model, str(folder / "net.onnx"))
    return load_model(folder / "net.onnx", example_inputs=x)


Door = Callable[[nn.Module, Tensor, Path], sbp_compile.LoadedModel]
DOORS: list[Door] = [exported_file, own_file, trace, state, onnx_file]
through_every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Dim.AUTO:UserWarning"),
]


def small_through(door: Door, net: nn.Module, x: Tensor, folder: Path) -> sbp_compile.Compiled:
    return compile_file(door(net.eval(), x, folder))


def widths(compiled: sbp_compile.Compiled) -> list[int]:
    return [layer.kept for layer in compiled.report.layers]


# NaN and infinity


@through_every_door
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        pytest.param("first.weight", (1, 0), NAN, id="NaN in a weight"),
        pytest.param("first.bias", (1,), INFINITY, id="infinity in a bias", marks=pytest.mark.slow),
        pytest.param("mask", (1,), NAN, id="NaN in a mask", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_is_refused_though_its_channel_is_off(
    door: Door, name: str, place: tuple[int, ...], value: float, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"has 1 of .* is {value}\): nothing exact"):
        small_through(door, with_value(name, place, value), torch.ones(2, 4), tmp_path)


class Normalised(nn.Module):
    """Half of the channels are off behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) * self.mask


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_infinite_statistics_are_refused_though_they_are_buffers(name: str) -> None:
    net = Normalised()
    getattr(net.norm, name)[1] = INFINITY
    with pytest.raises(UnsupportedModelError, match=rf"'norm.{name}' has 1 of 4 .*\[1\] is inf"):
        sbp_compile.compile(net, torch.randn(2, 4))


class Shifted(nn.Module):
    """An added buffer may be infinite: that is what attention masks look like."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("shift", shift)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + self.shift) * self.mask


def test_a_channel_that_is_off_and_infinite_stays_nan_and_is_told_of() -> None:
    net = Shifted(torch.tensor([0.0, -INFINITY, 0.0, 0.0]))
    x = torch.randn(3, 4)
    compiled = sbp_compile.compile(net, x)
    found = compiled.module(x)
    assert found[:, 1].isnan().all()
    torch.testing.assert_close(found, net(x), equal_nan=True)
    texts = [note.text for note in compiled.report.notes]
    assert any(
        "values of output 0 are NaN or infinite in the original: not compared" in text for text in texts
    )


def test_an_output_that_is_never_finite_proves_nothing() -> None:
    net = Shifted(torch.full((4,), INFINITY))
    with pytest.raises(UnsupportedModelError, match="output 0 of the model is NaN or infinite throughout"):
        sbp_compile.compile(net, torch.randn(3, 4))


def test_infinities_that_removal_would_hide_are_refused() -> None:
    class Hiding(Shifted):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.layer(x) + self.shift) * self.mask
            return torch.stack([hidden[:, 0] + hidden[:, 1], hidden[:, 2]], 1)

    net = Hiding(torch.tensor([0.0, INFINITY, 0.0, 0.0]))
    with pytest.raises(UnsupportedModelError, match="buffer 'shift' has infinite values, and output 0"):
        sbp_compile.compile(net, torch.randn(3, 4))


def test_values_that_overflow_in_the_models_own_dtype_are_named_as_such() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(torch.exp(x + 100.0))

    with pytest.raises(
        UnsupportedModelError, match=r"infinite in torch.float32 where it is finite in float64"
    ):
        sbp_compile.compile(Overflowing(), torch.rand(2, 4))


# Subnormal numbers


@pytest.mark.parametrize("scale", [1e-39, pytest.param(1e-42, marks=pytest.mark.slow)])
def test_a_network_of_subnormal_numbers_keeps_its_function(scale: float, tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.second.weight *= scale
        net.second.bias *= scale
    x = torch.randn(5, 4)
    compiled = sbp_compile.compile(net, x)
    compiled.save(tmp_path / "small.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {"x": x.numpy()})[0]
    assert bool((torch.as_tensor(found) != 0).any())
    assert relative_error(net(x), torch.as_tensor(found)) < 1e-2


# Dtypes


@pytest.mark.slow
@through_every_door
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_float_dtype_shrinks_or_says_who_cannot_run_it(
    door: Door, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.randn(2, 4).to(dtype)
    if door is onnx_file and dtype is torch.bfloat16:
        with pytest.raises(UnsupportedModelError, match="onnxruntime cannot run the original"):
            small_through(door, Net(dtype), x, tmp_path)
        return
    compiled = small_through(door, Net(dtype), x, tmp_path)
    assert {value.dtype for value in compiled.module.parameters()} == {dtype}
    assert [value.shape[0] for value in compiled.module.parameters()] == [3, 3, 3, 3]
    if dtype is torch.bfloat16:
        with pytest.raises(UnsupportedModelError, match="onnxruntime cannot run the network"):
            compiled.save(tmp_path / "small.onnx")
        compiled.save(tmp_path / "small.pt2")
    else:
        compiled.save(tmp_path / "small.onnx")


class Whole(nn.Module):
    """Weights that are integers, scaled when they are used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        held = torch.randint(0, 9, (6, 4)).to(dtype)
        self.held = nn.Parameter(held, requires_grad=False) if dtype != torch.bool else held
        self.last = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.held.to(x.dtype) * 0.1) * self.mask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool], ids=str)
def test_integer_parameters_become_what_they_are_used_as(dtype: torch.dtype) -> None:
    net, x = Whole(dtype), torch.randn(3, 4)
    compiled = sbp_compile.compile(net, x)
    torch.testing.assert_close(compiled.module(x), net(x))
    assert compiled.report.after.macs < compiled.report.before.macs


class Complex(nn.Module):
    """Complex weights between real ones, every second unit off."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=dtype))
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (x.to(self.weight.dtype) @ self.weight) * self.mask
        return hidden, hidden.abs().sum(1)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, pytest.param(torch.complex128, marks=pytest.mark.slow)], ids=str
)
def test_complex_parameters_are_exact_and_stay_as_wide(dtype: torch.dtype, tmp_path: Path) -> None:
    real = torch.float32 if dtype == torch.complex64 else torch.float64
    net, x = Complex(dtype), torch.randn(3, 4, dtype=real)
    net.mask = net.mask.to(real)
    compiled = sbp_compile.compile(net, x)
    assert compiled.report.verification is not None
    assert compiled.report.verification.float64_error < 1e-12
    for wanted, found in zip(net(x), compiled.module(x), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)
    compiled.save(tmp_path / "small.pt2")
    with pytest.raises(UnsupportedModelError, match=r"complex.*write \.pt2 instead"):
        compiled.save(tmp_path / "small.onnx")


def test_complex_inputs_are_taken_as_they_are(tmp_path: Path) -> None:
    net, x = Complex(torch.complex64), torch.randn(3, 4, dtype=torch.complex64)
    compiled = sbp_compile.compile(net, x)
    torch.testing.assert_close(compiled.module(x)[0], net(x)[0])
    compiled.save(tmp_path / "small.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "small.ts")(x)[0], net(x)[0])  # type: ignore[no-untyped-call]


def test_the_imaginary_part_counts_in_the_proof() -> None:
    a = torch.tensor([1 + 1j, 2 - 1j])
    assert relative_error(a, a.conj()) == pytest.approx(1.0)
    assert relative_error(a, a.clone()) == 0.0


# Tensors without entries


class Joined(nn.Module):
    """A cache that is empty at first, as streaming models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(0, 4))
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.cache], 0))


class WithoutUnits(nn.Module):
    """A layer of no units leaves the bias of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 0), nn.Linear(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x.sum(1, keepdim=True)


class WithoutResults(nn.Module):
    """One of the outputs has no entries."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.none = Net(), nn.Linear(4, 0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.none(x), self.net(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    "make", [Joined, *(pytest.param(make, marks=pytest.mark.slow) for make in (WithoutUnits, WithoutResults))]
)
def test_parameters_without_entries_change_nothing(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    net, x = make(), torch.randn(3, 4)
    compiled = sbp_compile.compile(net, x)
    torch.testing.assert_close(compiled.module(x), net(x))
    compiled.save(tmp_path / "small.onnx")


@pytest.mark.parametrize("door", [own_file, trace, state, onnx_file], ids=lambda door: door.__name__)
def test_an_empty_example_is_refused(door: Door, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input 'x' of shape \[0, 4\] is empty"):
        small_through(door, Net(), torch.randn(0, 4), tmp_path)


@pytest.mark.slow
def test_the_small_network_takes_an_empty_batch(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Net(), torch.randn(2, 4))
    compiled.save(tmp_path / "small.onnx")
    compiled.save(tmp_path / "small.ts")
    none = torch.zeros(0, 4)
    found = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {"x": none.numpy()})[0]
    assert found.shape == (0, 3)
    assert torch.jit.load(tmp_path / "small.ts")(none).shape == (0, 3)  # type: ignore[no-untyped-call]
    assert compiled.module(none).shape == (0, 3)
