"""Transformers over words, sounds and detected objects."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture, floats, mixed, tokens
from tests.zoo.attention import Attention, Block, FeedForward, Normed
from tests.zoo.places import Places
from tests.zoo.residual import basic
from tests.zoo.units import Add, Dense, Unit

WORDS, WIDTH, HEADS, LENGTH = 60, 32, 4, 12


class Bert(nn.Module):
    """Words, positions and segments; norms behind the sums; a mask for padding; pooled and masked-word heads."""

    def __init__(self, places: Places, depth: int = 2):
        super().__init__()
        self.words, self.segments = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Embedding(2, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.register_buffer("steps", torch.arange(LENGTH).unsqueeze(0))
        self.norm = Normed(places, WIDTH)
        self.blocks = nn.ModuleList(
            Block(places, WIDTH, Attention(places, WIDTH, HEADS, fused=False), 4 * WIDTH, first=False)
            for _ in range(depth)
        )
        self.pooler = Dense(places, WIDTH, WIDTH, nn.Tanh)
        self.classify = nn.Linear(WIDTH, 3)
        self.transform = nn.Sequential(Dense(places, WIDTH, WIDTH, nn.GELU), Normed(places, WIDTH))

    def forward(self, words: Tensor, segments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(words) + self.segments(segments) + self.positions(self.steps[:, : words.size(1)])
        x = self.norm(x)
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e4
        for block in self.blocks:
            x = block(x, None, bias)
        return self.classify(self.pooler(x[:, 0])), F.linear(self.transform(x), self.words.weight)


class GPT(nn.Module):
    """Norms in front, causal attention, the head tied to the word embedding."""

    def __init__(self, places: Places, direct: bool = False, depth: int = 2):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(
            *(
                Block(places, WIDTH, Attention(places, WIDTH, HEADS, direct=direct, causal=True), 4 * WIDTH)
                for _ in range(depth)
            )
        )
        self.norm = Normed(places, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions(torch.arange(words.size(1), device=words.device))
        return self.head(self.norm(self.blocks(x)))


class RMSNorm(nn.Module):
    """x / root mean square, written out."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, places: Places, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.before = places.noise("before norm", hidden, -1)
        self.noise = places.noise("hidden", hidden, -1)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.noise(F.silu(self.before(self.gate(x))) * self.up(x)))


class RotaryAttention(nn.Module):
    """LLaMA: rotated queries and keys, fewer heads for keys and values than for queries."""

    def __init__(self, places: Places, width: int, heads: int, shared: int):
        super().__init__()
        self.size, self.repeats = width // heads, heads // shared
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.values = places.noise("hidden", width, -1)
        self.out = nn.Linear(width, width, bias=False)
        angles = (
            torch.arange(LENGTH)[:, None] * 100.0 ** -(torch.arange(0, self.size, 2) / self.size)[None, :]
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self._rotated(query, length), self._rotated(key, length)
        key, value = (self._repeated(part) for part in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(self.values(y.transpose(1, 2).contiguous().view(batch, length, -1)))

    def _rotated(self, x: Tensor, length: int) -> Tensor:
        left, right = x[..., : self.size // 2], x[..., self.size // 2 :]
        return x * self.cos[:length] + torch.cat((-right, left), dim=-1) * self.sin[:length]

    def _repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, self.repeats, length, size)
        return x.reshape(batch, heads * self.repeats, length, size)


class Llama(nn.Module):
    def __init__(self, places: Places, depth: int = 2):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*(self._block(places) for _ in range(depth)))
        self.norm = Normed(places, WIDTH, RMSNorm)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    @staticmethod
    def _block(places: Places) -> nn.Module:
        attention = RotaryAttention(places, WIDTH, HEADS, 2)
        return Block(places, WIDTH, attention, norm=RMSNorm, feed=SwiGLU(places, WIDTH, 64))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(words))))


