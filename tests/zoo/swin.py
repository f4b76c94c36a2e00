"""Swin: attention inside windows that are shifted between the layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.attention import Attention, Block, MeanHead, Normed, Patches
from tests.zoo.places import Places


def windows(x: Tensor, size: int) -> Tensor:
    """(batch, height, width, channels) to (batch * windows, size * size, channels)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, channels)


def unwindowed(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The way back."""
    x = x.view(-1, height // size, width // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, x.shape[-1])


def relative_index(size: int) -> Tensor:
    """Which entry of the bias table each pair of a window's positions reads."""
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offsets = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + size - 1
    return offsets[..., 0] * (2 * size - 1) + offsets[..., 1]


class WindowAttention(nn.Module):
    """Swin: attention inside windows, shifted by a roll, with a bias for relative positions."""

    def __init__(self, places: Places, width: int, heads: int, side: int, size: int, shift: int):
        super().__init__()
        self.side, self.size, self.shift = side, size, shift
        self.attention = Attention(places, width, heads)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads) * 0.3)
        self.register_buffer("index", relative_index(size))
        self.register_buffer("mask", self._mask())

    def _mask(self) -> Tensor:
        """-100 between positions that the shift brought into one window from different regions."""
        regions = torch.zeros(1, self.side, self.side, 1)
        if self.shift:
            bands = (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None))
            for row in range(3):
                for column in range(3):
                    regions[:, bands[row], bands[column]] = 3 * row + column
        regions = windows(regions, self.size).squeeze(-1)
        return torch.where(regions[:, None, :] == regions[:, :, None], 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = x.view(batch, self.side, self.side, width)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        parts = windows(x, self.size)
        area = self.size**2
        bias = self.table[self.index.view(-1)].view(area, area, -1).permute(2, 0, 1).unsqueeze(0)
        if self.shift:
            bias = (bias + self.mask.unsqueeze(1)).repeat(batch, 1, 1, 1)
        x = unwindowed(self.attention(parts, None, bias), self.size, self.side, self.side)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x.view(batch, length, width)


class PatchMerging(nn.Module):
    """Four neighbours side by side, a norm, half of the width."""

    def __init__(self, places: Places, width: int, side: int):
        super().__init__()
        self.side = side
        self.norm = Normed(places, 4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        x = x.view(batch, self.side, self.side, width)
        parts = [x[:, row::2, column::2, :] for column in range(2) for row in range(2)]
        return self.reduce(self.norm(torch.cat(parts, -1).view(batch, -1, 4 * width)))


def swin(places: Places) -> nn.Module:
    def stage(width: int, heads: int, side: int) -> list[nn.Module]:
        shifts = (0, 2) if side > 4 else (0,)
        mixers = [WindowAttention(places, width, heads, side, 4, shift) for shift in shifts]
        return [Block(places, width, mixer, 4 * width) for mixer in mixers]

    return nn.Sequential(
        Patches(places, 16, 4), Normed(places, 16), *stage(16, 2, 8), PatchMerging(places, 16, 8), *stage(32, 4, 4),
        Normed(places, 32), MeanHead(32),
    )  # fmt: skip
