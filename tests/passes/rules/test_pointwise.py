import pytest
import torch

from passes.ir.lattice import Facts
from tests.passes.rules.between import LIVE, Between, kept_by
from tests.passes.rules.laws import Case, X, call

aten = torch.ops.aten


def known_of(overload, *operands):
    """What the rule knows of a call on operands: X for an unknown one, else a constant; None where unknown."""
    case = Case(call(overload, *operands), 0)
    for position, operand in enumerate(case.op.operands):
        if operand.op == "placeholder":
            case.facts[position] = Facts.unknown(case.op.info_of(operand))
    facts = case.forward(case.op)
    shape = case.op.out.sizes
    pairs = zip(facts.value.expand(shape).tolist(), facts.known.expand(shape).tolist(), strict=True)
    return [value if known else None for value, known in pairs]


@pytest.mark.parametrize("overload", [aten.logical_and.default, aten.bitwise_and.Tensor])
def test_a_side_that_is_false_decides_a_conjunction(overload):
    assert known_of(overload, X((2,), torch.bool), torch.tensor([True, False])) == [None, False]
    assert known_of(overload, torch.tensor([True, False]), X((2,), torch.bool)) == [None, False]


@pytest.mark.parametrize("overload", [aten.logical_or.default, aten.bitwise_or.Tensor])
def test_a_side_that_is_true_decides_a_disjunction(overload):
    assert known_of(overload, X((2,), torch.bool), torch.tensor([True, False])) == [True, None]


def test_only_no_bits_and_all_bits_decide_between_integers():
    bits = torch.tensor([0, 1, -1])
    assert known_of(aten.bitwise_and.Tensor, X((3,), torch.int64), bits) == [0, None, None]
    assert known_of(aten.bitwise_or.Tensor, X((3,), torch.int64), bits) == [None, None, -1]


def test_a_number_that_is_not_zero_is_true_in_a_logical_disjunction():
    assert known_of(aten.logical_or.default, X((2,)), torch.tensor([0.5, 0.0], dtype=torch.float64)) == [
        True,
        None,
    ]


def test_a_choice_between_equal_constants_is_known_whatever_the_condition():
    yes, no = (torch.tensor(value, dtype=torch.float64) for value in ([1.0, 2.0], [1.0, 3.0]))
    assert known_of(aten.where.self, X((2,), torch.bool), yes, no) == [1.0, None]


def test_channels_go_through_slopes_of_their_own_and_a_shared_one():
    slopes = {"own": torch.linspace(-0.5, 2.0, 6), "shared": torch.tensor([0.3])}
    parts = {
        name: Between(lambda x, slope=slope: torch.prelu(x - 1, slope.to(x.dtype)))
        for name, slope in slopes.items()
    }
    assert kept_by(parts, 4, 4) == dict.fromkeys(slopes, LIVE)