class Decoder(nn.Module):
    """Self-attention, attention to a memory, a perceptron."""

    def __init__(self, places: Places, own: nn.Module, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.own, self.cross = own, Attention(places, WIDTH, HEADS, fused=False)
        self.feed = FeedForward(places, WIDTH, 2 * WIDTH, nn.ReLU)
        self.norms = nn.ModuleList(Normed(places, WIDTH, norm) for _ in range(3))
        self.adds = nn.ModuleList(Add(places, WIDTH, dim=-1) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.adds[0](x, self.own(self.norms[0](x), None, bias))
        x = self.adds[1](x, self.cross(self.norms[1](x), memory))
        return self.adds[2](x, self.feed(self.norms[2](x)))


class T5(nn.Module):
    """Encoder and decoder with RMS norms, one relative position bias for all layers of each, words tied."""

    def __init__(self, places: Places):
        super().__init__()
        norm = partial(nn.RMSNorm, eps=1e-6)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.tables = nn.ModuleList(nn.Embedding(2 * LENGTH, HEADS) for _ in range(2))
        self.encoder = Block(
            places, WIDTH, Attention(places, WIDTH, HEADS, fused=False), 2 * WIDTH, act=nn.ReLU, norm=norm
        )
        own = Attention(places, WIDTH, HEADS, fused=False, causal=True)
        self.decoder = Decoder(places, own, norm)
        self.norms = nn.ModuleList(Normed(places, WIDTH, norm) for _ in range(2))

    def _bias(self, table: nn.Module, length: int) -> Tensor:
        steps = torch.arange(length)
        return table(steps[None, :] - steps[:, None] + LENGTH).permute(2, 0, 1).unsqueeze(0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.words(source), None, self._bias(self.tables[0], source.size(1)))
        bias = self._bias(self.tables[1], target.size(1))
        y = self.decoder(self.words(target), self.norms[0](memory), bias)
        return F.linear(self.norms[1](y) * WIDTH**-0.5, self.words.weight)


class DETR(nn.Module):
    """A residual backbone, torch's own multi-head attention, learned queries, two heads."""

    def __init__(self, places: Places, queries: int = 6):
        super().__init__()
        self.backbone = nn.Sequential(
            places.noise("on input", 3),
            Unit(places, 3, 16, 5, 4),
            basic(places, 16, 32, 2),
            nn.Conv2d(32, WIDTH, 1),
        )
        self.queries = nn.Parameter(torch.randn(queries, WIDTH))
        self.rows, self.columns = (nn.Parameter(torch.rand(4, WIDTH // 2)) for _ in range(2))
        self.attend, self.own, self.cross = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(3)
        )
        self.feeds = nn.ModuleList(FeedForward(places, WIDTH, 2 * WIDTH, nn.ReLU) for _ in range(2))
        self.norms = nn.ModuleList(Normed(places, WIDTH) for _ in range(5))
        self.classes = nn.Linear(WIDTH, 5)
        self.boxes = nn.Sequential(
            Dense(places, WIDTH, WIDTH), Dense(places, WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.backbone(x)
        batch, _, height, width = x.shape
        columns = self.columns[:width].unsqueeze(0).repeat(height, 1, 1)
        rows = self.rows[:height].unsqueeze(1).repeat(1, width, 1)
        position = torch.cat([columns, rows], dim=-1).flatten(0, 1).unsqueeze(0)
        x = x.flatten(2).transpose(1, 2)
        place = x + position
        x = self.norms[0](x + self.attend(place, place, x, need_weights=False)[0])
        memory = self.norms[1](x + self.feeds[0](x))
        queries = self.queries.unsqueeze(0).repeat(batch, 1, 1)
        y = self.norms[2](queries + self.own(queries, queries, queries)[0])
        y = self.norms[3](y + self.cross(y + queries, memory + position, memory)[0])
        y = self.norms[4](y + self.feeds[1](y))
        return {"pred_logits": self.classes(y), "pred_boxes": self.boxes(y).sigmoid()}


class ConvModule(nn.Module):
    """Conformer: pointwise, GLU, depthwise, batch norm, swish, pointwise; channels last outside."""

    def __init__(self, places: Places, width: int):
        super().__init__()
        self.norm = Normed(places, width)
        self.gate = Unit(places, width, 2 * width, 1, act=partial(nn.GLU, dim=1), norm=None, dims=1)
        self.depthwise = Unit(places, width, width, 7, act=nn.SiLU, groups=width, dims=1)
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.depthwise(self.gate(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Half a perceptron, attention, convolution, half a perceptron, a norm."""

    def __init__(self, places: Places, width: int):
        super().__init__()
        self.halves = nn.ModuleList(FeedForward(places, width, 3 * width, nn.SiLU) for _ in range(2))
        self.attention = Attention(places, width, HEADS, fused=False)
        self.conv = ConvModule(places, width)
        self.norms = nn.ModuleList(Normed(places, width) for _ in range(4))
        self.add = Add(places, width, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.halves[0](self.norms[0](x))
        x = self.add(x, self.attention(self.norms[1](x)))
        x = x + self.conv(x)
        return self.norms[3](x + 0.5 * self.halves[1](self.norms[2](x)))


class Conformer(nn.Module):
    """Spectra made four times shorter by convolutions, flattened over frequencies, then blocks."""

    def __init__(self, places: Places):
        super().__init__()
        unit = partial(Unit, places, kernel=3, stride=2, norm=None, padding=0)
        self.shorten = nn.Sequential(unit(1, 12), unit(12, 12))
        self.entry = nn.Linear(12 * 4, WIDTH)
        self.block = ConformerBlock(places, WIDTH)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shorten(x.unsqueeze(1))
        batch, channels, steps, bins = y.shape
        y = self.entry(y.transpose(1, 2).contiguous().view(batch, steps, channels * bins))
        return self.head(self.block(y)).log_softmax(-1)


class LinearAttention(nn.Module):
    """Attention with elu(x) + 1 as the kernel, in sums over positions (Katharopoulos et al. 2020)."""

    def __init__(self, places: Places, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (Dense(places, width, width, act=None) for _ in range(3))
        self.values = places.noise("hidden", width, -1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1) for layer in (self.query, self.key, self.value)
        )
        query, key = F.elu(query) + 1, F.elu(key) + 1
        memory = torch.einsum("nshd,nshm->nhmd", key, value)
        scale = 1 / (torch.einsum("nlhd,nhd->nlh", query, key.sum(dim=1)) + 1e-6)
        y = torch.einsum("nlhd,nhmd,nlh->nlhm", query, memory, scale)
        return self.out(self.values(y.contiguous().view(batch, length, width)))


class LinearTransformer(nn.Module):
    def __init__(self, places: Places):
        super().__init__()
        self.entry = nn.Linear(8, WIDTH)
        self.blocks = nn.Sequential(
            *(Block(places, WIDTH, LinearAttention(places, WIDTH, HEADS), 2 * WIDTH) for _ in range(2))
        )
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.entry(x)))


class TorchEncoder(nn.Module):
    """torch's own encoder layers between a hidden layer and a head; padding masked by keys."""

    def __init__(self, places: Places):
        super().__init__()
        self.entry = nn.Sequential(Dense(places, 10, 48), nn.Linear(48, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.noise = places.noise("hidden", WIDTH, -1)
        self.head = nn.Sequential(Dense(places, WIDTH, 24), nn.Linear(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.noise(self.encoder(self.entry(x))).mean(1))


SENTENCE = tokens(WORDS, (LENGTH,))

ARCHITECTURES = (
    Architecture("bert", "BERT", Bert, mixed(SENTENCE, tokens(2, (LENGTH,), (LENGTH,)))),
    Architecture("gpt", "GPT", GPT, SENTENCE),
    Architecture("gpt_direct", "GPT", partial(GPT, direct=True), SENTENCE),
    Architecture("llama", "LLaMA", Llama, SENTENCE),
    Architecture("t5", "T5", T5, tokens(WORDS, (LENGTH,), (8,))),
    Architecture("detr", "DETR", DETR, IMAGE),
    Architecture("conformer", "Conformer", Conformer, floats((31, 19))),
    Architecture("linear_transformer", "Linear attention", LinearTransformer, floats((12, 8))),
    Architecture("torch_encoder", "Transformer encoder", TorchEncoder, floats((12, 10))),
)
