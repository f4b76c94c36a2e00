"""choose_widths: more channels than the minimal network has, where the target runs that faster.

Keeping more is always exact, so widths are a choice after the fact:

1. run the passes: the minimal network;
2. for each coupling of it, choose the width that makes the layers at it fastest by the target's table, one after the
   other until nothing changes;
3. pin as many of the removed channels and run the passes again. A constant channel keeps its constant, a dead one its
   weights; the facts stay what they are, and nothing reads more than it did;
4. take the result if the target's estimate of the whole network fell; else the minimal network;
5. once more, for the constant maps that are left: a channel that fits into a block anyway stands for one at no cost.

A tuner measures layers where a table guesses, and whole networks where the estimate judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, fx

from passes.ir.analysis import analyze
from passes.ir.pipeline import Callback, Note, Noted, Pass, Pipeline, Result, Step
from passes.ir.program import Origin, Pins, Program
from passes.ir.ties import ties
from passes.network import Coupling, Network, Touched, layers, map_behind, network_of, seconds
from passes.rules import rule_for
from passes.rules.joining import joined_axis
from passes.targets import Layer, Target

aten = torch.ops.aten

ROUNDS = 3
PLAIN = "no gather, no map"
COPYING = frozenset({"lay_out_constants", "separate_edges", "separate_positions"})
BY_FAR = 0.85  # estimates of networks that differ by less were wrong as often as right
BETWEEN_RUNS = 1 << 25  # bytes of large constants from which on what a run dropped goes before the next one
MOST_PARTS = 3  # of a concatenation, whose widths are combined in questions

Watcher = tuple[Callback, Noted]


@dataclass(frozen=True)
class Seen:
    """A step that is over: its name, its notes, and what each watcher noted of it."""

    name: str
    notes: tuple[Note, ...]
    noted: tuple[Step, ...]


Run = tuple[Result, list[Seen]]
Question = tuple[Layer, int, int]
"""A layer with so many input and output channels."""


class Tuner(Protocol):
    """Measures what a table can only guess."""

    def target(self, original: Program, minimal: Program, table: Target | None) -> Target:
        """A target that knows what was measured of the layers, and has the table for the rest."""

    def fastest(self, programs: Mapping[str, Program]) -> tuple[str, Note]:
        """The name of the fastest of some networks, and what was measured."""


@dataclass(frozen=True)
class ChooseWidths(Pipeline):
    """A pipeline that runs its passes once for the minimal network, and once more for each choice of widths.

    With a `tuner` there are several networks: minimal, by the target's table, by measured layers, the latter by each of
    `alternatives`, and with every channel that could stay. It says which is taken. Callbacks see the passes of the run
    that was taken.
    """

    target: Target | None = None
    tuner: Tuner | None = field(default=None, compare=False)
    watchers: tuple[Watcher, ...] = field(default=(), compare=False)
    alternatives: Mapping[str, tuple[Pass, ...]] = field(default_factory=dict, compare=False)
    """Passes that decide otherwise, for the tuner to choose from."""
    spares_maps: bool = True
    """Whether channels may stand where the passes would have a constant map."""

    def with_callback(self, callback: Callback, noted: Noted | None = None) -> Pipeline:
        return replace(self, watchers=(*self.watchers, (callback, noted or (lambda step: step))))

    def __call__(self, program: Program) -> Result:
        taken = minimal = self._run_all(self.passes, program)
        notes: tuple[Note, ...] = ()
        if self.target is not None:
            taken = self._without_copies(program, self._widened(self.passes, program, minimal, self.target))
        if self.tuner is not None:
            measured = self.tuner.target(program, minimal[0].program, self.target)
            runs = {"minimal": minimal, "table": taken}
            for name, passes in {"tuned": self.passes, **self.alternatives}.items():
                own = minimal if passes is self.passes else self._run_all(passes, program)
                runs[name] = self._widened(passes, program, own, measured)
            every = widths_of(minimal[0].program, program, measured).most()
            wide = program.replace(pinned=_joined(program.pinned, every))
            runs["every channel"] = self._run_all(self.alternatives.get(PLAIN, self.passes), wide)
            name, note = self.tuner.fastest({name: run[0].program for name, run in runs.items()})
            taken, notes = runs[name], (note,)
        result, steps = taken
        for step in steps:
            for (watcher, _), noted in zip(self.watchers, step.noted, strict=True):
                watcher(noted)
        return replace(result, notes=(*result.notes, *notes))

    def _without_copies(self, program: Program, taken: Run) -> Run:
        """The network without gathers and constant maps, where these are in the way by far; else `taken`."""
        passes, target = self.alternatives.get(PLAIN), self.target
        if (
            passes is None
            or target is None
            or not any(step.notes for step in taken[1] if step.name in COPYING)
        ):
            return taken
        plain = self._widened(passes, program, self._run_all(passes, program), target)
        is_faster = seconds(plain[0].program, target) < BY_FAR * seconds(taken[0].program, target)
        return plain if is_faster else taken

    def _run_all(self, passes: tuple[Pass, ...], program: Program) -> Run:
        steps: list[Seen] = []

        def see(step: Step) -> None:
            steps.append(Seen(step.name, step.notes, tuple(noted(step) for _, noted in self.watchers)))

        inner = Pipeline(passes, self.name, self.repeat, self.limit).with_callback(see)
        result = inner(program)
        program.constants.free_dropped(BETWEEN_RUNS)
        return result, steps

    def _widened(self, passes: tuple[Pass, ...], program: Program, minimal: Run, target: Target) -> Run:
        """The fastest by the target's estimate of the minimal network and those that follow from it.

        Hopeful estimates: with what constant maps cost, widths came out that were slower than without.
        """
        best = minimal
        pins: Pins = program.pinned
        for _ in range(ROUNDS):
            wanted = widths_of(best[0].program, program, target).pins()
            if not wanted:
                break
            pins = _joined(pins, wanted)
            wider = self._run_all(passes, program.replace(pinned=pins))
            if seconds(wider[0].program, target, hopeful=True) >= seconds(
                best[0].program, target, hopeful=True
            ):
                break
            best = wider
        if passes is not self.passes or not self.spares_maps or not _has_map(best[0].program):
            return best
        without = self._without_maps(program, best, pins, target)
        if without is None:
            return best
        return min(without, minimal, key=lambda run: seconds(run[0].program, target))

    def _without_maps(self, program: Program, best: Run, pins: Pins, target: Target) -> Run | None:
        """The network with channels in place of constant maps, where the target's estimate of it is less; else None."""
        wanted = widths_of(best[0].program, program, target, maps=True).pins()
        if not wanted:
            return None
        wider = self._run_all(self.passes, program.replace(pinned=_joined(pins, wanted)))
        is_faster = seconds(wider[0].program, target) < seconds(best[0].program, target)
        return wider if is_faster else None


