"""Image classifiers that mix channels and positions in ways of their own."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import IMAGE, Architecture
from tests.zoo.attention import FeedForward, MeanHead, Normed, Patches
from tests.zoo.places import Places
from tests.zoo.units import Add, Classifier, Dense, SqueezeExcite, Unit


class StandardisedConv(nn.Conv2d):
    """Weights with mean 0 and variance 1 for each output channel, times a gain; written as a batch norm of them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(
            rows, None, None, weight=self.gain * self.scale, training=True, momentum=0.0, eps=1e-6
        )
        weight = rows.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormFreeBlock(nn.Module):
    """Activations scaled to variance 1, grouped convolutions, squeeze and excitation, a gain that starts the branch."""

    def __init__(self, places: Places, inputs: int, outputs: int, stride: int):
        super().__init__()
        middle = outputs // 2
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Sequential(pool, StandardisedConv(inputs, outputs, 1))
        self.first = places.noise("after activation", inputs)
        self.layers = nn.ModuleList(
            (
                StandardisedConv(inputs, middle, 1),
                StandardisedConv(middle, middle, 3, stride, groups=2),
                StandardisedConv(middle, outputs, 1),
            )
        )
        asked = (("before norm", middle), ("after norm", middle), ("after norm", outputs))
        self.noise = nn.ModuleList(places.noise(*place) for place in asked)
        self.excite = SqueezeExcite(places, outputs, 8)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(x)) * 0.9
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.noise[0](self.layers[0](y))
        for layer, noise in zip(self.layers[1:], self.noise[1:], strict=True):
            y = noise(layer(F.silu(y).mul_(1.79)))
        y = 2.0 * self.excite(y)
        y.mul_(self.gain)
        return y * 0.2 + shortcut


def nfnet(places: Places) -> nn.Module:
    block = partial(NormFreeBlock, places)
    features = [
        StandardisedConv(3, 16, 3, 2),
        block(16, 32, 1),
        block(32, 48, 2),
        block(48, 48, 1),
        nn.SiLU(),
    ]
    return Classifier(places, features, 48)


