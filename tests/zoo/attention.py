"""What the zoo's transformers share: patches, attention, its perceptron, and the block of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.places import Places
from tests.zoo.units import Add, Dense


class Attention(nn.Module):
    """Multi-head attention with noise on heads and on their joined values.

    Self-attention with `fused` projects once for queries, keys and values; `direct` calls torch's operator.
    """

    def __init__(
        self,
        places: Places,
        width: int,
        heads: int,
        *,
        fused: bool = True,
        direct: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        self.heads, self.direct, self.causal = heads, direct, causal
        if fused:
            self.qkv = Dense(places, width, 3 * width, act=None)
        else:
            self.query, self.key, self.value = (Dense(places, width, width, act=None) for _ in range(3))
        self.fused = fused
        self.by_head = places.noise("hidden", heads)
        self.values = places.noise("hidden", width, -1)
        self.out = Dense(places, width, width, act=None)

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend from `x` to `memory` (itself if not given); `bias` is added to the scores."""
        batch, length, width = x.shape
        y = self.by_head(self._mixed(*self._projected(x, x if memory is None else memory), bias))
        return self.out(self.values(y.transpose(1, 2).reshape(batch, length, width)))

    def _projected(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused:
            batch, length, width = x.shape
            qkv = (
                self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            )
            query, key, value = qkv.unbind(0)
            return query, key, value
        return self._split(self.query(x)), self._split(self.key(memory)), self._split(self.value(memory))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if self.direct:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=self.causal)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if self.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        return scores.softmax(dim=-1) @ value


class Normed(nn.Module):
    """A norm over the last axis, then noise."""

    def __init__(self, places: Places, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm = norm(width)
        self.noise = places.noise("after norm", width, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.norm(x))


class FeedForward(nn.Sequential):
    """linear, activation, linear."""

    def __init__(
        self, places: Places, width: int, hidden: int, act: Callable[[], nn.Module] = nn.GELU, out: int = 0
    ):
        super().__init__(Dense(places, width, hidden, act), Dense(places, hidden, out or width, act=None))


class Block(nn.Module):
    """Attention (or another mixer of positions) and a perceptron, each with a norm and a sum."""

    def __init__(
        self,
        places: Places,
        width: int,
        mixer: nn.Module,
        hidden: int = 0,
        *,
        first: bool = True,
        act: Callable[[], nn.Module] = nn.GELU,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        feed: nn.Module | None = None,
    ):
        super().__init__()
        self.first, self.mixer = first, mixer
        self.feed = FeedForward(places, width, hidden, act) if feed is None else feed
        self.norms = nn.ModuleList(Normed(places, width, norm) for _ in range(2))
        self.adds = nn.ModuleList(Add(places, width, dim=-1) for _ in range(2))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Norm in front of each part (`first`) or behind each sum."""
        one, two = self.norms
        if self.first:
            x = self.adds[0](x, self.mixer(one(x), *context))
            return self.adds[1](x, self.feed(two(x)))
        x = one(self.adds[0](x, self.mixer(x, *context)))
        return two(self.adds[1](x, self.feed(x)))


class Patches(nn.Module):
    """A strided convolution; patches as a sequence, shape (batch, patches, width)."""

    def __init__(self, places: Places, width: int, size: int):
        super().__init__()
        self.input = places.noise("on input", 3)
        self.conv = nn.Conv2d(3, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.input(x)).flatten(2).transpose(1, 2)


class MeanHead(nn.Module):
    """The mean over positions, classified."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=1))