@dataclass(frozen=True, eq=False)
class Room:
    """An original value, an axis of it, and the original indices there: what the minimal network has, and has not."""

    name: str
    axis: int
    kept: Tensor
    removed: Tensor


@dataclass
class Widths:
    """The widths of a minimal network's couplings, and where they could grow.

    `before`, `now`: channels of each coupling; `room`: where a coupling can grow; `concatenations`: the couplings that
    make up another one; `maps`: whether a channel more may spare a constant map.
    """

    target: Target
    network: Network
    before: dict[Coupling, int]
    room: dict[Coupling, Room]
    concatenations: dict[Coupling, tuple[Coupling, ...]]
    maps: bool = False
    now: dict[Coupling, int] = field(init=False)

    def __post_init__(self) -> None:
        """The best of some descents: from the widths that there are, and from where all have grown a step.

        Alone no layer gains by being packed where its neighbours are not.
        """
        wholes: dict[Coupling, list[Coupling]] = {coupling: [coupling] for coupling in self.room}
        for whole, parts in self.concatenations.items():
            for part in parts:
                wholes.setdefault(part, [part]).append(whole)
        touched = {coupling: self.network.touched(wholes[coupling]) for coupling in self.room}
        best, least = self.before, float("inf")
        for start in self._starts():
            self.now = start
            self._descend(touched)
            total = self.network.seconds(self.target, self.width)
            if total < least:
                best, least = self.now, total
        self.now = dict(best)

    def _starts(self) -> Iterator[dict[Coupling, int]]:
        """The widths before, and each coupling's first, second ... of the target's next widths, where there is room."""
        yield dict(self.before)
        steps = {coupling: self._steps(coupling) for coupling in self.room}
        for number in range(max(map(len, steps.values()), default=0)):
            yield {
                **self.before,
                **{coupling: found[min(number, len(found) - 1)] for coupling, found in steps.items()},
            }

    def _steps(self, coupling: Coupling) -> list[int]:
        """The width that a coupling has, or the target's next ones that there is room for."""
        least = self.before[coupling]
        most = least + len(self.room[coupling].removed)
        return [width for width in self.target.widths(least) if width <= most] or [least]

    def _descend(self, touched: Mapping[Coupling, Touched]) -> None:
        """Coordinate descent: each coupling in turn gets its best width, until none changes."""
        changed = True
        while changed:
            changed = False
            for coupling in self.room:
                best = min(
                    self._candidates(coupling),
                    key=lambda width: self._cost(touched[coupling], coupling, width),
                )
                changed |= best != self.now[coupling]
                self.now[coupling] = best

    def _candidates(self, coupling: Coupling) -> list[int]:
        """The width it has first, so that it stays where nothing is gained."""
        least = self.before[coupling]
        most = least + len(self.room[coupling].removed)
        others = (least, *self.target.widths(least), most)
        if self.maps:
            others = (*others, least + 1, *self.target.widths(least + 1))
        now = self.now[coupling]
        return [now, *(width for width in sorted(others) if width <= most and width != now)]

    def _cost(self, touched: Touched, coupling: Coupling, width: int) -> float:
        held = self.now[coupling]
        self.now[coupling] = width
        total = self.network.seconds(self.target, self.width, touched)
        self.now[coupling] = held
        return total

    def questions(self) -> Iterator[Question]:
        """Every layer at all the widths that its couplings may get."""
        for part in self.network.layers:
            outputs = self._options(part.y)
            for width in self._options(part.x):
                others = (width,) if part.x == part.y else outputs
                yield from ((part.layer, width, other) for other in others)

    def _options(self, coupling: Coupling) -> list[int]:
        """The widths that a coupling may get, alone or with the parts that are concatenated to it."""
        own = self._candidates(coupling) if coupling in self.room else [self.before[coupling]]
        more = [
            [width - self.before[part] for width in self._candidates(part)]
            for part in self.concatenations.get(coupling, ())
            if part in self.room
        ]
        totals = {width + sum(added) for width, *added in product(own, *more[:MOST_PARTS])}
        return sorted(totals)

    def width(self, coupling: Coupling) -> int:
        """The channels that a coupling now has."""
        parts = self.concatenations.get(coupling, ())
        return self.now[coupling] + sum(self.now[part] - self.before[part] for part in parts)

    def pins(self) -> Pins:
        """What to pin so that each coupling gets its width: the first of the removed channels.

        And the kept ones, for some of these may be there to carry constants only, which the added ones can do as well.
        """
        return self._pins({coupling: self.now[coupling] - self.before[coupling] for coupling in self.room})

    def most(self) -> Pins:
        """What to pin so that every channel stays that could."""
        return self._pins({coupling: len(room.removed) for coupling, room in self.room.items()})

    def _pins(self, added: Mapping[Coupling, int]) -> Pins:
        found: dict[str, dict[int, Tensor]] = {}
        for coupling, more in added.items():
            room = self.room[coupling]
            if more:
                found.setdefault(room.name, {})[room.axis] = torch.cat([room.kept, room.removed[:more]])
        return found


