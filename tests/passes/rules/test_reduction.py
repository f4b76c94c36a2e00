import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import LIVE, Between, compiled, free_axes, kept_after, kept_by
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")
SPATIAL = (2, 3)


def maps(vector):
    return vector[:, :, None, None]


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_masked_channels_go_through_a_spatial_reduction(dynamic):
    functions = {
        "mean": lambda x: x.mean(SPATIAL, keepdim=True),
        "mean without the axes": lambda x: maps(x.mean(SPATIAL)),
        "amax": lambda x: x.amax(SPATIAL, keepdim=True),
        "amin": lambda x: maps(x.amin(SPATIAL)),
        "mean of one axis": lambda x: x - x.mean(-1, keepdim=True),
        "max of one axis": lambda x: x * x.max(2, keepdim=True).values,
    }
    parts = {name: Between(function) for name, function in functions.items()}
    assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_sums_and_variances_of_static_axes_are_laid_out():
    functions = {
        "sum": lambda x: x.sum(SPATIAL, keepdim=True),
        "var": lambda x: x * x.var(SPATIAL, keepdim=True),
        "std": lambda x: x + maps(x.std(SPATIAL, correction=0)),
        "var without the axes": lambda x: maps(x.var(SPATIAL, unbiased=True)),
        "count": lambda x: x * (x > 0.5).sum(SPATIAL, keepdim=True),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, LIVE)


def test_over_free_axes_a_sum_is_constant_only_if_it_is_zero_and_a_variance_never():
    def total(x):
        return x.sum(SPATIAL, keepdim=True)

    def variance(x):
        return x * x.var(SPATIAL, keepdim=True) + x.var(SPATIAL, keepdim=True)

    parts = {"zeros": Between(total, bias=False), "constants": Between(total), "variance": Between(variance)}
    kept = kept_by(parts, 8, 8, dynamic=FREE, unseen=(9, 30))
    assert kept == {"zeros": LIVE, "constants": 2 * LIVE, "variance": 2 * LIVE}


def over_channels(names, axes, bias=True):
    def function(name):
        return lambda x: getattr(torch, name)(x, axes, keepdim=True)

    return {f"{name} {bias}": Between(function(name), out=1, bias=bias) for name in names}


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_channels_that_are_reduced_go_and_their_constants_are_added_again(dynamic):
    names = ("mean", "sum", "amax", "amin")
    parts = over_channels(names, 1) | over_channels(names, 1, bias=False)
    assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_channels_and_free_axes_reduced_at_once():
    parts = over_channels(("mean", "amax", "amin", "sum"), (1, 2, 3))
    kept = kept_by(parts, 8, 8, dynamic=FREE, unseen=(9, 30))
    assert kept == {"mean True": LIVE, "amax True": LIVE, "amin True": LIVE, "sum True": 2 * LIVE}


def test_constants_that_differ_by_position_are_added_again():
    module = Between(lambda x: F.avg_pool2d(x, 3, 1, 1).mean(1, keepdim=True), out=1)
    assert kept_after(compiled(module, 8, 8)) == LIVE


def test_a_variance_of_channels_keeps_them():
    module = Between(lambda x: x.var(1, keepdim=True), out=1)
    assert kept_after(compiled(module, 8, 8)) == 2 * LIVE


def test_reductions_of_everything_and_of_the_batch_are_exact():
    functions = [
        lambda x: x.mean() + x,
        lambda x: x.max() + x,
        lambda x: x.min() + x,
        lambda x: x.sum() + x,
        lambda x: x.std() + x,
        lambda x: x.amax(()) + x,
        lambda x: x.mean(0, keepdim=True) + x,
    ]
    parts = {
        f"{at} {bias}": Between(f, bias=bias) for bias in (False, True) for at, f in enumerate(functions)
    }
    assert all(LIVE <= kept <= 2 * LIVE for kept in kept_by(parts, 6, 6).values())


@pytest.mark.parametrize("bias", [False, True], ids=["zeros", "constants"])
def test_a_sum_over_the_batch_is_exact_at_every_batch(bias):
    module = Between(lambda x: x.sum(0, keepdim=True) + x, bias=bias)
    module.mask.zero_()
    assert kept_after(compiled(module, 6, 6, unseen=(6, 6))) <= 2 * LIVE


@pytest.mark.parametrize("keepdim", [False, True])
def test_rows_that_nobody_reads_ask_for_nothing(keepdim):
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 6, 1)
            self.last = nn.Linear(6, 4)
            self.last.weight.data[:, 2:] = 0.0

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3), keepdim=keepdim).flatten(1))

    assert shapes_of(check(Unread(), torch.randn(2, 2, 6, 6)))["first.weight"][0] == 2


def test_an_index_output_that_is_used_leaves_the_call_alone():
    def both(x):
        largest = x.max(1, keepdim=True)
        return largest.values + largest.indices

    result = compiled(Between(both, out=1), 6, 6)
    assert aten.max.dim in targets_of(result)


def test_more_reductions_over_positions_shrink_their_channels():
    functions = {
        "prod": lambda x: x * x.prod(-1, keepdim=True),
        "any": lambda x: x * (x > 0.5).any(-1, keepdim=True),
        "all": lambda x: x * (x > 0.5).all(2, keepdim=True),
        "norm": lambda x: x * x.norm(dim=(2, 3), keepdim=True),
        "logsumexp": lambda x: x * x.logsumexp((2, 3), keepdim=True),
        "argmax": lambda x: x * x.argmax(-1, keepdim=True),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, LIVE)
    zeros = {name: Between(function, bias=False) for name, function in functions.items()}
    assert kept_by(zeros, 8, 8, dynamic=FREE, unseen=(9, 12)) == dict.fromkeys(zeros, LIVE)


@pytest.mark.parametrize("bias", [False, True], ids=["zeros", "constants"])
def test_norms_products_and_logarithms_of_sums_take_up_the_channels_that_go(bias):
    functions = {
        "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
        "norm": lambda x: x.norm(dim=1, keepdim=True),
        "one norm": lambda x: x.norm(p=1, dim=1, keepdim=True),
        "largest": lambda x: x.norm(p=torch.inf, dim=1, keepdim=True),
        "any": lambda x: (x > 2).any(1, keepdim=True).to(x.dtype),
        "all": lambda x: (x > -1).all(1, keepdim=True).to(x.dtype),
    }
    if bias:
        functions["prod"] = lambda x: x.prod(1, keepdim=True)
    parts = {name: Between(function, out=1, bias=bias) for name, function in functions.items()}
    assert kept_by(parts, 8, 8, dynamic=FREE) == dict.fromkeys(parts, LIVE)


def test_a_zero_makes_a_product_a_constant():
    parts = {"prod": Between(lambda x: x.prod(1, keepdim=True), out=1, bias=False)}
    assert kept_by(parts, 8, 8) == {"prod": 0}


def test_other_norms_let_zeros_go_alone():
    def cubic(x):
        return x.norm(p=3, dim=1, keepdim=True)

    parts = {"zeros": Between(cubic, out=1, bias=False), "constants": Between(cubic, out=1)}
    assert kept_by(parts, 8, 8) == {"zeros": LIVE, "constants": 2 * LIVE}


def test_an_index_of_channels_counts_them_all():
    parts = {"argmax": Between(lambda x: x.argmax(1, keepdim=True).to(x.dtype), out=1)}
    assert kept_by(parts, 8, 8) == {"argmax": 2 * LIVE}
