"""Networks that once compiled to something else, or not at all; found by tests/fuzz."""

import torch
from torch import nn

from tests.passes.support import check


class Then(nn.Module):
    """A mask, then a function."""

    def __init__(self, mask, function):
        super().__init__()
        self.register_buffer("mask", mask)
        self.function = function

    def forward(self, x):
        return self.function(x * self.mask)


def test_an_operator_with_several_results_takes_a_constant():
    check(Then(torch.zeros(3), lambda x: torch.sort(torch.cos(x), 1).values), torch.randn(2, 3))


class Tokens(nn.Module):
    """Tokens of which one has a channel that is constant, through a linear layer; one token is read."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 4)
        mask = torch.ones(2, 3)
        mask[0, 0] = 0.0
        self.register_buffer("mask", mask)
        self.register_buffer("shift", torch.randn(2, 3))

    def forward(self, x):
        return self.after(torch.relu(self.before(x) * self.mask + self.shift))[:, 0]


def test_a_channel_that_is_constant_at_the_live_token_and_dead_at_the_others_is_absorbed():
    check(Tokens(), torch.randn(2, 2, 3))
