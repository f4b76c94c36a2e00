"""The networks of the Structured Bayesian Pruning paper, with the noise where its authors put it.

Convolutions: convolution without bias -> noise -> + bias -> (batch norm) -> relu -> pool. Linear layers:
noise on their inputs. With `noise=False` the same class is the dense network: its state dict has the same
names, without the noise parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sbp_compile.errors import UsageError
from sbp_compile.nn import LogNormalNoise


def _noise(features: int, enabled: bool) -> nn.Module:
    return LogNormalNoise(features) if enabled else nn.Identity()


def _check_widths(widths: Sequence[int], expected: int) -> tuple[int, ...]:
    if len(widths) != expected or min(widths) < 1:
        raise UsageError(f"`widths` (={tuple(widths)}) must be {expected} positive integers")
    return tuple(widths)


def _first(x: Tensor, consumer: nn.Linear, available: int) -> Tensor:
    """Take what `consumer` reads; a full width is passed on whole, so that a wrong image size is an error."""
    return x if consumer.in_features == available else x[:, : consumer.in_features]


class ConvBlock(nn.Module):
    """Convolution without bias -> noise -> + bias -> optional batch norm -> relu, on (N, C, H, W)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        padding: int = 0,
        batch_norm: bool = False,
        noise: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
        self.noise = _noise(outputs, noise)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        x = self.noise(self.conv(x)) + self.bias.view(-1, 1, 1)
        return torch.relu(self.norm(x))


class LeNet5(nn.Module):
    """LeNet-5-Caffe: two 5x5 convolutions and two linear layers on (N, 1, 28, 28) images.

    `widths` is (conv1, conv2, flattened, hidden). The first linear layer reads the first `flattened` of the
    16 * conv2 flattened values, so that a pruned structure such as 3-18-284-283 can be built as it stands.
    """

    input_shape = (1, 28, 28)
    positions = 16  # flattened values per channel of the last convolution

    def __init__(self, widths: Sequence[int] = (20, 50, 800, 500), *, noise: bool = True, classes: int = 10):
        super().__init__()
        conv1, conv2, flat, hidden = self.units = _check_widths(widths, 4)
        if flat > 16 * conv2:
            raise UsageError(f"`widths[2]` (={flat}) must be at most 16 * `widths[1]` (={16 * conv2})")
        self.block1 = ConvBlock(1, conv1, 5, noise=noise)
        self.block2 = ConvBlock(conv1, conv2, 5, noise=noise)
        self.noise_flat = _noise(flat, noise)
        self.fc1 = nn.Linear(flat, hidden)
        self.noise_hidden = _noise(hidden, noise)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        x = torch.max_pool2d(self.block1(x), 2)
        x = _first(torch.max_pool2d(self.block2(x), 2).flatten(1), self.fc1, 16 * len(self.block2.bias))
        x = torch.relu(self.fc1(self.noise_flat(x)))
        return self.fc2(self.noise_hidden(x))  # type: ignore[no-any-return]

    def macs(self, kept: Sequence[int]) -> list[int]:
        """Multiply-adds of one image per layer when `kept` units of each width remain."""
        conv1, conv2, flat, hidden = kept
        return [25 * conv1 * 24**2, 25 * conv1 * conv2 * 8**2, flat * hidden, hidden * self.fc2.out_features]


class LeNet500300(nn.Module):
    """LeNet-500-300: three linear layers on (N, 1, 28, 28) images.

    `widths` is (pixels, hidden1, hidden2); the network reads the first `pixels` of the 784.
    """

    input_shape = (1, 28, 28)
    positions = 0

    def __init__(self, widths: Sequence[int] = (784, 500, 300), *, noise: bool = True, classes: int = 10):
        super().__init__()
        pixels, hidden1, hidden2 = self.units = _check_widths(widths, 3)
        if pixels > 784:
            raise UsageError(f"`widths[0]` (={pixels}) must be at most 784")
        self.noise_input = _noise(pixels, noise)
        self.fc1 = nn.Linear(pixels, hidden1)
        self.noise1 = _noise(hidden1, noise)
        self.fc2 = nn.Linear(hidden1, hidden2)
        self.noise2 = _noise(hidden2, noise)
        self.fc3 = nn.Linear(hidden2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        x = _first(x.flatten(1), self.fc1, 784)
        x = torch.relu(self.fc1(self.noise_input(x)))
        x = torch.relu(self.fc2(self.noise1(x)))
        return self.fc3(self.noise2(x))  # type: ignore[no-any-return]

    def macs(self, kept: Sequence[int]) -> list[int]:
        """Multiply-adds of one image per layer when `kept` units of each width remain."""
        pixels, hidden1, hidden2 = kept
        return [pixels * hidden1, hidden1 * hidden2, hidden2 * self.fc3.out_features]


class VGGLike(nn.Module):
    """The VGG-like network of the paper: 13 convolutions and two linear layers on (N, 3, 32, 32) images.

    `widths` is the 13 convolutions' channels and the hidden width. Noise sits in every block, on the
    flattened features (as many as the last convolution has channels) and on the hidden units.
    """

    input_shape = (3, 32, 32)
    positions = 1
    default_widths = (64, 64, 128, 128, 256, 256, 256, *[512] * 7)
    pool_after = (1, 3, 6, 9, 12)

    def __init__(self, widths: Sequence[int] = default_widths, *, noise: bool = True, classes: int = 10):
        super().__init__()
        *convs, hidden = _check_widths(widths, 14)
        self.units = (*convs, convs[-1], hidden)
        self.blocks = nn.ModuleList(
            ConvBlock(i, o, 3, padding=1, batch_norm=True, noise=noise)
            for i, o in zip((3, *convs), convs, strict=False)
        )
        self.noise_flat = _noise(convs[-1], noise)
        self.fc1 = nn.Linear(convs[-1], hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.noise_hidden = _noise(hidden, noise)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.pool_after:
                x = torch.max_pool2d(x, 2)
        x = torch.relu(self.norm(self.fc1(self.noise_flat(x.flatten(1)))))
        return self.fc2(self.noise_hidden(x))  # type: ignore[no-any-return]

    def macs(self, kept: Sequence[int]) -> list[int]:
        """Multiply-adds of one image per layer; `kept` has 15 entries, the last two flattened and hidden."""
        *convs, flat, hidden = kept
        sizes = [32 >> sum(p < i for p in self.pool_after) for i in range(13)]
        layers = [9 * i * o * s * s for i, o, s in zip((3, *convs), convs, sizes, strict=False)]
        return [*layers, flat * hidden, hidden * self.fc2.out_features]


Network = LeNet5 | LeNet500300 | VGGLike
