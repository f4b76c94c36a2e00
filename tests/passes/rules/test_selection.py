"""Slices, selections, flips, expansions: the operand keeps what is read, the positions are renumbered."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import Input, Program, default_pipeline
from tests.passes.support import check, run, shapes_of, targets_of

aten = torch.ops.aten
KEPT = [0, 1, 3, 4, 6]


class Net(nn.Module):
    """A masked convolution to 8 channels, one operator, and a convolution."""

    def __init__(self, middle, inputs, kept=KEPT):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(inputs, 2, 1)
        self.mask, self.middle = torch.zeros(8).index_fill(0, torch.tensor(kept), 1.0), middle

    def forward(self, x):
        return self.out(self.middle(F.relu(self.conv(x)) * self.mask[:, None, None]))


def compiled(middle, inputs, kept=KEPT, dynamic=True):
    """(channels of the first convolution, inputs of the second, operators between) after compilation."""
    result = check(Net(middle, inputs, kept), torch.randn(2, 3, 4, 4), dynamic=dynamic)
    shapes = shapes_of(result)
    between = [
        target for target in targets_of(result) if target not in (aten.conv2d.default, aten.relu.default)
    ]
    return shapes["conv.weight"][0], shapes["out.weight"][1], between


@pytest.mark.parametrize(
    ("middle", "inputs", "wanted"),
    [
        (lambda x: x[:, :4], 4, (3, 3, [])),
        (lambda x: x[:, 2:], 6, (3, 3, [])),
        (lambda x: x[:, -5:-1], 4, (3, 3, [])),
        (lambda x: x[:, 3:99], 5, (3, 3, [])),
        (lambda x: x[:, ::3], 3, (3, 3, [])),
        (lambda x: x[:, [6, 2, 0, 0]], 4, (2, 2, [])),
        (lambda x: x[:, [1, 2, 4, 5]], 4, (2, 2, [])),
        (lambda x: torch.index_select(x, 1, torch.tensor([4, 3])), 2, (2, 2, [])),
        (lambda x: x.select(1, 3).unsqueeze(1), 1, (1, 1, [aten.select.int, aten.unsqueeze.default])),
        (lambda x: x[:, -2][:, None], 1, (1, 1, [aten.select.int, aten.unsqueeze.default])),
        (lambda x: x.flip(1), 8, (5, 5, [])),
        (lambda x: x.flip((2, 3)), 8, (5, 5, [aten.flip.default])),
        (lambda x: x.roll(2, 1), 8, (5, 5, [])),
        (lambda x: x.roll((1, 2), (2, 3)), 8, (5, 5, [aten.roll.default])),
        (lambda x: x.repeat(1, 2, 1, 1), 16, (5, 5, [])),
        (lambda x: x.narrow(1, 4, 3), 3, (2, 2, [])),
        (lambda x: x[:, :, 1:3, ::2], 8, (5, 5, [aten.slice.Tensor, aten.slice.Tensor])),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_only_what_is_read_is_kept_and_an_identity_is_not_emitted(middle, inputs, wanted, dynamic):
    assert compiled(middle, inputs, dynamic=dynamic) == wanted


def test_a_slice_of_an_operand_with_other_readers_becomes_a_slice_in_the_new_numbering():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out, self.rest = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
            self.mask = torch.zeros(8).index_fill(0, torch.tensor(KEPT), 1.0)[:, None, None]

        def forward(self, x):
            first, second = (F.relu(self.conv(x)) * self.mask).chunk(2, 1)
            return self.out(first), self.rest(second)

    result = check(Halves(), torch.randn(2, 3, 4, 4))
    slices = [tuple(node.args[1:]) for node in result.calls() if node.target is aten.slice.Tensor]
    assert slices == [(1, 0, 3, 1), (1, 3, 5, 1)]
    assert shapes_of(result)["rest.weight"] == (2, 2, 1, 1)


def test_unbound_pieces_shrink():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 2)
            self.mask = torch.zeros(3, 8)
            self.mask[:, [1, 5]] = 1.0

        def forward(self, x):
            query, key, value = (self.qkv(x) * self.mask.flatten()).view(-1, 5, 3, 8).unbind(2)
            return self.out(F.relu(query) * key + value)

    shapes = shapes_of(check(Pieces(), torch.randn(2, 5, 3)))
    assert shapes["qkv.weight"] == (6, 3)
    assert shapes["out.weight"] == (2, 2)


def test_an_expanded_channel_keeps_what_its_reader_keeps():
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.mask = torch.zeros(8).index_fill(0, torch.tensor(KEPT), 1.0)[:, None, None]

        def forward(self, x):
            level = x.mean((1, 2, 3), keepdim=True).expand(-1, 8, 4, 4)
            return self.out(level.sigmoid() * self.conv(x) * self.mask)

    result = check(Brightness(), torch.randn(2, 3, 4, 4))
    assert shapes_of(result)["out.weight"] == (2, len(KEPT), 1, 1)
    sizes = [node.args[1] for node in result.calls() if node.target is aten.expand.default]
    assert sizes == [[-1, len(KEPT), 4, 4]]


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x[1:],
        lambda x: x[-1:].expand(x.shape[0], -1, -1, -1),
        lambda x: x[0].unsqueeze(0),
        lambda x: x.flip(0),
        lambda x: x.repeat(2, 1, 1, 1),
    ],
)
def test_reading_along_the_batch_leaves_the_channels_free(middle):
    batch = torch.export.Dim("batch", min=4)
    result = check(Net(middle, 8), torch.randn(4, 3, 4, 4), dynamic=({0: batch},))
    assert shapes_of(result)["conv.weight"][0] == 5
    assert shapes_of(result)["out.weight"][1] == 5


def test_a_slice_that_only_looks_whole_at_the_example_sizes_is_not_dropped():
    graph = fx.Graph()
    x = graph.placeholder("x")
    cut = graph.call_function(aten.slice.Tensor, (x, 1, 0, 512))
    graph.output((graph.call_function(aten.relu.default, (cut,)),))
    program = Program(graph, {}, {}, (Input("x", torch.float32, (2, 96), (3, 128)),))
    result = default_pipeline()(program).program
    assert run(result, torch.randn(2, 600))[0].shape == (2, 512)


def test_a_repetition_of_a_constant_to_the_batch_is_exact():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.out = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.cat([self.token.repeat(x.shape[0], 1, 1), x], 1))

    check(Token(), torch.randn(2, 4, 6))
