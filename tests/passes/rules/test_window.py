import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import AnalyzeChannels, Canonicalize
from tests.passes.rules.between import LIVE, Between, compiled, free_axes, kept_after, kept_by
from tests.passes.support import capture, check, shapes_of, targets_of

aten = torch.ops.aten
SIZES = {1: (8,), 2: (6, 7), 3: (4, 5, 4)}
FREE = free_axes("height", "width")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masked_channels_go_through_pooling(rank):
    kinds = ("max_pool", "avg_pool", "adaptive_avg_pool")
    pools = {kind: getattr(F, f"{kind}{rank}d") for kind in kinds}
    parts = {kind: Between(lambda x, pool=pool: pool(x, 2), rank=rank) for kind, pool in pools.items()}
    assert kept_by(parts, *SIZES[rank]) == dict.fromkeys(kinds, LIVE)


@pytest.mark.parametrize("dynamic", [False, FREE], ids=["static", "free"])
def test_a_constant_channel_stays_flat(dynamic):
    pools = {
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "max as wide as its dilation": lambda x: F.max_pool2d(x[:, :, :2], (2, 1), 1, (1, 0), (2, 1)),
        "max dilated": lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1)),
        "mean of real entries": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "mean without padding": lambda x: F.avg_pool2d(x, 2, 2, 0, count_include_pad=True),
        "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 1)),
    }
    parts = {name: Between(pool) for name, pool in pools.items()}
    assert kept_by(parts, 9, 10, dynamic=dynamic) == dict.fromkeys(pools, LIVE)


def test_counted_padding_costs_one_map_for_all_constants_and_a_divisor_none():
    parts = {
        "padding": Between(lambda x: F.avg_pool2d(x, 3, 1, 1)),
        "overhang": Between(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
        "divisor": Between(lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
        "max overhang": Between(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    }
    kept = kept_by(parts, 10, 12)
    assert kept == {"padding": LIVE + 1, "overhang": LIVE + 1, "divisor": LIVE, "max overhang": LIVE}


def test_counted_padding_on_free_sizes_lets_zeros_go_and_nothing_else():
    parts = {
        "zeros": Between(lambda x: F.avg_pool2d(x, 3, 1, 1), bias=False),
        "constants": Between(lambda x: F.avg_pool2d(x, 3, 1, 1)),
    }
    kept = kept_by(parts, 12, 12, dynamic=FREE, unseen=(17, 11))
    assert kept == {"zeros": LIVE, "constants": 2 * LIVE}


def test_one_free_spatial_axis_and_one_static():
    free_width = free_axes("", "width")
    module = Between(lambda x: F.avg_pool2d(x, (3, 2), 1, (1, 0)))
    result = compiled(module, 12, 12, dynamic=free_width, unseen=(12, 31))
    assert kept_after(result) == LIVE + 1


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_an_unbatched_value_has_its_channels_in_front(pool):
    result = compiled(Between(lambda x: pool(x[0], 2)), 8, 8)
    assert kept_after(result) == LIVE


class Positions(nn.Module):
    """Masks on single positions, as noise on a flattened layer leaves them."""

    def __init__(self, pool, mask):
        super().__init__()
        self.pool = pool
        self.first = nn.Conv2d(1, 3, 1)
        self.register_buffer("mask", mask)
        self.register_buffer("read", torch.zeros(1, 1, 2, 2))
        self.read[0, 0, 1, 0] = 1.0

    def forward(self, x):
        return self.pool(self.first(x) * self.mask) * self.read


@pytest.fixture(params=[lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)], ids=["max", "mean"])
def analysis(request):
    mask = torch.ones(3, 4, 4)
    mask[1, :2, :2] = 0.0  # all that position (0, 0) of channel 1 reads
    mask[2, 0, 0] = 0.0  # some of what position (0, 0) of channel 2 reads
    program = capture(Positions(request.param, mask), torch.randn(2, 1, 4, 4))
    return AnalyzeChannels()(Canonicalize()(program).program).program.analysis


def test_a_window_of_constants_is_a_constant(analysis):
    (name,) = (name for name in analysis.facts if "pool" in name)
    known = analysis.facts[name].known.expand(1, 3, 2, 2)
    assert known.nonzero().tolist() == [[0, 1, 0, 0]]


def test_a_position_that_is_read_asks_for_its_window(analysis):
    demand = analysis.demand[next(name for name in analysis.demand if "mul" in name)].expand(1, 3, 4, 4)
    assert demand.nonzero()[:, 2:].unique(dim=0).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_a_pool_that_nobody_reads_asks_for_nothing():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 6, 1)
            self.second = nn.Conv2d(6, 4, 1)
            self.second.weight.data[:, 2:] = 0.0

        def forward(self, x):
            return self.second(F.max_pool2d(self.first(x), 2))

    result = check(Unread(), torch.randn(2, 2, 6, 6))
    assert shapes_of(result)["first.weight"][0] == 2


def test_a_squeeze_and_excitation_block_shrinks():
    result = compiled(Between(lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))), 8, 8, dynamic=FREE)
    assert kept_after(result) == LIVE


def test_nothing_is_kept_when_every_channel_is_constant():
    module = Between(lambda x: F.max_pool2d(x, 3, 2, 1))
    module.mask.zero_()
    result = compiled(module, 9, 9)
    assert aten.conv2d.default not in targets_of(result)
