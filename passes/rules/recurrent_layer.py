"""One recurrent layer or cell with constant weights, described once for everything that its rules ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.axes import flatten_facts
from passes.ir.lattice import Facts
from passes.ir.program import Op

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """How many gates there are, which one is the candidate tanh(..), and whether a state is carried past the gates."""

    gates: int
    candidate: int
    carries: bool


LSTM, GRU, PLAIN = Kind(4, 2, True), Kind(3, 2, True), Kind(1, 0, False)

LAYERS: dict[object, Kind] = {
    aten.lstm.input: LSTM,
    aten.gru.input: GRU,
    aten.rnn_tanh.input: PLAIN,
    aten.rnn_relu.input: PLAIN,
}
CELLS: dict[object, Kind] = {
    aten.lstm_cell.default: LSTM,
    aten.gru_cell.default: GRU,
    aten.rnn_tanh_cell.default: PLAIN,
    aten.rnn_relu_cell.default: PLAIN,
}


@dataclass(frozen=True, eq=False)
class Direction:
    """The weights of one direction, by gate: (gates, units, inputs), (gates, units, units), and biases (gates, units).

    `nodes`: those of the parameters, in the order of the call.
    """

    kind: Kind
    nodes: tuple[fx.Node, ...]
    from_input: Tensor
    from_units: Tensor
    input_bias: Tensor | None
    unit_bias: Tensor | None

    def silent(self, x_zero: Tensor, units_zero: Tensor) -> Tensor:
        """The units whose candidate is tanh(0), given which inputs and which units' last values are known to be 0."""
        gate = self.kind.candidate
        heard = ((self.from_input[gate] != 0) & ~x_zero).any(1)
        heard |= ((self.from_units[gate] != 0) & ~units_zero).any(1)
        for bias in (self.input_bias, self.unit_bias):
            if bias is not None:
                heard |= bias[gate] != 0
        return ~heard

    def zero_units(self, x_zero: Tensor, state_zero: Tensor) -> Tensor:
        """The units that stay 0 at every step: those that start at 0 and hear nothing but each other."""
        zero = state_zero
        while True:
            smaller = zero & self.silent(x_zero, zero)
            if torch.equal(smaller, zero):
                return zero
            zero = smaller

    def inputs_of(self, units: Tensor) -> Tensor:
        """The inputs that some gate of these units reads with a weight that is not zero."""
        return (self.from_input[:, units] != 0).flatten(0, 1).any(0)

    def units_of(self, units: Tensor) -> Tensor:
        """The units whose last value some gate of these units reads."""
        return (self.from_units[:, units] != 0).flatten(0, 1).any(0)

    def closure(self, units: Tensor, zero: Tensor) -> Tensor:
        """These units and all that they read at any earlier step, but for those that are always 0."""
        live = units & ~zero
        while True:
            larger = live | (self.units_of(live) & ~zero)
            if torch.equal(larger, live):
                return live
            live = larger


class Recurrent:
    """A call, described: x, its initial states, the directions."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.is_layer = op.target in LAYERS
        self.kind = (LAYERS if self.is_layer else CELLS)[op.target]
        self.x: fx.Node = op.args["input"]
        given = op.arg("hx")
        self.states: tuple[fx.Node, ...] = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        self.parameters = _parameters(op)
        self.directions = tuple(self._direction(nodes) for nodes in self.parameters)
        self.inputs, self.units = (
            self.directions[0].from_input.shape[2],
            self.directions[0].from_units.shape[2],
        )

    def _direction(self, nodes: Sequence[fx.Node]) -> Direction:
        values = [self.op.program.constant(node) for node in nodes]
        by_gate = [
            value.reshape(self.kind.gates, -1, *value.shape[1:]) for value in values if value is not None
        ]
        biases = (by_gate[2], by_gate[3]) if len(by_gate) == 4 else (None, None)
        return Direction(self.kind, tuple(nodes), by_gate[0], by_gate[1], *biases)

    def zero_states(self, facts: dict[fx.Node, Facts]) -> list[Tensor]:
        """For each direction of a layer, the units whose initial states are all known to be 0."""
        found = []
        for number in range(len(self.directions)):
            zero = torch.ones(self.units, dtype=torch.bool)
            for state in self.states:
                own = facts[state]
                known = own.known & (own.value == 0)
                known = known.narrow(0, number if known.shape[0] > 1 else 0, 1)
                zero = zero & flat_vector(Facts(known, known), self.units).known
            found.append(zero)
        return found

    def zero_units(self, facts: dict[fx.Node, Facts]) -> list[Tensor]:
        """For each direction of a layer, the units that are 0 at every step."""
        x = flat_vector(facts[self.x], self.inputs)
        x_zero = x.known & (x.value == 0)
        pairs = zip(self.directions, self.zero_states(facts), strict=True)
        return [direction.zero_units(x_zero, state) for direction, state in pairs]


def flat_vector(facts: Facts, size: int) -> Facts:
    """What is known along the last axis of entries that are the same at every other index; shapes (size,)."""
    flat = flatten_facts(facts, range(facts.value.ndim - 1))
    return Facts(flat.value.reshape(-1).expand(size), flat.known.reshape(-1).expand(size))


def describe(op: Op) -> Recurrent:
    """The call's description, made once for each Program."""
    cache = op.program.op(op.source).cache
    if "recurrent" not in cache:
        cache["recurrent"] = Recurrent(op)
    found: Recurrent = cache["recurrent"]
    return found


def _parameters(op: Op) -> list[list[Any]]:
    """The weights and biases of each direction."""
    if op.target in CELLS:
        nodes = [op.args[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        return [[node for node in nodes if node is not None]]
    each = 4 if op.args["has_biases"] else 2
    nodes = list(op.args["params"])
    return [nodes[start : start + each] for start in range(0, len(nodes), each)]


def is_recurrent(op: Op) -> bool:
    """Whether all parameters are constants, and there is one level, without projection or dropout."""
    if op.target in LAYERS:
        args = op.args
        each = (4 if args["has_biases"] else 2) * (2 if args["bidirectional"] else 1)
        if args["num_layers"] != 1 or len(args["params"]) != each or (args["train"] and args["dropout"] != 0):
            return False
    values = [op.program.constant(node) for nodes in _parameters(op) for node in nodes]
    if any(value is None for value in values) or len(values) % 2:
        return False
    this = describe(op)
    last = [op.program.infos.get(node) for node in (this.x, *this.states)]
    wanted = [this.inputs, *[this.units] * len(this.states)]
    return all(
        info is not None and info.rank > 0 and info.key(info.rank - 1) == (size,) * 3
        for info, size in zip(last, wanted, strict=True)
    )
