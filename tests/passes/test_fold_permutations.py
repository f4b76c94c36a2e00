"""Permutations between layers disappear into their weights; what cannot be folded stays one call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import Pipeline
from passes.canonicalize import Canonicalize
from passes.compose_readings import ComposeReadings
from passes.fold_permutations import FoldPermutations
from tests.passes.support import assert_same, capture, check, shapes_of, targets_of

aten = torch.ops.aten
FOLDING = Pipeline((Canonicalize(), ComposeReadings(), FoldPermutations()))
MOVES = (aten.index_select.default, aten.flip.default, aten.roll.default)


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, first, second, middle):
        super().__init__()
        self.first, self.second, self.middle = first, second, middle
        self.third = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.register_buffer("cube", torch.rand(1, 8, 4, 4))

    def forward(self, x):
        return self.second(self.middle(self, self.first(x), x))


def folded(middle, first=None, second=None, dynamic=True):
    """How many permutations are left between two layers; the result is compared with the original."""
    first = nn.Conv2d(3, 8, 1) if first is None else first
    second = nn.Conv2d(8, 4, 3, padding=1) if second is None else second
    program = capture(Net(first, second, middle), torch.randn(2, 3, 4, 4), dynamic=dynamic)
    result = FOLDING(program).program
    assert_same(program, result)
    return sum(target in MOVES for target in targets_of(result))


def shuffle(x):
    return F.channel_shuffle(x, 4)


INPUT, OUTPUT = nn.Identity(), nn.Identity()


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x, _: shuffle(x),
        lambda net, x, _: F.relu(shuffle(F.gelu(x))),
        lambda net, x, _: shuffle(x) * net.scale + net.cube,
        lambda net, x, _: shuffle(x * net.scale + net.cube),
        lambda net, x, _: F.max_pool2d(shuffle(F.avg_pool2d(x, 2)), 2),
        lambda net, x, _: F.pad(F.interpolate(shuffle(x), scale_factor=2.0), (1, 2), value=3.0),
        lambda net, x, y: shuffle(x + net.third(y)),
        lambda net, x, y: shuffle(torch.cat([x[:, :4], F.relu(net.third(y))[:, 4:]], 1)).flip(1),
        lambda net, x, y: shuffle(x) + shuffle(net.third(y)),
        lambda net, x, _: shuffle(x) * shuffle(x).mean((2, 3), keepdim=True),
        lambda net, x, _: shuffle(x) * torch.sigmoid(shuffle(x)),
        lambda net, x, _: shuffle(x).flip(1),
        lambda net, x, _: x.roll(2, 1).permute(0, 2, 3, 1).flip(3).permute(0, 3, 1, 2),
        lambda net, x, _: net.depthwise(shuffle(x))[:, :8],
        lambda net, x, _: net.depthwise(x).view(-1, 8, 2, 4, 4).sum(2).flip(1),
        lambda net, x, _: net.grouped(F.relu(x).roll(4, 1)),
        lambda net, x, _: F.relu(net.grouped(x)).roll(4, 1),
        lambda net, x, _: net.grouped(x)[:, [5, 4, 6, 7, 0, 1, 2, 3]],
        lambda net, x, _: shuffle(x).amax(1, keepdim=True) + torch.zeros(1, 8, 1, 1),
        lambda net, x, _: (x * torch.sigmoid(x) + x).flip(1),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_permutation_between_layers_goes_into_their_weights(middle, dynamic):
    assert folded(middle, dynamic=dynamic) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(nn.Conv2d(3, 8, 1), OUTPUT), (nn.Conv2d(3, 8, 1, bias=False), OUTPUT), (INPUT, nn.Conv2d(3, 2, 1))],
)
def test_one_layer_at_either_side_is_enough(first, second):
    assert folded(lambda net, x, _: x.flip(1).sigmoid(), first, second) == 0


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x, _: net.grouped(shuffle(net.grouped(x))),
        lambda net, x, _: torch.cumsum(shuffle(torch.cumsum(x, 1)), 1),
    ],
)
def test_what_cannot_be_folded_stays_one_call(middle):
    assert folded(middle) == 1


def test_an_output_keeps_its_order():
    assert folded(lambda net, x, _: x.flip(1), INPUT, OUTPUT) == 1


def test_a_shuffle_before_a_flatten_reorders_the_columns_of_the_linear_layer():
    assert folded(lambda net, x, _: shuffle(x).flatten(1), INPUT_OF_8, nn.Linear(128, 3)) == 0


def test_parts_of_a_concatenation_that_change_places_are_reordered_each_for_itself():
    def middle(net, x, y):
        return torch.cat([net.third(y)[:, :4], F.relu(x)[:, :4]], 1)[:, [6, 7, 5, 4, 0, 3, 2, 1]]

    result = check(Net(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), middle), torch.randn(2, 3, 4, 4))
    assert not set(targets_of(result)) & {*MOVES, aten.slice.Tensor}
    assert shapes_of(result)["first.weight"] == (4, 3, 1, 1)


def test_channels_read_twice_are_columns_added_up():
    assert folded(lambda net, x, _: x[:, torch.arange(16) // 2], second=nn.Conv2d(16, 3, 3)) == 0


@pytest.mark.parametrize(
    "coloured",
    [
        lambda x: x.expand(-1, 3, -1, -1),
        lambda x: x.repeat(1, 3, 1, 1),
        lambda x: torch.cat([x, x, x], 1),
        lambda x: x.repeat_interleave(3, 1),
        lambda x: x[:, [0, 0, 0]],
    ],
)
def test_a_grey_image_shown_as_three_channels_is_read_once(coloured):
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(coloured(x))

    result = check(Grey(), torch.randn(2, 1, 5, 5))
    assert shapes_of(result)["conv.weight"] == (4, 1, 3, 3)
    assert targets_of(result) == [aten.conv2d.default]


INPUT_OF_8 = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1))


@pytest.mark.parametrize("middle", [shuffle, lambda x: x.roll(5, 1), lambda x: x.flip(1)])
def test_any_mask_passes_a_folded_permutation(middle):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.mask = torch.zeros(8).index_fill(0, torch.tensor([0, 3, 4]), 1.0)[:, None, None]

        def forward(self, x):
            return self.second(F.relu(middle(self.first(x) * self.mask + 0.5)))

    result = check(Masked(), torch.randn(2, 3, 4, 4))
    assert shapes_of(result)["second.weight"] == (4, 3, 1, 1)
    assert targets_of(result) == [aten.conv2d.default, aten.relu.default, aten.conv2d.default]


@pytest.mark.parametrize("place", ["in front", "behind"])
def test_the_slopes_of_a_prelu_go_with_the_channels_that_are_moved(place):
    prelu = nn.PReLU(8)
    prelu.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 8))
    if place == "in front":
        chain = nn.Sequential(nn.ChannelShuffle(4), prelu, nn.Conv2d(8, 4, 1))
        result = check(chain, torch.randn(2, 8, 4, 4))
    else:
        chain = nn.Sequential(nn.Conv2d(3, 8, 1), prelu, nn.ChannelShuffle(4))
        result = check(chain, torch.randn(2, 3, 4, 4))
    assert not any(target in MOVES for target in targets_of(result))


@pytest.mark.parametrize("dim", [1, None])
def test_a_permutation_stays_in_front_of_what_numbers_the_channels(dim):
    class Best(nn.Module):
        def forward(self, x):
            return shuffle(x).argmax(dim)

    result = check(Best(), torch.randn(2, 8, 4, 4))
    assert aten.index_select.default in targets_of(result)
