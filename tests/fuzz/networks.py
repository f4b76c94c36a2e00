"""Random networks: a Spec is plain data, `build` makes the same module of it every time.

A spec lists steps; each takes an earlier value (counted back from the newest), a kind and a seed. A step that
does not fit is left out, so that any part of a spec is a spec too: that is what makes failures shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.fuzz.attention import ATTENTION
from tests.fuzz.blocks import BLOCKS
from tests.fuzz.builder import Builder, RandomNetwork, Step
from tests.fuzz.convolutions import GROUPED
from tests.fuzz.draw import Draw
from tests.fuzz.joins import JOINS
from tests.fuzz.layers import SIMPLE, Kind
from tests.fuzz.moves import MOVES
from tests.fuzz.norms import NORMS
from tests.fuzz.routes import ROUTES
from tests.fuzz.sequences import SEQUENCES, VOCABULARY
from tests.fuzz.views import VIEWS
from tests.fuzz.wiring import WIRING

INPUT_SHAPES = (
    (3, 6, 6), (4, 5, 7), (2, 8, 8), (6, 4, 4), (1, 7, 7), (8, 5, 5), (4, 9), (3, 12), (6, 5), (10,), (16,),
    (2, 4, 4, 4), (5, 6), (4, 8), (6,), (5,),
)  # fmt: skip
TOKENS = frozenset({14, 15})  # of integers
SEQUENCE_INPUTS = TOKENS | {12, 13}  # positions are axis 1
DYNAMIC = ("batch", "batch", "batch", "batch", "batch", "batch", "static 1", "static 2", "spatial")
FORMS = ("single", "tuple", "dict", "nested")


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


KINDS: dict[str, Kind] = {
    **SIMPLE, **VIEWS, **MOVES, **BLOCKS, **NORMS, **ATTENTION, **SEQUENCES, **GROUPED, **WIRING,
}  # fmt: skip
# Not in ALL_KINDS: the networks of the seeds stay what they were.
ROUTED_KINDS = {**KINDS, **ROUTES}
OF_INTEGERS = (*VIEWS, *MOVES, "embedding")
WEIGHTS = {
    "block": 8, "conv": 3, "mask": 7, "residual": 4, "dense": 4, "activation": 4, "binary": 5, "concat": 3,
    "transposed": 3, "grouped": 3, "attention": 4, "multihead": 2, "transformer": 3, "cross": 3, "recurrent": 3,
    "over_last": 2, "over_positions": 2, "softmax": 2, "branches": 2, "growing": 2, "twice": 2,
    "squeeze_excite": 2, "embedding": 2, "tied": 2,
}  # fmt: skip
ALL_KINDS = (*KINDS, *JOINS)
WITH_ROUTES = (*ALL_KINDS, *(kind for kind in ROUTES for _ in range(12)))


def build(spec: Spec) -> tuple[RandomNetwork, Builder]:
    """The network of a spec, in eval mode, and how it was built."""
    draw = Draw(spec.seed)
    values = list(zip(*(inputs(spec, which, draw.generator) for which in (0, 1)), strict=True))
    builder = Builder(RandomNetwork().eval(), values, len(spec.inputs), spec.masks)
    for step in spec.steps:
        if apply(step, builder):
            builder.applied.append(step)
    _choose_outputs(draw, builder, spec)
    return builder.network, builder


def inputs(spec: Spec, which: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random float32 inputs, or int64 where they are tokens, at the first or second example sizes."""
    return tuple(
        torch.randint(VOCABULARY, sizes[which], generator=generator)
        if position % len(INPUT_SHAPES) in TOKENS
        else torch.randn(sizes[which], generator=generator)
        for position, sizes in zip(spec.inputs, example_sizes(spec), strict=True)
    )


def example_sizes(spec: Spec) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two example sizes for every input."""
    found = []
    for position in spec.inputs:
        inner = INPUT_SHAPES[position % len(INPUT_SHAPES)]
        first, second = (2, 3) if spec.dynamic in {"batch", "spatial"} else (int(spec.dynamic[-1]),) * 2
        other = [second, *inner]
        for axis in moving_axes(position) if spec.dynamic == "spatial" else ():
            other[axis] += 4
        found.append(((first, *inner), tuple(other)))
    return found


def moving_axes(position: int) -> range:
    """The axes of an input, beside the batch, that are dynamic: the last two that are no channels."""
    rank = 1 + len(INPUT_SHAPES[position % len(INPUT_SHAPES)])
    if position % len(INPUT_SHAPES) in SEQUENCE_INPUTS:
        return range(1, 2)
    return range(max(2, rank - 2), rank)


def apply(step: Step, builder: Builder) -> bool:
    """Add one step's layer; False where it does not fit."""
    source = len(builder.values) - 1 - step.back % len(builder.values)
    draw = Draw(step.seed, builder.masks)
    if not builder.is_float(source) and step.kind not in OF_INTEGERS:
        return False
    if step.kind in JOINS:
        done = JOINS[step.kind](draw, builder, source)
    else:
        module = ROUTED_KINDS[step.kind](draw, builder.shape(source))
        done = module is not None and builder.add(module, (source,))
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


def spec_of(seed: int, among: Sequence[str] = ALL_KINDS) -> Spec:
    """The random spec of a seed, with steps that all apply."""
    draw = Draw(seed)
    base = Spec(
        inputs=tuple(draw.randrange(len(INPUT_SHAPES)) for _ in range(draw.one((1, 1, 1, 2)))),
        dynamic=draw.one(DYNAMIC),
        form=draw.one(FORMS),
        seed=draw.randrange(1 << 16),
    )
    _, builder = build(base)
    for back, position in enumerate(reversed(base.inputs)):
        step = Step("embedding", 2 * back, draw.randrange(1 << 20))
        if position in TOKENS and apply(step, builder):
            builder.applied.append(step)
    kinds = [kind for kind in among for _ in range(WEIGHTS.get(kind, 1))]
    wanted = draw.one((2, 3, 4, 5, 6, 8, 10))
    for _ in range(4 * wanted):
        back = 0 if draw.chance(0.8) else draw.randrange(6)
        step = Step(draw.one(kinds), back, draw.randrange(1 << 20))
        if apply(step, builder):
            builder.applied.append(step)
        if len(builder.applied) >= wanted:
            break
    return replace(base, steps=tuple(builder.applied))
