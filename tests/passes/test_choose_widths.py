"""Widths that a target runs faster: exact, no wider than asked for, and never by accident slower."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from passes import TARGETS, FewestMacs, default_pipeline
from passes.network import layers, map_behind, seconds
from passes.targets import AVX512, Layer
from tests.passes.support import assert_same, capture


class Mask(nn.Module):
    """Keeps the first of the channels; the others are 0, or what the bias behind makes of them."""

    def __init__(self, channels: int, kept: int, shift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("scale", (torch.randperm(channels) < kept).double().view(1, -1, 1, 1))
        self.register_buffer("shift", torch.full((1, channels, 1, 1), shift).double())

    def forward(self, x):
        return x * self.scale + self.shift


def chain(widths, kept, kernel=3, shift=0.25):
    torch.manual_seed(0)
    parts, inputs = [], 3
    for width, number in zip(widths, kept, strict=True):
        parts += [
            nn.Conv2d(inputs, width, kernel, padding=kernel // 2),
            Mask(width, number, shift),
            nn.ReLU(),
        ]
        inputs = width
    return nn.Sequential(*parts, nn.Conv2d(inputs, 5, 1)).double()


def compiled(network, *inputs, target=AVX512):
    """The captured Program, and what the default pipeline makes of it for a target."""
    program = capture(network, *inputs)
    return program, default_pipeline(target=target)(program).program


def widths(program):
    return [(this.in_channels, this.out_channels) for this in layers(program)]


def images(size=14):
    return torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_a_width_that_leaves_the_blocked_kernels_grows_to_the_next_that_does_not(shift):
    program, small = compiled(chain((64, 64), (31, 45), shift=shift), images())
    assert widths(small) == [(3, 32), (32, 48), (48, 5)]
    assert_same(program, small)


def test_without_a_target_there_are_only_the_channels_that_are_needed():
    _, small = compiled(chain((64, 64), (31, 45)), images(), target=None)
    assert widths(small) == [(3, 31), (31, 45), (45, 5)]


def test_a_width_stays_where_whole_blocks_would_be_more_work():
    _, small = compiled(chain((64, 64), (17, 17), kernel=1, shift=0.0), images(56))
    assert widths(small) == [(3, 17), (17, 17), (17, 5)]


def test_depthwise_layers_get_a_multiple_of_the_alignment():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 1),
        Mask(32, 13, 0.5),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU6(),
        nn.Conv2d(32, 7, 1),
    ).double()
    program, small = compiled(network, images())
    assert widths(small) == [(3, 16), (16, 16), (16, 7)]
    assert_same(program, small)


def test_a_width_does_not_grow_beyond_what_the_network_had():
    program, small = compiled(chain((38, 50, 63), (37, 47, 61), shift=0.0), images())
    assert [outputs for _, outputs in widths(small)] == [37, 48, 61, 5]
    assert_same(program, small)


def test_unread_channels_fill_a_width_with_their_own_weights():
    network = chain((64,), (64,), shift=0.0)
    with torch.no_grad():
        network[-1].weight[:, torch.randperm(64)[:19]] = 0.0
    network.append(nn.Conv2d(5, 5, 1).double())
    program, small = compiled(network, images(4))
    assert widths(small)[0][1] in (45, 48)
    assert_same(program, small)


class Joined(nn.Module):
    """A stream with two branches, added and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = (
            nn.Conv2d(3, 96, 3),
            nn.Conv2d(96, 96, 3, padding=1),
            nn.Conv2d(96, 96, 1),
        )
        self.masks = nn.ModuleList([Mask(96, 35, 0.1), Mask(96, 35, 0.2), Mask(96, 21, 0.3)])
        self.last = nn.Conv2d(192, 4, 3, padding=1)

    def forward(self, x):
        x = self.masks[0](self.stem(x)).relu()
        y = x + self.masks[1](self.left(x))
        return self.last(torch.cat([y.relu(), self.masks[2](self.right(x))], 1))


