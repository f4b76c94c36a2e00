"""Networks that once compiled to something else, or not at all; found by tests/fuzz."""

import torch
from torch import nn

from passes import default_pipeline
from tests.passes.support import capture, check, run


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


def test_a_size_that_two_example_shapes_agree_on_is_not_static():
    class Pooled(nn.Module):
        def forward(self, x):
            return torch.nn.functional.max_pool2d(x * 0.0 + 1.0, 70, 70)

    height, width = torch.export.Dim("height", min=140), torch.export.Dim("width", min=140)
    original = capture(Pooled(), torch.randn(2, 3, 150, 160), dynamic=({2: height, 3: width},))
    result = default_pipeline()(original).program
    x = torch.randn(2, 3, 430, 500, dtype=torch.float64)
    assert run(result, x)[0].shape == run(original, x)[0].shape == (2, 3, 6, 7)


def test_two_axes_of_the_same_small_range_are_told_apart():
    height, width = torch.export.Dim("height", min=4, max=48), torch.export.Dim("width", min=4, max=48)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Then(torch.zeros(4, 1, 1), torch.relu))
    original = capture(network, torch.randn(2, 3, 20, 24), dynamic=({2: height, 3: width},))
    result = default_pipeline()(original).program
    x = torch.randn(2, 3, 20, 31, dtype=torch.float64)
    assert run(result, x)[0].shape == (2, 4, 20, 31)


def test_a_constant_summed_over_the_batch_follows_the_batch():
    check(Then(torch.zeros(3), lambda x: (x + 1.0).sum(0)), torch.randn(2, 3))


class OfConstants(nn.Module):
    """Constants of dynamic size through one padded depthwise layer twice, then a layer of which one channel is read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.last = nn.Conv2d(6, 6, 1)
        self.register_buffer("mask", (torch.arange(6) == 2).float().view(-1, 1, 1))

    def forward(self, x):
        constants = torch.sigmoid(x.expand(-1, 6, -1, -1) * 0.0)
        return self.last(self.shared(constants) * self.mask)


def test_an_expanded_constant_of_which_not_all_is_read_is_cut_in_the_same_sweep():
    height, width = torch.export.Dim("height", min=4), torch.export.Dim("width", min=4)
    original = capture(OfConstants(), torch.randn(2, 1, 9, 11), dynamic=({2: height, 3: width},))
    result = default_pipeline()(original).program
    x = torch.randn(2, 1, 13, 17, dtype=torch.float64)
    torch.testing.assert_close(run(result, x)[0], run(original, x)[0], rtol=1e-12, atol=0.0)
    assert all(value.shape != (6, 1, 3, 3) for value in result.constants.values())
