"""Where a compiled network costs more than its bound, layer by layer, and the compiler's own reasons for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from bound import Bound
from layer_shapes import layer_macs, layers
from torch import fx

from passes import Program

STANDS_FOR = "stands for the constants that"
UNEXPLAINED = "needed, says the analysis"
UNKNOWN = "a layer that the original does not have"


@dataclass(frozen=True)
class Excess:
    """One layer that costs more than its bound, and why: (reason, channels) on either side."""

    layer: str
    kind: str
    macs: int
    bound: float
    inputs: str
    outputs: str
    reasons: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Reasons:
    """Why a layer keeps input and output channels beyond the necessary ones: (reason, how many)."""

    inputs: list[tuple[str, int]] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)


def reasons_by_layer(analyses: Sequence[Program]) -> dict[str, Reasons]:
    """The reasons of every layer, from the last analysis that has it."""
    found: dict[str, Reasons] = {}
    for program in analyses:
        for shape in layers(program):
            found[shape.node.name] = Reasons(
                _reasons(program, shape.x, shape.x_axis), _reasons(program, shape.node, shape.y_axis)
            )
    return found


def _reasons(program: Program, node: fx.Node, axis: int) -> list[tuple[str, int]]:
    keep = program.analysed().keep
    axis %= program.infos[node].rank
    needed = keep.needed(node.name, axis)
    if needed is None or keep.count(node, axis) <= needed:
        return []
    return keep.reasons(node.name, axis)


def standing_outputs(layer_bounds: Sequence[Bound], reasons: Mapping[str, Reasons]) -> dict[str, float]:
    """Multiply-adds for making the channels that stand for constants, by the layer that makes them.

    They are those that the report keeps for that reason, also where a depthwise convolution lies between.
    """
    depthwise: dict[str, int] = {}
    found: dict[str, float] = {}
    for bound in reversed(layer_bounds):
        number = 0
        for why, count in reasons.get(bound.name, Reasons()).outputs:
            number += count if STANDS_FOR in why else min(count, depthwise.get(why, 0))
        if bound.groups == bound.inputs > 1:
            depthwise[f"groups of {bound.name} stay whole"] = number
        inputs = bound.live_inputs + bound.standing if bound.groups == 1 else bound.inputs // bound.groups
        found[bound.name] = number * inputs * bound.unit
    return found


def excesses(
    layer_bounds: Sequence[Bound],
    needed: Mapping[str, float],
    program: Program,
    reasons: Mapping[str, Reasons],
) -> Iterator[Excess]:
    """The layers of a compiled Program that cost more than their bound, the costliest first."""
    bound_of = {bound.name: bound for bound in layer_bounds}
    macs = layer_macs(program)
    shapes = {shape.node.name: shape for shape in layers(program)}
    for name in sorted(macs, key=lambda name: needed.get(name, 0.0) - macs[name]):
        if macs[name] <= needed.get(name, 0.0):
            return
        node, why = shapes[name].node, reasons.get(name, Reasons())
        groups, outputs, inputs, _ = (
            shapes[name].matrix(torch.empty(program.infos[shapes[name].weight].sizes)).shape
        )
        kept, bound = (groups * inputs, groups * outputs), bound_of.get(name)
        label = str(node.meta.get("module") or name)
        if bound is None:
            yield Excess(label, _kind(node), macs[name], 0.0, f"{kept[0]}", f"{kept[1]}", ((UNKNOWN, 1),))
            continue
        told = [*_uncovered(kept[0] - bound.live_inputs - bound.standing, why.inputs)]
        told += _uncovered(kept[1] - bound.live_outputs, why.outputs)
        yield Excess(
            label,
            _kind(node),
            macs[name],
            needed[name],
            f"{kept[0]} of {bound.inputs}, bound {bound.live_inputs + bound.standing}",
            f"{kept[1]} of {bound.outputs}, bound {bound.live_outputs}",
            added_up(told),
        )


def _uncovered(more: int, reasons: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The reasons for channels beyond the bound; those that no reason covers are needed in the analysis' eyes."""
    if more <= 0:
        return []
    rest = more - sum(number for _, number in reasons)
    return [*reasons, *([(UNEXPLAINED, rest)] if rest > 0 else [])]


def added_up(reasons: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Reasons without the numbers of their operators, each once, the most frequent first."""
    found: Counter[str] = Counter()
    for why, number in reasons:
        found[without_numbers(why)] += number
    return tuple(found.most_common())


def _kind(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def without_numbers(why: str) -> str:
    """A reason with the operators it names, but not which of them."""
    return re.sub(r"_\d+(?=\b|_)", "", why)
