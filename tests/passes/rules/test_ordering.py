"""Operators that order an axis: other axes shrink, the ordered one stays whole."""

import pytest
import torch
from torch import nn

from tests.passes.rules.between import Between, Together, compiled, free_axes, kept_by
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten


BESIDE = {
    "sort": lambda x: x.sort(2)[0],
    "stable sort": lambda x: torch.sort(x, dim=2, stable=True, descending=True)[0],
    "topk": lambda x: x.topk(3, 2)[0],
    "max": lambda x: x.max(2, keepdim=True)[0] + x.max(2, keepdim=True)[1],
    "min": lambda x: (lambda found: found[0] + found[1])(x.min(2, True)),
    "median": lambda x: x.median(2, True)[0],
    "kthvalue": lambda x: x.kthvalue(2, 2, True)[0],
    "cummax": lambda x: x.cummax(2)[0],
    "var_mean": lambda x: (lambda found: found[0] + found[1])(torch.var_mean(x, [2], keepdim=True)),
    "std_mean": lambda x: (lambda found: found[0] + found[1])(
        torch.std_mean(x, dim=[2], correction=0, keepdim=True)
    ),
    "aminmax": lambda x: (lambda found: found[0] + found[1])(x.aminmax(dim=2, keepdim=True)),
}


def parts(functions):
    """A network for each function of channels and flattened positions."""
    return {
        name: Between(lambda x, function=function: function(x.flatten(2))[..., None])
        for name, function in functions.items()
    }


def test_channels_beside_the_ordered_axis_shrink():
    assert kept_by(parts(BESIDE), 4, 4) == dict.fromkeys(BESIDE, 3)


def test_channels_beside_an_ordered_axis_of_any_length_shrink():
    names = [name for name in BESIDE if name not in {"topk"}]
    functions = {name: BESIDE[name] for name in names}
    kept = kept_by(parts(functions), 9, 8, dynamic=free_axes("height"), unseen=(11, 8))
    assert all(count <= 6 for count in kept.values())


def test_indices_keep_the_channels_whose_ties_nobody_decides():
    functions = {
        "sort": lambda x: x.sort(2)[1] * 1.0,
        "topk": lambda x: (lambda found: found[0] * found[1])(x.topk(3, 2)),
    }
    assert kept_by(parts(functions), 4, 4) == {"sort": 6, "topk": 6}


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sort(1)[0], lambda x: x.topk(6, 1)[0], lambda x: x.cummax(1)[0]],
    ids=["sort", "topk", "cummax"],
)
def test_an_ordered_channel_axis_stays_whole(function):
    assert kept_by({"one": Between(function)}, 4, 4) == {"one": 6}


def test_the_two_ends_of_a_range_need_only_what_depends_on_the_input():
    def ends(x):
        found = x.aminmax(dim=1, keepdim=True)
        return torch.cat([found.min, found.max], 1)

    result = compiled(Together({"one": Between(ends, out=2)}), 4, 4)
    assert shapes_of(result)["parts.0.first.weight"][0] <= 4
    assert aten.aminmax.default not in targets_of(result)


def test_indices_of_a_masked_score_are_those_of_the_original():
    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(5, 8)
            self.register_buffer("mask", (torch.arange(8) % 2).float())

        def forward(self, x):
            values, indices = (self.score(x) * self.mask).topk(3)
            return {"values": values, "indices": indices}

    check(Best(), torch.randn(3, 5))
