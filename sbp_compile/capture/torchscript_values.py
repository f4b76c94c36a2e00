"""What TorchScript computes on numbers, lists and types rather than on tensors, in Python.

A trace wraps sizes into tensors (`NumToTensor`) and does its arithmetic on them; here they stay numbers, so that
torch.export sees sizes as sizes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sbp_compile.errors import UnsupportedModelError

_NUMBERS = (int, float, bool, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
# torch leaves these without types.
_SYM_INT: Callable[[Any], Any] = torch.sym_int
_SYM_FLOAT: Callable[[Any], Any] = torch.sym_float
_SYM_MIN: Callable[[Any, Any], Any] = torch.sym_min
_SYM_MAX: Callable[[Any, Any], Any] = torch.sym_max
# c10's numbers of dtypes, layouts and memory formats; torch documents them nowhere.
_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
_ENUMERATIONS: Mapping[str, tuple[Any, ...]] = {
    "ScalarType": _DTYPES,
    "Layout": (torch.strided, torch.sparse_coo),
    "MemoryFormat": (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    ),
}


def is_number(value: object) -> bool:
    """Whether a value is a number or a symbolic size."""
    return isinstance(value, _NUMBERS)


def holds_tensor(value: object) -> bool:
    """Whether a value is a tensor or has one in it."""
    if isinstance(value, dict):
        return any(holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def enumerated(value: Any, kind: str) -> Any:
    """Return the dtype, layout or memory format with a number; the number itself where `kind` is none of them."""
    known = _ENUMERATIONS.get(kind)
    if known is None or type(value) is not int:
        return value
    if not 0 <= value < len(known):
        raise UnsupportedModelError(f"TorchScript has {kind} number {value}, which is not supported")
    return known[value]


def number_of(value: object) -> int:
    """Return TorchScript's number of a dtype, layout or memory format."""
    for known in _ENUMERATIONS.values():
        if value in known:
            return known.index(value)
    raise UnsupportedModelError(f"TorchScript has no number for {value}")


def _divide(left: Any, right: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return left / right
    if rounding_mode == "floor" or (isinstance(left, int) and isinstance(right, int) and left * right >= 0):
        return left // right
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        return left // right  # sizes are not negative
    return math.trunc(left / right)


def _slice(items: Any, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return items[start:end:step]


def _clamp(value: Any, low: Any = None, high: Any = None) -> Any:
    value = value if low is None else _largest(value, low)
    return value if high is None else _least(value, high)


def _to_list(items: list[Any], *_: Any) -> list[Any]:
    return items


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _extend(items: list[Any], more: list[Any]) -> None:
    items.extend(more)


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _text(template: str, *values: Any) -> str:
    return template.format(*values)


def _whole(value: Any) -> Any:
    """Return int(value), but a symbolic size as it is: `int` would fix it to the example's."""
    return _SYM_INT(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else int(value)


def _real(value: Any) -> Any:
    return _SYM_FLOAT(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else float(value)


def _least(*values: Any) -> Any:
    return _folded(_SYM_MIN, values)


def _largest(*values: Any) -> Any:
    return _folded(_SYM_MAX, values)


def _folded(function: Callable[[Any, Any], Any], values: tuple[Any, ...]) -> Any:
    items = values[0] if len(values) == 1 else values
    return functools.reduce(function, items)


# By the name behind `aten::` or `prim::`; for calls on numbers, strings, lists, dicts and None.
ON_VALUES: Mapping[str, Callable[..., Any]] = {
    "add": lambda left, right, alpha=1: left + (right if alpha == 1 else alpha * right),
    "sub": lambda left, right, alpha=1: left - (right if alpha == 1 else alpha * right),
    "rsub": lambda left, right, alpha=1: right - (left if alpha == 1 else alpha * left),
    "mul": operator.mul,
    "div": _divide,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "fmod": math.fmod,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__lshift__": operator.lshift,
    "__rshift__": operator.rshift,
    "__not__": operator.not_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__contains__": operator.contains,
    "__getitem__": operator.getitem,
    "TupleIndex": operator.getitem,
    "Int": _whole,
    "Float": _real,
    "Bool": bool,
    "IntImplicit": _same,
    "FloatImplicit": _same,
    "ScalarImplicit": _same,
    "NumToTensor": _same,
    "to": _same,
    "detach": _same,
    "clone": _same,
    "min": _least,
    "max": _largest,
    "minimum": _least,
    "maximum": _largest,
    "clamp": _clamp,
    "len": len,
    "list": list,
    "copy": lambda items: items.copy(),
    "append": _append,
    "extend": _extend,
    "insert": lambda items, index, item: items.insert(index, item),
    "pop": lambda items, index=-1: items.pop(index),
    "reverse": lambda items: items.reverse(),
    "index": lambda items, item: items.index(item),
    "keys": lambda items: list(items),
    "values": lambda items: list(items.values()),
    "items": lambda items: list(items.items()),
    "get": lambda items, key, default=None: items.get(key, default),
    "_set_item": _set_item,
    "slice": _slice,
    "format": _text,
    "str": str,
    "tolist": _to_list,
    "warn": lambda *_, **__: None,
    "Print": lambda *_: None,
}
