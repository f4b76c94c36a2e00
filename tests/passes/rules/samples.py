"""Sample calls for every overload in the registry."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passes.rules import registered_rules
from tests.passes.rules.laws import Sample, X, call

aten = torch.ops.aten
INF = 2**63 - 1


def constant(*shape: int, zeros: float = 0.3, positive: bool = False) -> Tensor:
    """A constant with some exact zeros (none if it must be positive)."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if positive:
        return value.abs() + 0.5
    return value * (torch.rand(shape, generator=generator) >= zeros)


def weight(out: int, inputs: int, *kernel: int) -> Tensor:
    """A weight with zero rows, zero columns and zero entries."""
    value = constant(out, inputs, *kernel, zeros=0.1)
    value[0] = 0.0
    value[:, -1] = 0.0
    return value


DOMAIN = {
    "log": (0.5, 2.0), "log2": (0.5, 2.0), "log10": (0.5, 2.0), "log1p": (-0.5, 2.0), "sqrt": (0.1, 2.0),
    "rsqrt": (0.1, 2.0), "reciprocal": (0.1, 2.0), "acosh": (1.1, 3.0), "asin": (-0.9, 0.9), "acos": (-0.9, 0.9),
    "atanh": (-0.9, 0.9), "erfinv": (-0.9, 0.9), "logit": (0.1, 0.9), "tan": (-1.0, 1.0),
    "special_logit": (0.1, 0.9), "lgamma": (0.5, 3.0), "digamma": (0.5, 3.0),
}  # fmt: skip
EXTRA = {
    "threshold": (0.1, 0.3), "clamp": (-0.5, 0.5), "clamp_min": (-0.5,), "clamp_max": (0.5,),
    "to": (torch.float32,), "pow": (2.0,), "clip": (-0.5, 0.5)
}  # fmt: skip
BOOLEAN = {
    "logical_not",
    "bitwise_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
}
SHAPES = ((2, 5, 3, 4), (2, 3, 6), (3, 7))


def name_of(overload: Any) -> str:
    return str(overload).split(".")[1]


def pointwise(overload: Any) -> list[Sample]:
    """Unary, scalar and broadcasting binary calls of an elementwise overload."""
    name, kind = str(overload).split(".")[1:3]
    low, high = DOMAIN.get(name, (-2.0, 2.0))
    dtype = torch.bool if name in BOOLEAN else torch.float64

    def x(*shape: int) -> X:
        return X(shape, dtype, low, high)

    if name == "masked_fill" or (name == "where" and kind != "self"):
        return choices(overload, kind)
    if name == "prelu":
        return [
            call(overload, X((2, 5, 3)), constant(5)),
            call(overload, X((2, 5)), X((5,))),
            call(overload, X((2, 5, 3)), constant(1, zeros=0.0)),
            call(overload, X((4,)), X((1,))),
            call(overload, X((2, 1, 3)), X((1,))),
        ]
    if name == "lerp":
        weight = 0.3 if kind == "Scalar" else x(5, 1, 1)
        return [call(overload, x(2, 5, 3, 4), end, weight) for end in (constant(5, 3, 4), x(2, 5, 1, 1))]
    if name == "where":
        condition = torch.rand(1, 5, 1, 1) < 0.5
        return [
            call(overload, X((2, 5, 3, 4), torch.bool), x(2, 5, 3, 4), x(5, 1, 1)),
            call(overload, condition, x(2, 5, 3, 4), x(2, 5, 3, 4)),
        ]
    if kind in {"Scalar", "Tensor_Scalar", "Scalar_mode"}:
        extra = {"rounding_mode": "floor"} if "mode" in kind else {}
        return (
            [call(overload, x(*shape), 1.5, **extra) for shape in SHAPES]
            if name != "pow" or kind != "Scalar"
            else [call(overload, 1.5, x(2, 5, 3, 4))]
        )
    if kind in {"Tensor", "Tensor_Tensor", "Tensor_mode"} or name in TWO_TENSORS:
        extra = {"rounding_mode": "floor"} if "mode" in kind else {}
        base = X((2, 5, 3, 4), dtype, 0.5, 2.0) if name in {"pow", "float_power"} else x(2, 5, 3, 4)
        other = (
            torch.rand(5, 1, 1) < 0.5 if dtype == torch.bool else constant(5, 1, 1, positive=name in PARTIAL)
        )
        second = X((2, 5, 1, 1), dtype, 0.5, 2.0) if name in PARTIAL else x(2, 5, 1, 1)
        third = X((2, 5, 3, 4), dtype, 0.5, 2.0) if name in PARTIAL else x(2, 5, 3, 4)
        pairs = [(base, other), (base, second), (base, third)]
        if name in {"clamp", "clip"}:
            return [call(overload, base, other, None), call(overload, base, None, second)]
        if name in BOOLEAN:
            bits = torch.tensor([0, -1, 3, 0, -1]).reshape(5, 1, 1)
            pairs.append((X((2, 5, 3, 4), torch.int64), bits))
        return [call(overload, *pair, **extra) for pair in pairs]
    if kind == "decimals":
        return [call(overload, x(2, 5, 3, 4), decimals=1)]
    if name == "_to_copy":
        return [call(overload, x(2, 5, 3, 4), dtype=torch.float32)]
    return [call(overload, x(*shape), *EXTRA.get(name, ())) for shape in SHAPES]


