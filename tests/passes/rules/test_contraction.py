"""Convolutions, transposed convolutions and groups between masked layers, against the original in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import compiled, free_axes, kept_after
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Masked(nn.Module):
    """conv -> mask and bias -> middle -> mask and bias -> conv; masked channels are constants that are not 0."""

    def __init__(self, middle, channels, out, masked=0.5, rank=2, seed=0, last_padding=1):
        super().__init__()
        torch.manual_seed(seed)
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.first = convolution(2, channels, 3, padding=1)
        self.middle = middle
        self.last = convolution(out, 3, 3 if last_padding else 1, padding=last_padding)
        for name, size in (("before", channels), ("after", out)):
            shape = (size, *[1] * rank)
            self.register_buffer(f"{name}_mask", (torch.rand(size) >= masked).float().reshape(shape))
            self.register_buffer(f"{name}_bias", torch.randn(shape))

    def forward(self, x):
        h = F.relu(self.first(x) * self.before_mask + self.before_bias)
        h = F.relu(self.middle(h) * self.after_mask + self.after_bias)
        return self.last(h)


SETTINGS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "padding": 1, "dilation": 2},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 3, "groups": 4},
    {"kernel_size": 3, "stride": 2, "groups": 2, "bias": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("free", [(), ("height", "width")], ids=["fixed", "free"])
def test_a_transposed_convolution_loses_its_masked_channels(settings, free):
    torch.manual_seed(1)
    net = Masked(nn.ConvTranspose2d(8, 8, **settings), 8, 8)
    result = compiled(net, 9, 8, dynamic=free_axes(*free) if free else True, unseen=(11, 13) if free else ())
    live = int(net.before_mask.sum())
    assert kept_after(result) <= live + (1 if settings.get("groups", 1) == 1 else 4)


@pytest.mark.parametrize("rank", [1, 3])
def test_transposed_convolutions_of_other_ranks_lose_channels_too(rank):
    torch.manual_seed(1)
    net = Masked(TRANSPOSED[rank](6, 6, 3, stride=2, padding=1), 6, 6, rank=rank)
    assert kept_after(compiled(net, *[6] * rank)) <= int(net.before_mask.sum()) + 1


def test_constants_go_into_the_bias_of_a_transposed_convolution_that_treats_every_position_alike():
    middle = nn.ConvTranspose2d(8, 8, 2, stride=2)
    torch.manual_seed(1)
    with torch.no_grad():
        middle.weight.copy_(torch.randn(8, 8, 1, 1).expand(8, 8, 2, 2))
    net = Masked(middle, 8, 8)
    result = compiled(net, 8, 8, dynamic=free_axes("height", "width"), unseen=(9, 11))
    assert kept_after(result) == int(net.before_mask.sum())


def test_a_scale_and_a_shift_fold_into_transposed_convolutions():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)
            self.second, self.last = nn.ConvTranspose2d(6, 4, 1), nn.ConvTranspose2d(4, 3, 2, 2)
            self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)
            self.register_buffer("shift", torch.randn(4, 1, 1))

        def forward(self, x):
            return self.last(self.second(self.norm(self.first(x))) + self.shift)

    result = check(Scaled(), torch.randn(2, 4, 5, 5))
    assert set(targets_of(result)) == {aten.conv_transpose2d.input}


def grouped(groups, channels, out, **settings):
    settings = {"kernel_size": 3, "padding": 1, **settings}
    return nn.Conv2d(channels, out, groups=groups, **settings)


@pytest.mark.parametrize("masked", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("groups", "channels", "out"),
    [(2, 8, 8), (4, 16, 16), (4, 8, 16), (8, 8, 8), (8, 8, 24), (2, 12, 6)],
    ids=str,
)
def test_groups_with_different_masks_stay_exact(groups, channels, out, masked, seed):
    torch.manual_seed(seed)
    compiled(Masked(grouped(groups, channels, out), channels, out, masked, seed=seed), 7, 6)


def with_masks(middle, before, after, last_padding=0):
    net = Masked(middle, before.numel(), after.numel(), last_padding=last_padding)
    net.before_mask.copy_(before.reshape(-1, 1, 1)), net.after_mask.copy_(after.reshape(-1, 1, 1))
    net.before_bias.zero_()
    return net


def test_groups_that_keep_equally_many_shrink_inside():
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0]).repeat(2)
    net = with_masks(grouped(4, 16, 16), mask, mask)
    assert shapes_of(compiled(net, 8, 8))["middle.weight"] == (8, 2, 3, 3)


def test_a_masked_group_goes_whole():
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    net = with_masks(grouped(3, 12, 12), mask, mask)
    assert shapes_of(compiled(net, 8, 8))["middle.weight"] == (8, 4, 3, 3)


def test_many_groups_are_padded_to_the_widest():
    mask = torch.ones(16, 4)
    mask[:, 3] = 0
    mask[::2, 2] = 0
    net = with_masks(grouped(16, 64, 64), mask.flatten(), mask.flatten())
    assert shapes_of(compiled(net, 8, 8))["middle.weight"] == (48, 3, 3, 3)


def test_few_narrow_groups_become_dense():
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0])
    net = with_masks(grouped(2, 8, 8), mask, mask)
    assert shapes_of(compiled(net, 8, 8))["middle.weight"] == (4, 4, 3, 3)


def test_wide_groups_with_very_different_masks_are_split():
    mask = torch.zeros(3, 128)
    mask[:2, :120] = 1
    mask[2, :8] = 1
    net = with_masks(grouped(3, 384, 384), mask.flatten(), mask.flatten())
    result = compiled(net, 8, 8)
    weights = [shape for name, shape in shapes_of(result).items() if name.startswith("middle.weight")]
    assert sorted(weights) == [(8, 8, 3, 3), (240, 120, 3, 3)]


class Pairs(nn.Module):
    """A grouped convolution of pairs between two layers; one channel of one pair is masked behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 40, 1), nn.Conv1d(40, 4, 1)
        self.pairs = nn.Conv1d(40, 40, 1, groups=20)
        self.register_buffer("mask", (torch.arange(40) != 7).float().reshape(-1, 1))

    def forward(self, x):
        return self.last(self.pairs(self.first(x)) * self.mask)


def test_groups_never_become_a_dense_layer_with_more_multiplications_than_they_had():
    torch.manual_seed(0)
    [pairs] = [
        shape
        for name, shape in shapes_of(check(Pairs(), torch.randn(2, 3, 5))).items()
        if name == "pairs.weight"
    ]
    assert pairs[0] * pairs[1] <= 80
