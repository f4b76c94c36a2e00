"""The module of the small network is an ordinary module."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from sbp_compile.capture.program import program_from_export
from sbp_compile.emit.module import CompiledModule, emit_graph_module
from tests.networks import Masked, assert_close

Call = tuple[tuple[Tensor, ...], dict[str, Tensor]]


class Mixed(nn.Module):
    """Literals that name a dtype, a keyword input, a constant output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()
        self.counter: Tensor
        self.register_buffer("counter", torch.tensor([3, 4]))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        started = (x > 0).to(torch.float32) + torch.zeros(6, dtype=torch.float32)
        return {"y": self.body(x * scale + started), "count": self.counter}


def call(batch: int = 3, dtype: torch.dtype = torch.float32) -> Call:
    return (torch.randn(batch, 6).to(dtype),), {"scale": torch.tensor(0.5, dtype=dtype)}


@pytest.fixture(scope="module")
def compiled() -> sbp_compile.Compiled:
    torch.manual_seed(0)
    args, kwargs = call()
    return sbp_compile.compile(Mixed(), args, kwargs=kwargs)


def test_a_deep_copy_is_the_same_function_with_weights_of_its_own(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    twin = copy.deepcopy(compiled.module)
    wanted = compiled.module(*args, **kwargs)["y"]
    assert torch.equal(twin(*args, **kwargs)["y"], wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(compiled.module(*args, **kwargs)["y"], wanted)


def test_it_survives_pickling(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    buffer = io.BytesIO()
    torch.save(compiled.module, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own specs of the arguments' nesting
        loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, CompiledModule)
    assert torch.equal(loaded(*args, **kwargs)["y"], compiled.module(*args, **kwargs)["y"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 1e-2)])
def test_it_can_be_cast(compiled: sbp_compile.Compiled, dtype: torch.dtype, tolerance: float) -> None:
    args, kwargs = call(dtype=dtype)
    cast = copy.deepcopy(compiled.module).to(dtype)
    results = cast(*args, **kwargs)
    assert results["y"].dtype == dtype
    assert results["count"].dtype == torch.int64
    wanted = compiled.module(args[0].float(), scale=kwargs["scale"].float())
    assert_close(wanted["y"].detach(), results["y"].detach(), tolerance)


def test_double_and_half_are_casts_like_any_other(compiled: sbp_compile.Compiled) -> None:
    for cast, dtype in (("double", torch.float64), ("half", torch.float16)):
        module = getattr(copy.deepcopy(compiled.module), cast)()
        args, kwargs = call(dtype=dtype)
        assert module(*args, **kwargs)["y"].dtype == dtype


def test_it_can_be_moved(compiled: sbp_compile.Compiled) -> None:
    moved = copy.deepcopy(compiled.module).to("meta")
    args, kwargs = call()
    results = moved(*(value.to("meta") for value in args), scale=kwargs["scale"].to("meta"))
    assert results["y"].device.type == "meta"


def test_train_and_eval_mode_are_the_same(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    wanted = compiled.module.eval()(*args, **kwargs)["y"]
    assert torch.equal(compiled.module.train()(*args, **kwargs)["y"], wanted)


def test_its_weights_can_be_trained(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    module = copy.deepcopy(compiled.module)
    module(*args, **kwargs)["y"].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_exported_again_it_keeps_input_names_and_the_dynamic_batch(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "scale": {}}
    program = torch.export.export(compiled.module, args, kwargs, dynamic_shapes=shapes)
    assert program.graph_signature.user_inputs == ("x", "scale")
    args, kwargs = call(batch=8)
    wanted = compiled.module(*args, **kwargs)["y"]
    assert_close(wanted.detach(), program.module()(*args, **kwargs)["y"].detach())


def test_compiled_again_it_stays_as_small(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    again = sbp_compile.compile(compiled.module, args, kwargs=kwargs, dynamic_batch="require")
    assert again.report.after.macs == compiled.report.after.macs


def test_a_constant_output_may_be_written_into(compiled: sbp_compile.Compiled) -> None:
    args, kwargs = call()
    compiled.module(*args, **kwargs)["count"].zero_()
    assert compiled.module(*args, **kwargs)["count"].tolist() == [3, 4]


def test_subnormal_weights_are_flushed_at_emission_only(compiled: sbp_compile.Compiled) -> None:
    program = compiled.program
    name = next(name for name, value in program.constants.items() if value.ndim == 2)
    constants: dict[str, Any] = dict(program.constants)
    constants[name] = torch.full_like(constants[name], 1e-40)
    constants[name][0, 0] = 1.0
    module = emit_graph_module(program.replace(constants=constants))
    [emitted] = [value for key, value in module.named_parameters() if key == name.replace(".", "_")]
    assert emitted[0, 0] == 1.0
    assert int((emitted == 0).sum()) == emitted.numel() - 1
    assert bool((constants[name] != 0).all())


def test_subnormal_weights_with_nothing_larger_beside_them_stay(compiled: sbp_compile.Compiled) -> None:
    program = compiled.program
    name = next(name for name, value in program.constants.items() if value.ndim == 2)
    constants: dict[str, Any] = dict(program.constants)
    constants[name] = torch.full_like(constants[name], 1e-40)
    module = emit_graph_module(program.replace(constants=constants))
    [emitted] = [value for key, value in module.named_parameters() if key == name.replace(".", "_")]
    assert bool((emitted == torch.tensor(1e-40)).all())


class NamedAsByTheExporter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("val_45", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + self.val_45


def test_no_constant_has_a_name_that_torchs_onnx_exporter_gives_itself() -> None:
    module = sbp_compile.compile(NamedAsByTheExporter(), torch.randn(2, 4)).module
    assert not any(name.rpartition(".")[2] == "val_45" for name in module.state_dict())


def test_a_program_as_captured_can_be_emitted_with_its_casts() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        return x.double().sum(-1).float()

    network = type("Casts", (nn.Module,), {"forward": forward})()
    x = torch.randn(2, 4)
    module = emit_graph_module(program_from_export(torch.export.export(network, (x,))))
    torch.testing.assert_close(module(x)[0], network(x))
