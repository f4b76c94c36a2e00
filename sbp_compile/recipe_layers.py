"""For a recipe: which output channels of each layer are kept and removed, by their numbers in the original, and why."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.analysis import Analysis
from passes.ir.cost import TRANSPOSED
from passes.ir.lattice import all_over_others
from passes.ir.pipeline import Step
from passes.ir.program import Program
from passes.rules.layer import SPATIAL_RANK, by_rows

REORDERING = ("fold_permutations", "align_heads")


@dataclass(frozen=True)
class LayerRecipe:
    """One layer's output channels.

    `kept`: those of the small network, in its order, None where their order inside the small network is free and not
    known (heads of attention). `constant`, `dead`: why each other one was removed: its value is known for every input,
    or nothing reads it. `kept_for`: (reason, channels) of those that are kept although they could go.
    """

    name: str
    value: str
    operator: str
    channels: int
    kept: tuple[int, ...] | None
    kept_number: int
    constant: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()
    kept_for: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Trace(Step):
    """What is kept of a step: Programs without the entries of their constants, and where layers' rows were before.

    `places`: of the layers whose weights a reordering pass changed, by name; None where the rows are not the same.
    """

    places: Mapping[str, Tensor | None] = field(default_factory=dict)


def tracing(original: Program) -> Callable[[Step], Trace]:
    """Return what notes of a step what a recipe and a report of `original` read of it."""
    names = {node.name for node in original.calls() if _channels(original, node) is not None}

    def trace(step: Step) -> Trace:
        places: dict[str, Tensor | None] = {}
        if step.name in REORDERING and step.before is not step.after:
            after = _layers(step.after, names)
            places = {
                name: _places(_rows(step.before, node), _rows(step.after, after[name]))
                for name, node in _layers(step.before, names).items()
                if name in after and not _has_same_weights(step, node, after[name])
            }
        return Trace(step.name, step.before.outline, step.after.outline, step.seconds, step.notes, places)

    return trace


def layer_recipes(original: Program, small: Program, steps: Sequence[Trace]) -> tuple[LayerRecipe, ...]:
    """Return the layers of `original` (with constant weights) in graph order; `steps`: what the pipeline did."""
    tracks: dict[str, _Track] = {}
    for node in original.calls():
        channels = _channels(original, node)
        if channels is not None:
            tracks[node.name] = _Track(node, torch.arange(channels))
    for step in steps:
        before, after = _layers(step.before, tracks), _layers(step.after, tracks)
        for name, track in tracks.items():
            if name in before and name in after and track.numbers is not None:
                track.follow(step, before[name], after[name])
    left = _layers(small, tracks)
    return tuple(track.recipe(left.get(name), small) for name, track in tracks.items())


def _layers(program: Program, names: Container[str]) -> dict[str, fx.Node]:
    return {node.name: node for node in program.calls() if node.name in names and node in program.infos}


def _channels(program: Program, node: fx.Node) -> int | None:
    """Return the output channels of a convolution or linear layer; None where the input decides how many."""
    if node.target not in SPATIAL_RANK or node not in program.infos:
        return None
    args = schema.bind(node)
    info, groups = program.infos.get(args["weight"]), args.get("groups", 1)
    if info is None or info.rank != SPATIAL_RANK[node.target] + 2:
        return None
    if not info.all_static or not isinstance(groups, int):  # a kernel for each example
        return None
    return info.sizes[1] * groups if node.target in TRANSPOSED else info.sizes[0]


class _Track:
    """One layer on its way through the passes.

    `numbers`: the original's number of each output channel that it has left; None once their order is not known.
    """

    def __init__(self, node: fx.Node, numbers: Tensor) -> None:
        self.node = node
        self.numbers: Tensor | None = numbers
        self.channels = len(numbers)
        self.constant: set[int] = set()
        self.dead: set[int] = set()
        self.reasons: dict[str, set[int]] = {}

    def follow(self, step: Trace, before: fx.Node, after: fx.Node) -> None:
        """Take one pass into account: what the analysis says, what was cut, what changed places."""
        assert self.numbers is not None
        axis = self._axis(step.before, before)
        if step.after.analysis is not None:
            self._read(step.after.analysis, after.name, axis)
        elif step.name == "shrink_channels" and step.before.analysis is not None:
            self.numbers = self.numbers[step.before.analysis.keep.get(before, axis)]
        elif before.name in step.places:
            places = step.places[before.name]
            self.numbers = None if places is None else self.numbers[places]
        if self.numbers is not None and len(self.numbers) != step.after.infos[after].sizes[axis]:
            self.numbers = None

    def _axis(self, program: Program, node: fx.Node) -> int:
        """Return the channel axis of the value: the layer's own, or what was added to it under its name."""
        target: Any = self.node.target
        return program.infos[node].rank - 1 - SPATIAL_RANK[target]

    def _read(self, analysis: Analysis, name: str, axis: int) -> None:
        assert self.numbers is not None
        keep, numbers = analysis.keep, self.numbers
        removed = ~keep.at(name, axis)
        known = all_over_others(analysis.facts[name].known, axis, len(numbers))
        self.constant |= set(numbers[removed & known].tolist())
        self.dead |= set(numbers[removed & ~known].tolist())
        self.reasons = {why: set(numbers[mask].tolist()) for why, mask in keep.reason_masks(name, axis)}

    def recipe(self, left: fx.Node | None, small: Program) -> LayerRecipe:
        """Return what became of the layer; `left`: what the small network has of it."""
        numbers = torch.arange(0) if left is None else self.numbers
        stay = set(range(self.channels)) if numbers is None else set(numbers.tolist())
        constant = self.constant - stay
        return LayerRecipe(
            self.node.meta.get("module") or self.node.name,
            self.node.name,
            str(self.node.target).removeprefix("aten."),
            self.channels,
            None if numbers is None else tuple(numbers.tolist()),
            0 if left is None else small.infos[left].sizes[self._axis(small, left)],
            tuple(sorted(constant)),
            tuple(sorted(set(range(self.channels)) - stay - constant)),
            tuple((why, tuple(sorted(those & stay))) for why, those in self.reasons.items() if those & stay),
        )


