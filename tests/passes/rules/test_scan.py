import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import LIVE, Between, compiled, free_axes, kept_after, kept_by
from tests.passes.support import check, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_beside_the_axis_of_a_softmax_every_channel_is_alone(dynamic):
    functions = {
        "softmax": lambda x: x * F.softmax(x, -1),
        "log_softmax": lambda x: x * F.log_softmax(x, 2),
        "cumsum": lambda x: x * x.cumsum(-1),
        "cumprod": lambda x: x * x.cumprod(2),
    }
    parts = {name: Between(function, bias=False) for name, function in functions.items()}
    assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_constants_go_through_softmax_and_cumulative_operators_over_static_axes():
    functions = {
        "softmax": lambda x: F.softmax(x, -1),
        "log_softmax": lambda x: F.log_softmax(x, 2),
        "cumsum": lambda x: x.cumsum(-1),
        "logcumsumexp": lambda x: x.logcumsumexp(-1),
        "tril": lambda x: x.tril(),
        "triu": lambda x: x.triu(1),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    kept = kept_by(parts, 4, 4)
    assert all(LIVE <= count <= 2 * LIVE for count in kept.values())
    assert kept["softmax"] == kept["log_softmax"] == LIVE


def test_along_the_axis_of_a_softmax_all_channels_take_part():
    functions = {
        "softmax": lambda x: F.softmax(x, 1),
        "log_softmax": lambda x: F.log_softmax(x, 1),
        "cumsum": lambda x: x.cumsum(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    assert kept_by(parts, 8, 8, dynamic=FREE) == dict.fromkeys(parts, 2 * LIVE)


def test_channels_behind_the_last_that_is_read_of_a_cumulative_sum_are_dead():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)
            self.last.weight.data[:, 2:] = 0.0

        def forward(self, x):
            return self.last(self.hidden(self.first(x).relu()).cumsum(-1))

    check(Head(), torch.randn(2, 3))


def test_masked_attention_weights_are_exact():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("causal", torch.ones(6, 6, dtype=torch.bool).triu(1))

        def forward(self, x):
            return self.last(self.score(x).masked_fill(self.causal, -torch.inf).softmax(-1))

    check(Attention(), torch.randn(2, 6, 4))


def test_triangles_and_sums_over_free_axes_are_exact_at_other_sizes():
    for function in (lambda x: x.tril(), lambda x: x.cumsum(2), lambda x: x.softmax(-1)):
        for bias in (False, True):
            module = Between(function, bias=bias)
            assert LIVE <= kept_after(compiled(module, 8, 8, dynamic=FREE, unseen=(9, 12))) <= 2 * LIVE


def test_a_softmax_of_constants_alone_is_a_constant():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("logits", torch.randn(6))

        def forward(self, x):
            weights = (self.first(x) * 0 + self.logits).softmax(-1)
            return self.last(self.first(x) * weights)

    assert aten.softmax.int not in targets_of(check(Weights(), torch.randn(2, 4)))