TWO_TENSORS = BOOLEAN - {"logical_not", "bitwise_not"} | {
    "maximum", "minimum", "atan2", "floor_divide", "fmax", "fmin", "hypot", "logaddexp", "heaviside",
}  # fmt: skip
PARTIAL = {"div", "pow", "float_power", "fmod", "remainder", "floor_divide", "atan2", "xlogy"}


def choices(overload: Any, kind: str) -> list[Sample]:
    """masked_fill and where with numbers: conditions that vary, are constant or broadcast."""
    x, condition = X((2, 5, 3, 4)), X((2, 5, 3, 4), torch.bool)
    known = torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    if "masked_fill" in str(overload):
        values = (1.5, -math.inf) if kind == "Scalar" else (X(()), torch.tensor(0.5, dtype=torch.float64))
        return [call(overload, x, mask, value) for mask in (condition, known) for value in values]
    if kind == "Scalar":
        return [call(overload, condition, 1.5, 0.0), call(overload, known, 2.0, 0.5)]
    order = 1 if kind == "ScalarOther" else -1
    return [call(overload, mask, *(x, 1.5)[::order]) for mask in (condition, known)]


def convolution(overload: Any, rank: int) -> list[Sample]:
    """Padding, stride, dilation, groups, depthwise; with and without bias; unbatched."""
    size = (7, 6, 5)[:rank]
    x = X((2, 6, *size))
    kernel = (3,) * rank
    ones, zeros, twos = [1] * rank, [0] * rank, [2] * rank
    return [
        call(overload, x, weight(5, 6, *kernel), constant(5), ones, zeros, ones, 1),
        call(overload, x, weight(5, 6, *kernel), None, ones, ones, ones, 1),
        call(overload, x, weight(5, 6, *kernel), constant(5), twos, ones, ones, 1),
        call(overload, x, weight(5, 6, *kernel), constant(5), ones, twos, twos, 1),
        call(overload, x, weight(5, 6, *([1] * rank)), constant(5), ones, zeros, ones, 1),
        call(overload, x, weight(6, 1, *kernel), constant(6), ones, ones, ones, 6),
        call(overload, x, weight(12, 1, *kernel), None, ones, ones, ones, 6),
        call(overload, x, weight(9, 2, *kernel), constant(9), ones, zeros, ones, 3),
        call(overload, x, weight(8, 3, *kernel), constant(8), ones, ones, ones, 2),
        call(overload, x, weight(4, 3, *kernel), None, twos, ones, ones, 2),
        call(overload, X((6, *size)), weight(5, 6, *kernel), constant(5), ones, ones, ones, 1),
    ]


