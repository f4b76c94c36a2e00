import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import LIVE, Between, free_axes, kept_by
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")


def test_formulas_shrink_like_what_they_stand_for():
    functions = {
        "rrelu": lambda x: F.rrelu(x - 0.5),
        "addcmul": lambda x: torch.addcmul(x, x, x.sigmoid(), value=2.0),
        "addcdiv": lambda x: torch.addcdiv(x, x, x.exp() + 1.0, value=0.5),
        "cosine": lambda x: x * F.cosine_similarity(x, x + 1, dim=-1).unsqueeze(-1),
        "distance": lambda x: x * F.pairwise_distance(x, 2 * x).unsqueeze(-1),
        "var_mean": lambda x: x * torch.var_mean(x, (2, 3), keepdim=True)[1],
        "aminmax": lambda x: x * torch.aminmax(x, dim=-1, keepdim=True).max,
    }
    parts = {name: Between(function, bias=False) for name, function in functions.items()}
    kept = kept_by(parts, 8, 8)
    assert {name for name, count in kept.items() if count != LIVE} <= {"addcdiv"}


def test_moments_and_extrema_of_everything_are_exact():
    class Moments(nn.Module):
        def forward(self, x):
            first, second = torch.var_mean(x, correction=0)
            third, fourth = torch.std_mean(x, dim=1)
            low, high = torch.aminmax(x)
            return x * first + second + (third * fourth).unsqueeze(1) + low * high

    targets = targets_of(check(Moments(), torch.randn(2, 5, 3)))
    assert not {aten.var_mean.correction, aten.std_mean.dim, aten.aminmax.default} & set(targets)


def test_both_halves_of_a_gated_unit_lose_the_same_channels():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(8, 3)
            self.register_buffer("mask", (torch.arange(8) % 2 == 0).float())

        def forward(self, x):
            return self.last(F.glu(self.first(x)) * self.mask)

    shapes = shapes_of(check(Gated(), torch.randn(2, 7, 4)))
    assert shapes["first.weight"] == (8, 4)
    assert shapes["last.weight"] == (3, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bilinear_layer_loses_inputs_of_both_sides_and_rows(bias):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(3, 6)
            self.joined, self.last = nn.Bilinear(8, 6, 10, bias=bias), nn.Linear(10, 2)

        def forward(self, x):
            first = self.first(x) * (torch.arange(8) % 2)
            second = self.second(x) * (torch.arange(6) % 3 == 0)
            return self.last(self.joined(first, second).tanh() * (torch.arange(10) < 4))

    shapes = shapes_of(check(Joined(), torch.randn(2, 5, 3)))
    assert shapes["first.weight"] == (4, 3)
    assert shapes["second.weight"] == (2, 3)
    assert shapes["joined.weight"] == (4, 8)


def test_a_gated_unit_along_channels_of_maps():
    parts = {"glu": Between(lambda x: F.glu(x, 1), out=3)}
    kept_by(parts, 8, 8, dynamic=FREE, unseen=(9, 12))


def test_a_norm_that_is_expanded_to_be_divided_by_leaves_zero_channels_alone():
    parts = {
        "normalize": Between(lambda x: F.normalize(x, dim=1), bias=False),
        "beside": Between(lambda x: F.normalize(x, dim=-1), bias=False),
    }
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, LIVE)
