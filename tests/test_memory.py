"""What a compilation holds at its peak, counted in bytes of tensors that are alive, and how constants are held."""

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sbp_compile
from passes.ir import constants
from passes.ir.constants import Constants, hold
from passes.ir.lattice import Facts
from sbp_compile.capture import export_module
from sbp_compile.capture.call import captured_call
from sbp_compile.compiler import Compiled, compile_exported
from sbp_compile.emit import onnx_file

LAYERS, WIDTH = 8, 1024
SIZE = 4 * LAYERS * WIDTH**2


class Masked(nn.Module):
    """Linear layers of which every second unit is off."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("mask", (torch.arange(width) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x) * self.mask)
        return x


class Peak(TorchDispatchMode):
    """The most bytes that tensors on the CPU have taken up at once, small ones apart."""

    SMALL = 100_000

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen = [weakref.ref(tensor) for tensor in tensors]
        self.bytes = 0

    def left(self, net: nn.Module) -> int:
        """Bytes of the tensors that are alive now, without the network's own."""
        own = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
        alive = [tensor for reference in self._seen if (tensor := reference()) is not None]
        return total(tensor for tensor in alive if tensor.untyped_storage().data_ptr() not in own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            value for value in (result if isinstance(result, (tuple, list)) else [result]) if is_real(value)
        ]
        if any(value.untyped_storage().nbytes() > self.SMALL for value in made):
            alive = [tensor for reference in self._seen if (tensor := reference()) is not None]
            self._seen = [weakref.ref(tensor) for tensor in (*alive, *made)]
            self.bytes = max(self.bytes, total(alive + made))
        return result


def is_real(value: object) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu"  # type: ignore[attr-defined]


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, what they share counted once."""
    return sum({(at := tensor.untyped_storage()).data_ptr(): at.nbytes() for tensor in tensors}.values())


def compiled_in_place(net: nn.Module, x: Tensor) -> tuple[Compiled, float]:
    """Compile as the command line does; the peak in terms of the model's size."""
    exported = export_module(net, (x,))
    call = captured_call(exported, (x,), {})
    with Peak(net.parameters()) as peak:
        compiled = compile_exported(exported, call, [x], copy=False)
    return compiled, peak.bytes / SIZE


@pytest.mark.slow
def test_a_compilation_takes_little_more_than_three_times_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the model, half of it small, and two layers in float64, each of which is a quarter of this model."""
    monkeypatch.setattr(constants, "TOTAL", 0)
    compiled, peak = compiled_in_place(Masked(), torch.randn(2, WIDTH))
    assert peak < 3.3
    assert compiled.report.after.parameters < 0.32 * compiled.report.before.parameters


def test_what_a_compilation_leaves_is_the_model_and_the_small_network_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "TOTAL", 0)
    monkeypatch.setattr(constants, "LARGE", 1 << 16)
    net, x = Masked(4), torch.randn(2, WIDTH)
    exported = export_module(net, (x,))
    call = captured_call(exported, (x,), {})
    with Peak(()) as peak:
        compiled = compile_exported(exported, call, [x], copy=False)
    gc.collect()
    assert 0 < peak.left(net) < 2.1 * compiled.report.after.bytes


def test_nothing_of_the_exporter_stays_when_a_file_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exporter's rewriter remembers its last match."""
    emitted = []
    original = onnx_file.emit_graph_module

    def watched(*args: Any) -> Any:
        module = original(*args)
        emitted.extend(weakref.ref(value) for value in module.parameters())
        return module

    monkeypatch.setattr(onnx_file, "emit_graph_module", watched)
    sbp_compile.compile(Masked(1, 16), torch.randn(2, 16)).save(tmp_path / "small.onnx")
    gc.collect()
    assert emitted
    assert not any(reference() is not None for reference in emitted)


