"""A Program as parts and the ways between them: what a target's estimate of the whole network is made of.

A part (a layer, a pool, a concatenation) takes its channels packed in blocks or as they lie, and gives them so. On a
way between two parts that do not agree, and between a part and anything else, the values have to be moved. What
onnxruntime 1.32 packs, and what it does along with a layer, was read from the graphs that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import fx

from passes.ir.program import Program
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.joining import joined_axis
from passes.rules.layer import Contraction, describe
from passes.targets import Layer, Target

aten = torch.ops.aten

Coupling = tuple[str, int]
Width = Callable[[Coupling], int]
Named = Callable[[fx.Node, int], Coupling]
Touched = tuple[list[int], list[int]]
"""Numbers of parts and of ways."""

ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
    }
)
"""What onnxruntime does along with the layer in front."""
COMBINING = frozenset({aten.add.Tensor, aten.mul.Tensor})
ANY_LAYOUT = (
    ACTIVATIONS
    | COMBINING
    | {aten.gelu.default, aten.silu.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}
)
"""What onnxruntime runs on packed channels as well as on plain ones."""
ALONG = ACTIVATIONS | {aten.add.Tensor}
IMAGE_RANK = 4
WINDOWS = frozenset({aten.max_pool2d.default, aten.avg_pool2d.default})
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim})


class Part(Protocol):
    """What takes and gives channels of images."""

    @property
    def couplings(self) -> tuple[Coupling, ...]: ...

    def seconds(self, target: Target, width: Width) -> float:
        """The target's estimate for one example."""

    def packed(self, target: Target, width: Width) -> tuple[bool, bool]:
        """Whether it takes, and whether it gives, channels packed in blocks."""


@dataclass(frozen=True)
class LayerPart:
    """A layer with the couplings of its input and of its output channels."""

    layer: Layer
    x: Coupling
    y: Coupling

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        return self.x, self.y

    def seconds(self, target: Target, width: Width) -> float:
        return target.seconds(self.layer, width(self.x), width(self.y))

    def packed(self, target: Target, width: Width) -> tuple[bool, bool]:
        return target.packed(self.layer, width(self.x), width(self.y))


@dataclass(frozen=True)
class PoolPart:
    """A pool: `taps` entries of each channel at each of `positions`."""

    channels: Coupling
    taps: int
    positions: int

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        return (self.channels,)

    def seconds(self, target: Target, width: Width) -> float:
        return target.pooling(width(self.channels), self.taps, self.positions)

    def packed(self, target: Target, width: Width) -> tuple[bool, bool]:
        fits = target.is_whole(width(self.channels))
        return fits, fits


@dataclass(frozen=True)
class JoinedPart:
    """A concatenation of channels."""

    parts: tuple[Coupling, ...]
    positions: int

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        return self.parts

    def seconds(self, target: Target, width: Width) -> float:
        return target.passing(sum(map(width, self.parts)) * self.positions)

    def packed(self, target: Target, width: Width) -> tuple[bool, bool]:
        fits = all(target.is_whole(width(part)) for part in self.parts)
        return fits, fits


@dataclass(frozen=True)
class Way:
    """From one part to another; None: from or to anything else. `positions`: of one example.

    `stands_for`: the channels that a layer at the beginning of it reads, and how many: with one more there will be no
    constant map to add on the way; None where there is none.
    """

    giver: int | None
    taker: int | None
    coupling: Coupling
    positions: int
    stands_for: tuple[Coupling, int] | None = None

    def has_map(self, width: Width) -> bool:
        """Whether a constant map is added on it, to channels that are not packed."""
        return self.stands_for is not None and width(self.stands_for[0]) <= self.stands_for[1]


