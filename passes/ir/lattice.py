r"""The lattice: what is known of each entry of a value before any input is seen.

          unknown            (may depend on the input)
         /   |   \
     ... c1  c2  c3 ...      (this entry is that number for every input)

A fact is a pair of tensors, values and an explicit known-mask, both *broadcastable* to the value's shape: size 1 along
every axis where nothing varies, and always size 1 along dynamic axes. `join` goes up; only `join` and the
constructors make facts, so a transfer function built from them is monotone. Values that are not finite are unknown:
the promise of exactness covers finite values only, and it is what licenses 0 * unknown = 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.ir.constants import Held
from passes.ir.program import TensorInfo


@dataclass(frozen=True, eq=False)
class Facts:
    """Values and known-mask of one tensor, each broadcastable to its shape (and to each other)."""

    value: Tensor
    known: Tensor

    @staticmethod
    def unknown(info: TensorInfo) -> Facts:
        """The top element: nothing is known."""
        shape = (1,) * info.rank
        return Facts(torch.zeros(shape, dtype=info.dtype), torch.zeros(shape, dtype=torch.bool))

    @staticmethod
    def constant(value: Tensor) -> Facts:
        """Every entry is known; entries that are not finite become unknown."""
        return Facts(value, torch.ones((1,) * value.ndim, dtype=torch.bool)).finite()

    @staticmethod
    def held(constant: Held) -> Facts:
        """The same of a Program's constant; a large one is widened each time its values are read."""
        return (
            HeldFacts(constant)
            if constant.is_narrow and constant.is_finite
            else Facts.constant(constant.read())
        )

    def finite(self) -> Facts:
        """Forget the entries whose value is infinite or NaN."""
        has_fractions = self.value.is_floating_point() or self.value.is_complex()
        if not has_fractions or bool(torch.isfinite(self.value.sum())):
            return self  # a sum is finite only if every term is
        finite = torch.isfinite(self.value)
        return Facts(torch.where(finite, self.value, 0.0), self.known & finite)

    @property
    def all_known(self) -> bool:
        return bool(self.known.all())

    @property
    def any_known(self) -> bool:
        return bool(self.known.any())

    @property
    def known_value(self) -> Tensor:
        """The values, with 0 where unknown."""
        return torch.where(self.known, self.value, torch.zeros((), dtype=self.value.dtype))

    def expand(self, axes: Iterable[int], info: TensorInfo) -> Facts:
        """The same facts stored at full size along `axes` (each of them static)."""
        return Facts(expand_axes(self.value, axes, info), expand_axes(self.known, axes, info))

    def join(self, other: Facts) -> Facts:
        """Known where both are known and agree."""
        return Facts(self.value, self.known & other.known & (self.value == other.value))

    def forget(self, unknown: Tensor) -> Facts:
        """The same facts without the entries marked in `unknown` (a mask broadcastable to the shape)."""
        return Facts(self.value, self.known & ~unknown)

    def compress(self) -> Facts:
        """The same facts at size 1 along every axis where nothing varies."""
        value = self.known_value
        for axis in range(value.ndim):
            if value.shape[axis] > 1 and _is_flat(value, axis) and _is_flat(self.known, axis):
                value = value.narrow(axis, 0, 1)
        known = self.known
        for axis in range(known.ndim):
            if known.shape[axis] > 1 and _is_flat(known, axis):
                known = known.narrow(axis, 0, 1)
        return Facts(value, known)


class HeldFacts(Facts):
    """Facts of a large finite constant, whose values are not kept wide."""

    def __init__(self, constant: Held) -> None:
        vars(self).update(constant=constant, known=torch.ones((1,) * len(constant.shape), dtype=torch.bool))

    @property
    def value(self) -> Tensor:
        constant: Held = vars(self)["constant"]
        return constant.read()


def expand_axes(stored: Tensor, axes: Iterable[int], info: TensorInfo) -> Tensor:
    """A stored (compressed) tensor at full size along `axes`."""
    sizes = list(stored.shape)
    for axis in axes:
        sizes[axis] = info.sizes[axis]
    return stored.expand(sizes)


def any_over_others(mask: Tensor, axis: int, size: int) -> Tensor:
    """For each index along `axis`, whether any entry of the stored mask is set; shape (size,)."""
    others = [other for other in range(mask.ndim) if other != axis]
    reduced = mask.any(dim=others) if others else mask
    return reduced.expand(size).clone()


def all_over_others(mask: Tensor, axis: int, size: int) -> Tensor:
    """For each index along `axis`, whether all entries of the stored mask are set; shape (size,)."""
    return ~any_over_others(~mask, axis, size)


def reduce_to(mask: Tensor, info: TensorInfo) -> Tensor:
    """A mask over a broadcast result, reduced (any) to an operand's shape in stored form."""
    extra = mask.ndim - info.rank
    if extra:
        mask = mask.any(dim=tuple(range(extra)))
    for axis in range(info.rank):
        if mask.shape[axis] > 1 and info.sizes[axis] == 1:
            mask = mask.any(dim=axis, keepdim=True)
    return mask


def full_mask(info: TensorInfo, value: bool) -> Tensor:
    """A stored mask that is `value` everywhere."""
    return torch.full((1,) * info.rank, value, dtype=torch.bool)


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along one axis of a tensor of the given rank."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _is_flat(stored: Tensor, axis: int) -> bool:
    return bool((stored == stored.narrow(axis, 0, 1)).all())
