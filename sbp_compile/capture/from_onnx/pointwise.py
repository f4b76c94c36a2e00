"""Operators that compute each entry from the entries at its place."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_compile.capture.from_onnx.node import TRANSLATIONS, Node, translates
from sbp_compile.capture.from_onnx.tensors import dtype_of
from sbp_compile.capture.from_onnx.values import Known, Value, dtype, rank, scalar, tensor

_SIXTH = 1 / 6

_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "BitwiseXor": operator.xor,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
_ON_TENSORS = frozenset({"Equal", "And", "Or", "Xor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_MIRRORED = {
    "Greater": "Less",
    "Less": "Greater",
    "GreaterOrEqual": "LessOrEqual",
    "LessOrEqual": "GreaterOrEqual",
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(tensor(x))


def _binary(name: str) -> Callable[..., Any]:
    def run(node: Node, a: Value, b: Value) -> Any:
        if isinstance(a, Known) and not isinstance(b, Known) and name in _ON_TENSORS:
            return _BINARY[_MIRRORED.get(name, name)](tensor(b), _plain_number(a, b))
        if name in _ON_TENSORS:
            return _BINARY[name](tensor(a), _plain_number(b, a))
        return _BINARY[name](*pair(a, b))

    def _plain_number(value: Value, beside: Value) -> Any:
        return tensor(value) if name in {"And", "Or", "Xor"} else scalar(value, rank(beside))

    return run


TRANSLATIONS.update({name: _unary(function) for name, function in _UNARY.items()})
TRANSLATIONS.update({name: _binary(name) for name in _BINARY})


def pair(a: Value, b: Value) -> tuple[Any, Any]:
    """Return two operands; a known one of one entry as a number beside a tensor that gives shape and dtype."""
    if isinstance(a, Known) and not isinstance(b, Known):
        return scalar(a, rank(b)), tensor(b)
    return tensor(a), scalar(b, rank(a))


@translates("Div")
def _divide(node: Node, a: Value, b: Value) -> Tensor:
    x, y = pair(a, b)
    if dtype(a).is_floating_point or dtype(a).is_complex:
        return x / y  # type: ignore[no-any-return]
    return torch.div(x if isinstance(x, Tensor) else tensor(a), y, rounding_mode="trunc")


@translates("Mod")
def _modulo(node: Node, a: Value, b: Value) -> Tensor:
    function = torch.fmod if node.get("fmod", 0) else torch.remainder
    return function(tensor(a), scalar(b, rank(a)))


@translates("Pow")
def _power(node: Node, a: Value, b: Value) -> Tensor:
    """Raise to a power; the result has the base's dtype."""
    base, exponent = tensor(a), scalar(b, rank(a))
    if not base.is_floating_point() and dtype(b).is_floating_point:
        return torch.pow(base.to(dtype(b)), exponent).to(base.dtype)
    if isinstance(exponent, Tensor) and exponent.dtype != base.dtype and exponent.is_floating_point():
        exponent = exponent.to(base.dtype)
    return torch.pow(base, exponent)


@translates("BitShift")
def _shift(node: Node, a: Value, b: Value) -> Tensor:
    left = node.get("direction", "") == "LEFT"
    return (torch.bitwise_left_shift if left else torch.bitwise_right_shift)(tensor(a), tensor(b))


@translates("IsInf")
def _is_infinite(node: Node, x: Value) -> Tensor:
    value, up, down = tensor(x), node.get("detect_positive", 1), node.get("detect_negative", 1)
    if up and down:
        return torch.isinf(value)
    if up:
        return torch.isposinf(value)
    return torch.isneginf(value) if down else torch.zeros_like(value, dtype=torch.bool)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *operands: functools.reduce(function, map(tensor, operands))


TRANSLATIONS["Sum"] = _variadic(torch.add)


@translates("Mean")
def _mean(node: Node, *operands: Value) -> Tensor:
    return functools.reduce(torch.add, map(tensor, operands)) / len(operands)


