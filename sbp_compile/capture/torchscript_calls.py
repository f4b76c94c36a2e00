"""One call of a TorchScript graph: which operator it is, and its operands as that operator takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sbp_compile.capture.file_expressions import is_dangerous
from sbp_compile.capture.torchscript_values import ON_VALUES, enumerated, holds_tensor, is_number, number_of
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten
# What makes numbers of tensors: of a constant it is known, of anything else it depends on data.
TO_NUMBERS = frozenset(
    {"Int", "Float", "Bool", "Complex", "IntImplicit", "FloatImplicit", "ScalarImplicit", "item", "tolist"}
)
_SCHEMA = re.compile(r"(\w+)::(\w+)(?:\.(\w+))?\(")
# Beside a tensor with axes these take a number where a trace has a size as a tensor: the result is the same.
_TAKE_NUMBERS = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "pow",
        "remainder",
        "floor_divide",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    }
)
_SCALAR_SECOND = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div"})
_KEYWORDS = frozenset({"rounding_mode", "alpha"})
_CONVOLUTIONS: Mapping[tuple[bool, int], Callable[..., Tensor]] = {
    (False, 3): aten.conv1d.default,
    (False, 4): aten.conv2d.default,
    (False, 5): aten.conv3d.default,
    (True, 3): aten.conv_transpose1d.default,
    (True, 4): aten.conv_transpose2d.input,
    (True, 5): aten.conv_transpose3d.input,
}


def takes_scalar(node: Any, operands: list[Any]) -> bool:
    """Whether torch's interpreter takes a constant of no axes, as the second operand, for a number.

    The result's dtype depends on that; a trace writes a number of Python that way.
    """
    return node.kind() in _SCALAR_SECOND and len(operands) > 1 and not isinstance(operands[-1], str)


def call(node: Any, operands: list[Any], *, with_scalar: bool = False) -> Any:
    """Return the result of a node's call, on torch's operators or, for numbers and containers, in Python.

    `with_scalar`: see `takes_scalar`.
    Raises `UnsupportedModelError` for operators that torch does not show or that open files, and for a number that
    would depend on the values of a tensor.
    """
    name = node.kind().partition("::")[2]
    first = operands[0] if operands else None
    if isinstance(first, Tensor) and name in _OF_TENSORS:
        return _OF_TENSORS[name](*operands)
    if isinstance(first, Tensor) and name in TO_NUMBERS:
        raise on_data(node)
    if name in ON_VALUES and (name in {"__is__", "__isnot__"} or _is_by_value(operands)):
        return _call_on_values(node, operands, ON_VALUES[name])
    return _call_operator(node, operands, with_scalar)


def as_tensor(value: Any) -> Tensor:
    """Return what a trace's NumToTensor gives."""
    if isinstance(value, bool):
        return torch.scalar_tensor(value, dtype=torch.bool)
    dtype = torch.float64 if isinstance(value, (float, torch.SymFloat)) else torch.int64
    return torch.scalar_tensor(value, dtype=dtype)


def on_data(node: Any) -> UnsupportedModelError:
    """Return the refusal of a node that decides by the values of a tensor."""
    return UnsupportedModelError(
        f"TorchScript control flow ({node.kind()}) depends on the values of a tensor{place(node)}: branches on data "
        "cannot be compiled; trace the module on the branch that is used"
    )


def place(node: Any) -> str:
    """Return where a node comes from, as far as the file says."""
    match = re.search(r'File "([^"]*)", line (\d+)', str(node.sourceRange()))
    return f" ({match[1]}, line {match[2]})" if match else ""


def _is_by_value(operands: list[Any]) -> bool:
    """Whether a call is on numbers and containers; containers may hold tensors."""
    first = operands[0] if operands else None
    if is_number(first):
        return not any(holds_tensor(operand) for operand in operands)
    return not isinstance(first, Tensor)


