"""What an entry of the zoo is, and the inputs that entries have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.places import Places

BATCH = 2


@dataclass(frozen=True)
class Architecture:
    """A network of the literature at reduced width and depth; `example` gives one call's arguments, batch 2."""

    name: str
    family: str
    build: Callable[[Places], nn.Module]
    example: Callable[[], tuple[Tensor, ...]]
    dynamic_batch: bool = True


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """One standard normal float32 input for each shape, which is without the batch."""

    def example() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(BATCH, *shape, generator=generator) for shape in shapes)

    return example


def tokens(vocabulary: int, *shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """One int64 input below `vocabulary` for each shape, which is without the batch."""

    def example() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randint(vocabulary, (BATCH, *shape), generator=generator) for shape in shapes)

    return example


def mixed(*parts: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The inputs of all parts, one after the other."""
    return lambda: tuple(tensor for part in parts for tensor in part())


IMAGE = floats((3, 32, 32))
