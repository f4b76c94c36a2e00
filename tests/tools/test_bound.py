import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sbp_compile.capture import export_module, program_from_export

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZE = 6
IMAGE = torch.zeros(2, 3, SIZE, SIZE)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bound

    yield bound
    sys.modules.pop("bound")


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer) if isinstance(layer, nn.Module) else self.register_buffer(name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def measured(tool, function, *inputs, **layers):
    """The bound of each layer of a random network, in the graph's order."""
    torch.manual_seed(0)
    for layer in layers.values():
        if isinstance(layer, nn.Module):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    inputs = [
        value if value.dtype == torch.int64 else torch.randn(value.shape) for value in inputs or (IMAGE,)
    ]
    network = Net(function, **layers).eval()
    return tool.bounds(program_from_export(export_module(network, tuple(inputs))), inputs)


def mask(channels, kept, rank=2):
    return (torch.arange(channels) < kept).float().view(channels, *[1] * rank)


def counts(bound):
    return bound.live_inputs, bound.standing, bound.live_outputs


def test_a_masked_channel_counts_in_neither_layer(tool):
    first, second = measured(
        tool,
        lambda net, x: net.b(F.relu(net.a(x) * net.mask)),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 4, 3),
        mask=mask(8, 5),
    )
    assert counts(first) == (3, 0, 5)
    assert counts(second) == (5, 0, 4)
    assert first.needed == 3 * 5 * 9 * SIZE**2
    assert second.needed == 5 * 4 * 9 * (SIZE - 2) ** 2
    assert first.macs == 3 * 8 * 9 * SIZE**2


def test_each_side_of_an_add_counts_its_own_channels(tool):
    left, right, last = measured(
        tool,
        lambda net, x: net.c(net.a(x) * net.left + net.b(x) * net.right),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(3, 8, 1),
        c=nn.Conv2d(8, 4, 1),
        left=mask(8, 3),
        right=mask(8, 5).flip(0),
    )
    assert [left.live_outputs, right.live_outputs, last.live_inputs] == [3, 5, 8]


@pytest.mark.parametrize(("padding", "standing"), [(1, 1), (0, 0)])
def test_flat_constants_need_one_channel_where_a_border_makes_them_uneven(tool, padding, standing):
    _, second = measured(
        tool,
        lambda net, x: net.b(F.relu(net.a(x) * net.mask + net.shift)),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(8, 4, 3, padding=padding),
        mask=mask(8, 5),
        shift=torch.tensor([1.0, -1.0] * 4).view(8, 1, 1),
    )
    assert counts(second) == (5, standing, 4)
    assert second.needed == (5 + standing) * 4 * 9 * (SIZE - 4 + 2 * padding) ** 2


def test_constants_behind_a_padded_depthwise_convolution_need_the_rank_of_their_maps(tool):
    first, depthwise, last = measured(
        tool,
        lambda net, x: net.c(net.b(net.a(x) * net.mask + 1.0)),
        a=nn.Conv2d(3, 16, 1),
        b=nn.Conv2d(16, 16, 3, padding=1, groups=16),
        c=nn.Conv2d(16, 4, 1),
        mask=mask(16, 4),
    )
    assert counts(first) == (3, 0, 4)
    assert counts(depthwise) == (4, 0, 4)
    assert depthwise.needed == 4 * 9 * SIZE**2
    assert counts(last) == (4, 8, 4)  # 12 maps of the 9 dimensions that a 3x3 border leaves, one of them flat


def test_a_channel_gated_by_a_rectifier_of_a_constant_is_dead(tool):
    _, gated = measured(
        tool,
        lambda net, x: net.b(x) * F.relu(net.a(x) * net.mask - 1.0),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 8, 1),
        mask=mask(8, 5),
    )
    assert counts(gated) == (3, 0, 5)


