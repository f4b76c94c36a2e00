r"""Recurrent layers of one level and recurrent cells: LSTM, GRU, and plain ones with tanh or relu.

With gates s = W x + b + U h + d for each unit, in both directions of a layer:

    LSTM   c' = f * c + i * tanh(s_g),  h' = o * tanh(c')
    GRU    h' = (1 - z) * tanh((W x + b)_n + r * (U h + d)_n) + z * h
    plain  h' = act(s),  act(0) = 0

forward: a unit is 0 at every step if it starts at 0 and its candidate (g, n) hears nothing: zero biases, and zero
    weights wherever an input or a unit is not itself 0 at every step. In a layer the largest such set is found.
backward: a live unit needs what its gates read with a weight that is not zero, in a layer at any earlier step: the
    closure over U. An input that no live unit reads is dead.
couple: states and results keep the same units, all live ones among them (both directions equally many). Inputs are
    independent, but the constants of removed ones must be the same at every step.
rewrite: the gates of kept units, their columns in U, the kept columns of W, and with removed known inputs x_R
    b' = b + W_R x_R;  for a cell with removed known units h_R too d' = d + U_R h_R.

Time and batch stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, along, any_over_others, full_mask
from passes.ir.program import Op, TensorInfo
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.recurrent_layer import (
    CELLS,
    LAYERS,
    Direction,
    Recurrent,
    describe,
    flat_vector,
    is_recurrent,
)

aten = torch.ops.aten


class RecurrentRule(Rule):
    """What layers and cells share: inputs, their constants, and the parameters of the new call."""

    def applies(self, op: Op) -> bool:
        return is_recurrent(op)

    def couple_vector(self, op: Op, node: fx.Node, read: Tensor, keep: KeepSets, facts: Facts) -> None:
        """Keep at least one entry of x or h, and those removed constants that differ between steps."""
        axis = op.info_of(node).rank - 1
        kept = keep.get(node, axis)
        if not bool(kept.any()):
            first = torch.zeros_like(kept).index_fill(0, torch.zeros(1, dtype=torch.int64), True)
            keep.widen(node, axis, first, f"{op.source.name} reads at least one channel")
        varies = (
            any_over_others(facts.known_value != 0, axis, kept.numel())
            & ~flat_vector(facts, kept.numel()).known
        )
        keep.widen(
            node, axis, varies & read & ~kept, f"a constant of {op.source.name} that differs between steps"
        )

    def parameters(self, this: Recurrent, rewriter: Rewriter, units: Sequence[Tensor]) -> list[list[fx.Node]]:
        """For each direction the parameters of its kept units, with biases if there is something to add to."""
        cut = [
            self._cut(this, direction, rewriter, kept)
            for direction, kept in zip(this.directions, units, strict=True)
        ]
        needs_biases = any(bool((bias != 0).any()) for values in cut for bias in values[2:])
        if this.directions[0].input_bias is None and not needs_biases:
            cut = [values[:2] for values in cut]
        return [
            [_constant(rewriter, direction, number, value) for number, value in enumerate(values)]
            for direction, values in zip(this.directions, cut, strict=True)
        ]

    def _cut(self, this: Recurrent, direction: Direction, rewriter: Rewriter, units: Tensor) -> list[Tensor]:
        """W and U of the kept units and inputs, and both biases with the constants of what is removed."""
        kept_inputs = _kept(rewriter, this.op, this.x)
        from_input, from_units = direction.from_input[:, units], direction.from_units[:, units]
        input_bias = _absorbed(rewriter, from_input, this.x, kept_inputs)
        unit_bias = torch.zeros(from_units.shape[:2], dtype=from_units.dtype)
        if not this.is_layer:
            unit_bias = _absorbed(rewriter, from_units, this.states[0], units)
        if direction.input_bias is not None and direction.unit_bias is not None:
            input_bias = input_bias + direction.input_bias[:, units]
            unit_bias = unit_bias + direction.unit_bias[:, units]
        cut = (from_input[:, :, kept_inputs], from_units[:, :, units], input_bias, unit_bias)
        return [value.flatten(0, 1) for value in cut]


def _kept(rewriter: Rewriter, op: Op, node: fx.Node) -> Tensor:
    """The keep set along the last axis; all of it without an analysis."""
    info = op.info_of(node) if node in op.operands else op.out
    if rewriter.analysis is None:
        return torch.ones(info.sizes[-1], dtype=torch.bool)
    return rewriter.analysis.keep.get(node, info.rank - 1)


def _absorbed(rewriter: Rewriter, weight: Tensor, node: fx.Node, kept: Tensor) -> Tensor:
    """What the removed known entries of x or h add to the gates; (gates, units)."""
    if rewriter.analysis is None:
        return torch.zeros(weight.shape[:2], dtype=weight.dtype)
    found = flat_vector(rewriter.analysis.facts[node.name], kept.numel())
    return weight[:, :, ~kept] @ found.known_value[~kept]


def _constant(rewriter: Rewriter, direction: Direction, number: int, value: Tensor) -> fx.Node:
    """The parameter at one place; a bias that is new is named after its weight."""
    weight = direction.nodes[number % 2 if number >= len(direction.nodes) else number]
    name = str(weight.target)
    if number >= len(direction.nodes):
        head, _, tail = name.rpartition("weight")
        name = f"{head}bias{tail}" if head or tail != name else f"{name}_bias"
    return rewriter.constant(value, name, rewriter.dtype_of(weight))


@rule(*LAYERS)
class Layer(RecurrentRule):
    """One level of a recurrent network over a sequence, in one direction or two."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        known = self._stored(op, describe(op).zero_units(dict(zip(op.operands, facts, strict=True))))
        return Facts(torch.zeros(known.shape, dtype=op.out.dtype), known)

    def _stored(self, op: Op, units: Sequence[Tensor]) -> Tensor:
        """A vector for each direction as a stored tensor of a result: side by side in y, stacked in a state."""
        if op.position == 0:
            return torch.cat(list(units)).reshape(1, 1, -1)
        return torch.stack(list(units)).unsqueeze(1)

    def _units(self, op: Op, mask: Tensor) -> list[Tensor]:
        """The same the other way round: the units of each direction at which a stored mask is set."""
        this = describe(op)
        count = len(this.directions)
        if op.position == 0:
            return list(any_over_others(mask, 2, count * this.units).reshape(count, -1))
        return list(any_over(mask, (1,)).expand(count, 1, this.units).squeeze(1))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        this = describe(op)
        zero = this.zero_units(dict(zip(op.operands, facts, strict=True)))
        live = [
            direction.closure(units, silent)
            for direction, units, silent in zip(this.directions, self._units(op, demand), zero, strict=True)
        ]
        masks = {operand: full_mask(op.info_of(operand), False) for operand in op.operands}
        for direction, units in zip(this.directions, live, strict=True):
            masks[this.x] = masks[this.x] | direction.inputs_of(units)
        for state in this.states:
            masks[state] = masks[state] | torch.stack(live).unsqueeze(1)
        return [masks[operand] for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        this, by_node = describe(op), dict(zip(op.operands, facts, strict=True))
        results = self._kept_results(op, keep)
        for node in (this.x, *this.states, *results):
            keep.fill(node, f"steps, batch and directions of {op.source.name}", (0, 1))
        units = self._kept_units(op, keep, by_node)
        why = f"units of {op.source.name} that others read, or that another result or direction keeps"
        for node in results:
            keep.widen(node, 2, torch.cat(units) if op.program.op(node).position == 0 else units[0], why)
        for state in this.states:
            count = int(units[0].sum())
            flat = torch.arange(this.units) < count
            keep.widen(
                state, 2, flat if _is_flat(by_node[state]) else units[0], f"initial state of {op.source.name}"
            )
        read = torch.stack(
            [direction.inputs_of(kept) for direction, kept in zip(this.directions, units, strict=True)]
        )
        self.couple_vector(op, this.x, read.any(0), keep, by_node[this.x])

    def _kept_results(self, op: Op, keep: KeepSets) -> list[fx.Node]:
        return [node for node in op.pieces if not keep.is_empty(node)]

    def _kept_units(self, op: Op, keep: KeepSets, facts: dict[fx.Node, Facts]) -> list[Tensor]:
        """The units to keep in each direction, equally many; the same ones where a state is read or given."""
        this, count = describe(op), len(describe(op).directions)
        results = self._kept_results(op, keep)
        needed, kept = (
            [vectors.reshape(-1, this.units).expand(count, -1) for vectors in found]
            for found in (
                [keep.needed_at(node, 2) for node in results],
                [keep.get(node, 2) for node in results],
            )
        )
        seeds, units = torch.stack(needed).any(0), torch.stack(kept).any(0)
        silent = this.zero_units(facts)
        for number, direction in enumerate(this.directions):
            units[number] |= direction.closure(seeds[number], silent[number])
        states_matter = any(op.program.op(node).position != 0 for node in results)
        if states_matter or not all(_is_flat(facts[state]) for state in this.states):
            units = units.any(0).expand(count, -1)
        most = int(units.sum(1).max())
        return [_padded(vector, most) for vector in units]

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        return rewriter.piece(op, lambda: self._arguments(op, rewriter))

    def _arguments(self, op: Op, rewriter: Rewriter) -> list[Any]:
        this = describe(op)
        if rewriter.analysis is None:
            return list(rewriter.map(op.source.args))
        units = self._kept_units(
            op, rewriter.analysis.keep, {node: rewriter.analysis.facts[node.name] for node in op.operands}
        )
        parameters = self.parameters(this, rewriter, units)
        states = [self._state(op, rewriter, state, units[0]) for state in this.states]
        return [
            rewriter.value(this.x),
            states if isinstance(op.args["hx"], (list, tuple)) else states[0],
            [node for nodes in parameters for node in nodes],
            len(parameters[0]) == 4,
            *(op.args[name] for name in ("num_layers", "dropout", "train", "bidirectional", "batch_first")),
        ]

    def _state(self, op: Op, rewriter: Rewriter, state: fx.Node, units: Tensor) -> fx.Node:
        """An initial state at the kept units; where it has more, they are selected."""
        assert rewriter.analysis is not None
        kept = rewriter.analysis.keep.get(state, 2)
        if _is_flat(rewriter.analysis.facts[state.name]):
            positions = torch.arange(int(units.sum()))
        else:
            positions = torch.searchsorted(kept.nonzero().flatten(), units.nonzero().flatten())
        value = rewriter.value(state)
        if positions.numel() == int(kept.sum()):
            return value
        index = rewriter.constant(positions, f"{op.source.name}_units", torch.int64)
        return rewriter.call(aten.index_select.default, (value, 2, index), like=op.source, step=state.name)


def _padded(units: Tensor, count: int) -> Tensor:
    """The same units and the first others, `count` in all."""
    others = (~units).nonzero().flatten()[: count - int(units.sum())]
    return units.index_fill(0, others, True)


def _is_flat(facts: Facts) -> bool:
    """Whether an initial state is one known number for every unit and direction."""
    return flatten_facts(facts, (0, 2)).all_known


@rule(*CELLS)
class Cell(RecurrentRule):
    """One step of a recurrent network."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        this, by_node = describe(op), dict(zip(op.operands, facts, strict=True))
        zero = {node: _zero_vector(by_node[node], op.info_of(node)) for node in (this.x, *this.states)}
        silent = this.directions[0].silent(zero[this.x], zero[this.states[0]])
        if this.kind.carries:
            silent = silent & zero[this.states[-1]]
        return Facts(
            torch.zeros([1] * op.out.rank, dtype=op.out.dtype), along(silent, op.out.rank - 1, op.out.rank)
        )

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        this = describe(op)
        last = op.out.rank - 1
        units, steps = any_over_others(demand, last, this.units), demand.any(dim=last, keepdim=True)
        [direction] = this.directions
        masks = {operand: full_mask(op.info_of(operand), False) for operand in op.operands}
        asked = [(this.x, direction.inputs_of(units)), (this.states[0], direction.units_of(units))]
        for node, vector in (*asked, *[(this.states[-1], units)] * this.kind.carries):
            masks[node] = masks[node] | (steps & along(vector, last, last + 1))
        return [masks[operand] for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        this, by_node = describe(op), dict(zip(op.operands, facts, strict=True))
        last = op.out.rank - 1
        for node in (this.x, *this.states, op.node):
            keep.fill(node, f"batch of {op.source.name}", tuple(range(last)))
        for state in this.states:
            keep.tie((state, last), (op.node, last), f"units of {op.source.name}")
        [direction] = this.directions
        units = keep.get(op.node, last)
        self.couple_vector(op, this.x, direction.inputs_of(units), keep, by_node[this.x])
        self.couple_vector(op, this.states[0], direction.units_of(units), keep, by_node[this.states[0]])

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        if op.position is not None:
            return rewriter.piece(op, lambda: self._arguments(op, rewriter))
        return rewriter.call(op.target, self._arguments(op, rewriter), like=op.node)

    def _arguments(self, op: Op, rewriter: Rewriter) -> list[Any]:
        this = describe(op)
        [parameters] = self.parameters(this, rewriter, [_kept(rewriter, op, this.states[0])])
        return [rewriter.value(this.x), rewriter.map(op.args["hx"]), *parameters]


def _zero_vector(facts: Facts, info: TensorInfo) -> Tensor:
    """The entries along the last axis that are known to be 0 at every other index."""
    found = flat_vector(facts, info.sizes[-1])
    return found.known & (found.value == 0)
