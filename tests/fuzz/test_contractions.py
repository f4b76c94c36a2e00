"""Random stacks of convolutions, transposed convolutions and groups, and random attention, with random masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from sbp_compile.capture.export import quiet_export
from tests.passes.support import check

OLD_TORCH = torch.__version__ < "2.13"
SEEDS = range(12)


class Noise(nn.Module):
    """x * mask + constants, with some of both, or neither."""

    def __init__(self, channels, masked, rank, generator):
        super().__init__()
        shape = (channels, *[1] * rank)
        scale = torch.rand(channels, generator=generator) + 0.5
        kept = torch.rand(channels, generator=generator) >= masked
        constants = torch.randn(channels, generator=generator)
        constants *= torch.rand((), generator=generator) < 0.7
        self.register_buffer("mask", (scale * kept).reshape(shape))
        self.register_buffer("constants", constants.reshape(shape))

    def forward(self, x):
        return x * self.mask + self.constants


class Choice:
    """Random choices from one generator."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *values):
        return values[int(torch.randint(len(values), (), generator=self.generator))]


def layer(choice, channels, rank):
    """(a random layer on that many channels, how many it gives)."""
    out = choice(4, 6, 8, 12)
    divisors = [count for count in (1, 1, 2, 4, channels) if channels % count == 0]
    groups = choice(*divisors)
    out = groups * max(1, out // groups)
    kernel, padding, dilation = choice(1, 2, 3), choice(0, 1, 2), choice(1, 1, 2)
    bias = choice(True, False)
    if choice(True, False):
        stride = choice(1, 2, 3)
        size = dilation * (kernel - 1) + 1
        padding = min(padding, size - 1)
        extra = choice(0, min(1, max(stride, dilation) - 1))
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
        settings = {"output_padding": extra, "dilation": dilation, "groups": groups, "bias": bias}
        return kind(channels, out, kernel, stride, padding, **settings), out
    kind = (nn.Conv1d, nn.Conv2d)[rank - 1]
    padding = max(padding, dilation * (kernel - 1) // 2)
    return kind(channels, out, kernel, choice(1, 1, 2), padding, dilation, groups, bias), out


def stack(seed):
    """(random layers with noise between them, rank)."""
    torch.manual_seed(seed)
    choice = Choice(seed)
    rank, masked, channels = choice(1, 2), choice(0.3, 0.5, 0.8), 3
    parts = []
    for _ in range(choice(3, 4)):
        part, channels = layer(choice, channels, rank)
        parts += [
            part,
            Noise(channels, masked, rank, choice.generator),
            choice(nn.ReLU(), nn.Identity(), nn.Sigmoid()),
        ]
    parts.append(layer(choice, channels, rank)[0])
    return nn.Sequential(*parts), rank


@pytest.mark.parametrize("seed", SEEDS)
def test_random_stacks_of_convolutions_are_exact(seed):
    net, rank = stack(seed)
    names = [Dim(name, min=8, max=512) for name in ("height", "width")[:rank]]
    free = {0: Dim("batch"), **{2 + axis: dim for axis, dim in enumerate(names)}}
    check(net, torch.randn(2, 3, *(9, 10)[:rank]), dynamic=({0: Dim("batch")},) if seed % 2 else (free,))


class RandomAttention(nn.Module):
    """Attention with random masks on every projection, in one of several spellings."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        choice = Choice(seed)
        self.heads, self.width, self.values = choice(2, 4), choice(3, 4), choice(2, 4)
        self.shared = choice(1, 2)
        self.spelling = choice("fused", "parts", "causal", "bmm")
        masked = choice(0.3, 0.5, 0.8)
        keys = self.heads // self.shared
        sizes = {"q": self.heads * self.width, "k": keys * self.width, "v": keys * self.values}
        for name, size in sizes.items():
            setattr(self, name, nn.Sequential(nn.Linear(5, size), Noise(size, masked, 0, choice.generator)))
        total = self.heads * self.values
        self.noise, self.o = Noise(total, masked, 0, choice.generator), nn.Linear(total, 3)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, -1, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, self.values).transpose(1, 2)
        y = self.attend(q, k, v).transpose(1, 2).reshape(batch, length, self.heads * self.values)
        return self.o(self.noise(y))

    def attend(self, q, k, v):
        if self.spelling in {"fused", "causal"}:
            causal = self.spelling == "causal"
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.shared > 1)
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        if self.spelling == "parts":
            return torch.einsum(
                "bhts,bhsd->bhtd", (torch.einsum("bhtd,bhsd->bhts", q, k) * 0.4).softmax(-1), v
            )
        q, k, v = (part.reshape(-1, part.shape[2], part.shape[3]) for part in (q, k, v))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return y.view(-1, self.heads, y.shape[1], y.shape[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_random_attention_is_exact(seed):
    free = ({0: Dim("batch"), 1: Dim("length", min=2, max=512)},)
    network, x = RandomAttention(seed), torch.randn(2, 6, 5)
    if OLD_TORCH:
        with quiet_export():
            try:
                torch.export.export(network.eval(), (x,), dynamic_shapes=free)
            except Exception as error:
                if "Constraints violated (length)" not in str(error):
                    raise
                pytest.skip(f"torch {torch.__version__} does not capture this attention at any length")
    check(network, x, dynamic=free)