@pytest.mark.parametrize(
    "flat",
    [
        lambda y: F.relu(y - 100.0),
        lambda y: torch.sigmoid(100.0 * y - 1000.0),
        lambda y: torch.maximum(y, y.new_tensor(100.0)),
        lambda y: F.hardswish(y - 100.0),
    ],
    ids=["relu", "sigmoid", "maximum", "hardswish"],
)
def test_a_function_that_is_flat_by_chance_hides_nothing(tool, flat):
    first, second = measured(
        tool, lambda net, x: net.b(flat(net.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)
    )
    assert counts(first) == (3, 0, 8)
    assert counts(second) == (8, 0, 4)


def test_every_piece_of_a_maximum_is_live_but_the_constant_ones(tool):
    first, second = measured(
        tool,
        lambda net, x: net.b((net.a(x) * net.mask).view(-1, 4, 2).max(dim=2)[0]),
        torch.zeros(2, 3),
        a=nn.Linear(3, 8, bias=False),
        b=nn.Linear(4, 2),
        mask=mask(8, 5, 0),
    )
    assert counts(first) == (3, 0, 5)
    assert counts(second) == (3, 0, 2)


def test_zeroed_filters_and_zeroed_columns_are_masks(tool):
    weight = torch.randn(4, 8)
    weight[:, 6:] = 0.0
    first, second = measured(
        tool,
        lambda net, x: F.linear(F.linear(x, net.first), net.second),
        torch.zeros(2, 5),
        first=torch.randn(8, 5) * mask(8, 7, 1),
        second=weight,
    )
    assert counts(first) == (5, 0, 6)
    assert counts(second) == (6, 0, 4)


def test_pairs_lie_within_groups(tool):
    _, grouped, _ = measured(
        tool,
        lambda net, x: net.c(net.b(net.a(x) * net.before) * net.after),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 8, 1, groups=2),
        c=nn.Conv2d(8, 2, 1),
        before=mask(8, 5),
        after=mask(8, 6),
    )
    assert grouped.needed == (4 * 4 + 1 * 2) * SIZE**2


def test_a_transposed_convolution_counts_where_it_reads(tool):
    [layer] = measured(
        tool,
        lambda net, x: net.a(x) * net.mask,
        a=nn.ConvTranspose2d(3, 8, 4, stride=2, padding=1),
        mask=mask(8, 5),
    )
    assert layer.macs == 3 * 8 * 16 * SIZE**2
    assert layer.needed == 3 * 5 * 16 * SIZE**2


def test_a_linear_layer_counts_the_tokens_that_are_read(tool):
    [layer] = measured(tool, lambda net, x: net.a(x)[:, 0], torch.zeros(2, 7, 3), a=nn.Linear(3, 8))
    assert layer.macs == 7 * 3 * 8
    assert layer.needed == pytest.approx(3 * 8)


def test_what_a_class_is_made_of_is_live(tool):
    first, second = measured(
        tool,
        lambda net, x: net.b(F.relu(net.a(x) * net.mask)).argmax(1),
        torch.zeros(2, 3),
        a=nn.Linear(3, 8),
        b=nn.Linear(8, 4),
        mask=mask(8, 5, 0),
    )
    assert counts(first) == (3, 0, 5)
    assert counts(second) == (5, 0, 4)


def test_token_inputs_reach_the_layers_behind_an_embedding(tool):
    [layer] = measured(
        tool,
        lambda net, tokens: net.a(net.table(tokens)),
        torch.randint(0, 9, (2, 6)),
        table=nn.Embedding(9, 3),
        a=nn.Linear(3, 8),
    )
    assert counts(layer) == (3, 0, 8)


def test_products_of_two_activations_are_no_layers_and_a_constant_factor_on_either_side_is_a_weight(tool):
    [mixing] = measured(
        tool,
        lambda net, x: net.mix @ (x @ x.transpose(1, 2)),
        torch.zeros(2, 5, 3),
        mix=torch.randn(4, 5) * mask(5, 3, 0),
    )
    assert counts(mixing) == (3, 0, 4)
    assert mixing.needed == 3 * 4 * 5


def test_the_bound_leaves_the_program_as_it_was(tool):
    network = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 8, 1)).eval()
    program = program_from_export(export_module(network, (IMAGE,)))
    tool.bounds(program, [torch.randn(IMAGE.shape)])
    assert not any(value.requires_grad for value in program.constants.values())
