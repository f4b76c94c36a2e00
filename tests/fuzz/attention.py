"""The catalogue's attention: every spelling of it, with masks on each projection and between the parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.builder import Builder
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Kind, fill, sequence
from tests.fuzz.masks import alive, mask, thin
from tests.fuzz.norms import over_last, shift

SPELLINGS = ("fused", "fused", "causal", "biased", "parts", "einsum", "bmm")


def _tokens(width: int) -> Shape:
    """As many tokens as there may be: a mask along them would broadcast k to other tokens than v has."""
    return Shape((2, 3, width), (3, 5, width))


def projection(draw: Draw, size: int, out: int) -> nn.Module:
    """A linear layer with a mask on its result, and perhaps constants behind that."""
    layer = nn.Linear(size, out, bias=draw.chance(0.6))
    fill(draw, layer)
    thin(draw, layer)
    y = _tokens(out)
    return sequence(
        [
            layer,
            mask(draw, y, 2) if draw.chance(0.6) else None,
            shift(draw, y, 2) if draw.chance(0.3) else None,
        ]
    )


class Attention(nn.Module):
    """Heads of `width` for queries and keys and `values` for values; keys serve `shared` heads each."""

    def __init__(self, draw: Draw, size: int, context: int, fused: bool) -> None:
        super().__init__()
        self.heads = draw.one((1, 2, 2, 4))
        self.width = draw.one((2, 3, 4))
        self.values = self.width if fused else draw.one((2, 3, 4))
        self.shared = 1 if fused else draw.one([each for each in (1, 1, 2) if self.heads % each == 0])
        self.spelling, self.fused = draw.one(SPELLINGS), fused
        keys, total = self.heads // self.shared, self.heads * self.values
        if fused:
            self.qkv = projection(draw, size, 3 * total)
        else:
            self.q = projection(draw, size, self.heads * self.width)
            self.k = projection(draw, context, keys * self.width)
            self.v = projection(draw, context, keys * self.values)
        self.noise = mask(draw, _tokens(total), 2) if draw.chance(0.4) else nn.Identity()
        self.out = projection(draw, total, size)

    def extra_repr(self) -> str:
        sizes = f"{self.heads} heads of {self.width} and {self.values}, keys shared by {self.shared}"
        return f"{self.spelling}, {sizes}{', fused' if self.fused else ''}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = (
            self.qkv(x).chunk(3, -1) if self.fused else self._projected(x, x if context is None else context)
        )
        q, k, v = (
            part.reshape(part.shape[0], part.shape[1], -1, size).transpose(1, 2)
            for part, size in zip(parts, (self.width, self.width, self.values), strict=True)
        )
        y = self._attend(q, k, v).transpose(1, 2)
        return self.out(self.noise(y.reshape(y.shape[0], y.shape[1], self.heads * self.values)))

    def _projected(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(context), self.v(context)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling in {"fused", "causal"}:
            options = {"is_causal": self.spelling == "causal", "enable_gqa": self.shared > 1}
            return F.scaled_dot_product_attention(q, k, v, **options)
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        if self.spelling == "biased":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=_distances(q, k), scale=0.5)
        if self.spelling == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.4
            return torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v)
        if self.spelling == "parts":
            scores = (q * 0.5) @ k.transpose(-2, -1) + _distances(q, k)
            return torch.softmax(scores, -1) @ v
        q, k, v = (part.reshape(-1, part.shape[2], part.shape[3]) for part in (q, k, v))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return y.reshape(-1, self.heads, y.shape[1], y.shape[2])


def _distances(q: Tensor, k: Tensor) -> Tensor:
    """A bias that grows with the distance of two positions."""
    rows = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
    return -0.1 * (rows - torch.arange(k.shape[2], dtype=q.dtype)).abs()


def attention(draw: Draw, x: Shape) -> nn.Module | None:
    """Attention of tokens with themselves, from one projection or three."""
    if x.rank != 3 or not x.is_static(2):
        return None
    return Attention(draw, x.sizes[2], x.sizes[2], draw.chance(0.4))


class MultiHead(nn.Module):
    """torch's own layer with some heads' channels dead, and its weights as a second result where they are wanted."""

    def __init__(self, draw: Draw, size: int, context: int) -> None:
        super().__init__()
        heads = draw.one([each for each in (1, 2, 3, 4) if size % each == 0])
        own = {} if context == size and draw.chance(0.7) else {"kdim": context, "vdim": context}
        self.layer = nn.MultiheadAttention(size, heads, bias=draw.chance(0.7), batch_first=True, **own)
        self.wanted = draw.chance(0.3)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.copy_(draw.normal(*parameter.shape, scale=(fan_in or 1) ** -0.5))
                if name.startswith("in_proj"):
                    parameter.mul_(
                        torch.cat([alive(draw, size) for _ in range(3)]).reshape(
                            -1, *[1] * (parameter.ndim - 1)
                        )
                    )
            self.layer.out_proj.weight.mul_(alive(draw, size))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        other = x if context is None else context
        y, weights = self.layer(x, other, other, need_weights=self.wanted)
        return (y, weights) if self.wanted else y


def multihead(draw: Draw, x: Shape) -> nn.Module | None:
    if x.rank != 3 or not x.is_static(2):
        return None
    return MultiHead(draw, x.sizes[2], x.sizes[2])


class Stream(nn.Module):
    """x + mask * f(x): what transformers are made of."""

    def __init__(self, branch: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.branch, self.behind = branch, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(x + self.branch(x))


def transformer(draw: Draw, x: Shape) -> nn.Module | None:
    """A residual block of attention and one of two linear layers, with norms in front of them or behind."""
    if x.rank != 3 or not x.is_static(2):
        return None
    size, inner = x.sizes[2], draw.randint(2, 10)
    feed = [
        projection(draw, size, inner),
        draw.one((nn.ReLU, nn.GELU, nn.SiLU))(),
        projection(draw, inner, size),
    ]
    blocks = [Attention(draw, size, size, draw.chance(0.4)), sequence(feed)]
    in_front = draw.chance(0.6)
    norms = [over_last(draw, x) for _ in blocks]
    streams = [
        Stream(
            sequence([norm if in_front else None, part, mask(draw, x, 2) if draw.chance(0.4) else None]),
            nn.Identity() if in_front else norm,
        )
        for part, norm in zip(blocks, norms, strict=True)
    ]
    return sequence([mask(draw, x, 2) if draw.chance(0.4) else None, *streams])


def cross(draw: Draw, builder: Builder, source: int) -> bool:
    """Attention of tokens with the tokens of another value."""
    x = builder.shape(source)
    if x.rank != 3 or not x.is_static(2):
        return False
    partner = builder.partner(draw, lambda y: y.rank == 3 and y.is_static(2))
    if partner is None:
        return False
    sizes = x.sizes[2], builder.shape(partner).sizes[2]
    layer = MultiHead(draw, *sizes) if draw.chance(0.4) else Attention(draw, *sizes, False)
    return builder.add(layer, (source, partner))


ATTENTION: dict[str, Kind] = {"attention": attention, "multihead": multihead, "transformer": transformer}