def transposed(overload: Any, rank: int) -> list[Sample]:
    """Stride, padding, output padding, dilation, groups; with and without bias; unbatched."""
    size = (5, 4, 3)[:rank]
    x = X((2, 6, *size))
    kernel = (3,) * rank
    ones, zeros, twos = [1] * rank, [0] * rank, [2] * rank

    def stored(inputs: int, out: int, *kernel: int) -> Tensor:
        value = constant(inputs, out, *kernel, zeros=0.1)
        value[-1], value[:, 0] = 0.0, 0.0
        return value

    return [
        call(overload, x, stored(6, 5, *kernel), constant(5), ones, zeros),
        call(overload, x, stored(6, 5, *kernel), None, twos, ones, ones),
        call(overload, x, stored(6, 5, *kernel), constant(5), twos, zeros, zeros, 1, ones),
        call(overload, x, stored(6, 5, *twos), constant(5), twos, zeros),
        call(overload, x, torch.ones(6, 5, *twos, dtype=torch.float64), constant(5), twos, zeros),
        call(overload, x, stored(6, 5, *kernel), constant(5), twos, twos, ones, 1, twos),
        call(overload, x, stored(6, 5, *ones), constant(5), ones, zeros),
        call(overload, x, stored(6, 3, *kernel), constant(9), twos, ones, zeros, 3),
        call(overload, x, stored(6, 3, *kernel), constant(6), ones, ones, zeros, 2),
        call(overload, x, stored(6, 1, *kernel), constant(6), twos, ones, ones, 6),
        call(overload, x, stored(6, 2, *kernel), None, ones, ones, zeros, 6),
        call(overload, X((6, *size)), stored(6, 5, *kernel), constant(5), twos, ones, ones, 1),
    ]


def attention(overload: Any) -> list[Sample]:
    """Masks of every kind, a scale, heads that are shared, keys of another width than values."""
    q, k, v = X((2, 4, 3, 6)), X((2, 4, 5, 6)), X((2, 4, 5, 3))
    some = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return [
        call(overload, q, k, v),
        call(overload, q, k, v, X((3, 5))),
        call(overload, q, k, v, X((2, 1, 3, 5))),
        call(overload, q, k, v, X((2, 4, 1, 5))),
        call(overload, q, k, v, some),
        call(overload, q, k, v, torch.zeros(3, 5, dtype=torch.float64).masked_fill(~some, -torch.inf)),
        call(overload, q, k, v, None, 0.0, True),
        call(overload, q, k, v, None, 0.0, False, scale=0.3),
        call(overload, q, X((2, 2, 5, 6)), X((2, 2, 5, 6)), None, 0.0, False, enable_gqa=True),
        call(overload, X((2, 3, 6)), X((2, 5, 6)), X((2, 5, 6))),
        call(overload, q, X((1, 4, 5, 6)), X((1, 4, 5, 6))),
    ]


def product(overload: Any) -> list[Sample]:
    """Two variables, a constant on either side, broadcast leading axes."""
    if overload is aten.bmm.default:
        return [call(overload, X((2, 3, 5)), other) for other in (X((2, 5, 4)), constant(2, 5, 4))]
    return [
        call(overload, X((2, 3, 4, 5)), X((2, 3, 5, 6))),
        call(overload, X((2, 3, 4, 5)), X((1, 3, 5, 6))),
        call(overload, X((4, 5)), X((2, 5, 6))),
        call(overload, X((4, 5)), X((5, 6))),
        call(overload, constant(4, 5), X((2, 3, 5, 6))),
        call(overload, X((2, 4, 5)), constant(2, 5, 3)),
    ]


def linear(overload: Any) -> list[Sample]:
    return [
        call(overload, X(shape), weight(4, 6), bias)
        for shape in ((3, 6), (2, 3, 6), (6,))
        for bias in (constant(4), None)
    ]


def resampling(overload: Any) -> list[Sample]:
    name, kind = str(overload).split(".")[1:3]
    rank = next(number for number in (1, 2, 3) if f"{number}d" in name)
    x = X((2, 5, *(3, 4, 2)[:rank]))
    size, scale = [6, 7, 5][:rank], [2.0] * rank
    corners: tuple[Any, ...] = () if "nearest" in name else (False,)
    if kind == "vec":
        return [call(overload, x, size, *corners, None), call(overload, x, None, *corners, scale)]
    return [call(overload, x, size, *corners)]


