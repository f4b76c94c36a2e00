"""A coupling keeps the union of what its members need; where a gather is cheaper, each edge keeps its own channels."""

import pytest
import torch
from torch import nn

from passes import CountingModel, default_pipeline
from tests.passes.support import assert_same, capture, targets_of
from tests.passes.test_shrinking import Mask, norm, widths

aten = torch.ops.aten
GATHERS = {aten.index_select.default, aten.slice.Tensor}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Free(CountingModel):
    """A cost model to which gathers cost nothing."""

    def gathers_pay(self, copies, saved_macs):
        return saved_macs > 0


class Dear(CountingModel):
    """A cost model to which no gather pays."""

    def gathers_pay(self, copies, saved_macs):
        return False


def check(module, *inputs, cost=None, dynamic=True):
    """Compile with a cost model, compare with the original and return the small Program."""
    original = capture(module, *inputs, dynamic=dynamic)
    small = default_pipeline(cost or Free())(original).program
    small.lint()
    assert_same(original, small)
    again = default_pipeline(cost or Free())(small).program
    assert widths(again) == widths(small)
    assert targets_of(again) == targets_of(small)
    return small


class Residual(nn.Module):
    """relu(x + mask(conv(relu(conv(mask(x))))))."""

    def __init__(self, channels, reads=None, adds=None, bias=False):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.reads = nn.Identity() if reads is None else Mask(channels, reads)
        self.adds = nn.Identity() if adds is None else Mask(channels, adds)
        self.norm = norm(channels) if bias else nn.Identity()

    def forward(self, x):
        y = self.second(torch.relu(self.first(self.reads(x))))
        return torch.relu(x + self.norm(self.adds(y)))


IMAGE = torch.randn(2, 3, 8, 8)


def stream(*blocks):
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 2, 1))


def test_a_branch_brings_only_its_own_channels_to_a_sum():
    assert widths(check(stream(Residual(8, adds=3)), IMAGE)) == [(8, 3), (8, 8), (3, 8), (2, 8)]


def test_a_layer_reads_only_the_channels_it_needs_of_a_stream():
    assert widths(check(stream(Residual(8, reads=3)), IMAGE)) == [(8, 3), (8, 3), (8, 8), (2, 8)]


def test_the_constants_of_masked_channels_reach_the_sum():
    small = check(stream(Residual(8, adds=3, bias=True)), IMAGE)
    assert widths(small) == [(8, 3), (8, 8), (3, 8), (2, 8)]
    assert any("constants" in name for name in small.constants)


class Shortcut(nn.Module):
    """conv(x) + norm(mask(conv(x))): nothing else reads the first addend."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.mask, self.norm, self.last = Mask(8, 3), norm(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.norm(self.mask(self.second(x)))))


def test_constants_go_into_the_other_addend_where_a_layer_makes_it():
    small = check(Shortcut(), IMAGE)
    assert widths(small) == [(8, 3), (3, 3), (2, 8)]
    assert targets_of(small).count(aten.add.Tensor) == 1


class Dense(nn.Module):
    """Each layer reads what all layers before it made, masked."""

    def __init__(self, kept):
        super().__init__()
        sizes = [3, 7, 11]
        self.masks = nn.ModuleList(Mask(size, live) for size, live in zip(sizes, kept, strict=True))
        self.layers = nn.ModuleList(nn.Conv2d(size, 4, 3, padding=1) for size in sizes)

    def forward(self, x):
        for mask, layer in zip(self.masks, self.layers, strict=True):
            x = torch.cat((x, torch.relu(layer(mask(x)))), 1)
        return x


def test_each_layer_of_a_dense_block_reads_its_own_channels():
    assert widths(check(Dense([3, 4, 5]), IMAGE)) == [(4, 3), (4, 4), (4, 5)]


def test_an_input_of_the_network_is_read_in_part():
    assert widths(check(nn.Sequential(Mask(3, 1), nn.Conv2d(3, 4, 3, padding=1)), IMAGE)) == [(4, 1)]


class Preactivated(nn.Module):
    """x + conv(mask(relu(norm(x)))): the reader's own operators lie between the stream and the layer."""

    def __init__(self, act):
        super().__init__()
        self.stem, self.conv, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )
        self.norm, self.mask, self.act = norm(8), Mask(8, 3), act

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.conv(self.mask(self.act(self.norm(x)))))


def test_the_gather_stands_where_the_reader_begins():
    small = check(Preactivated(nn.ReLU()), IMAGE)
    assert widths(small) == [(8, 3), (8, 3), (2, 8)]
    order = [node.target for node in small.calls() if node.target in {*GATHERS, aten.relu.default}]
    assert order == [order[0], aten.relu.default]


class Reciprocal(nn.Module):
    def forward(self, x):
        return 1.0 / (x * x + 1.0).log()


def test_an_operator_that_zeros_would_upset_is_read_whole():
    small = check(Preactivated(Reciprocal()), IMAGE)
    assert widths(small) == [(8, 3), (8, 3), (2, 8)]
    order = [node.target for node in small.calls() if node.target in {*GATHERS, aten.log.default}]
    assert order == [aten.log.default, order[1]]