class Network:
    """Parts, the ways between them, and everything else.

    `passed`: the entries, for one example, of each call that is no part and that no layer does along.
    """

    def __init__(self, parts: Sequence[Part], ways: Sequence[Way], passed: Sequence[int] = ()) -> None:
        self.parts = parts
        self.ways = ways
        self.passed = passed
        self._parts_at: dict[Coupling, list[int]] = {}
        self._ways_of: dict[int | None, list[int]] = {}
        for number, part in enumerate(parts):
            for coupling in set(part.couplings):
                self._parts_at.setdefault(coupling, []).append(number)
        for number, way in enumerate(ways):
            for end in {way.giver, way.taker}:
                self._ways_of.setdefault(end, []).append(number)

    @property
    def layers(self) -> Iterator[LayerPart]:
        """The parts that are layers."""
        return (part for part in self.parts if isinstance(part, LayerPart))

    def touched(self, couplings: Iterable[Coupling]) -> Touched:
        """The parts at these couplings and the ways from and to them."""
        parts = {number for coupling in couplings for number in self._parts_at.get(coupling, ())}
        ways = {number for part in parts for number in self._ways_of.get(part, ())}
        return sorted(parts), sorted(ways)

    def seconds(self, target: Target, width: Width, touched: Touched | None = None) -> float:
        """The target's estimate for one example, of everything or of a part."""
        parts, ways = touched or (range(len(self.parts)), range(len(self.ways)))
        total = 0.0 if touched else sum(map(target.passing, self.passed))
        total += sum(self.parts[number].seconds(target, width) for number in parts)
        for way in map(self.ways.__getitem__, ways):
            total += self._way_seconds(target, width, way)
        return total

    def _way_seconds(self, target: Target, width: Width, way: Way) -> float:
        gives, takes = self._packed(target, width, way.giver)[1], self._packed(target, width, way.taker)[0]
        channels, total = width(way.coupling), 0.0
        moves = int(gives != takes)
        if way.has_map(width):
            moves = gives + takes
            total += target.passing(channels * way.positions)
        if moves:
            at_pool = any(isinstance(self._part(end), PoolPart) for end in (way.giver, way.taker))
            total += moves * target.moving(channels, way.positions, at_pool=at_pool)
        return total

    def _part(self, number: int | None) -> Part | None:
        return None if number is None else self.parts[number]

    def _packed(self, target: Target, width: Width, number: int | None) -> tuple[bool, bool]:
        part = self._part(number)
        return (False, False) if part is None else part.packed(target, width)


def layers(program: Program) -> Iterator[Contraction]:
    """The convolutions and linear layers with constant weights."""
    for node in program.calls():
        op = program.op(node)
        if op.info is not None and isinstance(rule_for(op), ContractionRule):
            yield describe(op)


def network_of(program: Program, coupling: Named, hopeful: bool = False, maps: bool = False) -> Network:
    """The parts of a Program, the ways from and to those of images, and what else it does with entries.

    `hopeful`: constants that are added count as if they were not there, since wider channels may stand for them.
    `maps`: not so those behind layers of images, as long as these have no more channels.
    """
    found: list[Part] = []
    images: dict[fx.Node, int] = {}
    blocked: set[fx.Node] = set()
    described = {this.op.node: this for this in layers(program)}
    for node in program.calls():
        part = _part(program, node, described.get(node), blocked, coupling)
        if part is not None:
            if not isinstance(part, LayerPart) or part.layer.is_of_images:
                images[node] = len(found)
                blocked.add(node)
            found.append(part)
        elif _takes_any_layout(program, node, blocked, hopeful):
            blocked.add(node)
    spared = {} if not maps else dict(_maps(program, described, images, coupling))
    ways = [way for node in images for way in _ways(program, node, images, blocked, coupling, spared)]
    free = {node for node in blocked if node.target in ALONG} | images.keys() | described.keys()
    return Network(
        found, ways, [_entries(program, node) for node in program.calls() if _moves(program, node, free)]
    )