def test_sums_and_concatenations_grow_together_with_what_they_join():
    program, small = compiled(Joined().double(), images())
    _, minimal = compiled(Joined().double(), images(), target=None)
    assert seconds(small, AVX512) < seconds(minimal, AVX512)
    stem, _, right, last = widths(small)
    assert stem[1] % 4 == 0
    assert last[0] == stem[1] + right[1]
    assert_same(program, small)


@settings(max_examples=8, deadline=None)
@example(kept=[8, 1], kernel=3, size=32, shift=0.5, target="cpu-avx2")
@given(
    kept=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    kernel=st.sampled_from([1, 3]),
    size=st.sampled_from([4, 9, 32]),
    shift=st.sampled_from([0.0, 0.5]),
    target=st.sampled_from([name for name, target in TARGETS.items() if target]),
)
def test_any_widths_are_exact_and_estimated_no_slower(kept, kernel, size, shift, target):
    network = chain((40,) * len(kept), kept, kernel, shift)
    program, small = compiled(network, images(size), target=TARGETS[target])
    _, minimal = compiled(network, images(size), target=None)
    estimates = [
        [seconds(which, TARGETS[target], hopeful) for which in (small, minimal)] for hopeful in (True, False)
    ]
    assert any(
        own <= fewest for own, fewest in estimates
    )  # widths are judged by the first, constant maps by the second
    assert_same(program, small)


def test_widening_again_changes_nothing():
    _, small = compiled(chain((64, 64), (31, 45)), images())
    again = default_pipeline(target=AVX512)(small.replace(pinned={})).program
    assert widths(again) == widths(small)


def test_callbacks_see_one_run_of_the_passes():
    seen = []
    program = capture(chain((64,), (31,)), images())
    result = default_pipeline(target=AVX512).with_callback(seen.append)(program)
    assert seen[0].before.graph is program.graph
    assert seen[-1].after is result.program
    assert sum(step.name == "remove_dead" for step in seen) == 1


def test_less_than_a_block_grows_to_a_block_where_it_would_be_unpacked_in_between():
    program, small = compiled(chain((64, 64), (40, 9), kernel=1, shift=0.25), images(28))
    assert widths(small)[1][1] == 16
    assert_same(program, small)


def test_the_table_says_what_was_measured():
    layer = Layer(spatial_rank=2, taps=9, positions=28 * 28)
    assert AVX512.seconds(layer, 32, 32) < AVX512.seconds(layer, 30, 30)
    assert AVX512.seconds(layer, 33, 33) < AVX512.seconds(layer, 36, 36)
    assert AVX512.seconds(layer, 48, 48) < AVX512.seconds(layer, 45, 45)
    assert AVX512.seconds(layer, 20, 20) == AVX512.seconds(layer, 32, 32)


def test_channels_in_front_of_a_pool_fill_their_blocks():
    pooled = chain((64, 64), (20, 40), kernel=1, shift=0.0)
    pooled.insert(3, nn.MaxPool2d(3, padding=1, stride=1))
    program, small = compiled(pooled, images(56))
    assert widths(small)[0] == (3, 32)
    assert_same(program, small)
    plain = chain((64, 64), (20, 40), kernel=1, shift=0.0)
    assert widths(compiled(plain, images(56))[1])[0] == (3, 20)


def test_few_channels_in_front_of_a_pool_stay_few():
    torch.manual_seed(0)
    lenet = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), Mask(20, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), Mask(50, 18), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 300)),
    ).double()
    _, small = compiled(lenet, torch.randn(2, 1, 28, 28, dtype=torch.float64))
    assert widths(small) == [(1, 3), (3, 18), (288, 300)]


def test_an_average_over_everything_asks_for_no_blocks():
    averaged = chain((64,), (20,), kernel=1, shift=0.0)
    averaged.insert(3, nn.AdaptiveAvgPool2d(1))
    program, small = compiled(averaged, images(56))
    assert widths(small)[0] == (3, 20)
    assert_same(program, small)


