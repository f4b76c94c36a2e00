"""separate_positions: what is read at few positions is computed there only, though others need what it is added to.

    x1 = x + attention(norm(x))      y = x1 + perceptron(norm(x1))      classes = head(y[:, 0])

Nothing reads y, the perceptron and x1 but at position 0, and the queries of this last block neither. They stay whole
all the same, since x is added to them and the keys need all of it. So does the last block of every transformer with a
class token. An adapter (passes/adapters.py) from x to the sum, and one from norm(x) to the queries, set all of it free.

From each layer that runs at positions where nobody needs it, edges are followed upwards: an axis passes an operator
where asking for those positions asks an operand for the same ones (the rules' own backward says so). The adapter stands
where a value has other readers that need more, at a network's input, or behind an operator that mixes positions. What
is needed is what some output depends on with nothing taken for known: a constant at another position may be, and asks
for nothing. The cost model says whether the multiply-adds saved are worth the entries moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.adapters import Adapter, Edge, note, with_adapters
from passes.ir.analysis import backward
from passes.ir.cost import CostModel, CountingModel, macs_by_node
from passes.ir.lattice import Facts, any_over_others
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import describe


@dataclass(frozen=True)
class SeparatePositions:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "separate_positions"

    def __call__(self, program: Program) -> Result:
        search: _Search | None = None
        saved: dict[tuple[tuple[fx.Node, fx.Node, int], ...], int] = {}
        macs = macs_by_node(program)
        for node, axis in _loose_axes(program):
            search = search or _Search.of(program)
            positions = search.needed(node, axis)
            edges = search.edges(node, axis, positions)
            if edges:
                wasted = int((program.analysed().keep.get(node, axis) & ~positions).sum())
                share = macs.get(node.name, 0) * wasted // len(positions)
                saved[edges] = saved.get(edges, 0) + share
        if search is None:
            return Result(program, False)
        chosen: dict[tuple[fx.Node, fx.Node, int], Adapter] = {}
        for edges, number in saved.items():
            adapters = [search.adapter(*edge) for edge in edges]
            if not all(adapter.cuts(program) for adapter in adapters):
                continue
            if self.cost.gathers_pay([adapter.copies(program) for adapter in adapters], number):
                chosen |= dict(zip(edges, adapters, strict=True))
        if not chosen:
            return Result(program, False)
        notes = tuple(note(program, adapter) for adapter in chosen.values())
        return Result(with_adapters(program, list(chosen.values())), True, notes)


def _loose_axes(program: Program) -> Iterator[tuple[fx.Node, int]]:
    """Each layer's result with an axis that is no channel axis, along which more is kept than anyone asks for."""
    keep = program.analysed().keep
    for node in program.calls():
        op = program.op(node)
        if op.info is None or not isinstance(rule_for(op), ContractionRule) or keep.is_empty(node):
            continue
        channels = describe(op).axis % op.info.rank
        for axis in op.info.static_axes:
            needed = keep.needed(node.name, axis)
            if axis != channels and needed is not None and keep.count(node, axis) > needed:
                yield node, axis


@dataclass(frozen=True, eq=False)
class _Search:
    """What every output depends on, with nothing taken for known but the constants."""

    program: Program
    facts: Mapping[str, Facts]
    live: Mapping[str, Tensor]

    @classmethod
    def of(cls, program: Program) -> _Search:
        facts = {}
        for node, info in program.infos.items():
            held = program.held(node)
            facts[node.name] = Facts.unknown(info) if held is None or info.is_empty else Facts.held(held)
        ops = {node: program.op(node) for node in program.calls()}
        return cls(program, facts, backward(program, ops, facts, rule_for))

    def needed(self, node: fx.Node, axis: int) -> Tensor:
        """The positions of a value that anything depends on: bool, (size of the axis,)."""
        return any_over_others(self.live[node.name], axis, self.program.infos[node].sizes[axis])

    def edges(self, node: fx.Node, axis: int, positions: Tensor) -> tuple[tuple[fx.Node, fx.Node, int], ...]:
        """The edges, with their axes, that keep a value whole which is needed at these positions only."""
        if bool(positions.all()) or not bool(positions.any()):
            return ()
        found: dict[tuple[fx.Node, fx.Node, int], None] = {}
        seen: set[tuple[fx.Node, int]] = set()
        pending = [(node, axis)]
        while pending:
            user, axis = pending.pop()
            if (user, axis) in seen:
                continue
            seen.add((user, axis))
            for source, axis_in in self.operands(user, axis, positions):
                if self.is_free(source, axis_in, positions):
                    pending.append((source, axis_in))
                elif not self._is_narrow(source, axis_in, positions):
                    found[source, user, axis_in] = None
        return tuple(found)

    def operands(self, user: fx.Node, axis: int, positions: Tensor) -> Iterator[tuple[fx.Node, int]]:
        """The operands that a call asks for just these positions, with the axis along which it does."""
        op = self.program.op(user)
        if op.info is None:
            return
        asked = _asked(op, self.live[user.name], self.facts)
        for source, mask in zip(op.operands, asked, strict=True):
            info = op.info_of(source)
            if self.program.held(source) is not None:
                continue
            for axis_in in sorted(info.static_axes, key=lambda other: other != axis):
                same = info.sizes[axis_in] == len(positions)
                if same and torch.equal(any_over_others(mask, axis_in, len(positions)), positions):
                    yield source, axis_in
                    break

    def is_free(self, source: fx.Node, axis: int, positions: Tensor) -> bool:
        """Whether what makes a value can do with these positions, as far as its other readers are concerned."""
        if source.op != "call_function" or not torch.equal(self.needed(source, axis), positions):
            return False
        return self._is_narrow(source, axis, positions) or any(self.operands(source, axis, positions))

    def _is_narrow(self, source: fx.Node, axis: int, positions: Tensor) -> bool:
        """Whether no more than these positions of a value are kept as it is."""
        return not bool((self.program.analysed().keep.get(source, axis) & ~positions).any())

    def adapter(self, source: fx.Node, user: fx.Node, axis: int) -> Adapter:
        op = self.program.op(user)
        size = self.program.infos[source].sizes[axis]
        asked = zip(op.operands, _asked(op, self.live[user.name], self.facts), strict=True)
        masks = [any_over_others(mask, axis, size) for operand, mask in asked if operand is source]
        pinned = self.program.pinned_entries(source).get(axis)
        positions = torch.stack(masks if pinned is None else [*masks, pinned]).any(0)
        constants = torch.zeros(size, dtype=torch.float64)
        return Adapter(Edge(source, axis, user), positions.nonzero().flatten(), constants, "positions")


def _asked(op: Op, live: Tensor, facts: Mapping[str, Facts]) -> list[Tensor]:
    known = [facts[operand.name] for operand in op.operands]
    return list(rule_for(op).backward(op, live, known))