def _call_on_values(node: Any, operands: list[Any], function: Callable[..., Any]) -> Any:
    """Call a function of Python; of what the schema says is a keyword it takes those that matter to numbers."""
    overload = _overload(node)
    if overload is None:
        return function(*operands)
    names = [argument.name for argument in overload._schema.arguments if argument.kwarg_only]
    split = len(operands) - len(names)
    keywords = dict(zip(names, operands[split:], strict=True))
    return function(*operands[:split], **{name: keywords[name] for name in names if name in _KEYWORDS})


def _call_operator(node: Any, operands: list[Any], with_scalar: bool) -> Any:
    overload = _overload(node)
    if overload is None:
        raise UnsupportedModelError(
            f"TorchScript operation {node.kind()!r} is not supported{place(node)}; give the module it was made from"
        )
    name = node.kind().partition("::")[2]
    if is_dangerous(name):
        raise UnsupportedModelError(
            f"TorchScript operation {node.kind()!r} is not one that a model file may call{place(node)}"
        )
    arguments = overload._schema.arguments
    has_axes = any(isinstance(operand, Tensor) and operand.ndim > 0 for operand in operands)
    takes_numbers = with_scalar or (name.rstrip("_") in _TAKE_NUMBERS and has_axes)
    values = [
        _fitted(operand, argument, takes_numbers)
        for argument, operand in zip(arguments, operands, strict=True)
    ]
    if name == "_convolution":
        return _convolve(*values)
    # With a number in the place of a tensor another overload is the right one, and torch finds it.
    loose = any(
        _is_tensor(entry) and is_number(value) for entry, value in zip(arguments, values, strict=True)
    )
    positional = [value for entry, value in zip(arguments, values, strict=True) if not entry.kwarg_only]
    keywords = {entry.name: value for entry, value in zip(arguments, values, strict=True) if entry.kwarg_only}
    return (overload.overloadpacket if loose else overload)(*positional, **keywords)


def _fitted(operand: Any, argument: Any, takes_numbers: bool) -> Any:
    """Return an operand as the operator's argument: dtypes as such, everything on the CPU, sizes as tensors."""
    if isinstance(operand, torch.device):
        return torch.device("cpu")
    if _is_tensor(argument) and is_number(operand):
        return operand if takes_numbers else as_tensor(operand)
    return enumerated(operand, _kind(argument))


def _is_tensor(argument: Any) -> bool:
    return _kind(argument) == "Tensor"


def _kind(argument: Any) -> str:
    return str(argument.real_type).removeprefix("Optional[").removesuffix("]")


def _overload(node: Any) -> Any:
    """Return torch's operator of a node, None where the node has no schema or torch shows no such operator."""
    match = _SCHEMA.match(node.schema())
    if match is None:
        return None
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    return getattr(packet, match[3] or "default", None)


def _convolve(*values: Any) -> Tensor:
    """Call the convolution that a trace spells `_convolution`; the switches of its backend are left out."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = values[:9]
    target = _CONVOLUTIONS[transposed, weight.ndim]
    if transposed:
        return target(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return target(x, weight, bias, stride, padding, dilation, groups)


def _size(x: Tensor, axis: int | None = None) -> Any:
    return list(x.shape) if axis is None else x.shape[axis]


_OF_TENSORS: Mapping[str, Callable[..., Any]] = {
    "size": _size,
    "dim": lambda x: x.dim(),
    "len": lambda x: x.shape[0],
    "numel": lambda x: x.numel(),
    "stride": lambda x, axis=None: list(x.stride()) if axis is None else x.stride(axis),
    "is_floating_point": lambda x: x.is_floating_point(),
    "is_complex": lambda x: x.is_complex(),
    "dtype": lambda x: number_of(x.dtype),
    "layout": lambda x: number_of(x.layout),
    "device": lambda _: torch.device("cpu"),
    "is_cuda": lambda _: False,
    "requires_grad": lambda _: False,
}