def _part(
    program: Program, node: fx.Node, this: Contraction | None, blocked: set[fx.Node], coupling: Named
) -> Part | None:
    if this is not None:
        return LayerPart(Layer.of(this), coupling(this.x, this.axis), coupling(node, this.axis))
    info = program.infos.get(node)
    if info is None or info.rank != IMAGE_RANK:
        return None
    op, positions = program.op(node), prod(info.sizes[2:])
    if node.target in WINDOWS:
        kernel = op.args["kernel_size"]
        return PoolPart(coupling(node, 1), prod(kernel) ** (3 - len(kernel)), positions)
    if node.target is aten.adaptive_avg_pool2d.default and positions > 1:
        return PoolPart(coupling(node, 1), prod(op.info_of(op.operands[0]).sizes[2:]) // positions, positions)
    if node.target is aten.cat.default and joined_axis(op) == 1 and blocked.issuperset(op.operands):
        return JoinedPart(tuple(coupling(operand, 1) for operand in op.operands), positions)
    return None


def _maps(
    program: Program, described: Mapping[fx.Node, Contraction], images: Container[fx.Node], coupling: Named
) -> Iterator[tuple[fx.Node, tuple[Coupling, int]]]:
    """Each constant map behind a layer of images, with the channels which that reads, and how many."""
    for node in program.calls():
        value = map_behind(program, node)
        if value is not None and value in images and value in described:
            this = described[value]
            yield node, (coupling(this.x, this.axis), this.in_channels)


def map_behind(program: Program, node: fx.Node) -> fx.Node | None:
    """The value that a call adds constants to which differ by position in an image; None if it does not."""
    if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
        return None
    for value, other in (node.all_input_nodes, node.all_input_nodes[::-1]):
        held = program.held(other)
        if held is not None and len(held.shape) == IMAGE_RANK and prod(held.shape[2:]) > 1:
            return value
    return None


def _takes_any_layout(program: Program, node: fx.Node, blocked: set[fx.Node], hopeful: bool) -> bool:
    """Whether a call is one that packed channels go through, and all its operands may be packed."""
    if node.target not in ANY_LAYOUT:
        return False
    operands = [operand for operand in node.all_input_nodes if program.held(operand) is None]
    if not blocked.issuperset(operands) or (len(operands) < len(node.all_input_nodes) and not hopeful):
        return False
    return node.target not in COMBINING or all(
        program.infos[operand].has_shape_of(program.infos[node]) for operand in operands
    )


def _moves(program: Program, node: fx.Node, free: set[fx.Node]) -> bool:
    """Whether a call reads and writes entries that no layer does along."""
    if node in free or node.target in VIEWS or node not in program.infos:
        return False
    return not (node.target in ACTIVATIONS and node.args[0] in free)


def _entries(program: Program, node: fx.Node) -> int:
    """Entries of a value for one example, about: those of the whole where the batch does not lead."""
    sizes = program.infos[node].sizes
    return prod(sizes[1:]) if sizes and not program.infos[node].is_static(0) else prod(sizes)


def _ways(
    program: Program,
    node: fx.Node,
    images: Mapping[fx.Node, int],
    blocked: set[fx.Node],
    coupling: Named,
    maps: Mapping[fx.Node, tuple[Coupling, int]],
) -> Iterator[Way]:
    """The ways into a part of images, and the one out of it to anything that is none."""
    number, first = images[node], node.args[0]
    for operand in (first,) if isinstance(first, fx.Node) else program.op(node).operands:
        *passed, source = _up(operand, blocked)
        found = next((maps[value] for value in passed if value in maps), None)
        yield Way(images.get(source), number, *_channels_and_positions(program, operand, coupling), found)
    if not all(_is_read_by(user, images, blocked) for user in node.users):
        found = next((maps[user] for user in node.users if user in maps), None)
        yield Way(number, None, *_channels_and_positions(program, node, coupling), found)


def _channels_and_positions(program: Program, node: fx.Node, coupling: Named) -> tuple[Coupling, int]:
    info = program.infos[node]
    return coupling(node, info.rank - 3), prod(info.sizes[-2:])


def _up(node: fx.Node, blocked: set[fx.Node]) -> Iterator[fx.Node]:
    """A value, what it comes from by operators that take any layout, and last what is none of their results."""
    yield node
    while node in blocked and node.target in ANY_LAYOUT:
        node = next(operand for operand in node.all_input_nodes if operand in blocked)
        yield node


def _is_read_by(user: fx.Node, images: Mapping[fx.Node, int], blocked: set[fx.Node]) -> bool:
    """Whether a reader, or every reader of what it hands on, takes any layout or is one of the layers."""
    while user in blocked and user not in images and len(user.users) == 1:
        user = next(iter(user.users))
    readers = user.users if user in blocked and user not in images else [user]
    return all(reader in blocked for reader in readers)


def seconds(program: Program, target: Target, hopeful: bool = False) -> float:
    """The target's estimate of a network for one example."""
    sizes: dict[Coupling, int] = {}

    def own(node: fx.Node, axis: int) -> Coupling:
        sizes[node.name, axis] = program.infos[node].sizes[axis]
        return node.name, axis

    return network_of(program, own, hopeful).seconds(target, sizes.__getitem__)
