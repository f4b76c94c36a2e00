"""The catalogue: every kind of step that takes one value, as a function from choices and a shape to a module.

A kind returns None where it does not fit the shape. Biases and shifts are not zero, so that a removed channel
is a constant that is not zero further down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Shape
from tests.fuzz.masks import alive, mask, thin

Kind = Callable[[Draw, Shape], nn.Module | None]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MOST_CHANNELS = 8


class Apply(nn.Module):
    """A function of tensors as a module, with the text that describes it."""

    def __init__(self, text: str, function: Callable[..., object]) -> None:
        super().__init__()
        self.text, self.function = text, function

    def forward(self, *values: Tensor) -> object:
        return self.function(*values)

    def extra_repr(self) -> str:
        return self.text


class WithBuffer(nn.Module):
    """A function of a tensor and one constant tensor."""

    def __init__(self, text: str, held: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.text, self.function = text, function
        self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.held)

    def extra_repr(self) -> str:
        return f"{self.text}, {tuple(self.held.shape)}"


def fill(draw: Draw, layer: nn.Module) -> None:
    """Weights that keep the scale of values, biases that are not zero."""
    with torch.no_grad():
        fan_in = max(1, layer.weight[0].numel())
        layer.weight.copy_(draw.normal(*layer.weight.shape, scale=fan_in**-0.5))
        if layer.bias is not None:
            layer.bias.copy_(draw.normal(*layer.bias.shape, scale=0.7))


def conv(draw: Draw, x: Shape) -> nn.Module | None:
    """conv1d/2d/3d with any stride, dilation, padding, groups."""
    if x.rank not in {3, 4, 5} or not x.is_static(1):
        return None
    kernel, dilation, padding = _windows(draw, x)
    same = draw.chance(0.2)
    stride = 1 if same else draw.one((1, 1, 1, 2))
    out, groups = _channels(draw, x.sizes[1])
    mode = draw.one(("zeros",) * 12 + ("replicate", "circular"))
    layer = CONVOLUTIONS[x.rank - 2](
        x.sizes[1], out, kernel, stride=stride, padding="same" if same else padding, dilation=dilation,
        groups=groups, bias=draw.chance(0.6), padding_mode=mode,
    )  # fmt: skip
    fill(draw, layer)
    thin(draw, layer)
    return layer


def _windows(draw: Draw, x: Shape) -> tuple[list[int], list[int], list[int]]:
    kernel, dilation, padding = [], [], []
    size = draw.one((1, 2, 3, 3, 3))
    for axis in x.spatial:
        k, d, p = draw.one((size, size, 3, 1)), draw.one((1, 1, 1, 2)), draw.one((0, 0, 1, 1, 2))
        while d * (k - 1) + 1 > x.least(axis) + 2 * p:
            k -= 1
        kernel, dilation, padding = [*kernel, k], [*dilation, d], [*padding, p]
    return kernel, dilation, padding


def _channels(draw: Draw, count: int) -> tuple[int, int]:
    """(out, groups)."""
    way = draw.one(("plain", "plain", "plain", "depthwise", "grouped"))
    if way == "depthwise":
        return count * draw.one((1, 1, 2)), count
    divisors = [each for each in range(2, count) if count % each == 0]
    if way == "grouped" and divisors:
        groups = draw.one(divisors)
        return groups * draw.randint(1, 3), groups
    return draw.randint(1, MOST_CHANNELS), 1


def linear(draw: Draw, x: Shape) -> nn.Module | None:
    """A linear layer on the last axis, of a vector or of tokens."""
    if not x.is_static(x.rank - 1):
        return None
    layer = nn.Linear(x.sizes[-1], draw.randint(1, MOST_CHANNELS), bias=draw.chance(0.7))
    fill(draw, layer)
    thin(draw, layer)
    return layer


def matmul(draw: Draw, x: Shape) -> nn.Module | None:
    """Products with constants: matmul, einsum, addmm."""
    if not x.is_static(x.rank - 1):
        return None
    size, out = x.sizes[-1], draw.randint(1, MOST_CHANNELS)
    weight = draw.normal(size, out, scale=size**-0.5) * alive(draw, size)[:, None] * alive(draw, out)
    bias = draw.normal(out)
    if x.rank == 2 and draw.chance(0.5):
        return WithBuffer("addmm", weight, lambda x, w: torch.addmm(bias.to(w), x, w))
    return WithBuffer("matmul", weight, lambda x, w: x @ w)


def batch_norm(draw: Draw, x: Shape) -> nn.Module | None:
    """Statistics and affine parameters that are not trivial, some gammas 0 or negative."""
    if x.rank > 5 or not x.is_static(1):
        return None
    count = x.sizes[1]
    layer = BATCH_NORMS[x.rank - 2](count, affine=draw.chance(0.8))
    with torch.no_grad():
        layer.running_mean.copy_(draw.normal(count, scale=0.5))
        layer.running_var.copy_(draw.between(0.5, 2.0, count))
        if layer.affine:
            layer.weight.copy_(draw.normal(count, scale=0.4) + 0.8)
            layer.bias.copy_(draw.normal(count, scale=0.7))
            if draw.chance(0.4):
                layer.weight.mul_(alive(draw, count))
    return layer


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
    "abs": torch.abs,
    "neg": torch.neg,
    "cos": torch.cos,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "exp": lambda x: torch.exp(x.clamp(-3.0, 1.5)),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.3),
    "reciprocal": lambda x: 1.0 / (x.abs() + 0.5),
    "log": lambda x: torch.log(x.abs() + 0.5),
    "inverse_sigmoid": lambda x: 0.1 / torch.sigmoid(x.clamp(-4.0, 4.0)),
    "cube": lambda x: x.clamp(-1.0, 1.0) ** 3,
    "where": lambda x: torch.where(x > 0.05, x, 0.3 * x),
    "positive": lambda x: x * (x > 0.05),
    "centred": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "times": lambda x: x * 0.75,
    "plus": lambda x: x + 0.4,
    "from": lambda x: 0.9 - x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}
ACTIVATIONS = ("relu", "relu", "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")


def pointwise(draw: Draw, x: Shape) -> nn.Module:
    name = draw.one(tuple(UNARY))
    return Apply(name, UNARY[name])


def activation(draw: Draw, x: Shape) -> nn.Module:
    name = draw.one(ACTIVATIONS)
    return Apply(name, UNARY[name])


def constant(draw: Draw, x: Shape) -> nn.Module | None:
    """A constant per channel, now and then per entry, added, subtracted, multiplied, divided by or compared with."""
    axis = draw.one((1, 1, x.rank - 1))
    if not x.is_static(axis):
        return None
    shape = [1] * (x.rank - axis)
    shape[0] = x.sizes[axis]
    held = draw.normal(*(x.sizes[1:] if x.inner_static and draw.chance(0.3) else shape))
    name, function = draw.one(
        (
            ("add", torch.add),
            ("sub", torch.sub),
            ("from", lambda x, c: c - x),
            ("mul", torch.mul),
            ("div", lambda x, c: x / (c.abs() + 0.5)),
            ("maximum", torch.maximum),
            ("where", lambda x, c: torch.where(c > 0.0, x, c)),
            ("masked_fill", lambda x, c: x.masked_fill(c > 0.3, 0.4)),
        )
    )
    return WithBuffer(name, held, function)


def max_pool(draw: Draw, x: Shape) -> nn.Module | None:
    window = _pool_window(draw, x)
    if window is None:
        return None
    layer = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[x.rank - 2]
    kernel, stride, padding = window
    return layer(kernel, stride, padding, ceil_mode=draw.chance(0.3))


def avg_pool(draw: Draw, x: Shape) -> nn.Module | None:
    window = _pool_window(draw, x)
    if window is None:
        return None
    layer = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[x.rank - 2]
    options = {"ceil_mode": draw.chance(0.3), "count_include_pad": draw.chance(0.6)}
    if x.rank > 3 and draw.chance(0.15):
        options["divisor_override"] = 3
    return layer(*window, **options)


def _pool_window(draw: Draw, x: Shape) -> tuple[int, int, int] | None:
    if x.rank not in {3, 4, 5}:
        return None
    kernel = draw.randint(1, min(3, *(x.least(axis) for axis in x.spatial)))
    return kernel, draw.randint(1, 3), draw.randint(0, kernel // 2)


def adaptive_pool(draw: Draw, x: Shape) -> nn.Module | None:
    if x.rank not in {3, 4, 5}:
        return None
    average = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    largest = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
    return draw.one((average, average, largest))[x.rank - 2](draw.one((1, 1, 2, 3)))


def upsample(draw: Draw, x: Shape) -> nn.Module | None:
    if x.rank not in {3, 4, 5} or max(x.sizes[2:]) > 6:
        return None
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.rank - 2]
    mode = draw.one(("nearest", smooth))
    corners = draw.chance(0.3) if mode == smooth else None
    if draw.chance(0.5) and x.inner_static:
        return nn.Upsample(
            size=[x.sizes[axis] + draw.randint(0, 3) for axis in x.spatial], mode=mode, align_corners=corners
        )
    return nn.Upsample(scale_factor=2, mode=mode, align_corners=corners)


def pad(draw: Draw, x: Shape) -> nn.Module | None:
    """Zeros, other constants, the input's own entries; of positions or channels; cropping too."""
    mode = draw.one(("constant", "constant", "constant", "replicate", "reflect"))
    count = x.rank - 2 if mode != "constant" or draw.chance(0.6) else x.rank - 1
    if not 1 <= count <= 3 or (mode != "constant" and x.rank not in {3, 4, 5}):
        return None
    low = -1 if mode == "constant" and draw.chance(0.3) else 0
    sides = [draw.randint(low, 1) for _ in range(2 * count)]
    value = draw.one((0.0, 0.0, 0.6)) if mode == "constant" else None
    return Apply(f"pad {sides} {mode} {value}", lambda x: F.pad(x, sides, mode, value))


