"""Attention in the ways that networks write it, with masked heads and head dimensions, batch and sequence dynamic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
HEADS, WIDTH, LENGTH = 4, 4, 5
MODEL = HEADS * WIDTH


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def free(*inputs: str):
    """Dynamic batch and length of each input; a letter names the length."""
    return tuple({0: Dim("batch"), 1: Dim(name, min=2, max=512)} for name in inputs)


def head_mask(*heads: int) -> torch.Tensor:
    """1 in the channels of the given heads."""
    mask = torch.zeros(HEADS, WIDTH)
    mask[list(heads)] = 1
    return mask.flatten()


def width_mask(*columns: int) -> torch.Tensor:
    """1 in the given columns of every head."""
    mask = torch.zeros(HEADS, WIDTH)
    mask[:, list(columns)] = 1
    return mask.flatten()


class Separate(nn.Module):
    """Attention with projections of its own; masks are multiplied before constants are added."""

    def __init__(self, query=None, key=None, value=None, bias=True, **settings):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(MODEL, MODEL) for _ in range(4))
        for name, mask in (("q", query), ("k", key), ("v", value)):
            self.register_buffer(f"{name}_mask", torch.ones(MODEL) if mask is None else mask)
            self.register_buffer(f"{name}_bias", torch.randn(MODEL) * bias)
        self.settings = settings

    def part(self, name, x):
        h = getattr(self, name)(x) * getattr(self, f"{name}_mask") + getattr(self, f"{name}_bias")
        return h.view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.settings)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        y = self.attend(self.part("q", x), self.part("k", memory), self.part("v", memory))
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], MODEL))


class InParts(Separate):
    """The same, written with matmul and softmax."""

    def attend(self, q, k, v):
        return (q @ k.transpose(-2, -1) / WIDTH**0.5).softmax(-1) @ v


WAYS = pytest.mark.parametrize("kind", [Separate, InParts], ids=["fused", "in parts"])


def shapes(net, *inputs, names="t"):
    return shapes_of(check(net, *inputs, dynamic=free(*names)))


@WAYS
def test_masked_heads_go_from_queries_keys_and_values(kind):
    mask = head_mask(0, 3)
    found = shapes(kind(mask, mask, mask, bias=False), torch.randn(2, LENGTH, MODEL))
    assert found["q.weight"] == found["k.weight"] == found["v.weight"] == (8, MODEL)
    assert found["o.weight"] == (MODEL, 8)


@WAYS
def test_masked_columns_of_the_values_go_and_their_constants_reach_the_output(kind):
    found = shapes(kind(value=width_mask(1, 2, 3)), torch.randn(2, LENGTH, MODEL))
    assert found["v.weight"] == (12, MODEL)
    assert found["o.weight"] == (MODEL, 12)
    assert found["q.weight"] == found["k.weight"] == (MODEL, MODEL)


@WAYS
@pytest.mark.parametrize("bias", [False, True])
def test_masked_columns_of_the_keys_go_from_queries_and_keys(kind, bias):
    found = shapes(kind(key=width_mask(1, 3), bias=bias), torch.randn(2, LENGTH, MODEL))
    assert found["q.weight"] == found["k.weight"] == (8, MODEL)
    assert found["v.weight"] == (MODEL, MODEL)


@WAYS
def test_masked_columns_of_the_queries_go_where_they_are_zero(kind):
    found = shapes(kind(query=width_mask(0, 3), bias=False), torch.randn(2, LENGTH, MODEL))
    assert found["q.weight"] == found["k.weight"] == (8, MODEL)


@WAYS
def test_columns_of_queries_that_are_constant_weigh_keys_and_stay(kind):
    found = shapes(kind(query=width_mask(0, 3)), torch.randn(2, LENGTH, MODEL))
    assert found["k.weight"] == (MODEL, MODEL)


@WAYS
def test_cross_attention_shrinks(kind):
    net = kind(head_mask(1, 2), head_mask(1, 2), head_mask(1, 2), bias=False)
    found = shapes(net, torch.randn(2, LENGTH, MODEL), torch.randn(2, 7, MODEL), names="ts")
    assert found["q.weight"] == (8, MODEL)
    assert found["o.weight"] == (MODEL, 8)


def test_causal_attention_shrinks():
    mask = head_mask(2)
    found = shapes(Separate(mask, mask, mask, is_causal=True), torch.randn(2, LENGTH, MODEL))
    assert found["v.weight"] == (4, MODEL)


def test_a_mask_that_may_hide_every_key_keeps_constant_values():
    class Hidden(Separate):
        def forward(self, x, hidden):
            q, k, v = (self.part(name, x) for name in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], MODEL))

    hidden = torch.rand(2, HEADS, 1, LENGTH) < 0.5
    length = Dim("t", min=2, max=512)
    dynamic = ({0: Dim("batch"), 1: length}, {0: Dim("batch"), 3: length})
    net = Hidden(value=width_mask(1))
    found = shapes_of(check(net, torch.randn(2, LENGTH, MODEL), hidden.float(), dynamic=dynamic))
    assert found["v.weight"][0] == MODEL


class Shared(nn.Module):
    """Eight heads of queries, two of keys and values."""

    def __init__(self, kept):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(32, 16)
        self.register_buffer("mask", torch.tensor(kept).float().repeat_interleave(4))

    def forward(self, x):
        batch, length = x.shape[:2]
        q, k, v = (part(x).view(batch, length, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, 32) * self.mask)


@pytest.mark.parametrize(
    ("kept", "queries", "keys"),
    [([1, 1, 0, 0, 0, 1, 1, 0], 16, 8), ([1, 0, 0, 0, 1, 1, 1, 0], 24, 8), ([0, 0, 0, 0, 1, 0, 0, 1], 8, 4)],
    ids=["equally many", "padded", "a whole group goes"],
)
def test_heads_that_share_keys_keep_equally_many_for_each(kept, queries, keys):
    found = shapes(Shared(kept), torch.randn(2, LENGTH, 16))
    assert found["q.weight"] == (queries, 16)
    assert found["k.weight"] == found["v.weight"] == (keys, 16)


class Fused(nn.Module):
    """A projection for queries, keys and values at once, taken apart in one of several ways."""

    def __init__(self, way, query, key, value):
        super().__init__()
        self.way = way
        self.qkv, self.o = nn.Linear(MODEL, 3 * MODEL), nn.Linear(MODEL, MODEL)
        self.register_buffer("mask", torch.cat([query, key, value]))

    def forward(self, x):
        batch, length = x.shape[:2]
        h = self.qkv(x) * self.mask
        if self.way == "unbind":
            q, k, v = h.reshape(batch, length, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.way == "index":
            whole = h.view(batch, length, 3, HEADS, WIDTH)
            q, k, v = (whole[:, :, part].transpose(1, 2) for part in range(3))
        else:
            q, k, v = (part.view(batch, length, HEADS, WIDTH).transpose(1, 2) for part in h.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, MODEL))


@pytest.mark.parametrize("way", ["unbind", "index", "chunk"])
def test_the_parts_of_a_fused_projection_keep_channels_of_their_own(way):
    net = Fused(way, width_mask(0, 1, 2), width_mask(0, 1, 3), width_mask(3))
    found = shapes(net, torch.randn(2, LENGTH, MODEL))
    assert found["qkv.weight"] == (2 * 8 + 4, MODEL)
    assert found["o.weight"] == (MODEL, 4)


class Modules(nn.Module):
    def __init__(self, with_weights, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(MODEL, HEADS, batch_first=batch_first)
        self.with_weights = with_weights

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=self.with_weights)
        return (y, weights) if self.with_weights else y


def prune(attention, query, key, value):
    with torch.no_grad():
        mask = torch.cat([query, key, value])
        attention.in_proj_weight *= mask[:, None]
        attention.in_proj_bias.copy_(torch.randn(3 * MODEL))
        attention.out_proj.bias.copy_(torch.randn(MODEL))


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_columns_of_multihead_attention_go(with_weights, dynamic):
    net = Modules(with_weights)
    prune(net.attention, width_mask(0, 1, 2, 3), width_mask(0, 1), width_mask(0, 2, 3))
    result = check(net, torch.randn(2, LENGTH, MODEL), dynamic=free("t") if dynamic else False)
    found = shapes_of(result)
    assert found["attention.in_proj_weight"] == (8 + 8 + 12, MODEL)
    assert found["attention.out_proj.weight"] == (MODEL, 12)


def test_heads_of_multihead_attention_go():
    net = Modules(False)
    prune(net.attention, head_mask(0, 2), head_mask(0, 2), head_mask(0, 2))
    found = shapes(net, torch.randn(2, LENGTH, MODEL))
    assert found["attention.in_proj_weight"] == (24, MODEL)
    assert found["attention.out_proj.weight"] == (MODEL, 8)


def test_an_encoder_layer_shrinks_in_attention_and_between_its_linear_layers():
    net = nn.TransformerEncoderLayer(MODEL, HEADS, 32, batch_first=True)
    prune(net.self_attn, head_mask(0, 2), head_mask(0, 2), head_mask(0, 2))
    with torch.no_grad():
        net.linear1.weight[::2] = 0
    found = shapes(net, torch.randn(2, LENGTH, MODEL))
    assert found["linear1.weight"] == (16, MODEL)
    assert found["self_attn.out_proj.weight"] == (MODEL, 8)


def test_attention_over_batch_times_heads_keeps_its_axes_apart():
    class Flat(Separate):
        def attend(self, q, k, v):
            q, k, v = (part.reshape(-1, part.shape[2], WIDTH) for part in (q, k, v))
            y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
            return y.view(-1, HEADS, y.shape[1], WIDTH)

    mask = head_mask(1)
    result = check(Flat(mask, mask, mask, bias=False), torch.randn(2, LENGTH, MODEL), dynamic=free("t"))
    assert shapes_of(result)["q.weight"] == (4, MODEL)
    assert aten.bmm.default not in targets_of(result)


def uneven(*columns):
    """Head h keeps its columns from h on, as many as the h-th number says."""
    mask = torch.zeros(HEADS, WIDTH)
    for head, count in enumerate(columns):
        mask[head, (torch.arange(count) + head) % WIDTH] = 1
    return mask.flatten()


@WAYS
@pytest.mark.parametrize("bias", [False, True])
def test_heads_that_need_different_columns_keep_as_many_as_the_widest(kind, bias):
    keys, values = uneven(2, 1, 2, 2), uneven(1, 1, 1, 1)
    found = shapes(kind(key=keys, value=values, bias=bias), torch.randn(2, LENGTH, MODEL))
    assert found["q.weight"] == found["k.weight"] == (8, MODEL)
    assert found["v.weight"] == (4, MODEL)
    assert found["o.weight"] == (MODEL, 4)


@pytest.mark.parametrize("way", ["unbind", "index", "chunk"])
def test_columns_of_a_fused_projection_are_aligned_head_by_head(way):
    net = Fused(way, uneven(3, 3, 2, 3), uneven(3, 3, 3, 1), uneven(2, 2, 1, 0))
    found = shapes(net, torch.randn(2, LENGTH, MODEL))
    assert found["qkv.weight"][0] <= 2 * HEADS * 3 + 2 * 3
    assert found["o.weight"][1] <= 2 * HEADS


@pytest.mark.parametrize("with_weights", [True, False])
def test_columns_of_multihead_attention_are_aligned(with_weights):
    net = Modules(with_weights)
    prune(net.attention, uneven(4, 4, 4, 4), uneven(2, 2, 1, 2), uneven(3, 3, 2, 3))
    found = shapes(net, torch.randn(2, LENGTH, MODEL))
    assert found["attention.in_proj_weight"] == (8 + 8 + 12, MODEL)


def test_heads_that_share_keys_are_aligned_together():
    class Uneven(Shared):
        def __init__(self):
            super().__init__([1] * 8)
            with torch.no_grad():
                for part in (self.k, self.v):
                    mask = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1])
                    part.weight *= mask[:, None]
                    part.bias *= mask

    found = shapes(Uneven(), torch.randn(2, LENGTH, 16))
    assert found["k.weight"] == found["v.weight"] == (4, 16)
    assert found["q.weight"] == (16, 16)


def test_queries_that_are_read_elsewhere_too_are_not_reordered():
    class Read(Separate):
        def forward(self, x):
            q, k, v = (self.part(name, x) for name in "qkv")
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.o(y.reshape(x.shape[0], x.shape[1], MODEL)), q

    found = shapes(Read(key=uneven(2, 1, 2, 2), bias=False), torch.randn(2, LENGTH, MODEL))
    assert found["k.weight"] == (MODEL, MODEL)


def test_one_projection_for_queries_keys_and_values_stays_exact():
    class Same(Separate):
        def forward(self, x):
            h = self.part("q", x)
            return self.o(self.attend(h, h, h).transpose(1, 2).reshape(x.shape[0], x.shape[1], MODEL))

    shapes(Same(uneven(2, 1, 2, 2), bias=False), torch.randn(2, LENGTH, MODEL))


def test_constants_of_keys_cancel_past_a_view_in_front_of_the_softmax():
    class Windows(Separate):
        def attend(self, q, k, v):
            logits = (q @ k.transpose(-2, -1) * 0.5).view(-1, 2, HEADS // 2, q.shape[2], k.shape[2])
            weights = (logits + 1.0).view(-1, HEADS, q.shape[2], k.shape[2]).softmax(-1)
            return weights @ v

    found = shapes(Windows(key=width_mask(0, 3)), torch.randn(2, LENGTH, MODEL))
    assert found["q.weight"] == found["k.weight"] == (8, MODEL)
