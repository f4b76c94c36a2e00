"""A Program as layers and the ways between them: what a target's estimate of the whole network is made of.

A layer takes its channels packed in blocks or as they lie, and gives them so. On a way between two layers that do not
agree, and between a layer and anything else, the values have to be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from passes.ir.program import Program
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import Contraction, describe
from passes.targets import Layer, Target

aten = torch.ops.aten

Coupling = tuple[str, int]
Width = Callable[[Coupling], int]
Named = Callable[[fx.Node, int], Coupling]
Touched = tuple[list[int], list[int]]
"""Numbers of layers and of ways."""

ANY_LAYOUT = frozenset(
    {
        aten.relu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.add.Tensor,
    }
)
"""What onnxruntime runs on packed channels as well as on plain ones."""
ACTIVATIONS = frozenset(
    {aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.hardtanh.default, aten.clamp.default}
)
"""What onnxruntime does along with the layer in front."""
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim})


@dataclass(frozen=True)
class Way:
    """From one layer to another; None: from or to anything else. `positions`: of one example."""

    giver: int | None
    taker: int | None
    coupling: Coupling
    positions: int


class Network:
    """Layers with the couplings of their input and output channels, the ways between them, and everything else.

    `passed`: the entries, for one example, of each call that is no layer and that none does along.
    """

    def __init__(
        self, layers: list[tuple[Layer, Coupling, Coupling]], ways: list[Way], passed: Sequence[int] = ()
    ) -> None:
        self.layers = layers
        self.ways = ways
        self.passed = passed
        self._layers_at: dict[Coupling, list[int]] = {}
        self._ways_of: dict[int | None, list[int]] = {}
        for number, (_, x, y) in enumerate(layers):
            for coupling in {x, y}:
                self._layers_at.setdefault(coupling, []).append(number)
        for number, way in enumerate(ways):
            for layer in {way.giver, way.taker}:
                self._ways_of.setdefault(layer, []).append(number)

    def touched(self, couplings: Iterable[Coupling]) -> Touched:
        """The layers at these couplings and the ways from and to them."""
        layers = {number for coupling in couplings for number in self._layers_at.get(coupling, ())}
        ways = {number for layer in layers for number in self._ways_of.get(layer, ())}
        return sorted(layers), sorted(ways)

    def seconds(self, target: Target, width: Width, touched: Touched | None = None) -> float:
        """The target's estimate for one example, of everything or of a part."""
        layers, ways = touched or (range(len(self.layers)), range(len(self.ways)))
        total = 0.0 if touched else sum(map(target.passing, self.passed))
        for number in layers:
            layer, x, y = self.layers[number]
            total += target.seconds(layer, width(x), width(y))
        for way in map(self.ways.__getitem__, ways):
            gives, takes = self._packed(target, width, way.giver), self._packed(target, width, way.taker)
            if gives[1] != takes[0]:
                total += target.moving(width(way.coupling), way.positions)
        return total

    def _packed(self, target: Target, width: Width, number: int | None) -> tuple[bool, bool]:
        if number is None:
            return False, False
        layer, x, y = self.layers[number]
        return target.packed(layer, width(x), width(y))


def layers(program: Program) -> Iterator[Contraction]:
    """The convolutions and linear layers with constant weights."""
    for node in program.calls():
        op = program.op(node)
        if op.info is not None and isinstance(rule_for(op), ContractionRule):
            yield describe(op)


def network_of(program: Program, coupling: Named, hopeful: bool = False) -> Network:
    """The layers of a Program, the ways from and to its convolutions of images, and what else it does with entries.

    `hopeful`: constants that are added count as if they were not there, since wider channels may stand for them.
    """
    found: list[tuple[Layer, Coupling, Coupling]] = []
    images: dict[fx.Node, int] = {}
    described = list(layers(program))
    for this in described:
        layer = Layer.of(this)
        if layer.is_of_images:
            images[this.op.node] = len(found)
        found.append((layer, coupling(this.x, this.axis), coupling(this.op.node, this.axis)))
    blocked = _may_be_blocked(program, images, hopeful)
    ways = [
        way for this in described if this.op.node in images for way in _ways(this, images, blocked, coupling)
    ]
    free = blocked | {this.op.node for this in described}
    return Network(
        found, ways, [_entries(program, node) for node in program.calls() if _moves(program, node, free)]
    )


def _may_be_blocked(program: Program, images: Mapping[fx.Node, int], hopeful: bool) -> set[fx.Node]:
    """Results of convolutions of images, and of operators that take any layout of them alone."""
    found = set(images)
    for node in program.calls():
        operands = [
            operand for operand in node.all_input_nodes if not (hopeful and program.held(operand) is not None)
        ]
        if node.target in ANY_LAYOUT and all(operand in found for operand in operands):
            found.add(node)
    return found


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
    this: Contraction, images: Mapping[fx.Node, int], blocked: set[fx.Node], coupling: Named
) -> Iterator[Way]:
    """The way into a layer, and the one out of it to anything that is no such layer."""
    node = this.op.node
    before, after = (prod(info.sizes[axis] for axis in this.spatial) for info in (this.info, this.op.out))
    yield Way(images.get(_source(this.x, blocked)), images[node], coupling(this.x, this.axis), before)
    if not all(_is_read_by(user, images, blocked) for user in node.users):
        yield Way(images[node], None, coupling(node, this.axis), after)


def _source(node: fx.Node, blocked: set[fx.Node]) -> fx.Node:
    """Where a value comes from, up to operators that take any layout."""
    while node in blocked and node.target in ANY_LAYOUT:
        node = node.all_input_nodes[0]
    return node


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
