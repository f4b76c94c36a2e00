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
