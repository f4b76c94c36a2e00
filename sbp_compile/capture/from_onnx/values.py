"""What a value is while a graph is read: a tensor, or numbers that are known while it is captured.

Sizes are such numbers: what older exporters compute shapes with (Shape, Gather, Concat, ...) stays Python arithmetic
on sizes, which torch.export follows. Small constants are such numbers, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node

MOST_KNOWN = 4096
MOST_KNOWN_FLOATS = 16
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_DTYPES = (
    torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_NUMPY = {dtype: np.dtype(str(dtype).removeprefix("torch.")) for dtype in _DTYPES}
_TORCH = {name: dtype for dtype, name in _NUMPY.items()}
Number = Any  # int, float, bool, or one of torch's symbols


@dataclass(frozen=True)
class Known:
    """Numbers known at capture.

    `entries`: an array of the dtype's numbers, of objects where some are symbolic; `dtype`: torch's; `held`: the same
    as a tensor of the network, if it is one.
    """

    entries: np.ndarray
    dtype: torch.dtype
    held: Tensor | None = None

    @property
    def is_symbolic(self) -> bool:
        """Whether some of the numbers are sizes that stay open."""
        return self.entries.dtype == object

    @property
    def numbers(self) -> list[Number]:
        """The numbers, flat, as Python has them."""
        flat = self.entries.reshape(-1)
        return list(flat) if self.is_symbolic else list(flat.tolist())

    def tensor(self) -> Tensor:
        """Return the numbers as a tensor."""
        if self.held is not None:
            return self.held
        if not self.is_symbolic:
            return torch.tensor(self.numbers, dtype=self.dtype).reshape(self.entries.shape)
        parts = [torch.scalar_tensor(number, dtype=self.dtype) for number in self.numbers]
        return parts[0] if self.entries.ndim == 0 else torch.stack(parts).reshape(self.entries.shape)


Value = Tensor | Known | list[Any] | None


def known(numbers: Sequence[Number] | Number, dtype: torch.dtype = torch.int64) -> Known:
    """Return numbers as a value: a vector of a list, no axes for a single one."""
    return from_objects(np.array(numbers, dtype=object), dtype)


def from_objects(entries: np.ndarray, dtype: torch.dtype) -> Known:
    """Return an array of objects as a value; of plain numbers it becomes an array of them."""
    if any(isinstance(number, _SYMBOLS) for number in entries.reshape(-1)):
        return Known(entries, dtype)
    return Known(entries.astype(numpy_dtype(dtype)), dtype)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Return NumPy's dtype; `KeyError` for those that it lacks."""
    return _NUMPY[dtype]


def torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    """Return torch's dtype, None for text and what else it lacks."""
    return _TORCH.get(dtype)


def is_small(value: Tensor) -> bool:
    """Whether a constant is one that may say sizes, axes and the like."""
    most = MOST_KNOWN_FLOATS if value.is_floating_point() or value.is_complex() else MOST_KNOWN
    return value.numel() <= most and value.dtype is not torch.bfloat16


def tensor(value: Value) -> Tensor:
    """Return a value as a tensor."""
    if isinstance(value, Known):
        return value.tensor()
    assert isinstance(value, Tensor), "the graph gives something else than a tensor here"
    return value


def optional_tensor(value: Value) -> Tensor | None:
    """Return a value as a tensor, None for one that is left out."""
    return None if value is None else tensor(value)


def rank(value: Value) -> int:
    """Return a value's number of axes."""
    return value.entries.ndim if isinstance(value, Known) else tensor(value).ndim


def dtype(value: Value) -> torch.dtype:
    """Return a value's dtype."""
    return value.dtype if isinstance(value, Known) else tensor(value).dtype


def numbers(node: Node, value: Value, what: str) -> list[Number]:
    """Return an operand that must be known at capture, as a flat list; refused where it depends on data."""
    if not isinstance(value, Known):
        raise node.refusal(
            f"its {what} depend on the values of a tensor, so there is no fixed structure to compile; export the "
            "network with constants there"
        )
    return value.numbers


def number(node: Node, value: Value, what: str) -> Number:
    """Return such an operand of one entry."""
    found = numbers(node, value, what)
    if len(found) != 1:
        raise node.refusal(f"its {what} must be one number, not {len(found)}")
    return found[0]


def scalar(value: Value, beside: int) -> Any:
    """Return a known value of one entry as a number, where a partner of that many axes gives the shape."""
    if isinstance(value, Known) and value.entries.size == 1 and value.entries.ndim <= beside:
        return value.numbers[0]
    return tensor(value)


def axis_of(node: Node, axis: int, axes: int) -> int:
    """Return an axis counted from the front; refused where there is no such axis."""
    if not -axes <= axis < max(axes, 1):
        raise node.refusal(f"axis {axis} is none of the {axes} that its operand has")
    return axis % max(axes, 1)
