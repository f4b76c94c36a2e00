"""Constants that differ by position are added behind a layer where a basis of channels would be dearer."""

import pytest
import torch
from torch import nn

from passes import FewestMacs
from tests.passes.support import targets_of
from tests.passes.test_separate_edges import Dear, check
from tests.passes.test_shrinking import IMAGE, Mask, norm, widths

aten = torch.ops.aten


class Maps(Dear):
    """A cost model to which constant maps cost nothing, and gathers too much."""

    def map_pays(self, entries, saved_macs):
        return saved_macs > 0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def padded(groups=1):
    """A masked layer whose constants meet the zero padding of the next one."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        Mask(8, 5),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )


def test_no_channel_stands_for_constants_that_are_added_as_a_map():
    small = check(padded(), IMAGE, cost=Maps())
    assert widths(small) == [(5, 3), (4, 5), (2, 4)]
    assert targets_of(small).count(aten.add.Tensor) == 1


def test_a_map_needs_static_positions():
    height, width = torch.export.Dim("height", min=4, max=64), torch.export.Dim("width", min=4, max=64)
    small = check(padded(), IMAGE, cost=Maps(), dynamic=({2: height, 3: width},))
    assert widths(small) == [(6, 3), (4, 6), (2, 4)]


def test_a_single_channel_that_stands_for_constants_is_cheaper_by_default():
    small = check(padded(), IMAGE, cost=Dear())
    assert widths(small) == [(6, 3), (4, 6), (2, 4)]


def test_groups_have_a_map_each():
    small = check(padded(groups=2), IMAGE, cost=Maps())
    assert targets_of(small).count(aten.add.Tensor) == 1


def test_a_row_that_nothing_keeps_stays_what_it_is_beside_one_with_a_map():
    """Negative everywhere, it is 0 behind the rectifier and goes; without its constants it would not be."""
    network = padded(groups=2)
    layer = network[4]
    with torch.no_grad():
        network[1].values[:, 4:] = 0.0
        network[2].bias.fill_(1.0)
        network[2].weight.fill_(0.1)
        layer.weight[2], layer.weight[3] = -1.0, 1.0
        layer.bias[2:] = 0.5
    check(network, IMAGE, cost=Maps())


def test_maps_of_many_ranks_need_no_basis():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False),
        Mask(16, 4),
        norm(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        norm(16),
        nn.ReLU6(),
        nn.Conv2d(16, 6, 1),
    )
    assert widths(check(network, IMAGE, cost=Maps()))[-1] == (6, 4)


@pytest.mark.parametrize("seed", range(8))
def test_random_layers_stay_exact_with_every_map(seed):
    torch.manual_seed(seed)
    stride, kernel, groups = (int(torch.randint(1, 4, ())) for _ in range(3))
    groups = {1: 1, 2: 2, 3: 4}[groups]
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        Mask(8, int(torch.randint(1, 8, ()))),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, kernel, stride, padding=kernel // 2, groups=groups),
        Mask(8, int(torch.randint(1, 8, ()))),
        norm(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding=1),
    )
    check(network, IMAGE, cost=FewestMacs())
