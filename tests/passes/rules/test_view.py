"""Views, permutations, squeezes: exact, and pruned channels pass through them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten


def mask_of(size, kept):
    """1 at the kept indices, else 0."""
    return torch.zeros(size).index_fill(0, torch.tensor(kept), 1.0)


class Net(nn.Module):
    """A masked 1x1 convolution, some operators on its result, a linear layer."""

    def __init__(self, channels, kept, middle, inputs, size=4):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, channels, 1), nn.Linear(inputs, 5)
        self.mask, self.middle, self.size = mask_of(channels, kept).reshape(-1, 1, 1), middle, size

    def forward(self, x):
        return self.linear(self.middle(F.relu(self.conv(x)) * self.mask))


def sizes_after(net, dynamic=True):
    """(channels of the convolution, inputs of the linear layer) after compilation."""
    shapes = shapes_of(check(net, torch.randn(2, 3, net.size, net.size), dynamic=dynamic))
    return shapes["conv.weight"][0], shapes["linear.weight"][1]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.flatten(1),
        lambda x: x.view(-1, 128),
        lambda x: x.reshape(x.shape[0], 128),
        lambda x: x.flatten(2).flatten(1),
        lambda x: x.view(x.shape[0], 8, 2, 8).flatten(1),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.transpose(1, 3).reshape(-1, 128),
    ],
)
def test_a_flatten_passes_pruned_channels_on(middle, dynamic):
    assert sizes_after(Net(8, [1, 2, 6], middle, 128), dynamic) == (3, 48)


def test_channels_split_into_heads_shrink_to_a_product_of_heads_and_positions():
    """12 channels as 3 heads of 4: kept {0, 2} in heads 0 and 1 are kept as 2 heads times 2 positions."""
    net = Net(
        12, [0, 2, 4, 6], lambda x: F.relu(x.view(-1, 3, 4, 4, 4)).permute(0, 3, 4, 1, 2).flatten(3), 12
    )
    assert sizes_after(net) == (4, 4)


def test_a_regrouping_keeps_the_least_product_that_contains_what_is_needed():
    """{0, 6} as (head, position) is {(0, 0), (1, 2)}: two heads times two positions."""
    net = Net(12, [0, 6], lambda x: F.relu(x.view(-1, 3, 4, 4, 4)).permute(0, 3, 4, 1, 2).flatten(3), 12)
    assert sizes_after(net) == (4, 4)


def test_an_axis_mixed_with_the_batch_is_kept_whole_and_the_others_shrink():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.out = nn.Linear(3, 24), nn.Linear(6, 5)
            self.mask = torch.zeros(4, 6)
            self.mask[:, [1, 4]] = 1.0

        def forward(self, x):
            batch = x.shape[0]
            heads = (self.query(x) * self.mask.flatten()).view(batch, 7, 4, 6).transpose(1, 2)
            return self.out(F.relu(heads.reshape(batch * 4, 7, 6))).view(batch, 4, 7, 5)

    shapes = shapes_of(check(Heads(), torch.randn(2, 7, 3)))
    assert shapes["query.weight"] == (8, 3)
    assert shapes["out.weight"] == (5, 2)


def test_a_constant_survives_views_and_is_absorbed():
    net = Net(
        8, [0, 3], lambda x: (x + torch.arange(8.0).reshape(-1, 1, 1)).permute(0, 2, 3, 1).flatten(1), 128
    )
    assert sizes_after(net) == (2, 32)


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
        lambda x: x.mean((2, 3), keepdim=True).squeeze(),
        lambda x: x.mean((2, 3), keepdim=True).squeeze((2, 3)),
        lambda x: x.mean((2, 3)).unsqueeze(1).squeeze(1),
        lambda x: x.mean((2, 3)).squeeze(1),
    ],
)
@pytest.mark.parametrize("kept", [[2, 5], [3]])
def test_a_squeeze_drops_only_the_axes_it_dropped_before(middle, kept):
    net = Net(8, kept, middle, 8)
    assert sizes_after(net) == (len(kept), len(kept))


def test_a_view_behind_a_permutation_needs_no_copy():
    class Copies(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 1).contiguous().view(x.shape[0], -1)

    result = check(Copies(), torch.randn(2, 3, 4))
    assert targets_of(result) == [aten.permute.default, aten.reshape.default]


def test_dynamic_positions_do_not_keep_channels_from_shrinking():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
            self.mask = mask_of(8, [1, 4]).reshape(-1, 1, 1)

        def forward(self, x):
            return self.linear((self.conv(x) * self.mask).flatten(2).transpose(1, 2))

    dims = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=8),
        3: torch.export.Dim("width", min=8),
    }
    result = check(Tokens(), torch.randn(2, 3, 16, 16), dynamic=(dims,))
    assert shapes_of(result)["conv.weight"] == (2, 3, 3, 3)
    assert shapes_of(result)["linear.weight"] == (5, 2)


def test_no_size_of_the_result_is_a_literal_where_the_axis_is_dynamic():
    result = check(Net(8, [1, 2], lambda x: x.flatten(1), 128), torch.randn(2, 3, 4, 4))
    call = next(node for node in result.calls() if node.target is aten.reshape.default)
    assert call.args[1] == [-1, 32]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_chain_of_views_is_exact_and_shrinks_by_every_mask_on_the_way(dynamic):
    class Chain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.conv, self.linear = nn.Conv2d(3, 12, 1), nn.Linear(192, 5)
            shapes = [(12, 1, 1), (1, 8, 8), (1, 24), (192,)]
            self.masks = [(torch.rand(shape, generator=generator) > 0.5).float() for shape in shapes]
            self.group = torch.tensor([1.0, 0.0, 1.0]).reshape(-1, 1, 1)

        def forward(self, x):
            first, second, third, last = self.masks
            x = self.conv(x) * first + 1.0
            x = F.relu(x.reshape(-1, 3, 8, 8) * second) * self.group
            x = x.transpose(1, 2).reshape(-1, 8, 24) * third
            return self.linear(x.flatten(1) * last)

    for seed in range(4):
        shapes = shapes_of(check(Chain(seed), torch.randn(2, 3, 4, 4), dynamic=dynamic))
        assert shapes["conv.weight"][0] <= 8
        assert shapes["linear.weight"][1] <= 128