class Branches(nn.Module):
    """Two layers side by side, concatenated or added, and something that is done to each before."""

    def __init__(self, before: nn.Module, *, added: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        kept = (20, 20) if added else (32, 28)
        self.left, self.right = (nn.Sequential(nn.Conv2d(3, 64, 1), Mask(64, n), before) for n in kept)
        self.last = nn.Conv2d(64 if added else 128, 16, 1)
        self.added = added

    def forward(self, x):
        parts = self.left(x), self.right(x)
        return self.last(sum(parts) if self.added else torch.cat(parts, 1))


def test_what_is_concatenated_fills_its_blocks_where_little_is_missing():
    program, small = compiled(Branches(nn.ReLU()).double(), images(56))
    assert widths(small) == [(3, 32), (3, 32), (64, 16)]
    assert_same(program, small)


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.LeakyReLU()])
def test_activations_that_run_on_packed_channels_count_no_unpacking(activation):
    _, small = compiled(Branches(activation, added=True).double(), images(14), target=None)
    _, unpacked = compiled(Branches(nn.ELU(), added=True).double(), images(14), target=None)
    assert seconds(small, AVX512) < seconds(unpacked, AVX512)


class Uneven(nn.Module):
    """Depthwise layers with padding behind channels that all hold other constants."""

    def __init__(self, *stages) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts, inputs = [], 3
        for width, kept in stages:
            shift = torch.randn(1, width, 1, 1).abs()
            masks = Mask(width, kept), Mask(width, kept)
            for mask in masks:
                mask.shift = shift
            parts += [nn.Conv2d(inputs, width, 1), masks[0], nn.ReLU()]
            parts += [nn.Conv2d(width, width, 3, padding=1, groups=width), masks[1], nn.ReLU()]
            inputs = width
        self.parts = nn.Sequential(*parts, nn.Conv2d(inputs, 5, 1)).double()

    def forward(self, x):
        return self.parts(x)


def test_channels_that_fill_a_width_stand_for_constants_as_well():
    program, small = compiled(Uneven((16, 6)), images(16))
    assert widths(small) == [(3, 16), (16, 16), (16, 5)]
    assert not any(node.target is torch.ops.aten.add.Tensor for node in small.calls()), "no map beside them"
    assert_same(program, small)


def test_layers_are_packed_together_where_none_would_be_alone():
    program, small = compiled(chain((128,) * 4, (29, 57, 29, 57), kernel=1, shift=0.0), images(28))
    assert widths(small) == [(3, 32), (32, 60), (60, 32), (32, 60), (60, 5)]
    assert_same(program, small)


class Doubled(nn.Module):
    def forward(self, x):
        return x + x + 1.0


def test_a_sum_of_one_value_with_itself_or_a_number_is_no_map():
    program, small = compiled(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled()).double(), images())
    assert maps(small) == 0
    assert_same(program, small)


def maps(program):
    return sum(map_behind(program, node) is not None for node in program.calls())


@pytest.mark.parametrize(("kept", "width"), [(20, 21), (28, 32), (45, 48)])
def test_a_channel_more_stands_for_constants_where_that_is_faster_than_a_map(kept, width):
    program, small = compiled(chain((64, 64), (kept, kept)), images(32))
    assert maps(small) == 0
    assert widths(small)[1][0] == width
    assert_same(program, small)


def test_constants_are_a_map_where_a_channel_more_would_begin_a_block():
    program, small = compiled(chain((64, 64), (32, 32)), images(32))
    assert maps(small) == 1
    assert widths(small)[1][0] == 32
    assert_same(program, small)


def test_every_map_stays_where_the_cost_model_is_the_users():
    program = capture(chain((64, 64), (20, 20)), images(32))
    small = default_pipeline(FewestMacs(), target=AVX512)(program).program
    assert maps(small) == 1


def test_a_width_is_reached_although_some_channels_stay_only_for_constants():
    program, small = compiled(Uneven((16, 6), (32, 11)), images(16))
    assert [outputs % 4 for _, outputs in widths(small)[:-1]] == [0] * 4
    assert_same(program, small)