def mean(draw: Draw, x: Shape) -> nn.Module | None:
    """A reduction over the last axes or any other but the batch."""
    if x.rank < 3:
        return None
    axes = list(x.spatial) if draw.chance(0.7) else [draw.randrange(1, x.rank)]
    keep = draw.chance(0.4)
    name, function = draw.one(
        (
            ("mean", lambda x: x.mean(axes, keepdim=keep)),
            ("mean", lambda x: x.mean(axes, keepdim=keep)),
            ("sum", lambda x: x.sum(axes, keepdim=keep)),
            ("amax", lambda x: x.amax(axes, keepdim=keep)),
        )
    )
    return Apply(f"{name} {axes} {keep}", function)


def opaque(draw: Draw, x: Shape) -> nn.Module | None:
    """Operators that most compilers have no rule for."""
    axis = draw.randrange(1, x.rank)
    layer = _opaque_module(draw, x) if draw.chance(0.25) else None
    if layer is not None:
        return layer
    options: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("softmax", lambda x: torch.softmax(x, axis)),
        ("cumsum", lambda x: torch.cumsum(x, axis)),
        ("flip", lambda x: torch.flip(x, [axis])),
        ("sort", lambda x: torch.sort(x, axis).values),
    ]
    if x.is_static(x.rank - 1):
        size = [x.sizes[-1]]
        options.append(("layer_norm", lambda x: F.layer_norm(x, size)))
    if x.is_static(1) and x.sizes[1] % 2 == 0 and x.rank > 2:
        options.append(("group_norm", lambda x: F.group_norm(x, 2)))
    if x.rank == 4 and x.is_static(1) and x.sizes[1] % 4 == 0:
        options.append(("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2)))
    name, function = draw.one(options)
    return Apply(f"{name} {axis}", function)


def _opaque_module(draw: Draw, x: Shape) -> nn.Module | None:
    """A transposed convolution, a parametric relu or a recurrent layer."""
    if x.rank == 3 and x.inner_static and draw.chance(0.5):
        recurrent = nn.GRU(x.sizes[2], 3, batch_first=True)
        with torch.no_grad():
            for parameter in recurrent.parameters():
                parameter.copy_(draw.normal(*parameter.shape, scale=0.4))
        return nn.Sequential(recurrent, Apply("states", lambda results: results[0]))
    if x.rank == 4 and x.is_static(1) and draw.chance(0.6):
        layer = nn.ConvTranspose2d(x.sizes[1], 3, 3, stride=draw.one((1, 2)), padding=draw.one((0, 1)))
        fill(draw, layer)
        return layer
    return nn.PReLU(x.sizes[1]) if x.is_static(1) else None


def masked(draw: Draw, x: Shape) -> nn.Module:
    return mask(draw, x)


SIMPLE: dict[str, Kind] = {
    "conv": conv, "linear": linear, "matmul": matmul, "batch_norm": batch_norm, "pointwise": pointwise,
    "activation": activation, "constant": constant, "max_pool": max_pool, "avg_pool": avg_pool,
    "adaptive_pool": adaptive_pool, "upsample": upsample, "pad": pad, "mean": mean, "opaque": opaque,
    "mask": masked,
}  # fmt: skip


def sequence(parts: Sequence[nn.Module | None]) -> nn.Sequential:
    return nn.Sequential(*(part for part in parts if part is not None))
