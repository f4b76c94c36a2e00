"""Images as patches: transformers and their relatives without attention."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.attention import Attention, Block, FeedForward, MeanHead, Normed, Patches
from tests.zoo.mobile import InvertedResidual
from tests.zoo.places import Places
from tests.zoo.swin import swin
from tests.zoo.units import Add, Classifier, Dense, Unit

WIDTH, HEADS = 32, 4


class ViT(nn.Module):
    """Extra tokens (class; with `distil` another one), positions, blocks; heads on the extra tokens."""

    def __init__(self, places: Places, distil: bool = False, direct: bool = False, depth: int = 2):
        super().__init__()
        count = 2 if distil else 1
        self.patches = Patches(places, WIDTH, 8)
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(1, 1, WIDTH)) for _ in range(count))
        self.position = nn.Parameter(torch.randn(1, 16 + count, WIDTH) * 0.5)
        self.blocks = nn.Sequential(
            *(
                Block(places, WIDTH, Attention(places, WIDTH, HEADS, direct=direct), 4 * WIDTH)
                for _ in range(depth)
            )
        )
        self.norm = Normed(places, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        extra = [token.expand(x.shape[0], -1, -1) for token in self.extra]
        x = self.norm(self.blocks(torch.cat([*extra, x], dim=1) + self.position))
        scores = [head(x[:, index]) for index, head in enumerate(self.heads)]
        return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2


class MixerBlock(nn.Module):
    """A perceptron over patches, then one over channels."""

    def __init__(self, places: Places, patches: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(Normed(places, width) for _ in range(2))
        self.patches, self.channels = FeedForward(places, patches, 24), FeedForward(places, width, 4 * width)
        self.adds = nn.ModuleList(Add(places, width, dim=-1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.adds[0](x, self.patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2))
        return self.adds[1](x, self.channels(self.norms[1](x)))


def mlp_mixer(places: Places) -> nn.Module:
    blocks = [MixerBlock(places, 16, WIDTH) for _ in range(2)]
    return nn.Sequential(Patches(places, WIDTH, 8), *blocks, Normed(places, WIDTH), MeanHead(WIDTH))


class GatedBlock(nn.Module):
    """gMLP: half of the hidden units gate the other half, after a linear map over positions."""

    def __init__(self, places: Places, patches: int, width: int, hidden: int):
        super().__init__()
        self.norm = Normed(places, width)
        self.expand = Dense(places, width, 2 * hidden, nn.GELU)
        self.gate = Normed(places, hidden)
        self.spatial = nn.Conv1d(patches, patches, 1)
        self.project = Dense(places, hidden, width, act=None)
        self.add = Add(places, width, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.expand(self.norm(x)).chunk(2, dim=-1)
        return self.add(x, self.project(left * self.spatial(self.gate(right))))


def gmlp(places: Places) -> nn.Module:
    blocks = [GatedBlock(places, 16, WIDTH, 48) for _ in range(2)]
    return nn.Sequential(Patches(places, WIDTH, 8), *blocks, Normed(places, WIDTH), MeanHead(WIDTH))


class Affine(nn.Module):
    """ResMLP's only norm: a scale and a shift for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(width) + 0.5)
        self.beta = nn.Parameter(torch.randn(width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class ResMLPBlock(nn.Module):
    def __init__(self, places: Places, patches: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(Normed(places, width, Affine) for _ in range(2))
        self.patches, self.channels = nn.Linear(patches, patches), FeedForward(places, width, 4 * width)
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.scales[1] * self.channels(self.norms[1](x))


def resmlp(places: Places) -> nn.Module:
    blocks = [ResMLPBlock(places, 16, WIDTH) for _ in range(2)]
    return nn.Sequential(Patches(places, WIDTH, 8), *blocks, Affine(WIDTH), MeanHead(WIDTH))


class PoolBlock(nn.Module):
    """PoolFormer: the mean of the neighbours less the pixel itself, group norms, layer scale, 1x1 perceptron."""

    def __init__(self, places: Places, width: int):
        super().__init__()
        self.norms = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, width), places.noise("after norm", width)) for _ in range(2)
        )
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        unit = partial(Unit, places, kernel=1, norm=None)
        self.feed = nn.Sequential(unit(width, 3 * width, act=nn.GELU), unit(3 * width, width, act=None))
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width, 1, 1) + 0.3) for _ in range(2))
        self.adds = nn.ModuleList(Add(places, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = self.adds[0](x, self.scales[0] * (self.pool(y) - y))
        return self.adds[1](x, self.scales[1] * self.feed(self.norms[1](x)))


def poolformer(places: Places) -> nn.Module:
    features = [
        nn.Conv2d(3, 16, 7, 4, 2), PoolBlock(places, 16), nn.Conv2d(16, 32, 3, 2, 1), PoolBlock(places, 32),
        PoolBlock(places, 32),
    ]  # fmt: skip
    return Classifier(places, features, 32)


class ConvAttention(nn.Module):
    """CvT: queries from a depthwise convolution of the map, keys and values from a strided one."""

    def __init__(self, places: Places, width: int, heads: int, side: int):
        super().__init__()
        self.side = side
        self.query, self.key = (
            Unit(places, width, width, 3, stride, None, groups=width) for stride in (1, 2)
        )
        self.attention = Attention(places, width, heads, fused=False)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).view(x.shape[0], -1, self.side, self.side)
        query, memory = (conv(grid).flatten(2).transpose(1, 2) for conv in (self.query, self.key))
        return self.attention(query, memory)


def cvt(places: Places) -> nn.Module:
    blocks = [Block(places, WIDTH, ConvAttention(places, WIDTH, HEADS, 8), 3 * WIDTH) for _ in range(2)]
    return nn.Sequential(Patches(places, WIDTH, 4), Normed(places, WIDTH), *blocks, MeanHead(WIDTH))


class MobileViTBlock(nn.Module):
    """Pixels at the same place of every 2x2 patch attend to each other; the result is joined to the input."""

    def __init__(self, places: Places, channels: int, width: int):
        super().__init__()
        self.local = nn.Sequential(
            Unit(places, channels, channels, act=nn.SiLU), nn.Conv2d(channels, width, 1)
        )
        self.block = Block(places, width, Attention(places, width, 2), 2 * width, act=nn.SiLU)
        self.project = Unit(places, width, channels, 1, act=nn.SiLU)
        self.join = Unit(places, 2 * channels, channels, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        batch, width, rows, columns = y.shape
        y = y.reshape(batch * width * rows // 2, 2, columns // 2, 2).transpose(1, 2)
        y = y.reshape(batch, width, rows * columns // 4, 4).transpose(1, 3).reshape(batch * 4, -1, width)
        y = self.block(y).view(batch, 4, -1, width).transpose(1, 3)
        y = y.reshape(batch * width * rows // 2, columns // 2, 2, 2).transpose(1, 2)
        y = self.project(y.reshape(batch, width, rows, columns))
        return self.join(torch.cat((x, y), dim=1))


def mobilevit(places: Places) -> nn.Module:
    inverted = partial(InvertedResidual, places, expand=2, act=nn.SiLU)
    features = [
        Unit(places, 3, 16, 3, 2, nn.SiLU), inverted(16, 24, 2), MobileViTBlock(places, 24, 32),
        Unit(places, 24, 48, 1, act=nn.SiLU),
    ]  # fmt: skip
    return Classifier(places, features, 48)


class SegFormer(nn.Module):
    """Attention to a reduced map, a depthwise convolution in the perceptron, a head over two resolutions."""

    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.fine = nn.Conv2d(3, 16, 7, 4, 3)
        self.reduce = nn.Sequential(nn.Conv2d(16, 16, 2, 2), nn.Flatten(2))
        self.norms = nn.ModuleList(Normed(places, 16) for _ in range(3))
        self.attention = Attention(places, 16, 2, fused=False)
        self.expand, self.project = Dense(places, 16, 48, act=None), Dense(places, 48, 16, act=None)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.coarse = nn.Conv2d(16, 32, 3, 2, 1)
        self.levels = nn.ModuleList(nn.Linear(inputs, width) for inputs in (16, 32))
        self.head = nn.Sequential(Unit(places, 2 * width, width, 1), nn.Conv2d(width, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.fine(x)
        batch, _, rows, columns = grid.shape
        x = grid.flatten(2).transpose(1, 2)
        y = self.norms[0](x)
        memory = self.reduce(y.transpose(1, 2).reshape(batch, -1, rows, columns)).transpose(1, 2)
        x = x + self.attention(y, self.norms[1](memory))
        y = self.expand(self.norms[2](x)).transpose(1, 2).view(batch, -1, rows, columns)
        x = x + self.project(F.gelu(self.depthwise(y).flatten(2).transpose(1, 2)))
        fine = x.transpose(1, 2).reshape(batch, -1, rows, columns)
        maps = []
        for level, y in zip(self.levels, (fine, self.coarse(fine)), strict=True):
            z = (
                level(y.flatten(2).transpose(1, 2))
                .permute(0, 2, 1)
                .reshape(batch, -1, y.shape[2], y.shape[3])
            )
            maps.append(F.interpolate(z, size=(rows, columns), mode="bilinear", align_corners=False))
        return self.head(torch.cat(maps[::-1], dim=1))


ARCHITECTURES = (
    Architecture("vit", "ViT", ViT, IMAGE),
    Architecture("vit_direct", "ViT", partial(ViT, direct=True), IMAGE),
    Architecture("deit", "DeiT", partial(ViT, distil=True), IMAGE),
    Architecture("swin", "Swin", swin, IMAGE),
    Architecture("cvt", "CvT", cvt, IMAGE),
    Architecture("mobilevit", "MobileViT", mobilevit, IMAGE),
    Architecture("segformer", "SegFormer", SegFormer, IMAGE),
    Architecture("poolformer", "PoolFormer", poolformer, IMAGE),
    Architecture("mlp_mixer", "MLP-Mixer", mlp_mixer, IMAGE),
    Architecture("gmlp", "gMLP", gmlp, IMAGE),
    Architecture("resmlp", "ResMLP", resmlp, IMAGE),
)