class Positioned(nn.Module):
    """A layer with two rows of zeros; what is left of those, its bias, is scaled differently at each position."""

    def __init__(self, behind):
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.layer.weight.data[1:3] = 0.0
        self.behind = behind
        self.register_buffer("scale", torch.rand(4, 1) + 0.5)

    def forward(self, x):
        return self.behind(torch.relu(self.layer(x) + 1.0) * self.scale)


@pytest.mark.parametrize("behind", [nn.Softmax(1), nn.Sequential(nn.Softmax(1), nn.Linear(5, 3))])
def test_constants_that_differ_by_position_pass_though_nobody_asks_for_them(behind):
    check(Positioned(behind), torch.randn(2, 4, 6))


def test_without_a_cheap_gather_the_coupling_keeps_the_union():
    small = check(stream(Residual(8, reads=3, adds=3)), IMAGE, cost=Dear())
    assert widths(small) == [(8, 3), (8, 8), (8, 8), (2, 8)]
    assert aten.index_select.default not in targets_of(small)


def test_small_feature_maps_are_not_worth_a_gather_by_default():
    small = check(stream(Residual(8, adds=7)), IMAGE, cost=CountingModel())
    assert aten.index_select.default not in targets_of(small)


class ReadTwice(nn.Module):
    """A value of 64 channels that two layers read, one of them masked; a layer's own, or two layers' side by side."""

    def __init__(self, joined):
        super().__init__()
        self.makers = nn.ModuleList(nn.Conv2d(3, 64 // (1 + joined), 1) for _ in range(1 + joined))
        self.mask, self.some, self.all = Mask(64, 32), nn.Conv2d(64, 16, 1), nn.Conv2d(64, 16, 1)

    def forward(self, x):
        parts = [make(x) for make in self.makers]
        x = torch.relu(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return self.some(self.mask(x)), self.all(x)


@pytest.mark.parametrize("joined", [False, True])
def test_a_gather_pays_sooner_where_channels_are_not_packed_anyway(joined):
    small = check(ReadTwice(joined), torch.randn(2, 3, 32, 32), cost=CountingModel())
    assert ((16, 32) in widths(small)) == joined


class Downsampled(nn.Module):
    """A sum of two layers of 64 channels, both masked, and a layer that reads some of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 64, 7, padding=3), nn.Conv2d(8, 64, 5, padding=2)])
        self.masks = nn.ModuleList([Mask(64, 16), Mask(64, 30)])
        self.all, self.some, self.mask = nn.Conv2d(64, 16, 1), nn.Conv2d(64, 16, 1), Mask(64, 32)

    def forward(self, x):
        x = sum(mask(layer(x).relu()) for mask, layer in zip(self.masks, self.layers, strict=True))
        return self.all(x), self.some(self.mask(x))


def test_where_one_part_of_a_sum_is_cut_the_others_and_its_readers_cost_less():
    small = check(Downsampled(), torch.randn(2, 8, 32, 32), cost=CountingModel())
    first, second, everything, some = widths(small)
    assert first[0] == 16
    assert second[0] == 30
    assert some[1] < everything[1]


class Tokens(nn.Module):
    """x + W2 relu(W1 mask(x)), along the last axis of a sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(3, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.reads, self.adds, self.head = Mask(12, 5, rank=2), Mask(12, 4, rank=2), nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        return self.head(x + self.adds(self.down(torch.relu(self.up(self.reads(x))))))


def test_the_features_of_tokens_are_cut_edge_by_edge():
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    small = check(Tokens(), torch.randn(2, 6, 3), dynamic=dynamic)
    assert widths(small) == [(12, 3), (24, 5), (4, 24), (2, 12)]


@pytest.mark.parametrize("seed", range(12))
def test_random_streams_stay_exact_with_every_gather(seed):
    torch.manual_seed(seed)
    kinds = torch.randint(0, 5, (4,)).tolist()
    blocks = [
        Residual(8, *((None, 1 + k)[torch.rand(()) < 0.7] for _ in range(2)), bias=k % 2 == 0) for k in kinds
    ]
    check(stream(*blocks), IMAGE)


def test_constants_that_differ_by_position_pass_an_edge_although_nobody_asks_for_what_comes_of_them():
    class Positions(nn.Module):
        """Two layers that read other channels of a masked value, which has a constant at every position."""

        def __init__(self):
            super().__init__()
            self.first, self.wide, self.narrow = nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(16, 4)
            self.register_buffer("mask", (torch.arange(16) < 6).float())
            self.register_buffer("place", torch.rand(5, 16) * (torch.arange(16) < 9))
            with torch.no_grad():
                self.wide.weight[:, :4] = 0.0
                self.wide.weight[:, 12:] = 0.0

        def forward(self, x):
            x = self.first(x) * self.mask + self.place
            return self.wide(torch.sigmoid(x)), self.narrow(x)

    check(Positions(), torch.randn(2, 5, 16))