def pooling(overload: Any) -> list[Sample]:
    name = name_of(overload)
    rank = next(number for number in (1, 2, 3) if f"{number}d" in name)
    x = X((2, 5, *(7, 6, 4)[:rank]))
    if name.startswith("adaptive"):
        return [call(overload, x, [2] * rank), call(overload, X(x.shape[1:]), [1] * rank)]
    found = [call(overload, x, [2] * rank), call(overload, x, [3] * rank, [2] * rank, [1] * rank)]
    if name.startswith("max"):
        found.append(call(overload, x, [2] * rank, [1] * rank, [0] * rank, [2] * rank, True))
    else:
        found.append(call(overload, x, [3] * rank, [2] * rank, [1] * rank, True, False))
    return found


def reduction(overload: Any) -> list[Sample]:
    name, kind = str(overload).split(".")[1:3]
    x = X((2, 5, 3, 4), torch.bool if name in {"any", "all"} else torch.float64)
    whole = {"mean", "sum", "var", "std", "prod", "any", "all", "var_mean", "std_mean"}
    if kind == "default" and name in whole:
        return [call(overload, x)]
    if name == "linalg_vector_norm":
        orders = [call(overload, x, order, [1], True) for order in (1, 2, 3.5, math.inf)]
        return [*orders, call(overload, x), call(overload, x, 2, [2, 3]), call(overload, x, 1, [-1])]
    if name in {"argmax", "argmin"}:
        return [call(overload, x), call(overload, x, 1), call(overload, x, -1, True)]
    if kind == "dim_int" or (kind == "dim" and name in {"any", "all"}):
        return [call(overload, x, axis, keepdim) for axis, keepdim in ((1, True), (-1, False), (0, False))]
    axes = [([2, 3], True), ([2, 3], False), ([-1], False), ([1], True)]
    if kind == "correction":
        return [call(overload, x, dims, correction=1, keepdim=keepdim) for dims, keepdim in axes]
    if kind == "dim" and name in {"var", "std", "var_mean", "std_mean"}:
        return [call(overload, x, dims, True, keepdim) for dims, keepdim in axes]
    return [call(overload, x, dims, keepdim) for dims, keepdim in axes]


def ordering(overload: Any) -> list[Sample]:
    """An axis put in order, or one entry of it; unlike entries, repeated ones, one axis alone."""
    name, kind = str(overload).split(".")[1:3]
    counts: tuple[Any, ...] = {"topk": (2,), "kthvalue": (2,)}.get(name, ())
    stable: dict[str, Any] = {"stable": True} if kind == "stable" else {}
    shapes = ((2, 5, 3, 4), 2), ((2, 5, 3, 4), 1), ((3, 7), -1), ((6,), 0)
    if stable:
        return [call(overload, X(shape), dim=axis, **stable) for shape, axis in shapes]
    found = [call(overload, X(shape), *counts, axis) for shape, axis in shapes]
    return [*found, call(overload, X((2, 5, 3), torch.int64), *counts, 1)]


def _recurrent_weights(gates: int, inputs: int, units: int, biases: bool) -> list[Tensor]:
    """A unit that hears nothing, one that only it hears, one that nobody reads, an input that nobody reads."""
    found = [constant(gates, units, inputs, zeros=0.2), constant(gates, units, units, zeros=0.4)]
    found += [constant(gates, units), constant(gates, units) + 1] if biases else []
    for value in found:
        value[:, 0] = 0.0
    found[0][:, :, 1] = 0.0
    found[0][:, 3], found[1][:, 3] = 0.0, 0.0
    found[1][:, 3, 0] = 1.0
    found[1][:, 1:, 2] = 0.0
    for value in found[2:]:
        value[:, 3] = 0.0
    return [value.flatten(0, 1) for value in found]


GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def recurrent(overload: Any) -> list[Sample]:
    """Layers (one and two directions, given states and zeros, with and without biases) or cells, 5 inputs, 4 units."""
    name = name_of(overload)
    gates, count = GATES[name.split("_")[0]], 2 if "lstm" in name else 1

    def hx(state: Any) -> Any:
        return [state] * count if count == 2 else state

    if name.endswith("cell"):
        weights = [_recurrent_weights(gates, 5, 4, biases) for biases in (True, False)]
        states = [X((3, 4)) for _ in range(count)]
        given = states if count == 2 else states[0]
        return [
            *(call(overload, X((3, 5)), given, *parameters) for parameters in weights),
            call(overload, X((3, 5)), hx(torch.zeros(3, 4, dtype=torch.float64)), *weights[0]),
        ]
    found = []
    for biases, both, batch_first in ((True, False, True), (False, False, False), (True, True, False)):
        parameters = _recurrent_weights(gates, 5, 4, biases)
        parameters += [value.flip(0) if value.ndim > 1 else value for value in parameters] * both
        shape = (1 + both, 3, 4)
        for state in (torch.zeros(shape, dtype=torch.float64), X(shape)):
            x = X((3, 2, 5) if batch_first else (2, 3, 5))
            args = (biases, 1, 0.0, False, both, batch_first)
            states = [state, X(shape) if isinstance(state, X) else state] if count == 2 else state
            found.append(call(overload, x, states, parameters, *args))
    return found


def lookup(overload: Any) -> list[Sample]:
    """Tables with columns of zeros, of one number, and of unlike numbers; indices in range."""
    table = constant(4, 5)
    table[:, 0], table[:, 1] = 0.0, 0.7
    tables = (table, X((4, 5)))
    if name_of(overload) == "embedding":
        return [call(overload, held, X(shape, torch.int64)) for held in tables for shape in ((2, 3), (6,))]
    indices, offsets = X((6,), torch.int64), torch.tensor([0, 2, 2, 5])
    modes = [(mode, None) for mode in (0, 1, 2)] + [(0, X((6,)))]
    rest = (False, 1) if str(overload).endswith("padding_idx") else (False,)
    return [
        call(overload, held, indices, offsets, False, mode, False, weights, *rest)
        for held in tables
        for mode, weights in modes
    ]


def routing(overload: Any) -> list[Sample]:
    """Indices and grids that vary, as wide as the data or narrower; bases of zeros, of numbers and that vary."""
    name = name_of(overload)
    x, index, wide = X((2, 5, 4)), X((3,), torch.int64), X((2, 5, 6), torch.int64)
    if name.startswith("fft_"):
        return fourier(overload, name)
    if name == "gather":
        narrow = X((2, 3, 6), torch.int64)
        return [call(overload, x, 2, wide), call(overload, x, -1, narrow), call(overload, X((4,)), 0, index)]
    if name.startswith("grid_sampler"):
        grids = X((2, 4, 3, 2), low=-1.3, high=1.3), X((2, 4, 3, 3, 3), low=-1.3, high=1.3)
        flat = [] if name.endswith("3d") else [(X((2, 5, 4, 3)), grids[0])]
        deep = [] if name.endswith("2d") else [(X((2, 5, 4, 3, 2)), grids[1])]
        modes = [(0, 0, False), (1, 1, True), (0, 2, False)]
        return [call(overload, *both, *mode) for both in flat + deep for mode in modes]
    if name == "max_unpool2d":
        return [call(overload, X((2, 5, 2, 2)), X((2, 5, 2, 2), torch.int64), [4, 3])]
    if name == "max_unpool3d":
        pooled = (2, 5, 2, 2, 1)
        return [call(overload, X(pooled), X(pooled, torch.int64), [4, 4, 2], [2, 2, 2], [0, 0, 0])]
    if "max_pool" in name:
        rank = int(name[name.rindex("pool") + 4])
        sizes = (4, 5, 3)[:rank]
        return [call(overload, X((2, 5, *sizes)), [2] * rank), call(overload, X((5, *sizes)), [2] * rank)]
    bases = (
        X((2, 5, 4)),
        torch.zeros(2, 5, 4, dtype=torch.float64),
        constant(5, 1).expand(2, 5, 4).contiguous(),
    )
    if name.startswith("scatter"):
        extra = {"scatter_reduce": ("mean",)}.get(name, ())
        narrow = X((2, 3, 6), torch.int64)
        found = [call(overload, base, 2, wide, X((2, 5, 6)), *extra) for base in bases]
        found.append(call(overload, x, 2, narrow, X((2, 5, 6)), *extra))
        return [*found, call(overload, X((4,)), 0, index, X((3,)), *extra)]
    source = X((2, 5, 3))
    return [call(overload, base, 2, index, source) for base in bases]


