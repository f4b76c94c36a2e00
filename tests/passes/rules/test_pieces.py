"""Calls with several results: each result is a piece, and its rule is that of the call."""

import pytest
import torch
from torch import Tensor, nn

from passes import Rule, rule
from passes.ir.analysis import analyze
from passes.ir.lattice import Facts
from passes.rules import OPAQUE, PIECES, base, rule_for
from tests.passes.rules.between import Between, compiled, kept_after
from tests.passes.support import capture, check, shapes_of, targets_of

aten = torch.ops.aten


@torch.library.custom_op("pieces::both", mutates_args=())
def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2.0, x.abs()


@both.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class Both(Rule):
    """Both results channel by channel."""

    def forward(self, op, facts):
        return Facts(op.run(lambda _: facts[0].known_value), facts[0].known)

    def backward(self, op, demand, facts):
        return [demand]

    def couple(self, op, keep, facts):
        for axis in op.out.static_axes:
            keep.tie((op.operands[0], axis), (op.node, axis), f"aligned by {op.source.name}")


@pytest.fixture
def _covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    rule(torch.ops.pieces.both.default)(Both)


def joint(x: Tensor) -> Tensor:
    first, second = both(x)
    return first * second


def test_a_call_with_several_results_and_no_rule_keeps_its_operands_whole() -> None:
    result = compiled(Between(joint), 5, 5)
    assert kept_after(result) == 6
    original = capture(Between(joint), torch.randn(2, 2, 5, 5))
    analysis = analyze(original, rule_for)
    [source] = [node for node in original.calls() if node.target is torch.ops.pieces.both.default]
    assert rule_for(original.op(source)) is PIECES
    for piece in source.users:
        assert rule_for(original.op(piece)) is OPAQUE
        assert bool(analysis.demand[source.args[0].name].all())
        assert analysis.keep.is_full(source.args[0], 1)
        assert analysis.keep.is_full(piece, 1)


@pytest.mark.usefixtures("_covered")
def test_the_results_of_a_call_with_a_rule_shrink_together() -> None:
    result = compiled(Between(joint, bias=False), 5, 5)
    assert kept_after(result) == 3
    assert targets_of(result).count(torch.ops.pieces.both.default) == 1


@pytest.mark.usefixtures("_covered")
@pytest.mark.parametrize("position", [0, 1])
def test_one_result_of_a_call_is_enough(position: int) -> None:
    result = compiled(Between(lambda x: both(x)[position], bias=False), 5, 5)
    assert kept_after(result) == 3


@pytest.mark.usefixtures("_covered")
def test_results_that_are_read_at_different_channels_keep_all_of_them() -> None:
    def apart(x: Tensor) -> Tensor:
        first, second = both(x)
        return torch.cat([first[:, :2], second[:, 1:]], 1)

    assert kept_after(compiled(Between(apart, out=7, bias=False), 5, 5)) == 3


def test_a_call_whose_results_nobody_reads_is_gone() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("mask", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            first, second = both(self.first(x))
            return self.second(first * self.mask) + second.sum() * 0.0

    result = check(Unread(), torch.randn(3, 4))
    assert torch.ops.pieces.both.default not in targets_of(result)
    assert "first.weight" not in shapes_of(result)
