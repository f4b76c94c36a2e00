import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import MergeNormalized, default_pipeline
from tests.passes.support import assert_same, capture, check, shapes_of, targets_of

aten = torch.ops.aten
WIDTH, LIVE, HIDDEN, HIDDEN_LIVE = 16, 6, 20, 8


class Block(nn.Module):
    """x + linear(gelu(linear(norm(x))) * mask) * mask."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.wide, self.narrow = norm, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("hidden", (torch.arange(HIDDEN) < HIDDEN_LIVE).float() * 0.7)

    def forward(self, x, mask):
        return x + self.narrow(F.gelu(self.wide(self.norm(x))) * self.hidden) * mask


class Stream(nn.Module):
    """A residual stream with masked channels, zero or constant, and norms along it."""

    def __init__(self, norm, constants=False, read=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.read = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), read
        self.blocks, self.norm = nn.ModuleList(Block(norm()) for _ in range(3)), norm()
        for vector in (value for value in self.parameters() if value.ndim == 1):
            vector.data = torch.rand(vector.shape) + 0.5
        self.register_buffer("mask", (torch.arange(WIDTH) % 8 < LIVE // 2).float())
        self.register_buffer("constants", torch.randn(WIDTH) * (self.mask == 0) * constants)

    def forward(self, x):
        x = self.first(x) * self.mask + self.constants
        for block in self.blocks:
            x = block(x, self.mask)
        return self.last(self.read(self.norm(x)))


def layer_norm():
    return nn.LayerNorm(WIDTH)


def rms_norm():
    return nn.RMSNorm(WIDTH)


@pytest.mark.parametrize(
    ("norm", "constants", "extra"),
    [(layer_norm, False, 1), (layer_norm, True, 2), (rms_norm, False, 0), (rms_norm, True, 1)],
    ids=["layer, zeros", "layer, constants", "rms, zeros", "rms, constants"],
)
def test_a_residual_stream_shrinks_but_for_channels_that_stand_for_its_constants(norm, constants, extra):
    shapes = shapes_of(check(Stream(norm, constants), torch.randn(2, 7, 5)))
    width = LIVE + extra
    assert shapes["first.weight"] == (width, 5)
    for block in range(3):
        assert shapes[f"blocks.{block}.wide.weight"] == (HIDDEN_LIVE, width)
        assert shapes[f"blocks.{block}.narrow.weight"] == (width, HIDDEN_LIVE)
    assert shapes["last.weight"] == (3, width)


READS = {
    "a token": lambda x: x[:, 0],
    "a slice": lambda x: x[:, 1:4],
    "a mean": lambda x: x.mean(1),
    "a view": lambda x: x.reshape(-1, 1, WIDTH),
    "a mean that keeps its axis": lambda x: x.mean(1, keepdim=True),
    "a permutation": lambda x: x.permute(1, 0, 2),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_layer_may_be_behind_what_treats_channels_alike(read):
    shapes = shapes_of(check(Stream(layer_norm, True, read), torch.randn(2, 7, 5)))
    assert shapes["last.weight"] == (3, LIVE + 2)


REFUSED = {
    "an activation": torch.relu,
    "a sum": lambda x: x.sum(1),
    "a mean of channels": lambda x: x - x.mean(-1, keepdim=True),
    "a slice of channels": lambda x: x[..., :12].repeat(1, 1, 2)[..., :WIDTH],
    "a view that splits channels": lambda x: x.reshape(-1, 7, 2, WIDTH // 2).transpose(2, 3).flatten(2),
}


@pytest.mark.parametrize("read", REFUSED.values(), ids=REFUSED)
def test_another_reader_keeps_the_norm_as_it_is(read):
    check(Stream(layer_norm, True, read), torch.randn(2, 7, 5))


def test_channels_first_with_a_norm_between_permutations():
    class Patches(nn.Module):
        def __init__(self, padding):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(12, 4, 2, 2, padding=padding)
            self.norm = nn.LayerNorm(12)
            self.norm.bias.data.normal_()
            self.register_buffer("mask", (torch.arange(12) % 3 == 0).float().view(12, 1, 1))

        def forward(self, x):
            x = (self.first(x) * self.mask).permute(0, 2, 3, 1)
            return self.last(self.norm(x).permute(0, 3, 1, 2))

    torch.manual_seed(0)
    assert shapes_of(check(Patches(0), torch.randn(2, 2, 8, 8)))["first.weight"][0] == 5
    assert shapes_of(check(Patches(1), torch.randn(2, 2, 8, 8)))["first.weight"][0] == 12


def test_constants_of_each_token_take_as_many_channels_as_they_are_independent():
    class Positions(Stream):
        def __init__(self, rank):
            super().__init__(layer_norm)
            positions = (torch.randn(7, rank) * 8).round() @ (torch.randn(rank, WIDTH) * 8).round()
            self.register_buffer("positions", positions * (self.mask == 0))

        def forward(self, x):
            return self.last(self.norm(self.first(x) * self.mask + self.positions))

    for rank in (1, 2):
        result = check(Positions(rank), torch.randn(2, 7, 5))
        assert shapes_of(result)["first.weight"][0] == LIVE + rank + 1


def test_the_pass_changes_no_value_and_is_done_after_one_run():
    program = capture(Stream(layer_norm, True), torch.randn(2, 7, 5))
    once = MergeNormalized()(program)
    assert once.changed
    assert len(once.notes) == 4
    assert_same(program, once.program)
    assert not MergeNormalized()(once.program).changed


def test_compiling_the_result_again_changes_nothing():
    for norm in (layer_norm, rms_norm):
        result = check(Stream(norm, True), torch.randn(2, 7, 5))
        again = default_pipeline()(result).program
        assert targets_of(again) == targets_of(result)
        assert shapes_of(again) == shapes_of(result)