def fourier(overload: Any, name: str) -> list[Sample]:
    """One axis or two, the last or others, padded and cut."""
    x = X((2, 5, 4, 3))
    if name[-1] in "2n":
        return [call(overload, x), call(overload, x, [4, 5], [1, -1]), call(overload, x, None, [0, 2])]
    return [call(overload, x), call(overload, x, 6, 2), call(overload, x, None, 1)]


def padding(overload: Any) -> list[Sample]:
    name = name_of(overload)
    if name == "constant_pad_nd":
        x = X((2, 5, 3, 4))
        return [
            call(overload, x, pads, value)
            for pads in ([1, 2], [1, 1, 0, 2], [0, 0, 0, 0, 2, 3], [1, 0, 0, 1, 1, 0], [-1, 1])
            for value in (0.0, 1.5)
        ]
    if name == "pad":
        return [
            call(overload, X((2, 5, 4, 4)), [1, 2, 2, 1], mode)
            for mode in ("reflect", "replicate", "circular")
        ]
    rank = next(number for number in (1, 2, 3) if f"{number}d" in name)
    return [call(overload, X((2, 5, *(4, 5, 4)[:rank])), [1, 2] * rank)]


def normalization(overload: Any) -> list[Sample]:
    """Norms over one and several axes, with and without weight and bias, constant or computed; groups of one."""
    name = name_of(overload)
    ones = constant(8, zeros=0.0)
    if name == "rms_norm":
        return [
            call(overload, X((2, 3, 8)), [8], constant(8), 1e-5),
            call(overload, X((2, 8)), [8], None, 0.1),
            call(overload, X((8,)), [8], ones, 1e-5),
            call(overload, X((2, 3, 8)), [8], X((8,)), 1e-5),
            call(overload, X((2, 3, 4)), [3, 4], constant(3, 4), 1e-5),
            call(overload, X((2, 3, 8)), [8], constant(8)),
        ]
    if name == "layer_norm":
        return [
            call(overload, X((2, 3, 8)), [8], constant(8), constant(8), 1e-5),
            call(overload, X((2, 3, 8)), [8], ones, None, 1e-5),
            call(overload, X((2, 8)), [8]),
            call(overload, X((8,)), [8], None, constant(8)),
            call(overload, X((2, 3, 8)), [8], X((8,)), X((8,)), 0.1),
            call(overload, X((2, 3, 4)), [3, 4], constant(3, 4), constant(3, 4)),
            call(overload, X((2, 3, 1)), [1]),
        ]
    shapes = ((2, 6, 3, 4), (2, 6, 5), (3, 6))
    vectors = ((constant(6), constant(6)), (None, None), (X((6,)), None), (None, constant(6)))
    if name == "group_norm":
        return [
            call(overload, X(shape), groups, *pair, 1e-5)
            for shape, pair in zip((*shapes, shapes[0]), vectors, strict=True)
            for groups in (1, 2, 3, 6)
        ]
    rest = (None, None, True, 0.1, 1e-5, False)
    return [
        call(overload, X(shape), *pair, *rest)
        for shape, pair in zip((*shapes[:2], *shapes[:2]), vectors, strict=True)
    ]


def scan(overload: Any) -> list[Sample]:
    name = name_of(overload)
    if name in {"tril", "triu"}:
        return [call(overload, X((2, 4, 5)), diagonal) for diagonal in (0, 2, -1)]
    extra = (False,) if name.startswith("_") else ()
    return [call(overload, X(shape), axis, *extra) for shape in ((2, 5, 3), (4,)) for axis in (0, -1)] + [
        call(overload, X((2, 5, 3, 2)), 1, *extra)
    ]


def filling(overload: Any) -> list[Sample]:
    name, number = name_of(overload), (1.5,) if "f" in name_of(overload) else ()
    x = (X((2, 5, 3)),) if "like" in name or "new" in name or name == "fill" else ()
    sizes = () if "like" in name or name == "fill" else ([2, 5, 3],)
    return [call(overload, *x, *sizes, *number)]


