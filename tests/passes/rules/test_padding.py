import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import LIVE, Between, Together, compiled, free_axes, kept_after, kept_by
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")


def padded(modes, rank):
    return {
        mode: Between(lambda x, mode=mode: F.pad(x, (1, 2) * rank, mode=mode), rank=rank) for mode in modes
    }


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_padding_with_own_entries_leaves_channels_flat(dynamic):
    parts = padded(("reflect", "replicate", "circular"), 2)
    assert kept_by(parts, 12, 12, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


@pytest.mark.parametrize(("rank", "size"), [(1, (9,)), (3, (5, 6, 5))])
def test_padding_with_own_entries_in_other_ranks(rank, size):
    parts = padded(("reflect", "replicate"), rank)
    assert kept_by(parts, *size) == dict.fromkeys(parts, LIVE)


def test_a_spatial_zero_pad_costs_one_map_for_all_constants():
    module = Between(lambda x: F.pad(x, (1, 1, 0, 2)))
    assert kept_after(compiled(module, 8, 8)) == LIVE + 1


def test_a_spatial_pad_on_free_sizes_lets_the_same_constant_go():
    parts = {
        "same": Between(lambda x: F.pad(x, (1, 1, 0, 2)), bias=False),
        "other": Between(lambda x: F.pad(x, (1, 1, 0, 2))),
    }
    kept = kept_by(parts, 12, 12, dynamic=FREE, unseen=(9, 33))
    assert kept == {"same": LIVE, "other": 2 * LIVE}


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_padded_channels_are_constants_and_cropped_ones_are_dead(dynamic):
    parts = {
        "zeros": Between(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), out=9),
        "constants": Between(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), value=-1.5), out=9),
        "cropped": Between(lambda x: F.pad(x, (0, 0, 0, 0, -1, -2)), out=3),
    }
    result = compiled(Together(parts), 8, 8, dynamic=dynamic)
    shapes = shapes_of(result)
    assert [shapes[f"parts.{at}.second.weight"][1] for at in range(3)] == [LIVE, LIVE, 1]
    assert targets_of(result).count(aten.constant_pad_nd.default) <= 1  # what is cropped is a dead end


def test_cropping_and_padding_at_once():
    parts = {
        "mixed": Between(lambda x: F.pad(x, (1, -1, -2, 2, 3, -2), value=0.5), out=7),
        "read uncropped too": Between(lambda x: F.pad(x, (0, 0, 0, 0, -3, 3)) + x),
        "nothing left": Between(lambda x: F.pad(x, (0, 0, 0, 0, -6, 6), value=2.0)),
    }
    kept = kept_by(parts, 8, 8)
    assert kept["mixed"] <= LIVE <= kept["read uncropped too"]


class Shortcut(nn.Module):
    """A residual block whose stream is strided and padded with zero channels."""

    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 3)
        self.register_buffer("mask", mask[:, None, None])

    def forward(self, x):
        x = F.relu(self.stem(x))
        padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.head(F.relu(self.branch(x) * self.mask + padded).mean((2, 3)))


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
@pytest.mark.parametrize("removed", [[0, 1, 2, 9, 10, 11], [0, 4, 10]])
def test_the_zero_channels_of_a_shortcut_go_with_their_partners(removed, dynamic):
    mask = torch.ones(12)
    mask[removed] = 0.0
    result = compiled(Shortcut(mask), 8, 8, dynamic=dynamic)
    width = 12 - sum(channel not in range(3, 9) for channel in removed)
    assert shapes_of(result)["branch.weight"][0] == width


def test_a_pad_whose_amounts_are_computed_at_run_time():
    def same(x):
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = (-(-size // 2) - 1) * 2 + 3 - size
            pads += [total // 2, total - total // 2]
        return F.avg_pool2d(F.pad(x, pads), 3, 2)

    module = Between(same, bias=False)
    result = compiled(module, 12, 12, dynamic=FREE, unseen=(15, 22))
    assert kept_after(result) == LIVE


def test_a_pad_of_minus_infinity_is_not_a_constant():
    module = Between(lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 2))
    assert kept_after(compiled(module, 9, 9)) >= LIVE


def test_padded_positions_reach_a_linear_layer_as_constants():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2 * 5 * 4, 3)

        def forward(self, x):
            return self.last(F.pad(x, (1, 1, 0, 2), value=0.5).flatten(1))

    result = check(Flat(), torch.randn(2, 2, 3, 2))
    assert shapes_of(result)["last.weight"] == (3, 12)


def test_a_pad_of_nothing_goes():
    result = compiled(Between(lambda x: F.pad(x, (0, 0, 0, 0))), 8, 8)
    assert targets_of(result) == [aten.conv2d.default, aten.relu.default, aten.conv2d.default]