@translates("Max", "Min")
def _extremum(node: Node, *operands: Value) -> Tensor:
    if len(operands) == 2:
        first, second = pair(*operands)
        if not isinstance(first, Tensor):
            first, second = second, first
        if isinstance(second, (int, float)):
            return torch.clamp(first, min=second) if node.op == "Max" else torch.clamp(first, max=second)
    function = torch.maximum if node.op == "Max" else torch.minimum
    return functools.reduce(function, map(tensor, operands))


@translates("Where")
def _where(node: Node, condition: Value, a: Value, b: Value) -> Tensor:
    return torch.where(tensor(condition), tensor(a), tensor(b))


@translates("Clip")
def _clip(node: Node, x: Value, low: Value = None, high: Value = None) -> Tensor:
    value = tensor(x)
    bounds = [None if bound is None else scalar(bound, max(rank(x), 1)) for bound in (low, high)]
    if bounds == [None, None]:
        return value.clone()
    if any(isinstance(bound, Tensor) for bound in bounds):
        bounds = [None if bound is None else torch.as_tensor(bound, dtype=value.dtype) for bound in bounds]
    return torch.clamp(value, *bounds)


@translates("Cast")
def _cast(node: Node, x: Value) -> Tensor:
    return tensor(x).to(dtype_of(node.get("to", 0), f"the result of {node.place}"))


@translates("CastLike")
def _cast_like(node: Node, x: Value, like: Value) -> Tensor:
    return tensor(x).to(dtype(like))


@translates("Identity")
def _identity(node: Node, x: Value) -> Value:
    return x


@translates("Dropout")
def _dropout(node: Node, x: Value, ratio: Value = None, training: Value = None) -> Any:
    if training is not None and (not isinstance(training, Known) or any(training.numbers)):
        raise node.refusal("it is in training mode and draws random numbers; export the network in eval mode")
    return (x, torch.ones_like(tensor(x), dtype=torch.bool)) if node.wants(1) else x


@translates("Elu")
def _elu(node: Node, x: Value) -> Tensor:
    return F.elu(tensor(x), node.get("alpha", 1.0))


@translates("Celu")
def _celu(node: Node, x: Value) -> Tensor:
    return F.celu(tensor(x), node.get("alpha", 1.0))


@translates("Selu")
def _selu(node: Node, x: Value) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return torch.mul(F.elu(tensor(x), alpha), gamma)


@translates("LeakyRelu")
def _leaky_relu(node: Node, x: Value) -> Tensor:
    return F.leaky_relu(tensor(x), node.get("alpha", 0.01))


@translates("PRelu")
def _prelu(node: Node, x: Value, slope: Value) -> Tensor:
    value, factor = tensor(x), tensor(slope)
    per_channel = value.ndim > 1 and tuple(factor.shape) == (value.shape[1], *[1] * (value.ndim - 2))
    if per_channel and node.is_constant(1):
        return F.prelu(value, factor.reshape(-1))
    return torch.where(value < 0, factor * value, value)


@translates("HardSigmoid")
def _hard_sigmoid(node: Node, x: Value) -> Tensor:
    """Clip alpha * x + beta; float32's nearest to a sixth means a sixth, as in torch."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - _SIXTH) < 1e-7 and beta == 0.5:
        return F.hardsigmoid(tensor(x))
    return torch.clamp(tensor(x) * alpha + beta, 0.0, 1.0)


@translates("Gelu")
def _gelu(node: Node, x: Value) -> Tensor:
    return F.gelu(tensor(x), approximate=node.get("approximate", "none"))


@translates("Swish")
def _swish(node: Node, x: Value) -> Tensor:
    value, alpha = tensor(x), node.get("alpha", 1.0)
    return F.silu(value) if alpha == 1.0 else value * torch.sigmoid(alpha * value)


@translates("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Value) -> Tensor:
    return F.threshold(tensor(x), node.get("alpha", 1.0), 0.0)


@translates("Shrink")
def _shrink(node: Node, x: Value) -> Tensor:
    value, lambd, bias = tensor(x), node.get("lambd", 0.5), node.get("bias", 0.0)
    low, high = torch.where(value < -lambd, value + bias, 0.0), torch.where(value > lambd, value - bias, 0.0)
    return low + high