def _has_same_weights(step: Step, before: fx.Node, after: fx.Node) -> bool:
    """Whether a layer has the weights that it had, so that nothing changed places: sorting rows takes far longer."""
    if before.target is not after.target or before.target not in SPATIAL_RANK:
        return False
    pairs = [
        (step.before.held(schema.bind(before)[name]), step.after.held(schema.bind(after)[name]))
        for name in ("weight", "bias")
    ]
    return pairs[0][0] is not None and all(
        (one is None) == (other is None) and (one is None or other is None or one.is_same(other))
        for one, other in pairs
    )


def _rows(program: Program, node: fx.Node) -> list[bytes] | None:
    """Return something for each output channel that only a change of its own weights changes, not their order."""
    first = node.args[0] if node.args else None
    if node.target not in SPATIAL_RANK and isinstance(first, fx.Node):  # a constant map that was added to it
        node = first
    bound = schema.bind(node) if node.target in SPATIAL_RANK else {}
    weight, bias = (program.constant(bound.get(name)) for name in ("weight", "bias"))
    if weight is None:
        return None
    rows = by_rows(weight, bound["groups"]) if node.target in TRANSPOSED else weight
    values = rows.flatten(1).sort(dim=1).values
    if bias is not None:
        values = torch.cat([values, bias.reshape(-1, 1)], 1)
    return [row.tobytes() for row in values.numpy()]


def _places(before: list[bytes] | None, after: list[bytes] | None) -> Tensor | None:
    """Return where each row was before; None if they are not the same rows."""
    if before is None or after is None or sorted(before) != sorted(after):
        return None
    where: dict[bytes, list[int]] = {}
    for position, row in reversed(list(enumerate(before))):
        where.setdefault(row, []).append(position)
    if before == after:
        return torch.arange(len(before))
    return torch.tensor([where[row].pop() for row in after])
