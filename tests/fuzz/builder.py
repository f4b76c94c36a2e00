"""A network under construction: layers, which values each reads, and every value at two example sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Shape

MOST_ENTRIES = 3000
LARGEST_VALUE = 300.0


@dataclass(frozen=True)
class Step:
    """One layer: the value it reads, counted back from the newest, its kind, and the seed of its choices."""

    kind: str
    back: int = 0
    seed: int = 0


class RandomNetwork(nn.Module):
    """Layers and, for each, which values it reads; the outputs are some of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.plan: list[tuple[int, tuple[int, ...]]] = []
        self.results: list[int] = []
        self.form = "single"

    def forward(self, *inputs: Tensor) -> Any:
        values: list[Any] = list(inputs)
        for layer, arguments in self.plan:
            values += flat(self.layers[layer](*(values[position] for position in arguments)))
        found = [values[position] for position in self.results]
        if self.form == "single":
            return found[0]
        if self.form == "dict":
            return {f"result_{number}": value for number, value in enumerate(found)}
        return tuple(found) if self.form == "tuple" else (found[0], list(found[1:]))

    def describe(self) -> str:
        """The network line by line, for reports."""
        lines = [f"{layer} <- {arguments}: {self.layers[layer]}" for layer, arguments in self.plan]
        return "\n".join([*lines, f"outputs {self.results} as {self.form}"])


def flat(result: Any) -> list[Tensor]:
    """The tensors of a layer's result."""
    return [result] if isinstance(result, Tensor) else [value for part in result for value in flat(part)]


@dataclass
class Builder:
    """A network under construction, with every value under two example shapes."""

    network: RandomNetwork
    values: list[tuple[Tensor, Tensor]]
    inputs: int
    masks: int = 0
    applied: list[Step] = field(default_factory=list)

    def shape(self, position: int) -> Shape:
        first, second = self.values[position]
        return Shape(tuple(first.shape), tuple(second.shape))

    def is_float(self, position: int) -> bool:
        return self.values[position][0].is_floating_point()

    def partner(self, draw: Draw, fits: Callable[[Shape], bool]) -> int | None:
        """A value of floating-point numbers whose shape fits."""
        found = [each for each in range(len(self.values)) if self.is_float(each) and fits(self.shape(each))]
        return draw.one(found) if found else None

    def add(self, module: nn.Module, arguments: tuple[int, ...], known: int | None = None) -> bool:
        """Append a layer (or an earlier one again) in eval mode if it runs and its values stay small and finite."""
        module.eval()
        try:
            with torch.no_grad():
                results = [
                    flat(module(*(self.values[each][which] for each in arguments))) for which in (0, 1)
                ]
        except (RuntimeError, ValueError, IndexError):
            return False
        if not all(_is_modest(value) for side in results for value in side):
            return False
        if known is None:
            known = len(self.network.layers)
            self.network.layers.append(module)
        self.network.plan.append((known, arguments))
        self.values += list(zip(*results, strict=True))
        return True


def _is_modest(value: Tensor) -> bool:
    if value.ndim < 2 or value.numel() == 0 or value.ndim > 5 or value[0].numel() > MOST_ENTRIES:
        return False
    return bool(torch.isfinite(value).all()) and float(value.abs().max()) < LARGEST_VALUE
