"""Batch * heads as two axes."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from passes import Canonicalize, Pipeline, SeparateAxes
from tests.passes.support import assert_same, capture, check, targets_of

aten = torch.ops.aten
HEADS = 4


class On(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def separated(function, *inputs):
    """The Program with axes apart; it gives the same values at other sizes."""
    dynamic = (tuple({0: Dim("batch"), 2: Dim("length", min=2, max=200)} for _ in inputs),)
    original = capture(On(function), *inputs, dynamic=dynamic)
    result = Pipeline((Canonicalize(), SeparateAxes(), Canonicalize()), name="test")(original).program
    result.lint()
    assert_same(original, result)
    return result


def has_product(program):
    """Whether some value has batch * heads as one axis."""
    batch = next(iter(program.inputs)).key(0)
    wanted = tuple(HEADS * size for size in batch)
    infos = [program.infos[node] for node in program.calls() if node in program.infos]
    return any(info.key(axis) == wanted for info in infos for axis in range(info.rank))


def flat(x):
    return x.reshape(-1, x.shape[2], 3)


def apart(x):
    return x.view(-1, HEADS, x.shape[1], x.shape[2])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: apart(torch.relu(flat(x)) * 2),
        lambda x: apart(torch.softmax(flat(x), -1)),
        lambda x: apart(torch.softmax(flat(x), 1).transpose(1, 2)),
        lambda x: apart(torch.bmm(flat(x), flat(x).transpose(1, 2))),
        lambda x: apart(flat(x).permute(1, 0, 2).tanh().permute(1, 0, 2)),
        lambda x: apart(flat(x) + torch.ones(1, 1, 3)),
        lambda x: apart(torch.baddbmm(torch.ones(3), flat(x).transpose(1, 2), flat(x))),
    ],
    ids=[
        "pointwise",
        "softmax",
        "softmax beside",
        "product",
        "permutations",
        "broadcast",
        "sum with product",
    ],
)
def test_a_flattening_sinks_to_the_view_that_undoes_it(function):
    assert not has_product(separated(function, torch.randn(2, HEADS, 5, 3)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: apart(flat(x) + torch.arange(flat(x).shape[0]).reshape(-1, 1, 1)),
        lambda x: apart(torch.softmax(flat(x), 0)),
        lambda x: flat(x),
        lambda x: flat(x).sum(0),
    ],
    ids=["counted", "softmax over it", "an output", "summed"],
)
def test_a_flattening_stays_where_the_product_itself_is_read(function):
    assert has_product(separated(function, torch.randn(2, HEADS, 5, 3)))


def test_sizes_that_only_happen_to_divide_are_not_taken_apart():
    original = capture(
        On(lambda x: x.reshape(4, -1)), torch.randn(8, 6), dynamic=(({0: 2 * Dim("half", min=2, max=100)},),)
    )
    result = SeparateAxes()(Canonicalize()(original).program)
    assert not result.changed


def test_nothing_happens_without_such_a_view():
    original = capture(nn.Flatten(), torch.randn(2, 3, 4))
    assert not SeparateAxes()(Canonicalize()(original).program).changed


def test_it_changes_nothing_the_second_time():
    result = separated(lambda x: apart(torch.relu(flat(x))), torch.randn(2, HEADS, 5, 3))
    again = SeparateAxes()(result).program
    assert targets_of(again) == targets_of(result)


@pytest.mark.parametrize("heads", [4, 5])
def test_the_slopes_of_a_prelu_stay_with_their_channels(heads):
    prelu = nn.PReLU(5)
    prelu.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 5))

    class Sloped(nn.Module):
        def __init__(self):
            super().__init__()
            self.prelu = prelu

        def forward(self, x):
            return self.prelu(x.reshape(-1, 5, 3)).reshape(-1, heads, 5, 3)

    check(Sloped(), torch.randn(2, heads, 5, 3))
