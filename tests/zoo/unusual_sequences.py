"""Sequences and tables: state spaces, latent arrays, experts, tokens from numbers."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, floats, mixed, tokens
from tests.zoo.attention import Attention, Block, MeanHead, Normed
from tests.zoo.places import Places
from tests.zoo.transformer import RMSNorm, SwiGLU
from tests.zoo.units import Dense

WORDS = 60


class SelectiveScan(nn.Module):
    """Mamba: a gated branch with a causal depthwise convolution and a state whose steps depend on the input."""

    def __init__(self, places: Places, width: int, state: int = 4, rank: int = 3, kernel: int = 4):
        super().__init__()
        inner = 2 * width
        self.sizes, self.inner = [rank, state, state], inner
        self.enter = Dense(places, width, 2 * inner, act=None)
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.read, self.step = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.log(torch.arange(1, state + 1).float().repeat(inner, 1)))
        self.skip = nn.Parameter(torch.ones(inner))
        self.values, self.leave = places.noise("hidden", inner, -1), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x, gate = self.enter(x).split(split_size=[self.inner, self.inner], dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[:, :, :length]).transpose(1, 2)
        return self.leave(self.values(self.scanned(x) * F.silu(gate)))

    def scanned(self, x: Tensor) -> Tensor:
        step, enter, leave = self.read(x).split(split_size=self.sizes, dim=-1)
        step = F.softplus(self.step(step))
        decay = torch.exp(torch.einsum("bld,dn->bldn", step, -torch.exp(self.log_decay.float())))
        fed = torch.einsum("bld,bln,bld->bldn", step, enter, x)
        state = torch.zeros((x.shape[0], *self.log_decay.shape), device=x.device)
        found = []
        for position in range(x.shape[1]):
            state = decay[:, position] * state + fed[:, position]
            found.append(torch.einsum("bdn,bn->bd", state, leave[:, position, :]))
        return torch.stack(found, dim=1) + x * self.skip.float()


class Mamba(nn.Module):
    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.norms = nn.ModuleList(Normed(places, width, RMSNorm) for _ in range(3))
        self.scans = nn.ModuleList(SelectiveScan(places, width) for _ in range(2))
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for norm, scan in zip(self.norms[:2], self.scans, strict=True):
            x = x + scan(norm(x))
        return self.head(self.norms[2](x))


def fourier_features(height: int, width: int, bands: int = 2) -> Tensor:
    """Positions between -1 and 1, with sines and cosines of some multiples; (height, width, features)."""
    lines = (torch.linspace(-1.0, 1.0, size) for size in (height, width))
    position = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).unsqueeze(-1)
    angles = position * torch.linspace(1.0, 5.0, bands) * math.pi
    return torch.cat([angles.sin(), angles.cos(), position], dim=-1).flatten(-2)


class Perceiver(nn.Module):
    """Learned latents attend to pixels, with heads among the batch; then to each other."""

    def __init__(self, places: Places, width: int = 32, latents: int = 6, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.norms = nn.ModuleList(Normed(places, size) for size in (13, width, width))
        self.query, self.both = nn.Linear(width, width, bias=False), Dense(places, 13, 2 * width, act=None)
        self.values, self.out = places.noise("hidden", width, -1), nn.Linear(width, width)
        self.expand, self.project = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.gated = places.noise("hidden", 4 * width, -1)
        self.block = Block(places, width, Attention(places, width, heads), 2 * width)
        self.head = nn.Sequential(nn.LayerNorm(width), MeanHead(width))

    def forward(self, data: Tensor) -> Tensor:
        batch = data.shape[0]
        data = data.permute(0, 2, 3, 1)
        place = fourier_features(*data.shape[1:3]).unsqueeze(0).expand(batch, -1, -1, -1)
        context = self.norms[0](torch.cat((data, place), dim=-1).reshape(batch, -1, 13))
        x = self.latents.unsqueeze(0).repeat(batch, 1, 1)
        x = x + self.out(self.values(self.attended(self.query(self.norms[1](x)), self.both(context))))
        value, gate = self.expand(self.norms[2](x)).chunk(2, dim=-1)
        x = x + self.project(self.gated(value * F.gelu(gate)))
        return self.head(self.block(x))

    def attended(self, query: Tensor, both: Tensor) -> Tensor:
        batch, size = query.shape[0], query.shape[-1] // self.heads
        key, value = both.chunk(2, dim=-1)
        query, key, value = (
            part.reshape(batch, -1, self.heads, size)
            .permute(0, 2, 1, 3)
            .reshape(batch * self.heads, -1, size)
            for part in (query, key, value)
        )
        weights = (torch.einsum("bid,bjd->bij", query, key) * size**-0.5).softmax(dim=-1)
        y = torch.einsum("bij,bjd->bid", weights, value)
        return (
            y.reshape(batch, self.heads, -1, size).permute(0, 2, 1, 3).reshape(batch, -1, self.heads * size)
        )


class StackedExperts(nn.Module):
    """All experts on every word, as einsums with stacked weights, weighted by a softmax."""

    def __init__(self, places: Places, width: int, experts: int = 4, hidden: int = 32):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.expand = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.bias = nn.Parameter(torch.randn(experts, hidden) * 0.2)
        self.project = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)
        self.before, self.noise = places.noise("before norm", hidden, -1), places.noise("hidden", hidden, -1)
        self.open = places.noise("after norm", experts, -1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.open(F.softmax(self.gate(x), dim=-1))
        y = self.before(torch.einsum("btd,edf->btef", x, self.expand)) + self.bias
        y = torch.einsum("btef,efd->bted", self.noise(F.gelu(y)), self.project)
        return torch.einsum("bted,bte->btd", y, shares)


class BestExperts(nn.Module):
    """The two best experts of each word, their shares scattered among zeros; all of them run."""

    def __init__(self, places: Places, width: int, experts: int = 4, hidden: int = 32):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(places, width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = x.view(-1, width)
        shares = F.softmax(self.gate(x), dim=1, dtype=torch.float)
        best, index = torch.topk(shares, 2, dim=-1)
        shares = torch.zeros_like(shares).scatter(1, index, best / best.sum(dim=-1, keepdim=True))
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            total = total + expert(x) * shares[:, number, None]
        return total.reshape(batch, length, width)


class Experts(nn.Module):
    """A decoder whose perceptrons are mixtures of experts."""

    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        attention = partial(Attention, places, width, 3, causal=True)
        self.blocks = nn.Sequential(
            Block(places, width, attention(), feed=StackedExperts(places, width)),
            Block(places, width, attention(), feed=BestExperts(places, width)),
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WORDS))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(words)))


class FTTransformer(nn.Module):
    """Every number and category a token, a class token from a constant 1, ReGLU, a head on the class token."""

    def __init__(
        self, places: Places, numbers: int = 6, categories: tuple[int, ...] = (4, 5, 3), width: int = 24
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numbers + 1, width))
        self.bias = nn.Parameter(torch.randn(numbers + len(categories), width) * 0.2)
        self.register_buffer("offsets", torch.tensor([0, *categories[:-1]]).cumsum(0))
        self.categories = nn.Embedding(sum(categories), width)
        self.noise = places.noise("before norm", width, -1)
        self.attention = nn.ModuleList(Attention(places, width, 4, fused=False) for _ in range(2))
        self.norms = nn.ModuleList(Normed(places, width) for _ in range(4))
        self.expand = nn.ModuleList(Dense(places, width, 64, act=None) for _ in range(2))
        self.project = nn.ModuleList(
            nn.Sequential(places.noise("hidden", 32, -1), nn.Linear(32, width)) for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2))

    def tokens(self, numbers: Tensor, categories: Tensor) -> Tensor:
        numbers = torch.cat([torch.ones(numbers.shape[0], 1, device=numbers.device), numbers], dim=1)
        x = torch.cat(
            [self.weight[None] * numbers[:, :, None], self.categories(categories + self.offsets[None])], dim=1
        )
        return x + torch.cat([torch.zeros(1, self.bias.shape[1], device=x.device), self.bias])[None]

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        x = self.noise(self.tokens(numbers, categories))
        for number, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * number](x) if number else x)
            value, gate = self.expand[number](self.norms[2 * number + 1](x)).chunk(2, dim=-1)
            x = x + self.project[number](value * F.relu(gate))
        return self.head(x[:, 0])


ARCHITECTURES = (
    Architecture("mamba", "Mamba", Mamba, tokens(WORDS, (6,))),
    Architecture("perceiver", "Perceiver", Perceiver, floats((3, 8, 8))),
    Architecture("experts", "Mixture of experts", Experts, tokens(WORDS, (12,))),
    Architecture("ft_transformer", "FT-Transformer", FTTransformer, mixed(floats((6,)), tokens(3, (3,)))),
)
