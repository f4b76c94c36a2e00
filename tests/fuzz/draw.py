"""Random choices of one step of a network, tensors included, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draw(random.Random):
    """Python's generator and torch's, started from the same seed.

    `masks`, started from two seeds, decides what is dead and nothing else: a network can have other masks.
    """

    def __init__(self, seed: int, masks: int = 0) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = random.Random(seed * 7919 + masks)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def one(self, options: Sequence[T]) -> T:
        return options[self.randrange(len(options))]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def dead(self, count: int, sparsities: Sequence[float]) -> list[int]:
        """Which of `count` units are dead."""
        return self.masks.sample(range(count), round(self.masks.choice(sparsities) * count))


@dataclass(frozen=True)
class Shape:
    """Sizes of a value under two example inputs that differ along every dynamic axis."""

    sizes: tuple[int, ...]
    other: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def is_static(self, axis: int) -> bool:
        return self.sizes[axis] == self.other[axis]

    @property
    def inner_static(self) -> bool:
        """Whether all axes but the batch are static."""
        return all(self.is_static(axis) for axis in range(1, self.rank))

    def least(self, axis: int) -> int:
        return min(self.sizes[axis], self.other[axis])

    @property
    def spatial(self) -> range:
        return range(2, self.rank)