def widths_of(minimal: Program, original: Program, target: Target, maps: bool = False) -> Widths:
    """The best widths for a minimal network that passes made of `original`.

    `maps`: with what constant maps cost where a layer gets no more channels than it has.
    """
    if minimal.analysis is None:
        minimal = minimal.replace(analysis=analyze(minimal, rule_for))
    tied = ties(minimal, rule_for)
    before: dict[Coupling, int] = {}

    def coupling(node: fx.Node, axis: int) -> Coupling:
        found = tied.coupling((node, axis))
        before[found] = minimal.infos[node].sizes[axis]
        return found

    for this in layers(minimal):
        if Layer.of(this).is_depthwise:
            tied.tie((this.x, this.axis), (this.op.node, this.axis))
    network = network_of(minimal, coupling, hopeful=True, maps=maps)
    room: dict[Coupling, Room] = {}
    concatenations: dict[Coupling, tuple[Coupling, ...]] = {}
    originals = original.by_origin()
    for node in minimal.calls():
        info = minimal.infos.get(node)
        for axis in () if info is None else info.static_axes:
            if tied.coupling((node, axis)) in before:
                found = _room(minimal, node, axis, original, originals)
                if found is not None:
                    room[tied.coupling((node, axis))] = found
        if node.target is aten.cat.default and info is not None:
            axis = joined_axis(minimal.op(node))
            parts = tuple(coupling(operand, axis) for operand in minimal.op(node).operands)
            concatenations[coupling(node, axis)] = parts
    return Widths(target, network, before, room, concatenations, maps)


def _has_map(program: Program) -> bool:
    return any(map_behind(program, node) for node in program.calls())


def _room(
    minimal: Program, node: fx.Node, axis: int, original: Program, originals: Mapping[str, fx.Node]
) -> Room | None:
    """The channels that a value had originally and is without; None where there are none."""
    origin: Origin | None = node.meta.get("origin")
    before = None if origin is None else originals.get(origin.name)
    if origin is None or before is None:
        return None
    info = original.infos[before]
    if axis >= info.rank or not info.is_static(axis):
        return None
    had = before.meta["origin"].indices(axis, info)
    kept = origin.indices(axis, minimal.infos[node])
    removed = had[~torch.isin(had, kept)]
    return Room(origin.name, axis, kept, removed) if len(removed) else None


def _joined(first: Pins, second: Pins) -> Pins:
    joined = {name: dict(axes) for name, axes in first.items()}
    for name, axes in second.items():
        for axis, index in axes.items():
            held = joined.setdefault(name, {}).get(axis)
            joined[name][axis] = index if held is None else torch.cat([held, index])
    return joined
