"""Random networks: a Spec is plain data, `build` makes the same module of it every time.

A spec lists steps; each takes an earlier value (counted back from the newest), a kind and a seed. A step that
does not fit is left out, so that any part of a spec is a spec too: that is what makes failures shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.blocks import BLOCKS
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import SIMPLE, Apply, Kind
from tests.fuzz.moves import MOVES
from tests.fuzz.views import VIEWS

INPUT_SHAPES = (
    (3, 6, 6), (4, 5, 7), (2, 8, 8), (6, 4, 4), (1, 7, 7), (8, 5, 5), (4, 9), (3, 12), (6, 5), (10,), (16,),
    (2, 4, 4, 4),
)  # fmt: skip
DYNAMIC = ("batch", "batch", "batch", "batch", "batch", "batch", "static 1", "static 2", "spatial")
FORMS = ("single", "tuple", "dict", "nested")
MOST_ENTRIES = 3000
LARGEST_VALUE = 300.0


@dataclass(frozen=True)
class Step:
    """One layer: the value it reads, counted back from the newest, its kind, and the seed of its choices."""

    kind: str
    back: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Spec:
    """A network as plain data.

    `inputs` are positions in INPUT_SHAPES. Specs that differ in `masks` alone give networks that differ in
    what is dead alone.
    """

    inputs: tuple[int, ...] = (0,)
    steps: tuple[Step, ...] = ()
    dynamic: str = "batch"
    form: str = "single"
    seed: int = 0
    masks: int = 0

    def without(self, position: int) -> Spec:
        return replace(self, steps=self.steps[:position] + self.steps[position + 1 :])


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

    def add(self, module: nn.Module, arguments: tuple[int, ...], known: int | None = None) -> bool:
        """Append a layer (or an earlier one again) if it runs and its values stay small and finite."""
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


Join = Callable[[Draw, Builder, int], bool]


def _partner(draw: Draw, builder: Builder, fits: Callable[[Shape], bool]) -> int | None:
    found = [position for position in range(len(builder.values)) if fits(builder.shape(position))]
    return draw.one(found) if found else None


def binary(draw: Draw, builder: Builder, source: int) -> bool:
    """A sum, product or the like of two values that broadcast."""
    x = builder.shape(source)

    def fits(y: Shape) -> bool:
        pairs = zip(x.sizes[::-1], y.sizes[::-1], x.other[::-1], y.other[::-1], strict=False)
        return (
            all((a == b and c == d) or b == d == 1 or a == c == 1 for a, b, c, d in pairs)
            and x.rank == y.rank
        )

    partner = _partner(draw, builder, fits)
    name, function = draw.one(
        (
            ("add", torch.add), ("add", torch.add), ("mul", torch.mul), ("maximum", torch.maximum),
            ("gate", lambda x, y: x * torch.sigmoid(y)),
            ("weighted", lambda x, y: torch.add(x, y, alpha=0.5)),
            ("sub", lambda x, y: x - 0.7 * y), ("div", lambda x, y: x / (y.abs() + 0.6)),
        )
    )  # fmt: skip
    return partner is not None and builder.add(Apply(name, function), (source, partner))


def concat(draw: Draw, builder: Builder, source: int) -> bool:
    """cat or stack with another value, with itself, or with a constant."""
    x = builder.shape(source)
    axis = draw.one((1, 1, draw.randrange(1, x.rank)))

    def fits(y: Shape) -> bool:
        rest = [each for each in range(x.rank) if each != axis] if y.rank == x.rank else []
        return bool(rest) and all((x.sizes[i], x.other[i]) == (y.sizes[i], y.other[i]) for i in rest)

    partner = _partner(draw, builder, fits)
    if partner is None:
        return False
    if draw.chance(0.15):
        return builder.add(Apply(f"stack {axis}", lambda x, y: torch.stack([x, y], axis)), (source, partner))
    if draw.chance(0.15):
        return builder.add(
            Apply(f"cat zeros {axis}", lambda x: torch.cat([x, torch.zeros_like(x)], axis)), (source,)
        )
    return builder.add(Apply(f"cat {axis}", lambda x, y: torch.cat([x, y], axis)), (source, partner))


def again(draw: Draw, builder: Builder, source: int) -> bool:
    """A layer used before, on another value: its parameters are shared."""
    plan = [entry for entry in builder.network.plan if len(entry[1]) == 1]
    if not plan:
        return False
    layer = draw.one(plan)[0]
    return builder.add(builder.network.layers[layer], (source,), layer)


def tied(draw: Draw, builder: Builder, source: int) -> bool:
    """A new layer with an earlier one's weight, as it is or transposed, and a bias of its own."""
    size = builder.shape(source).sizes[-1]
    linears = [m for m in builder.network.modules() if isinstance(m, nn.Linear) and hasattr(m, "weight")]
    linears = [m for m in linears if isinstance(m.weight, nn.Parameter) and size in m.weight.shape]
    if not linears:
        return False
    base = draw.one(linears)
    twin = nn.Linear(size, base.weight.numel() // size)
    with torch.no_grad():
        twin.bias.copy_(draw.normal(twin.out_features))
    if base.weight.shape[1] == size:
        twin.weight = base.weight
        return builder.add(twin, (source,))
    return builder.add(Transposed(base), (source,))


class Transposed(nn.Module):
    """x W with the weight of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight


def product(draw: Draw, builder: Builder, source: int) -> bool:
    """A matrix product of two values, as attention has."""
    x = builder.shape(source)
    if x.rank not in {3, 4} or not x.inner_static:
        return False
    scale = 1.0 / math.sqrt(x.sizes[-1])
    return builder.add(Apply("x xT x", lambda x: (x @ x.transpose(-1, -2)) * scale @ x), (source,))


JOINS: dict[str, Join] = {
    "binary": binary,
    "concat": concat,
    "again": again,
    "tied": tied,
    "product": product,
}
KINDS: dict[str, Kind] = {**SIMPLE, **VIEWS, **MOVES, **BLOCKS}
WEIGHTS = {
    "block": 6,
    "conv": 3,
    "mask": 5,
    "residual": 3,
    "dense": 3,
    "activation": 3,
    "binary": 4,
    "concat": 3,
}
ALL_KINDS = (*KINDS, *JOINS)


def build(spec: Spec) -> tuple[RandomNetwork, Builder]:
    """The network of a spec, in eval mode, and how it was built."""
    shapes = [INPUT_SHAPES[position % len(INPUT_SHAPES)] for position in spec.inputs]
    sizes = example_sizes(spec)
    draw = Draw(spec.seed)
    values = [(draw.normal(*first), draw.normal(*second)) for first, second in sizes]
    builder = Builder(RandomNetwork().eval(), values, len(shapes), spec.masks)
    for step in spec.steps:
        if apply(step, builder):
            builder.applied.append(step)
    _choose_outputs(draw, builder, spec)
    return builder.network, builder


def example_sizes(spec: Spec) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two example sizes for every input."""
    found = []
    for position in spec.inputs:
        inner = INPUT_SHAPES[position % len(INPUT_SHAPES)]
        first, second = (2, 3) if spec.dynamic in {"batch", "spatial"} else (int(spec.dynamic[-1]),) * 2
        other = [second, *inner]
        for axis in moving_axes(len(other)) if spec.dynamic == "spatial" else ():
            other[axis] += 4
        found.append(((first, *inner), tuple(other)))
    return found


def moving_axes(rank: int) -> range:
    """The axes of an input, beside the batch, that are dynamic: the last two that are no channels."""
    return range(max(2, rank - 2), rank)


def apply(step: Step, builder: Builder) -> bool:
    """Add one step's layer; False where it does not fit."""
    source = len(builder.values) - 1 - step.back % len(builder.values)
    draw = Draw(step.seed, builder.masks)
    if step.kind in JOINS:
        done = JOINS[step.kind](draw, builder, source)
    else:
        module = KINDS[step.kind](draw, builder.shape(source))
        done = module is not None and builder.add(module.eval(), (source,))
    return done


def _choose_outputs(draw: Draw, builder: Builder, spec: Spec) -> None:
    """The newest value, and some from the middle; a value nobody reads is likely to be one."""
    network, count = builder.network, len(builder.values)
    read = {position for _, arguments in network.plan for position in arguments}
    middle = list(range(builder.inputs, count - 1))
    loose = [position for position in middle if position not in read]
    extra = [position for position in loose if draw.chance(0.7)] + [p for p in middle if draw.chance(0.12)]
    network.form = spec.form
    if spec.form != "single" and draw.chance(0.04):
        extra.append(0)
    network.results = [count - 1, *sorted(set(extra))[:3]]


def spec_of(seed: int) -> Spec:
    """The random spec of a seed, with steps that all apply."""
    draw = Draw(seed)
    base = Spec(
        inputs=tuple(draw.randrange(len(INPUT_SHAPES)) for _ in range(draw.one((1, 1, 1, 2)))),
        dynamic=draw.one(DYNAMIC),
        form=draw.one(FORMS),
        seed=draw.randrange(1 << 16),
    )
    _, builder = build(base)
    kinds = [kind for kind in ALL_KINDS for _ in range(WEIGHTS.get(kind, 1))]
    wanted = draw.one((2, 3, 4, 5, 6, 8, 10))
    for _ in range(4 * wanted):
        back = 0 if draw.chance(0.8) else draw.randrange(6)
        step = Step(draw.one(kinds), back, draw.randrange(1 << 20))
        if apply(step, builder):
            builder.applied.append(step)
        if len(builder.applied) >= wanted:
            break
    return replace(base, steps=tuple(builder.applied))
