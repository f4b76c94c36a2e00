"""What an entry of the zoo is, and the inputs that entries have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.places import Places

BATCH = 2
Example = Callable[..., tuple[Tensor, ...]]  # optional argument: the batch


@dataclass(frozen=True)
class Architecture:
    """A network of the literature at reduced width and depth; `example` gives one call's arguments, batch 2."""

    name: str
    family: str
    build: Callable[[Places], nn.Module]
    example: Example
    dynamic_batch: bool = True


def floats(*shapes: tuple[int, ...]) -> Example:
    """One standard normal float32 input for each shape, which is without the batch."""

    def example(batch: int = BATCH) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)

    return example


def tokens(vocabulary: int, *shapes: tuple[int, ...]) -> Example:
    """One int64 input below `vocabulary` for each shape, which is without the batch."""

    def example(batch: int = BATCH) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randint(vocabulary, (batch, *shape), generator=generator) for shape in shapes)

    return example


def mixed(*parts: Example) -> Example:
    """The inputs of all parts, one after the other."""
    return lambda batch=BATCH: tuple(tensor for part in parts for tensor in part(batch))


IMAGE = floats((3, 32, 32))
