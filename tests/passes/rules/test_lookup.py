"""Embeddings: columns that a mask leaves constant or that nobody reads go from the table."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
MASK = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0])
SHIFT = torch.linspace(0.1, 1.0, 6)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Looked(nn.Module):
    """A table of 4 rows and 6 columns, a function of what is looked up, a linear layer."""

    def __init__(self, function=lambda self, x: x):
        super().__init__()
        self.table, self.out = nn.Embedding(4, 6, padding_idx=0), nn.Linear(6, 3)
        nn.init.normal_(self.table.weight)
        self.register_buffer("mask", MASK)
        self.register_buffer("shift", SHIFT)
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.function(self, self.table(tokens)))


TOKENS = torch.randint(0, 4, (3, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * self.mask,
        lambda self, x: x * self.mask + self.shift,
        lambda self, x: torch.relu(x * self.mask + self.shift),
        lambda self, x: torch.tanh(x * self.mask) * 2.0,
    ],
    ids=["mask", "mask and shift", "behind a relu", "scaled later"],
)
def test_masked_columns_go(function):
    assert shapes_of(check(Looked(function), TOKENS))["table.weight"] == (4, 3)


def test_columns_that_are_the_same_in_every_row_go():
    network = Looked()
    with torch.no_grad():
        network.table.weight[:, 2] = 0.7
        network.table.weight[:, 4] = 0.0
    assert shapes_of(check(network, TOKENS))["table.weight"] == (4, 4)


def test_columns_that_nobody_reads_go():
    network = Looked()
    with torch.no_grad():
        network.out.weight[:, 1::2] = 0.0
    assert shapes_of(check(network, TOKENS))["table.weight"] == (4, 3)


def test_a_mask_on_the_table_itself_is_a_mask():
    class Masked(Looked):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(F.embedding(tokens, self.table.weight * self.mask))

    result = check(Masked(), TOKENS)
    assert shapes_of(result)["out.weight"] == (3, 3)


def test_a_scale_goes_into_the_table():
    result = check(Looked(lambda self, x: torch.tanh(x * (self.shift + 1.0))), TOKENS)
    assert targets_of(result) == [aten.embedding.default, aten.tanh.default, aten.linear.default]


class Tied(nn.Module):
    """One parameter as the table and as the weight of the last layer."""

    def __init__(self, function):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("mask", MASK)
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.function(self, self.table(tokens)))


def test_a_tied_table_stays_one_constant_where_both_keep_the_same_columns():
    result = check(Tied(lambda self, x: torch.tanh(x) * (self.mask > 0)), TOKENS)
    weights = {name: shape for name, shape in shapes_of(result).items() if len(shape) == 2}
    assert set(weights.values()) == {(7, 3)}


def test_a_scale_is_not_folded_into_a_table_that_something_else_reads():
    result = check(Tied(lambda self, x: torch.tanh(x * 2.0)), TOKENS)
    weights = {name: shape for name, shape in shapes_of(result).items() if len(shape) == 2}
    assert list(weights.values()) == [(7, 6)]


def test_a_tied_table_is_right_where_its_readers_keep_other_columns():
    class Hidden(Tied):
        def __init__(self):
            super().__init__(None)
            self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.second(torch.relu(self.first(self.table(tokens) * self.mask)))
            return self.out(hidden * self.mask.flip(0))

    result = check(Hidden(), TOKENS)
    weights = [shape for shape in shapes_of(result).values() if shape == (7, 3)]
    assert len(weights) == 2


class Bags(nn.Module):
    """The sum, mean or maximum of the rows of a bag."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(9, 6, mode=mode), nn.Linear(6, 3)
        self.register_buffer("mask", MASK)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(tokens)) * self.mask)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_keep_the_columns_that_are_read(mode):
    result = check(Bags(mode), TOKENS, dynamic=False)
    assert shapes_of(result)["table.weight"] == (9, 3)


def test_embeddings_that_are_added_keep_what_their_sum_needs():
    class Sentence(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.kinds = nn.Embedding(11, 8), nn.Embedding(5, 8), nn.Embedding(2, 8)
            self.out = nn.Linear(8, 3)
            self.register_buffer("mask", (torch.arange(8) < 3).float())

        def forward(self, tokens, kinds):
            places = torch.arange(tokens.shape[1], device=tokens.device)
            total = self.words(tokens) + self.places(places) + self.kinds(kinds)
            return self.out(torch.tanh(total) * self.mask)

    tokens = torch.randint(0, 2, (3, 5))
    result = check(Sentence(), tokens, tokens.flip(0))
    shapes = shapes_of(result)
    assert shapes["words.weight"] == (11, 3)
    assert shapes["kinds.weight"] == (2, 3)
