"""What is moved several times in a row is moved once, and what did not move is not moved at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import Pipeline
from passes.canonicalize import Canonicalize
from passes.compose_readings import ComposeReadings
from tests.passes.support import assert_same, capture, check, targets_of

aten = torch.ops.aten
DIALECT = Pipeline((Canonicalize(), Canonicalize(), ComposeReadings(), Canonicalize()))


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.run = forward

    def forward(self, x):
        return self.run(x)


def calls(forward, *shape, dynamic=True):
    """The operators left of a function of one input, named without their namespace; the result is compared."""
    program = capture(Net(forward), torch.randn(shape), dynamic=dynamic)
    composed = DIALECT(program).program
    assert_same(program, composed)
    assert not ComposeReadings()(composed).changed
    return [str(target).removeprefix("aten.").split(".")[0] for target in targets_of(composed)]


def shuffled(x, groups):
    batch, channels, *rest = x.shape
    return x.view(batch, groups, channels // groups, *rest).transpose(1, 2).reshape(batch, channels, *rest)


def pair(x):
    return torch.cat([x + 1, x * 2], 1)


def test_the_only_entry_of_an_axis_is_read_as_it_is():
    assert calls(lambda x: x.mean(1, keepdim=True)[:, 0], 2, 8) == ["mean", "select"]


@pytest.mark.parametrize(
    ("forward", "wanted"),
    [
        (lambda x: x[:, 1:7][:, 2:4], ["slice"]),
        (lambda x: x[:, 1:7][:, [3, 0]], ["index_select"]),
        (lambda x: x.flip(1).flip(1) + 1, ["add"]),
        (lambda x: x[:, 2:][:, 3], ["select"]),
        (lambda x: x.roll(3, 1).roll(-3, 1) + 1, ["add"]),
        (lambda x: F.channel_shuffle(F.channel_shuffle(x, 2), 4) + 1, ["add"]),
        (lambda x: pair(x)[:, 8:], ["mul"]),
        (lambda x: pair(x)[:, 10:12], ["mul", "slice"]),
        (lambda x: pair(x).chunk(2, 1)[0], ["add"]),
        (lambda x: pair(x)[:, 6:10], ["add", "mul", "slice", "slice", "cat"]),
        (lambda x: pair(x)[:, 9], ["mul", "select"]),
        (lambda x: torch.cat([pair(x), x], 1), ["add", "mul", "cat"]),
        (lambda x: torch.cat(x.split([2, 3, 3], 1), 1) + 1, ["add"]),
        (lambda x: torch.cat([x[:, 1:3], x[:, 3:6], x[:, 6:]], 1), ["slice"]),
        (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), ["index_select"]),
        (lambda x: torch.cat([x[:, :4], x[:, 4:] + 1], 1), ["slice", "slice", "add", "cat"]),
        (lambda x: torch.stack([x + 1, x * 2], 2)[:, :, 1], ["mul"]),
        (lambda x: torch.stack([x + 1, x * 2], 1).unbind(1)[0], ["add"]),
        (lambda x: shuffled(x, 2), ["index_select"]),
        (lambda x: shuffled(shuffled(x, 2), 4) + 1, ["add"]),
        (lambda x: shuffled(pair(x), 2)[:, :4], ["add", "mul", "cat", "index_select"]),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1, ["add"]),
        (
            lambda x: x.view(-1, 2, 4, 4, 4).permute(0, 2, 1, 4, 3).reshape(-1, 8, 4, 4),
            ["reshape", "permute", "reshape"],
        ),
        (lambda x: x.unsqueeze(1).squeeze(1) + 1, ["add"]),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_is_moved_several_times_is_moved_once(forward, wanted, dynamic):
    assert calls(forward, 2, 8, 4, 4, dynamic=dynamic) == wanted


def test_axes_that_do_not_divide_are_no_chain():
    assert calls(lambda x: x.flatten(1).reshape(-1, 10, 3), 2, 5, 6) == ["reshape", "reshape"]


def test_a_concatenation_that_others_read_is_joined_as_it_is():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 + number, 1, 1) for number in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat((x, torch.relu(layer(x))), 1)
            return x

    small = check(Dense(), torch.randn(2, 3, 4, 4))
    joined = [node for node in small.calls() if node.target is aten.cat.default]
    assert [len(node.args[0]) for node in joined] == [2] * 12


def again(back):
    """Reads a value that has moved back to itself, in pieces, and forth once more."""
    return torch.cat([back.flip(1)[:, :3], back[:, 2:5]], 1) + torch.cat([back[:, 2:], back[:, :2]], 1)[:, :6]


@pytest.mark.parametrize(
    "back",
    [
        lambda x: x.flip(1).flip(1),
        lambda x: x[:, [1, 2, 0, 4, 5, 3]][:, [2, 0, 1, 5, 3, 4]],
        lambda x: torch.cat(x.split(2, 1), 1),
        lambda x: F.channel_shuffle(F.channel_shuffle(x, 2), 3),
    ],
    ids=["flip", "permutation", "split", "shuffle"],
)
def test_what_has_moved_back_to_itself_is_read_as_itself(back):
    assert calls(lambda x: again(back(x)), 3, 6, 4) == calls(again, 3, 6, 4)
