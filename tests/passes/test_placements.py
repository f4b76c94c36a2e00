"""Operators that only move entries have one spelling, and pruned channels pass through it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import Pipeline
from passes.canonicalize import Canonicalize
from passes.compose_readings import ComposeReadings
from tests.passes.support import assert_same, capture, check, shapes_of, targets_of

DIALECT = Pipeline((Canonicalize(), Canonicalize(), ComposeReadings(), Canonicalize()))
PLACES = torch.tensor([[0, 1], [3, 2]])


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.run = forward

    def forward(self, x):
        return self.run(x)


def put(index, value):
    def forward(x):
        copy = x.clone()
        copy[index] = value(x)
        return copy

    return forward


EVERY = slice(None)
CASES = [
    (lambda x: F.channel_shuffle(x, 2), ["index_select"]),
    (lambda x: x[:, PLACES], ["index_select", "reshape"]),
    (lambda x: x[:, :, PLACES, PLACES], ["reshape", "index_select", "reshape"]),
    (lambda x: x[:, PLACES, :, PLACES], ["permute", "reshape", "index_select", "reshape"]),
    (lambda x: x[:, PLACES, :, torch.tensor([1, 0])], ["permute", "reshape", "index_select", "reshape"]),
    (lambda x: x[:, [-1, 0]], ["index_select"]),
    (lambda x: x[:, torch.tensor(3)], ["select"]),
    (lambda x: x[:, torch.tensor([True, False] * 4)], ["index_select"]),
    (lambda x: x[:, :, torch.eye(4) > 0], ["reshape", "index_select"]),
    (lambda x: x.repeat_interleave(2, 1), ["index_select"]),
    (lambda x: x.repeat_interleave(2, 2), ["index_select"]),
    (lambda x: x.tile(2, 1, 1), ["repeat"]),
    (lambda x: x.rot90(1, (2, 3)), ["flip", "transpose"]),
    (lambda x: x.rot90(-1, (1, 3)), ["flip", "transpose"]),
    (lambda x: x.rot90(2, (1, 3)), ["flip"]),
    (lambda x: torch.slice_scatter(x, x[:, :2], 1, 6), ["index_select"]),
    (lambda x: torch.slice_scatter(x, x[:, :2] + 1, 1, 6), ["slice", "add", "slice", "cat"]),
    (lambda x: torch.slice_scatter(x, x[:, :3], 1, 1, 7, 2), ["index_select"]),
    (lambda x: torch.select_scatter(x, x[:, 0] + 1, 1, 0), ["select", "add", "unsqueeze", "slice", "cat"]),
    (put((EVERY, slice(0, 2)), lambda x: 1.0), ["slice", "fill", "slice", "cat"]),
    (put((EVERY, torch.tensor([5, 2])), lambda x: x[:, :2] * 2), ["slice", "mul", "cat", "index_select"]),
    (put((EVERY, 3), lambda x: x[:, 0] * 2), ["select", "mul", "unsqueeze", "slice", "slice", "cat"]),
]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("forward", "wanted"), CASES)
def test_moving_entries_has_one_spelling(forward, wanted, dynamic):
    program = capture(Net(forward), torch.randn(2, 8, 4, 4), dynamic=dynamic)
    result = DIALECT(program).program
    assert_same(program, result)
    assert [str(target).split(".")[1] for target in targets_of(result)] == wanted


@pytest.mark.parametrize("expanded", [True, False])
def test_a_constant_gather_that_is_the_same_everywhere_reads_whole_channels(expanded):
    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 2, 1)
            self.index = torch.tensor([6, 1, 2]).view(1, 3, 1, 1)

        def forward(self, x):
            x, sizes = self.first(x).relu(), (x.shape[0] if expanded else 2, 3, 4, 4)
            return self.second(torch.gather(x, 1, self.index.expand(sizes)))

    result = check(Gathered(), torch.randn(2, 3, 4, 4), dynamic=expanded)
    assert shapes_of(result)["first.weight"] == (3, 3, 1, 1)


def test_one_place_that_is_expanded_along_the_axis_is_read_as_often():
    place = torch.tensor([[[[2]]]])
    result = check(Net(lambda x: x.gather(3, place.expand(x.shape[0], 8, 4, 3))), torch.randn(2, 8, 4, 4))
    [(sizes, _)] = [(info.sizes, node) for node, info in result.infos.items() if node in result.outputs]
    assert sizes == (2, 8, 4, 3)


def test_repeating_the_batch_repeats_a_new_axis():
    program = capture(Net(lambda x: x.repeat_interleave(2, 0)), torch.randn(2, 8, 4, 4))
    result = DIALECT(program).program
    assert_same(program, result)
    assert [str(target).split(".")[1] for target in targets_of(result)] == ["unsqueeze", "expand", "reshape"]


def test_what_only_the_input_decides_is_left_alone():
    program = capture(Net(lambda x: x.gather(1, (x > 0).long())), torch.randn(2, 8, 4, 4))
    assert "gather" in str(targets_of(DIALECT(program).program))


NUMBERS = [
    put((EVERY, torch.tensor([1, 4, 6])), lambda x: 0.0),
    put((EVERY, [-2, 4, 1, 1]), lambda x: 0.0),
    put((EVERY, torch.tensor([False, True, False, False, True, False, True, False])), lambda x: 0.5),
    put((EVERY, [6, 1, 4]), lambda x: torch.tensor([1.0, 2.0, -3.0]).view(3, 1, 1)),
    lambda x: x.index_fill(1, torch.tensor([1, 4, 6]), 2.0),
    lambda x: x.index_fill(-3, torch.tensor([1, 4, 6]), torch.tensor(2.0)),
    lambda x: x.scatter(1, torch.tensor([1, 4, 6]).view(1, 3, 1, 1).expand(x.shape[0], 3, 4, 4), 0.5),
    lambda x: put((EVERY, [1, 4, 6]), lambda x: 1.0)(put(x < 0, lambda x: 0.0)(x)),
]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("assign", NUMBERS)
def test_channels_that_are_assigned_a_number_go(assign, dynamic):
    class Assigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.second(assign(self.first(x)))

    result = check(Assigned(), torch.randn(2, 3, 4, 4), dynamic=dynamic)
    assert shapes_of(result)["first.weight"] == (5, 3, 1, 1)


MORE_CHOICES = [
    (put((EVERY, EVERY, torch.eye(4) > 0), lambda x: 0.0), ["masked_fill"]),
    (put((EVERY, PLACES, PLACES), lambda x: 2.0), ["masked_fill"]),
    (lambda x: put(x > 0, lambda x: 2.0)(x), ["gt", "where"]),
    (
        lambda x: put(x[:, :, 0, 0] > 0, lambda x: 2.0)(x),
        ["select", "select", "gt", "unsqueeze", "unsqueeze", "where"],
    ),
    (lambda x: x.index_copy(1, torch.tensor([5, 2]), x[:, :2] * 2), ["slice", "mul", "cat", "index_select"]),
    (
        lambda x: x.scatter(
            1, torch.tensor([5, 2]).view(1, 2, 1, 1).expand(x.shape[0], 2, 4, 4), x[:, :2] * 2
        ),
        ["slice", "mul", "cat", "index_select"],
    ),
]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("forward", "wanted"), MORE_CHOICES)
def test_putting_numbers_and_values_at_constant_places_has_a_spelling(forward, wanted, dynamic):
    test_moving_entries_has_one_spelling(forward, wanted, dynamic)


KEPT = [
    put(
        (EVERY, [1, 1]), lambda x: torch.tensor([1.0, 2.0]).view(2, 1, 1)
    ),  # which of them stays is not defined
    lambda x: torch.ops.aten.index_put(x, [None, torch.tensor([1, 1])], x[:, :2], True),
    lambda x: x.scatter(
        1, torch.tensor([1, 4]).view(1, 2, 1, 1).expand(1, 2, 4, 4), 0.5
    ),  # the first of the batch
]


@pytest.mark.parametrize("forward", KEPT)
def test_what_is_put_at_places_of_no_constant_mask_is_left_alone(forward):
    program = capture(Net(forward), torch.randn(2, 8, 4, 4))
    result = DIALECT(program).program
    assert_same(program, result)
    assert not {"masked_fill", "where", "cat"} & {str(target).split(".")[1] for target in targets_of(result)}