def test_the_network_is_the_same_number_for_number_however_constants_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net, x = Masked(3, 24), torch.randn(2, 24)
    found = []
    for large in (1, 1 << 40):
        monkeypatch.setattr(constants, "LARGE", large)
        found.append(sbp_compile.compile(net, x).program)
    narrow, wide = found
    assert str(narrow.graph) == str(wide.graph)
    assert all(torch.equal(value, wide.constants[name]) for name, value in narrow.constants.items())
    assert any(narrow.constants.held(name).is_narrow for name in narrow.constants)
    assert not any(wide.constants.held(name).is_narrow for name in wide.constants)


@pytest.mark.parametrize("copy", [True, False])
def test_the_original_shares_the_models_memory_only_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, copy: bool
) -> None:
    monkeypatch.setattr(constants, "LARGE", 1)
    net, x = Masked(1, 16), torch.randn(2, 16)
    exported = export_module(net, (x,))
    compiled = compile_exported(exported, captured_call(exported, (x,), {}), [x], copy=copy)
    with torch.no_grad():
        net.layers[0].weight.zero_()
    assert bool(compiled.original.constants["layers.0.weight"].any()) is copy


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "LARGE", 1)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize(
    ("values", "dtype", "is_narrow"),
    [
        ([1.0, -0.0, 0.5, 2.0**-149], torch.float32, True),
        ([1.0, 1 / 3], torch.float32, False),
        ([1.0, 2.0**-150], torch.float32, False),
        ([1e300], torch.float32, False),
        ([float("inf"), 1.0], torch.float32, True),
        ([float("nan"), 1.0], torch.float32, False),
        ([1.0, 65504.0], torch.float16, True),
        ([1.0, 65505.0], torch.float16, False),
        ([1.0, 2.0], torch.float64, False),
        ([1.0, 2.0], torch.int64, False),
        ([1.0, 2.0], None, False),
    ],
)
def test_a_constant_is_held_narrow_only_where_that_loses_nothing(
    values: list[float], dtype: torch.dtype | None, is_narrow: bool
) -> None:
    value = torch.tensor(values, dtype=torch.float64)
    held = hold(value, dtype)
    assert held.is_narrow is is_narrow
    assert held.read().dtype == torch.float64
    assert torch.equal(held.read().nan_to_num(), value.nan_to_num())
    assert torch.equal(held.read().signbit(), value.signbit())
    assert held.is_finite is bool(torch.isfinite(value).all())


@pytest.mark.usefixtures("all_large")
def test_one_entry_beyond_the_first_part_is_enough_to_hold_a_constant_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "CHUNK", 4)
    value = torch.ones(3, 3, dtype=torch.float64)
    assert hold(value, torch.float32).is_narrow
    value[2, 2] = 1 / 3
    assert not hold(value, torch.float32).is_narrow


@pytest.mark.usefixtures("all_large")
def test_equal_constants_are_the_same_however_they_are_held() -> None:
    value = torch.tensor([1.0, 2.0], dtype=torch.float64)
    narrow, wide = hold(value, torch.float32), hold(value, None)
    assert narrow.is_same(wide)
    assert wide.is_same(narrow)
    assert not narrow.is_same(hold(value + 1, torch.float32))
    assert not narrow.is_same(hold(value[:1].clone(), torch.float32))


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("infinite", [False, True])
def test_facts_of_a_constant_are_the_same_however_it_is_held(infinite: bool) -> None:
    value = torch.tensor([[1.0, float("inf") if infinite else 2.0]], dtype=torch.float64)
    wanted, found = Facts.constant(value), Facts.held(hold(value, torch.float32))
    assert torch.equal(found.value, wanted.value)
    assert torch.equal(found.known.expand(1, 2), wanted.known.expand(1, 2))


def test_an_outline_has_names_and_shapes_and_no_numbers() -> None:
    value = torch.ones(2, 3, dtype=torch.float64)
    outline = Constants({"w": value}, {"w": torch.float32}).outline()
    assert list(outline) == ["w"]
    assert outline["w"].shape == value.shape
    assert outline["w"].is_meta