class PartialBlock(nn.Module):
    """FasterNet: a 3x3 convolution of a quarter of the channels, then a perceptron of all."""

    def __init__(self, places: Places, channels: int):
        super().__init__()
        self.sizes = [channels // 4, channels - channels // 4]
        self.mix = nn.Conv2d(channels // 4, channels // 4, 3, 1, 1, bias=False)
        self.feed = nn.Sequential(
            Unit(places, channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1, bias=False)
        )
        self.scale = nn.Parameter(torch.rand(channels) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, untouched = torch.split(x, self.sizes, dim=1)
        y = torch.cat((self.mix(mixed), untouched), 1)
        return x + self.scale.unsqueeze(-1).unsqueeze(-1) * self.feed(y)


def fasternet(places: Places) -> nn.Module:
    features = [
        Unit(places, 3, 16, 4, 4, padding=0), PartialBlock(places, 16), PartialBlock(places, 16),
        nn.Conv2d(16, 32, 2, 2, bias=False), nn.BatchNorm2d(32), PartialBlock(places, 32), PartialBlock(places, 32),
    ]  # fmt: skip
    return Classifier(places, features, 32)


class FocalModulation(nn.Module):
    """Queries times a context: depthwise convolutions of growing size, each gated, and the mean over all positions."""

    def __init__(self, places: Places, width: int, levels: int = 2):
        super().__init__()
        self.project = nn.Linear(width, 2 * width + levels + 1)
        self.levels = nn.ModuleList(
            Unit(places, width, width, 3 + 2 * level, act=nn.GELU, groups=width, norm=None)
            for level in range(levels)
        )
        self.join, self.joined = nn.Conv2d(width, width, 1), places.noise("hidden", width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        x = self.project(x).permute(0, 3, 1, 2).contiguous()
        query, context, gates = torch.split(x, (width, width, len(self.levels) + 1), 1)
        total: Tensor | float = 0
        for number, level in enumerate(self.levels):
            context = level(context)
            total = total + context * gates[:, number : number + 1]
        whole = F.gelu(context.mean(2, keepdim=True).mean(3, keepdim=True))
        total = total + whole * gates[:, len(self.levels) :]
        return self.out((query * self.joined(self.join(total))).permute(0, 2, 3, 1).contiguous())


class FocalBlock(nn.Module):
    def __init__(self, places: Places, width: int, side: int):
        super().__init__()
        self.side = side
        self.norms = nn.ModuleList(Normed(places, width) for _ in range(2))
        self.modulate, self.feed = FocalModulation(places, width), FeedForward(places, width, 3 * width)
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.modulate(self.norms[0](x).view(batch, self.side, self.side, width))
        x = x + self.scales[0] * y.view(batch, length, width)
        return x + self.scales[1] * self.feed(self.norms[1](x))


def focalnet(places: Places) -> nn.Module:
    blocks = [FocalBlock(places, 24, 8) for _ in range(2)]
    return nn.Sequential(Patches(places, 24, 4), nn.LayerNorm(24), *blocks, nn.LayerNorm(24), MeanHead(24))


class CrossCovariance(nn.Module):
    """XCiT: attention between channels, with queries and keys of length 1 over the positions."""

    def __init__(self, places: Places, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.values = Dense(places, width, 3 * width, act=None), places.noise("hidden", width, -1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = (part.transpose(-2, -1) for part in (qkv[0], qkv[1], qkv[2]))
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        weights = ((query @ key.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        y = (weights @ value).permute(0, 3, 1, 2).reshape(batch, length, width)
        return self.out(self.values(y))


class LocalPatches(nn.Module):
    """Two depthwise convolutions between two views of the sequence as an image."""

    def __init__(self, places: Places, width: int, side: int):
        super().__init__()
        self.side = side
        unit = partial(Unit, places, width, width, groups=width)
        self.body = nn.Sequential(unit(act=nn.GELU), unit(act=None, norm=None))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.body(x.permute(0, 2, 1).reshape(batch, width, self.side, self.side))
        return y.reshape(batch, width, length).permute(0, 2, 1)


class ClassAttention(nn.Module):
    """The class token attends to everything; the other tokens pass."""

    def __init__(self, places: Places, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.values = places.noise("hidden", width, -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0][:, :, 0:1], qkv[1], qkv[2]
        weights = ((query * key).sum(dim=-1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        token = (weights.unsqueeze(2) @ value).transpose(1, 2).reshape(batch, 1, width)
        return torch.cat([self.out(self.values(token)), x[:, 1:]], dim=1)


class XCiT(nn.Module):
    """A convolutional stem, blocks of three branches with layer scale, class attention."""

    def __init__(self, places: Places, width: int = 32, heads: int = 4):
        super().__init__()
        self.stem = nn.Sequential(Unit(places, 3, 16, 3, 2, nn.GELU), Unit(places, 16, width, 3, 2, None))
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.5)
        self.branches = nn.ModuleList(
            nn.Sequential(Normed(places, width), branch)
            for branch in (
                CrossCovariance(places, width, heads),
                LocalPatches(places, width, 8),
                FeedForward(places, width, 3 * width),
            )
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.3) for _ in range(3))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.attend, self.norm = ClassAttention(places, width, heads), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        for scale, branch in zip(self.scales, self.branches, strict=True):
            x = x + scale * branch(x)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.head(self.norm(x + self.attend(x))[:, 0])


class Involution(nn.Module):
    """Kernels made from the image, one for each position and group of channels (Li et al. 2021)."""

    def __init__(self, places: Places, channels: int, stride: int, kernel: int = 3, share: int = 4):
        super().__init__()
        self.groups, self.taps = channels // share, kernel**2
        self.pool = nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity()
        self.kernels = nn.Sequential(
            Unit(places, channels, channels // 2, 1), nn.Conv2d(channels // 2, self.taps * self.groups, 1)
        )
        self.unfold = nn.Unfold(kernel, 1, (kernel - 1) // 2, stride)
        self.noise = places.noise("after norm", channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernels(self.pool(x))
        batch, _, height, width = weight.shape
        weight = weight.view(batch, self.groups, self.taps, height, width).unsqueeze(2)
        patches = self.unfold(x).view(batch, self.groups, -1, self.taps, height, width)
        return self.noise((weight * patches).sum(dim=3).view(batch, -1, height, width))


class InvolutionBlock(nn.Module):
    def __init__(self, places: Places, inputs: int, middle: int, outputs: int, stride: int = 1):
        super().__init__()
        self.reduce, self.expand = Unit(places, inputs, middle, 1), Unit(places, middle, outputs, 1, act=None)
        self.mix, self.norm = Involution(places, middle, stride), nn.BatchNorm2d(middle)
        self.shortcut = Unit(places, inputs, outputs, 1, stride, act=None)
        self.add = Add(places, outputs, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.expand(F.relu(self.norm(self.mix(self.reduce(x))))), self.shortcut(x))


def rednet(places: Places) -> nn.Module:
    block = partial(InvolutionBlock, places)
    return Classifier(places, [Unit(places, 3, 16, 3, 2), block(16, 16, 32), block(32, 16, 48, 2)], 48)


class CondConv(nn.Module):
    """A mixture of kernels for each example, applied to the batch as groups."""

    def __init__(self, places: Places, inputs: int, outputs: int, experts: int = 3):
        super().__init__()
        self.outputs = outputs
        self.route = nn.Linear(inputs, experts)
        self.kernels = nn.Parameter(torch.randn(experts, outputs * inputs * 9) * (inputs * 9) ** -0.5)
        self.before, self.norm = places.noise("before norm", outputs), nn.BatchNorm2d(outputs)
        self.last = places.noise("after activation", outputs)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        route = torch.sigmoid(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        weight = torch.matmul(route, self.kernels).view(batch * self.outputs, channels, 3, 3)
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight, None, 1, 1, 1, groups=batch)
        y = y.view(batch, self.outputs, height, width)
        return self.last(F.relu(self.norm(self.before(y))))


def condconv(places: Places) -> nn.Module:
    features = [Unit(places, 3, 16, 3, 2), CondConv(places, 16, 24), Unit(places, 24, 32)]
    return Classifier(places, features, 32)


ARCHITECTURES = (
    Architecture("nfnet", "NFNet", nfnet, IMAGE),
    Architecture("fasternet", "FasterNet", fasternet, IMAGE),
    Architecture("focalnet", "FocalNet", focalnet, IMAGE),
    Architecture("xcit", "XCiT", XCiT, IMAGE),
    Architecture("rednet", "Involution", rednet, IMAGE),
    Architecture("condconv", "CondConv", condconv, IMAGE, dynamic_batch=False),
)
