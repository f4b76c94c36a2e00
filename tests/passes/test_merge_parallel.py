"""Branches of one value that are added become one layer, and only those."""

import pytest
import torch
from torch import nn

from passes import FewestMacs, default_pipeline
from passes.network import layers
from tests.passes.support import assert_same, capture, check


class Branches(nn.Module):
    """The sum of some layers of one value, with an activation behind."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.relu(sum(branch(x) for branch in self.branches))


class Scale(nn.Module):
    """x s + t for each channel, as a batch norm is in eval mode."""

    def __init__(self, channels, spatial=2):
        super().__init__()
        shape = (channels, *[1] * spatial)
        self.scale, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.scale + self.shift


def norm(channels):
    made = nn.BatchNorm2d(channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2.0)
    return made


def count(program):
    return len(list(layers(program)))


CASES = {
    "3x3 and 1x1": [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)],
    "1x1 and 3x3, strided": [nn.Conv2d(4, 6, 1, stride=2), nn.Conv2d(4, 6, 3, padding=1, stride=2)],
    "5x5 and 3x3 with dilation": [nn.Conv2d(4, 6, 5, padding=2), nn.Conv2d(4, 6, 3, padding=2, dilation=2)],
    "rows and columns": [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
    ],
    "RepVGG": [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(4)),
        norm(4),
    ],
    "depthwise": [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 1, groups=4),
        Scale(4),
    ],
    "groups": [nn.Conv2d(4, 4, 3, padding=1, groups=2), Scale(4)],
    "1-d": [nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), Scale(4, 1)],
    "linear": [nn.Linear(5, 6), nn.Linear(5, 6, bias=False)],
}


def example(name):
    sizes = {"1-d": (4, 9), "linear": (5,)}.get(name, (4, 9, 8))
    return torch.randn(2, *sizes)


@pytest.mark.parametrize("name", CASES)
def test_added_layers_of_one_value_become_one(name):
    assert count(check(Branches(*CASES[name]), example(name))) == 1


def test_a_kernel_that_reaches_further_than_the_other_stays_apart():
    wide = nn.Conv2d(4, 6, 3, padding=3, dilation=3)
    assert count(check(Branches(nn.Conv2d(4, 6, 3, padding=1), wide), torch.randn(2, 4, 9, 8))) == 2


def test_other_groups_stay_apart():
    branches = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)
    assert count(check(Branches(*branches), torch.randn(2, 4, 9, 8))) == 2


class ReadTwice(nn.Module):
    """A branch whose result is an output as well."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        y = self.narrow(x)
        return self.wide(x) + y, y


def test_a_branch_that_something_else_reads_stays_apart():
    assert count(check(ReadTwice(), torch.randn(2, 4, 9, 8))) == 2


def test_a_plain_residual_stays_a_sum():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.layer(x) + x)

    result = check(Residual(), torch.randn(2, 4, 9, 8))
    assert any(node.target is torch.ops.aten.add.Tensor for node in result.calls())


def test_branches_of_other_rows_stay_apart_where_fewest_multiply_adds_are_asked_for():
    wide, narrow = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
    with torch.no_grad():
        for layer, rows in ((wide, slice(0, 4)), (narrow, slice(4, 8))):
            layer.weight[rows], layer.bias[rows] = 0.0, 0.0
    program = capture(Branches(wide, narrow), torch.randn(2, 4, 9, 8))
    apart, merged = (default_pipeline(cost)(program).program for cost in (FewestMacs(), None))
    assert (count(apart), count(merged)) == (2, 1)
    assert_same(program, apart)
    assert_same(program, merged)
