"""A Program's constants: float64 for whoever reads them, large ones held narrower where that loses nothing.

Most weights came from a narrower dtype and still have values that it holds: what a mask leaves of them, what is cut out
of them. A large one is held in the dtype that it is emitted in if it is the same number for number, and is widened each
time it is read. So memory goes with the model's own dtype, and only the constants that are being read are wide.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

LARGE = 1 << 20
"""Entries from which on narrowing is tried: below, it would cost more time than memory."""
CHUNK = 1 << 20
TOTAL = 1 << 28
"""Bytes of all large constants from which on what was dropped is collected at once, which takes a tenth of a second."""


class Held:
    """One constant as it is held; Programs that have the same constant share it."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.dtype = dtype
        self._is_finite: bool | None = None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def numel(self) -> int:
        return self.tensor.numel()

    @property
    def is_narrow(self) -> bool:
        """Whether it is held in another dtype than it is read in."""
        return self.tensor.dtype != self.dtype

    @property
    def is_finite(self) -> bool:
        """Whether no entry is infinite or NaN; looked at once."""
        if self._is_finite is None:
            self._is_finite = all(bool(torch.isfinite(part).all()) for part in _chunks(self.tensor))
        return self._is_finite

    def read(self) -> Tensor:
        """The constant in the dtype that the passes compute in; anew each time where it is held narrow."""
        return self.tensor.to(self.dtype)

    def on_meta(self) -> Tensor:
        """Its shape, strides and dtype alone."""
        return torch.empty_like(self.tensor, dtype=self.dtype, device="meta")

    def is_same(self, other: Held) -> bool:
        """Whether both are the same constant, entry by entry."""
        if self is other:
            return True
        if self.dtype != other.dtype or self.shape != other.shape:
            return False
        if self.tensor.dtype == other.tensor.dtype:
            return torch.equal(self.tensor, other.tensor)
        return torch.equal(self.read(), other.read())


def is_large(value: Tensor) -> bool:
    """Whether narrowing a constant is worth its time."""
    return value.numel() >= LARGE


def hold(value: Tensor, dtype: torch.dtype | None = None) -> Held:
    """A constant that is emitted in `dtype`, held in it where it is large and loses nothing."""
    return Held(_narrowed(value, dtype), value.dtype)


def _narrowed(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    may_be = value.dtype == torch.float64 and is_large(value) and value.is_contiguous()
    if not may_be or dtype is None or not dtype.is_floating_point or dtype == value.dtype or value.is_meta:
        return value
    narrow = value.to(dtype)
    pairs = zip(_chunks(narrow), _chunks(value), strict=True)
    return narrow if all(torch.equal(part.to(value.dtype), other) for part, other in pairs) else value


def _chunks(value: Tensor) -> tuple[Tensor, ...]:
    """A tensor's entries in parts, so that what is computed of them stays small."""
    return torch.split(value.flatten(), CHUNK) if value.is_contiguous() else (value,)


class Constants(Mapping[str, Tensor]):
    """Constants by name, each read in the dtype that the passes compute in."""

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._held: dict[str, Held] = {}
        for name in values or ():
            assert values is not None
            self._held[name] = hold(values[name], (dtypes or {}).get(name))

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def held(self, name: str) -> Held:
        """A constant as it is held: to share it, or for what its shape tells."""
        return self._held[name]

    def put(self, name: str, held: Held) -> None:
        """Add a constant."""
        self._held[name] = held

    def only(self, names: Collection[str]) -> Constants:
        """Those of some names, shared."""
        found = Constants()
        found._held = {name: held for name, held in self._held.items() if name in names}
        return found

    def outline(self) -> Constants:
        """The same names and shapes without any numbers."""
        found = Constants()
        for name, held in self._held.items():
            found.put(name, Held(held.on_meta(), held.dtype))
        return found

    def free_dropped(self, total: int = TOTAL) -> None:
        """Free what was dropped where these are much: a Program and its Ops, among others, refer to each other."""
        tensors = [held.tensor for held in self._held.values() if is_large(held.tensor)]
        if sum(tensor.nbytes for tensor in tensors) >= total:
            gc.collect()
