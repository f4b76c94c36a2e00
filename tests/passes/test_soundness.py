"""Networks thought up to break the passes: each once gave a wrong result, an error or nothing removed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.support import check, shapes_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Around(nn.Module):
    """A function of a hidden layer with eight channels, of which the last layer reads every second one."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.last.weight[:, 1::2] = 0.0
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class On(nn.Module):
    """A function of the input and some buffers."""

    def __init__(self, function, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


MASK = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * F.relu6(h + 3) / 6,
        lambda h: h * (F.relu6(h + 3) / 6),
        lambda h: F.gelu(h) ** 2,
        lambda h: torch.div(F.gelu(h), 0.5, rounding_mode="floor"),
        lambda h: torch.remainder(F.gelu(h), 0.3),
    ],
    ids=["hard swish", "hard swish in parts", "square", "floor", "remainder"],
)
def test_dead_channels_go_through_divisions_and_powers_that_cannot_overflow(function):
    result = check(Around(function), torch.randn(3, 6))
    assert shapes_of(result)["first.weight"] == (4, 6)


def test_a_dead_channel_stays_in_front_of_a_power_that_can_overflow():
    result = check(Around(lambda h: (h.abs() + 0.1) ** -2.0), torch.randn(3, 6))
    assert shapes_of(result)["first.weight"] == (8, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.gelu(x) * self.mask / x.shape[0],
        lambda self, x: F.gelu(x) * self.mask + x.shape[0],
        lambda self, x: F.gelu(x) * self.mask * x.shape[0],
    ],
    ids=["divided", "added", "multiplied"],
)
def test_known_channels_meet_a_number_that_only_the_input_decides(function):
    check(On(function, mask=MASK), torch.randn(3, 6))


def test_an_integer_constant_is_divided_by_an_unknown():
    def function(self, x):
        x = x + 1
        return self.k % x, torch.fmod(self.k, x), torch.div(self.k, x, rounding_mode="floor"), self.k // x

    check(On(function, k=torch.arange(1, 7)), torch.randint(0, 2, (3, 6)))


def test_a_linear_layer_with_a_vector_for_a_weight_is_left_alone():
    check(On(lambda self, x: F.linear(x * self.mask, self.w), mask=MASK, w=torch.randn(6)), torch.randn(3, 6))


def test_a_linear_layer_with_a_number_for_a_bias_is_left_alone():
    buffers = {"mask": MASK, "w": torch.randn(4, 6), "b": torch.randn(1)}
    check(On(lambda self, x: F.linear(x * self.mask, self.w, self.b) * 2, **buffers), torch.randn(3, 6))


def test_a_sum_of_constants_over_the_batch_counts_the_batch():
    def function(self, x):
        return (x * 0.0 + self.t).sum(0, keepdim=True) + x * 0.0

    check(On(function, t=torch.randn(6)), torch.randn(3, 6))


def test_a_number_read_from_a_buffer_is_a_constant():
    def function(self, x):
        return F.linear(x * self.factor.item(), self.w)[:, : self.count.item()]

    buffers = {"w": torch.randn(4, 6), "factor": torch.tensor(3.0), "count": torch.tensor(3)}
    assert shapes_of(check(On(function, **buffers), torch.randn(3, 6)))["w"] == (3, 6)


def test_a_batch_norm_with_a_bias_that_depends_on_the_input_is_left_alone():
    def function(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, F.linear(x, self.w).mean(0))

    buffers = {"mean": torch.randn(6), "var": torch.rand(6) + 0.5, "weight": torch.rand(6)}
    check(On(function, w=torch.randn(6, 6), **buffers), torch.randn(3, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.contiguous().view(torch.int32),
        lambda y: torch.view_as_real(torch.view_as_complex(y.contiguous()) * 2.0),
        lambda y: y.contiguous().as_strided((2, 3), (3, 1)),
    ],
    ids=["another dtype", "complex", "strided"],
)
def test_what_reads_memory_as_it_lies_reads_a_contiguous_copy(function):
    network = On(lambda self, x: function(F.linear(x, self.w).transpose(1, 2)), w=torch.randn(5, 5))
    check(network, torch.randn(4, 2, 5), dynamic=False)


def test_pieces_whose_size_only_the_input_decides_are_left_alone():
    def function(self, x):
        return F.linear(x * self.mask, self.w).split(x.shape[0], 1)[0]

    network = On(function, mask=MASK, w=torch.randn(12, 6))
    check(network, torch.randn(3, 6), dynamic=({0: torch.export.Dim.AUTO},))
