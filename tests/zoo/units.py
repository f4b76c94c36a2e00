"""The layers that the zoo's networks share, with the places where noise can go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.zoo.places import Places

Act = Callable[[], nn.Module] | None

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}


def norm_layer(kind: str | None, channels: int, dims: int = 2) -> nn.Module:
    """The norm over channels called `kind`; None: nothing."""
    if kind == "batch":
        return BATCH_NORMS[dims](channels)
    if kind == "instance":
        return INSTANCE_NORMS[dims](channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(4, channels)
    return nn.Identity()


class Unit(nn.Module):
    """convolution -> noise -> + bias -> norm -> noise -> activation -> noise."""

    def __init__(
        self,
        places: Places,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, ...] = 3,
        stride: int | tuple[int, ...] = 1,
        act: Act = nn.ReLU,
        *,
        groups: int = 1,
        dilation: int = 1,
        padding: int | tuple[int, ...] | None = None,
        norm: str | None = "batch",
        dims: int = 2,
        mode: str = "zeros",
    ):
        super().__init__()
        if padding is None:
            sizes = (kernel,) * dims if isinstance(kernel, int) else kernel
            padding = tuple(size // 2 * dilation for size in sizes)
        self.conv = CONVOLUTIONS[dims](
            inputs, outputs, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode
        )
        self.before = places.noise("before norm", outputs)
        self.bias = nn.Parameter(torch.randn(outputs, *[1] * dims) * 0.2)
        self.norm = norm_layer(norm, outputs, dims)
        self.after = places.noise("after norm", outputs)
        self.act = act() if act else nn.Identity()
        width = outputs // 2 if isinstance(self.act, nn.GLU) else outputs
        self.last = places.noise("after activation", width) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.after(self.norm(self.before(self.conv(x)) + self.bias))))


class Transposed(nn.Module):
    """The same with a transposed convolution."""

    def __init__(
        self,
        places: Places,
        inputs: int,
        outputs: int,
        kernel: int = 4,
        stride: int = 2,
        act: Act = nn.ReLU,
        *,
        padding: int = 1,
        extra: int = 0,
        norm: str | None = "batch",
        dims: int = 2,
    ):
        super().__init__()
        self.conv = TRANSPOSED[dims](inputs, outputs, kernel, stride, padding, extra, bias=False)
        self.before = places.noise("before norm", outputs)
        self.bias = nn.Parameter(torch.randn(outputs, *[1] * dims) * 0.2)
        self.norm = norm_layer(norm, outputs, dims)
        self.after = places.noise("after norm", outputs)
        self.act = act() if act else nn.Identity()
        self.last = places.noise("after activation", outputs) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.after(self.norm(self.before(self.conv(x)) + self.bias))))


class PreUnit(nn.Module):
    """norm -> noise -> activation -> noise -> convolution -> noise -> + bias."""

    def __init__(
        self,
        places: Places,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        act: Callable[[], nn.Module] = nn.ReLU,
        *,
        norm: str = "batch",
    ):
        super().__init__()
        self.norm = norm_layer(norm, inputs)
        self.after = places.noise("after norm", inputs)
        self.act = act()
        self.last = places.noise("after activation", inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.before = places.noise("before norm", outputs)
        self.bias = nn.Parameter(torch.randn(outputs, 1, 1) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.act(self.after(self.norm(x))))
        return self.before(self.conv(x)) + self.bias


class Dense(nn.Module):
    """linear over the last axis -> noise -> + bias -> noise -> activation -> noise on hidden units."""

    def __init__(self, places: Places, inputs: int, outputs: int, act: Act = nn.ReLU, *, norm: bool = False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.before = places.noise("before norm", outputs, -1)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.2)
        self.norm = nn.BatchNorm1d(outputs) if norm else nn.Identity()
        self.after = places.noise("after norm", outputs, -1)
        self.act = act() if act else nn.Identity()
        self.last = places.noise("hidden", outputs, -1) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.after(self.norm(self.before(self.linear(x)) + self.bias))))


class Add(nn.Module):
    """noise(x) + noise(y), then an activation and noise on the block's output."""

    def __init__(self, places: Places, channels: int, act: Act = None, dim: int = 1):
        super().__init__()
        self.left = places.noise("both sides of adds", channels, dim)
        self.right = places.noise("both sides of adds", channels, dim)
        self.act = act() if act else nn.Identity()
        self.out = places.noise("after activation" if act else "on blocks", channels, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.act(self.left(x) + self.right(y)))


class SqueezeExcite(nn.Module):
    """Channels gated by their means, through a bottleneck of 1x1 convolutions."""

    def __init__(
        self,
        places: Places,
        channels: int,
        squeezed: int,
        act: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        dims: int = 2,
    ):
        super().__init__()
        self.pool = (nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool2d)(1)
        self.reduce = CONVOLUTIONS[dims](channels, squeezed, 1)
        self.act = act()
        self.hidden = places.noise("hidden", squeezed)
        self.expand = CONVOLUTIONS[dims](squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.hidden(self.act(self.reduce(self.pool(x))))))


class Classifier(nn.Module):
    """noise on the input, features of any rank, mean over positions, linear."""

    def __init__(
        self, places: Places, features: Sequence[nn.Module], channels: int, inputs: int = 3, classes: int = 10
    ):
        super().__init__()
        self.input = places.noise("on input", inputs)
        self.features = nn.Sequential(*features)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.input(x)).flatten(2).mean(2))


class Perceptron(nn.Sequential):
    """Dense layers through `widths`, the last one linear."""

    def __init__(self, places: Places, widths: Sequence[int], act: Callable[[], nn.Module] = nn.ReLU):
        pairs = list(itertools.pairwise(widths))
        layers = [Dense(places, a, b, act) for a, b in pairs[:-1]]
        super().__init__(*layers, nn.Linear(*pairs[-1]))
