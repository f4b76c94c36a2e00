"""Two layers with nothing between them become one where that is less work."""

import pytest
import torch
from torch import nn

from passes.network import layers
from tests.passes.support import check


def shapes(program):
    return [tuple(this.weight.shape) for this in layers(program)]


CASES = {
    "linear": ([nn.Linear(6, 20), nn.Linear(20, 5)], (6,), [(5, 6)]),
    "three": ([nn.Linear(6, 20), nn.Linear(20, 30, bias=False), nn.Linear(30, 5)], (6,), [(5, 6)]),
    "1x1 behind 3x3": ([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)], (3, 9, 8), [(4, 3, 3, 3)]),
    "3x3 behind 1x1": ([nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3)], (3, 9, 8), [(4, 3, 3, 3)]),
    "without bias": (
        [nn.Conv2d(3, 9, 1, bias=False), nn.Conv2d(9, 4, 3, padding=1)],
        (3, 9, 8),
        [(4, 3, 3, 3)],
    ),
    "transposed": (
        [nn.ConvTranspose2d(3, 8, 3, stride=2), nn.Conv2d(8, 4, 1)],
        (3, 5, 6),
        [(4, 3, 3, 3)],
    ),
    "strided": ([nn.Conv1d(3, 8, 3, stride=2), nn.Conv1d(8, 4, 1)], (3, 11), [(4, 3, 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_two_layers_with_nothing_between_them_become_one(name):
    parts, sizes, wanted = CASES[name]
    result = check(nn.Sequential(*parts, nn.ReLU(), nn.Flatten()), torch.randn(2, *sizes))
    assert shapes(result) == wanted


def test_a_narrow_value_between_them_stays():
    result = check(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 5)), torch.randn(2, 6))
    assert shapes(result) == [(2, 6), (5, 2)]


def test_a_value_that_masks_made_narrow_stays():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 40), nn.Linear(40, 6)
            self.register_buffer("mask", (torch.arange(40) < 2).float())

        def forward(self, x):
            return torch.tanh(self.second(self.first(x) * self.mask))

    assert shapes(check(Masked(), torch.randn(2, 6))) == [(2, 6), (6, 2)]


def test_a_bias_that_meets_padding_keeps_them_apart():
    parts = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3, padding=1)
    assert len(shapes(check(nn.Sequential(*parts), torch.randn(2, 3, 9, 8)))) == 2


def test_what_something_else_reads_stays():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 5)

        def forward(self, x):
            y = self.first(x)
            return self.second(y), y

    assert len(shapes(check(Tapped(), torch.randn(2, 6)))) == 2
