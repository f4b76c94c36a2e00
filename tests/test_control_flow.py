"""Branches that depend on data: opaque to the passes, exact all the way, and everything around them shrinks."""

import pytest
import torch
from torch import nn

import sbp_compile
from passes.ir.control import ControlFlow
from sbp_compile.compiler import compile_file
from sbp_compile.errors import UnsupportedModelError


class Branching(nn.Module):
    """Masked convolutions around a cond with weights, literals, constants and another cond in its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 4, 1)
        self.register_buffer("mask", (torch.arange(8) % 2).float().view(1, 8, 1, 1))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x):
        def positive(y):
            return self.third(y) * 2 + torch.ones(2, 2).sum(), y.mean()

        def negative(y):
            inner = torch.cond(y.max() > 3, lambda y: y.sum(), lambda y: y.max() + self.shift, (y,))
            return self.third(y.double().type_as(y)).relu(), inner

        y = self.second(torch.relu(self.first(x) * self.mask))
        y, z = torch.cond(x.sum() > 0, positive, negative, (y,))
        return y.mean((2, 3)), z


class Halving(nn.Module):
    """Halves its features until they are small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 4)
        self.register_buffer("mask", (torch.arange(12) % 3 > 0).float())

    def forward(self, x):
        def is_large(y, count):
            return y.abs().max() > 0.1

        def half(y, count):
            return y * 0.5, count + 1

        y, count = torch.while_loop(
            is_large,
            half,
            (self.second(torch.tanh(self.first(x) * self.mask)), torch.zeros((), dtype=torch.int64)),
        )
        return y, count


@pytest.fixture(autouse=True)
def seeded_and_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():  # with them torch compiles a cond, with warnings of its own
        yield


def batches(*shape):
    """Inputs that take either branch."""
    return [sign * torch.randn(*shape).abs() for sign in (-1, 1)]


def test_both_branches_are_exact_in_every_format(tmp_path):
    network = Branching().eval()
    compiled = sbp_compile.compile(
        network, torch.randn(2, 3, 8, 8), inputs=[(x,) for x in batches(2, 3, 8, 8)]
    )
    for name in ("small.onnx", "small.pt2"):
        compiled.save(tmp_path / name)  # verifies on the inputs given
    for x in batches(3, 3, 8, 8):
        for own, ours in zip(network(x), compiled.module(x), strict=True):
            torch.testing.assert_close(ours, own)


def test_what_is_in_front_of_a_branch_shrinks():
    compiled = sbp_compile.compile(Branching().eval(), torch.randn(2, 3, 8, 8))
    assert compiled.program.constants["first.weight"].shape[0] == 4


def test_the_branches_are_named_in_the_report():
    compiled = sbp_compile.compile(Branching().eval(), torch.randn(2, 3, 8, 8))
    assert any(note.where == "cond" and "full width" in note.text for note in compiled.report.notes)


def test_the_branches_follow_a_cast_of_the_module():
    network = Branching().eval()
    double = sbp_compile.compile(network, torch.randn(2, 3, 8, 8)).module.double()
    network.double()
    for x in batches(2, 3, 8, 8):
        for own, ours in zip(network(x.double()), double(x.double()), strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


def test_a_compiled_branch_compiles_to_itself():
    x = torch.randn(2, 3, 8, 8)
    once = sbp_compile.compile(Branching().eval(), x)
    twice = sbp_compile.compile(once.module, x)
    assert [node.target for node in once.program.calls() if not isinstance(node.target, ControlFlow)] == [
        node.target for node in twice.program.calls() if not isinstance(node.target, ControlFlow)
    ]
    assert len(once.program.nodes) == len(twice.program.nodes)
    assert once.report.after.macs == twice.report.after.macs


def test_a_loop_is_exact(tmp_path):
    network = Halving().eval()
    compiled = sbp_compile.compile(network, torch.randn(2, 5), inputs=[(torch.randn(2, 5) * 100,)])
    assert compiled.program.constants["first.weight"].shape[0] == 8
    compiled.save(tmp_path / "small.onnx")
    compiled.save(tmp_path / "small.pt2")
    assert any(isinstance(node.target, ControlFlow) for node in compiled.program.calls())


@pytest.mark.parametrize(("network", "shape"), [(Branching, (2, 3, 8, 8)), (Halving, (2, 5))])
def test_control_flow_goes_through_a_model_file(tmp_path, network, shape):
    sbp_compile.save_model(network().eval(), torch.randn(shape), tmp_path / "model.pt")
    compiled = compile_file(sbp_compile.load_model(tmp_path / "model.pt"))
    compiled.save(tmp_path / "small.onnx")
    assert compiled.report.after.macs < compiled.report.before.macs


def test_control_flow_of_another_kind_is_refused_in_one_line():
    class Scanning(nn.Module):
        def forward(self, x):
            return torch._higher_order_ops.map(lambda row: row.sin(), x)

    with pytest.raises(UnsupportedModelError, match=r"known are cond and while_loop"):
        sbp_compile.compile(Scanning(), torch.randn(3, 4))


def test_random_numbers_in_a_branch_are_refused():
    class Rolling(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x * 2, (x,))

    with pytest.raises(UnsupportedModelError, match="random numbers"):
        sbp_compile.compile(Rolling(), torch.randn(3, 4))