SPECIFIC: dict[Any, Callable[[Any], list[Sample]]] = {
    aten.linear.default: linear,
    aten.conv1d.default: lambda op: convolution(op, 1),
    aten.conv2d.default: lambda op: convolution(op, 2),
    aten.conv3d.default: lambda op: convolution(op, 3),
    aten.conv_transpose1d.default: lambda op: transposed(op, 1),
    aten.conv_transpose2d.input: lambda op: transposed(op, 2),
    aten.conv_transpose3d.input: lambda op: transposed(op, 3),
    aten.cat.default: lambda op: [
        call(op, [X((2, 3, 4)), X((2, 2, 4)), constant(2, 2, 4)], 1),
        call(op, [X((2, 3, 4)), X((2, 3, 1))], -1),
    ],
    aten.stack.default: lambda op: [call(op, [X((2, 3, 4)), X((2, 3, 4))], axis) for axis in (0, 1, -1)],
    aten.permute.default: lambda op: [call(op, X((2, 3, 4)), [0, 2, 1]), call(op, X((2, 3, 4)), [2, 0, 1])],
    aten.transpose.int: lambda op: [call(op, X((2, 3, 4)), 1, 2), call(op, X((2, 3, 4)), 0, -1)],
    aten.t.default: lambda op: [call(op, X((3, 4)))],
    aten.unsqueeze.default: lambda op: [call(op, X((3, 4)), axis) for axis in (0, 1, -1)],
    aten.squeeze.default: lambda op: [call(op, X((3, 1, 4)))],
    aten.squeeze.dim: lambda op: [call(op, X((3, 1, 4)), 1), call(op, X((3, 1, 4)), 0)],
    aten.squeeze.dims: lambda op: [call(op, X((3, 1, 4, 1)), [1, 3])],
    aten.slice.Tensor: lambda op: [
        call(op, X((2, 8, 3)), 1, 2, 6), call(op, X((2, 8, 3)), 1, 1, INF, 3), call(op, X((2, 8, 3)), -2, -5, -1),
    ],
    aten.select.int: lambda op: [call(op, X((2, 8, 3)), 1, 3), call(op, X((2, 8, 3)), -1, -1)],
    aten.index_select.default: lambda op: [
        call(op, X((2, 8, 3)), 1, torch.tensor([5, 1, 1, 7])), call(op, X((2, 8, 3)), -2, torch.randperm(8)),
        call(op, X((2, 5, 4)), 2, X((6,), torch.int64)), call(op, X((4,)), 0, X((1,), torch.int64)),
    ],
    aten.index.Tensor: lambda op: [
        call(op, X((2, 8, 3)), [None, torch.tensor([5, 1, 1, 7])]), call(op, X((4, 5)), [X((3,), torch.int64)]),
        call(op, X((2, 4, 5)), [None, X((3, 2), torch.int64)]),
        call(op, X((2, 5, 4)), [None, None, X((), torch.int64)]),
        call(op, X((4, 2, 4, 5)), [X((3,), torch.int64), None, X((2, 1), torch.int64)]),
        call(op, X((2, 4, 4, 5)), [None, X((3,), torch.int64), torch.tensor([1])]),
    ],
    aten.flip.default: lambda op: [call(op, X((2, 5, 3)), [1]), call(op, X((2, 5, 3)), [1, 2])],
    aten.roll.default: lambda op: [
        call(op, X((2, 5, 3)), [2], [1]), call(op, X((2, 5, 3)), [-1, 4], [-1, 1]),
        call(op, X((2, 5, 3)), [0, 2], [1, 2]),
        call(op, X((2, 5, 3), dynamic=(1,)), [1, -1], [1, 2]), call(op, X((2, 5, 3), dynamic=(0, 1, 2)), [1], [0]),
    ],
    aten.pixel_shuffle.default: lambda op: [
        call(op, X((2, 8, 3, 2)), 2), call(op, X((9, 2, 2)), 3),
        call(op, X((2, 3, 4, 1, 1)), 2), call(op, X((1, 3, 2, 2)), 1),
        call(op, X((2, 8, 3, 2), dynamic=(0, 2, 3)), 2), call(op, X((2, 8, 3, 2), dynamic=(3,)), 2),
    ],
    aten.pixel_unshuffle.default: lambda op: [
        call(op, X((2, 3, 4, 6)), 2), call(op, X((2, 3, 3)), 3), call(op, X((2, 2, 3, 2, 2)), 2),
        call(op, X((2, 3, 4, 6), dynamic=(0, 2, 3)), 2), call(op, X((2, 3, 4, 6), dynamic=(2,)), 2),
    ],
    aten.im2col.default: lambda op: [
        call(op, X((2, 3, 4, 5)), [2, 3], [1, 1], [0, 0], [1, 1]),
        call(op, X((2, 3, 4, 4)), [3, 3], [1, 1], [1, 1], [2, 1]),
        call(op, X((2, 3, 4, 5), dynamic=(0, 2, 3)), [2, 3], [1, 1], [0, 0], [1, 1]),
        call(op, X((2, 3, 4, 5), dynamic=(2,)), [2, 3], [1, 1], [1, 1], [1, 1]),
        call(op, X((3, 4, 4)), [2, 2], [2, 2], [0, 1], [1, 1]),
    ],
    aten.col2im.default: lambda op: [
        call(op, X((2, 12, 4)), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
        call(op, X((2, 18, 16)), [4, 4], [3, 3], [1, 1], [1, 1], [1, 1]),
        call(op, X((8, 9)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    ],
    aten.unfold.default: lambda op: [
        call(op, X((2, 7, 3)), 1, 3, 2), call(op, X((2, 7, 3)), -2, 2, 1),
        call(op, X((2, 4, 3)), 0, 2, 1), call(op, X((5,)), 0, 2, 3),
        call(op, X((2, 7, 3), dynamic=(0, 1)), 1, 3, 2),
    ],
    aten.diagonal.default: lambda op: [
        call(op, X((2, 4, 3))), call(op, X((2, 4, 3)), 1, 1, 2), call(op, X((2, 4, 3)), -1, -1, -2),
        call(op, X((2, 4, 3), dynamic=(1,)), 0, 1, 2), call(op, X((2, 4, 3), dynamic=(0, 1, 2)), 0, 1, 2),
    ],
    aten.expand.default: lambda op: [call(op, X((2, 1, 3)), [2, 4, -1]), call(op, X((3, 1)), [2, 3, 5])],
    aten.repeat.default: lambda op: [call(op, X((2, 3)), [1, 2]), call(op, X((2, 3)), [4, 1, 1])],
    aten.flatten.using_ints: lambda op: [
        call(op, X((2, 3, 4)), 1), call(op, X((2, 3, 4)), 0, 1), call(op, X((2, 3, 4), dynamic=(0,)), 0, 1),
        call(op, X((2, 3, 4, 2), dynamic=(0, 2)), 2), call(op, X((2, 3, 4, 2), dynamic=(0,)), 1, -1),
    ],
    aten.unflatten.int: lambda op: [
        call(op, X((2, 12, 2)), 1, [3, 4]), call(op, X((2, 12, 2), dynamic=(0, 2)), 1, [3, -1]),
        call(op, X((4, 12), dynamic=(0,)), 0, [-1, 2]),
    ],
}  # fmt: skip
for _view in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
    SPECIFIC[_view] = lambda op: [
        call(op, X((2, 6, 4)), [2, 24]),
        call(op, X((2, 24)), [2, 6, 4]),
        call(op, X((2, 6, 4)), [2, 3, 8]),
        call(op, X((2, 4, 6)), [2, 3, 8]),
        call(op, X((2, 3, 1, 4)), [2, 12, 1]),
    ]

FAMILIES: dict[str, Callable[[Any], list[Sample]]] = {
    "attention": attention,
    "product": product,
    "pointwise": pointwise,
    "window": pooling,
    "recurrent": recurrent,
    "reduction": reduction,
    "lookup": lookup,
    "ordering": ordering,
    "padding": padding,
    "resample": resampling,
    "routing": routing,
    "normalization": normalization,
    "scan": scan,
    "filling": filling,
}


def samples_of(overload: Any) -> list[Sample]:
    """The sample calls of an overload; an overload without any is an error of the tests."""
    if overload in SPECIFIC:
        return SPECIFIC[overload](overload)
    family = type(registered_rules()[overload]).__module__.rsplit(".", 1)[1]
    if family not in FAMILIES:
        raise AssertionError(
            f"{overload} is registered but has no sample; add one to tests/passes/rules/samples.py"
        )
    return FAMILIES[family](overload)
