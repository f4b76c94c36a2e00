"""Capture: the batch stays dynamic where it can, and the user's module stays as it is."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sbp_compile.capture import export_module
from sbp_compile.errors import BatchPinnedWarning, InputError, UnsupportedModelError, UsageError


class Net(nn.Module):
    """Dropout, batch norm, a mask as a buffer, a shared parameter, and submodules in modes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
        self.norm.eval()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = torch.relu_(self.norm(self.conv(x))) * self.get_buffer("mask")[:, None, None]
        y = self.second(self.drop(self.first(y.flatten(1))))
        result: Tensor = y if scale is None else y * scale
        return result


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("example_batch", [1, 2, 3])
def test_the_captured_program_takes_any_batch(example_batch: int) -> None:
    net, x = Net(), torch.randn(4, 1, 4, 4)
    program = export_module(net, (x[:example_batch],)).module()
    net.eval()
    for batch in (1, 2, 4):
        assert torch.equal(program(x[:batch]), net(x[:batch]))


def test_without_a_dynamic_batch_the_example_is_the_only_one() -> None:
    program = export_module(Net(), (torch.randn(1, 1, 4, 4),), dynamic_batch=False)
    assert not program.range_constraints


def test_keyword_inputs_of_the_same_batch_follow_it() -> None:
    net, x = Net(), torch.randn(3, 1, 4, 4)
    program = export_module(net, (x[:1],), {"scale": torch.ones(1, 16)}).module()
    assert torch.equal(program(x, scale=torch.full((3, 16), 2.0)), 2 * net.eval()(x))


def test_dynamic_shapes_are_handed_to_torch() -> None:
    positions = torch.export.Dim("positions", min=2)
    program = export_module(Lambda(torch.relu), (torch.ones(2, 3),), dynamic_shapes=(({1: positions},),))
    assert program.module()(torch.ones(2, 7)).shape == (2, 7)


@pytest.mark.parametrize("shape", [(2, 6), (1, 6)])
def test_a_pinned_batch_is_warned_of_and_captured_static(shape: tuple[int, int]) -> None:
    pinned = Lambda(lambda x: x.view(shape[0], 2, 3) * int(x.shape[0]))
    with pytest.warns(BatchPinnedWarning, match=f"captured for batch {shape[0]} only"):
        program = export_module(pinned, (torch.ones(shape),))
    assert not program.range_constraints
    assert program.module()(torch.ones(shape)).shape == (shape[0], 2, 3)


def test_a_pinned_batch_is_an_error_where_a_dynamic_one_is_required() -> None:
    with pytest.raises(UnsupportedModelError, match="the batch cannot be made dynamic"):
        export_module(Lambda(lambda x: x.view(2, -1)), (torch.ones(2, 6),), dynamic_batch="require")
    with pytest.raises(InputError, match="cannot be made dynamic"):
        export_module(Lambda(lambda x: x + 1), (torch.tensor(1.0),), dynamic_batch="require")


def test_inputs_without_a_batch_axis_are_captured_as_they_are() -> None:
    program = export_module(Lambda(lambda x: x + 1), (torch.tensor(1.0),))
    assert program.module()(torch.tensor(2.0)) == 3


def test_every_submodule_keeps_its_own_mode() -> None:
    net = Net()
    before = modes(net)
    export_module(net, (torch.randn(2, 1, 4, 4),))
    assert modes(net) == before
    assert True in before
    assert False in before


def test_a_failed_capture_restores_modes_and_attributes_and_says_why() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), Lambda(lambda x: x.no_such_method()))
    prune.random_unstructured(net[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    weight, before = net[0].weight, modes(net)
    with pytest.raises(UnsupportedModelError, match="no_such_method"):
        export_module(net, (torch.randn(2, 4),))
    assert net[0].weight is weight
    assert modes(net) == before


def test_capture_changes_no_tensor_no_gradient_flag_and_no_random_state() -> None:
    net = Net()
    net.first.requires_grad_(False)
    state, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    random_state = torch.get_rng_state()
    export_module(net, (torch.randn(2, 1, 4, 4, generator=torch.Generator()),))
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert flags == [p.requires_grad for p in net.parameters()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_a_module_under_prune_is_captured_after_a_forward() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)  # type: ignore[no-untyped-call]
    expected = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = export_module(net, (x,)).module()
    assert torch.equal(program(x), expected)
    assert torch.equal(net(x), expected)
    assert prune.is_pruned(net)


def test_eval_of_the_users_class_is_not_called() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> "Merging":
            raise AssertionError("merges weights")

    export_module(nn.Sequential(Merging(2, 2)), (torch.ones(2, 2),))
    with pytest.raises(AssertionError, match="merges"):
        Merging(2, 2).eval()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UsageError, match=r"dynamic_batch \(='always'\) must be"):
        export_module(Net(), (torch.ones(1, 1, 4, 4),), dynamic_batch="always")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"args \(=list\) must be a tuple"):
        export_module(Net(), [torch.ones(1, 1, 4, 4)])  # type: ignore[arg-type]
