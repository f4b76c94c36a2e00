"""What is read at a few positions is computed there only, though others need what it is added to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import CountingModel, FewestCalls, default_pipeline
from passes.targets import AVX512
from tests.passes.support import assert_same, capture, shapes_of, targets_of
from tests.passes.test_separate_edges import Free
from tests.passes.test_shrinking import Mask

LENGTH, WIDTH = 6, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        query, key, value = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron with norms in front, or behind the sums; a mask on what the perceptron reads."""

    def __init__(self, first=True, mask=False):
        super().__init__()
        self.first, self.attention = first, Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.expand, self.project = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.mask = Mask(WIDTH, 5, 2) if mask else nn.Identity()

    def feed(self, x):
        return self.project(F.gelu(self.expand(self.mask(x))))

    def forward(self, x):
        one, two = self.norms
        if self.first:
            x = x + self.attention(one(x))
            return x + self.feed(two(x))
        x = one(x + self.attention(x))
        return two(x + self.feed(x))


class Reader(nn.Module):
    """A layer, a body, and a head on what `reads` takes of it."""

    def __init__(self, body, reads):
        super().__init__()
        self.entry, self.body, self.head, self.reads = nn.Linear(3, WIDTH), body, nn.Linear(WIDTH, 2), reads

    def forward(self, x):
        return self.head(self.reads(self.body(self.entry(x))))


def positions(program):
    """At how many positions each layer runs, by its weight's name."""
    found = {}
    for node in program.calls():
        if node.target is torch.ops.aten.linear.default:
            sizes = program.infos[node].sizes
            found[str(node.args[1].target).removesuffix(".weight")] = sizes[1] if len(sizes) == 3 else 1
    return found


def check(module, *inputs, cost=None):
    """Compile, compare with the original at two sizes and return the small Program; once more changes nothing."""
    original = capture(module, *inputs)
    small = default_pipeline(cost or Free())(original).program
    small.lint()
    assert_same(original, small)
    again = default_pipeline(cost or Free())(small).program
    assert targets_of(again) == targets_of(small)
    assert positions(again) == positions(small)
    return small


X = torch.randn(2, LENGTH, 3)


def first(x):
    return x[:, 0]


@pytest.mark.parametrize("norms_first", [True, False])
def test_the_last_block_runs_at_the_class_token_only(norms_first):
    found = positions(check(Reader(nn.Sequential(Block(norms_first), Block(norms_first)), first), X))
    alone = {"query", "out"}
    for layer in ("query", "key", "value", "out"):
        assert found[f"body.0.attention.{layer}"] == LENGTH
        assert found[f"body.1.attention.{layer}"] == (1 if layer in alone else LENGTH)
    assert found["body.0.expand"] == found["body.0.project"] == LENGTH
    assert found["body.1.expand"] == found["body.1.project"] == 1


def test_several_positions_are_gathered_together():
    found = positions(check(Reader(Block(), lambda x: x[:, 0] + x[:, 3]), X))
    assert found["body.expand"] == found["body.attention.query"] == 2


def test_the_mean_over_all_positions_needs_all_of_them():
    found = positions(check(Reader(Block(), lambda x: x.mean(1)), X))
    assert set(found.values()) == {LENGTH, 1}
    assert found["body.expand"] == LENGTH


def test_masked_channels_go_at_the_positions_that_stay():
    small = check(Reader(nn.Sequential(Block(), Block(mask=True)), first), X)
    assert positions(small)["body.1.expand"] == 1
    assert shapes_of(small)["body.1.expand.weight"] == (16, 5)


def test_the_last_step_of_a_recurrent_layer_is_all_that_the_layers_behind_it_see():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.hidden = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.tanh(self.hidden(self.cells(x)[0]))

    found = positions(check(Reader(Recurrent(), lambda x: x[:, -1]), X))
    assert found["body.hidden"] == 1
    assert found["entry"] == LENGTH


def test_an_input_is_read_where_it_is_needed():
    assert positions(check(Reader(nn.Identity(), first), X))["entry"] == 1


def test_constants_at_the_other_positions_stay_in_the_sums_that_others_read():
    class Two(nn.Module):
        """A stream with constant channels that one reader sees at one position and another as a whole."""

        def __init__(self):
            super().__init__()
            self.mask, self.block, self.all = Mask(WIDTH, 4, 2), Block(), nn.Linear(WIDTH, 3)

        def forward(self, x):
            x = torch.sigmoid(self.mask(x))
            return torch.cat([self.block(x)[:, 0], self.all(x).mean(1)], 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry, self.two = nn.Linear(3, WIDTH), Two()

        def forward(self, x):
            return self.two(self.entry(x))

    found = positions(check(Net(), X))
    assert found["two.block.expand"] == 1
    assert found["two.all"] == LENGTH


def test_where_no_gather_pays_all_positions_stay():
    small = check(Reader(Block(), first), X, cost=FewestCalls())
    assert positions(small)["body.expand"] == LENGTH


def test_it_is_the_multiply_adds_saved_that_pay():
    assert positions(check(Reader(Block(), first), X, cost=CountingModel()))["body.expand"] == LENGTH
    wide = Reader(nn.Sequential(Block()), first)
    wide.body[0].expand, wide.body[0].project = nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH)
    assert positions(check(wide, X, cost=CountingModel()))["body.0.expand"] == 1


class Branches(nn.Module):
    """Small layers whose sum is read at one position, and what they read at all of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x):
        total = x = torch.sigmoid(x)
        for layer in self.layers:
            total = total + layer(x).relu()
        return total[:, 0], x.mean(1)


def test_gathers_that_are_in_the_way_by_far_go_where_a_target_says_so():
    program = capture(Branches().double(), torch.randn(2, 5, 64, dtype=torch.float64))
    gathers = [
        targets_of(default_pipeline(target=target)(program).program).count(
            torch.ops.aten.index_select.default
        )
        for target in (None, AVX512)
    ]
    assert gathers[0] > 0
    assert gathers[1] == 0
