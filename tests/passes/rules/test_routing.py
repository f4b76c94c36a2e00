"""Channels go beside axes along which the input decides what is read, added or sampled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.support import check, shapes_of

MASK = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])


class Graph(nn.Module):
    """Messages along edges, added or averaged where they arrive."""

    def __init__(self, reduce):
        super().__init__()
        self.first, self.second, self.reduce = nn.Linear(3, 8), nn.Linear(8, 2), reduce

    def forward(self, x, edges):
        x = self.first(x).tanh() * MASK
        to = edges[1]
        if self.reduce == "index_add":
            met = torch.zeros_like(x).index_add(0, to, x[edges[0]])
        else:
            index = to[:, None].expand(-1, 8)
            met = torch.zeros_like(x).scatter_reduce(0, index, x[edges[0]], self.reduce)
        return self.second((met + x).relu())


@pytest.mark.parametrize("reduce", ["index_add", "sum", "amax"])
def test_message_passing(reduce):
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 0, 1, 1]])
    result = check(Graph(reduce), torch.randn(4, 3), edges, dynamic=False)
    assert shapes_of(result)["first.weight"] == (4, 3)
    assert shapes_of(result)["second.weight"] == (2, 4)


class Images(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x) * MASK.view(8, 1, 1)))


def sampled(mode):
    def between(x):
        grid = x[:, 0:1].tanh().movedim(1, -1).expand(-1, -1, -1, 2)
        return F.grid_sample(x, grid, padding_mode=mode, align_corners=False)

    return between


def neighbours(x):
    x = x.flatten(2).transpose(1, 2)
    nearest = (x @ x.transpose(1, 2)).topk(3, -1)[1]
    batch = torch.arange(x.shape[0])[:, None, None]
    return x[batch, nearest].amax(2).transpose(1, 2).unflatten(2, (4, 6))


BETWEEN = {
    "sampling beyond the border": sampled("zeros"),
    "sampling at the border": lambda x: sampled("border")(x + torch.arange(8.0).view(8, 1, 1)),
    "unpooling": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "a filter of frequencies": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.arange(4.0), s=(4, 6)),
    "nearest neighbours": neighbours,
    "gathered columns": lambda x: x.gather(3, x[:, :1].argsort(3).expand(-1, 8, -1, -1)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_beside_positions_that_the_input_decides(name):
    result = check(Images(BETWEEN[name]), torch.randn(2, 3, 4, 6))
    assert shapes_of(result)["first.weight"] == (4, 3, 3, 3)
    assert shapes_of(result)["second.weight"] == (2, 4, 1, 1)


ADDED_TO_ITSELF = [
    lambda x, places: x.index_add(3, places[0, 0, 0], x),
    lambda x, places: x.scatter_add(3, places.expand_as(x), x),
]


@pytest.mark.parametrize("add", ADDED_TO_ITSELF)
def test_what_is_added_to_itself_is_known_where_it_is_zero(add):
    result = check(Images(lambda x: add(x, x[:, :1].argsort(3))), torch.randn(2, 3, 4, 6))
    assert shapes_of(result)["first.weight"] == (4, 3, 3, 3)


def test_numbers_that_say_where_to_read_among_themselves_stay_whole():
    class Following(nn.Module):
        def forward(self, x):
            x = x[:, [2, 0, 3, 1]]
            return x[x][:, :, 1]

    check(Following(), torch.randint(0, 3, (3, 4)), dynamic=False)
