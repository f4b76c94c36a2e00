"""separate_edges: values with several readers, or several parts, need not keep the same channels on every edge.

A residual stream with ten readers is as wide as all of them ask for, and so is everything added to it. An adapter
(passes/adapters.py) on one edge cuts it loose: the channels this reader needs and the value does not know pass, the
others are the value's known constants.

Edges are looked for from the contractions: a layer that reads channels it does not need, or makes rows that nobody
needs, is followed through elementwise and per-channel operators to the value where the coupling begins. The cost model
says whether the multiply-adds saved are worth the entries moved.

Not covered: groups, couplings through views, and constants that differ by position: they stay in S, asked for or not,
since a known entry asks nothing of its operands and yet has to come out as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.adapters import Adapter, Edge, note, with_adapters
from passes.ir.analysis import Analysis
from passes.ir.axes import flatten_facts
from passes.ir.cost import CostModel, CountingModel, macs_by_node
from passes.ir.lattice import along, any_over_others
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import Contraction, describe
from passes.rules.pointwise import Pointwise, Prelu
from passes.rules.reading import is_tied
from passes.rules.spatial import SpatialRule
from passes.rules.view import Rearrange

aten = torch.ops.aten


@dataclass(frozen=True)
class SeparateEdges:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "separate_edges"

    def __call__(self, program: Program) -> Result:
        cut: set[fx.Node] = set()
        chosen: dict[tuple[fx.Node, fx.Node | None], Adapter] = {}
        macs = macs_by_node(program)
        for this in _layers(program):
            for adapters, saved in (_wasted_reads(program, this, macs), _wasted_rows(program, this, macs)):
                copies = [entry.copies(program, cut) for entry in adapters]
                if adapters and self.cost.gathers_pay(copies, saved):
                    chosen |= {(entry.edge.source, entry.edge.user): entry for entry in adapters}
                    cut |= {entry.edge.source for entry in adapters if entry.edge.user is None}
        if not chosen:
            return Result(program, False)
        notes = tuple(note(program, adapter) for adapter in chosen.values())
        return Result(with_adapters(program, list(chosen.values())), True, notes)


def _layers(program: Program) -> Iterator[Contraction]:
    for node in program.calls():
        op = program.op(node)
        if op.info is not None and isinstance(rule_for(op), ContractionRule) and describe(op).groups == 1:
            yield describe(op)


def _wasted_reads(program: Program, this: Contraction, macs: dict[str, int]) -> tuple[list[Adapter], int]:
    """Adapters that spare a layer the input channels it does not need, and the multiply-adds saved."""
    facts = program.analysed().facts[this.x.name]
    read = this.columns.any(0)
    needed = read & any_over_others(~facts.known, this.axis, this.in_channels)
    stand_ins = read & any_over_others(facts.known_value != 0, this.axis, this.in_channels) & ~needed
    if not this.may_vary():
        stand_ins = torch.zeros_like(stand_ins)
    needed = needed | stand_ins | _pinned(program, this.x, this.axis)
    wasted = int((~needed).sum())
    if wasted == 0:
        return [], 0
    first = _adapter(program, Edge(this.x, this.axis, this.op.node), read, stand_ins)
    adapters = list(_adapters_above(program, first, read, stand_ins))
    if any(adapter.index.numel() == 0 for adapter in adapters):
        return [], 0
    return [entry for entry in adapters if entry.cuts(program)], macs[
        this.op.node.name
    ] * wasted // this.in_channels


def _wasted_rows(program: Program, this: Contraction, macs: dict[str, int]) -> tuple[list[Adapter], int]:
    """The adapter that spares a layer the output channels nobody needs, and the multiply-adds saved."""
    edge = _edge_below(program, Edge(this.op.node, this.axis))
    adapter = _adapter(program, edge)
    kept = adapter.index.numel()
    if kept == 0 or not adapter.cuts(program):
        return [], 0
    return [adapter], macs[this.op.node.name] * (this.out_channels - kept) // this.out_channels


def _adapters_above(program: Program, adapter: Adapter, read: Tensor, stand_ins: Tensor) -> Iterator[Adapter]:
    """The adapters, as far up as they are no wider, that cut what one reader sees of a value loose from the rest.

    They stand where others read the value too, at the network's inputs, and behind what is no elementwise operator.
    """
    source, axis = adapter.edge.source, adapter.edge.axis
    if source.op != "call_function" or len(source.users) > 1:
        yield adapter
        return
    op = program.op(source)
    if isinstance(rule_for(op), ContractionRule):
        return
    edges = []
    for x in op.operands:
        found = None if program.held(x) is not None else _axis_in(op, x, axis)
        if found is not None:
            edges.append(Edge(x, found, source))
        elif program.held(x) is None:
            edges = []
            break
    above = [_adapter(program, edge, read, stand_ins) for edge in edges]
    if not above or any(entry.index.numel() > adapter.index.numel() for entry in above):
        yield adapter
        return
    for entry in above:
        yield from _adapters_above(program, entry, read, stand_ins)


def _edge_below(program: Program, edge: Edge) -> Edge:
    """Where a layer's result is joined with something else: behind elementwise and per-channel operators."""
    while len(edge.source.users) == 1:
        user = next(iter(edge.source.users))
        if user.op != "call_function" or program.infos.get(user) is None:
            return edge
        op = program.op(user)
        variable = [x for x in op.operands if program.held(x) is None]
        axis = _axis_out(op, edge.source, edge.axis) if variable == [edge.source] else None
        if axis is None:
            return edge
        edge = Edge(user, axis)
    return edge


def _axis_in(op: Op, x: fx.Node, axis: int) -> int | None:
    """The axis of an operand that has the same channels as an axis of the result; None if there is none."""
    rule, info = rule_for(op), op.info_of(x)
    found: int | None = axis
    if isinstance(rule, Rearrange):
        read = rule.reading(op).axes[axis]
        found = read.source if is_tied(read) else None
    elif isinstance(rule, SpatialRule):
        found = None if axis in rule.spatial(op) else axis
    elif isinstance(rule, Pointwise):
        found = axis - (op.out.rank - info.rank)
        found = None if isinstance(rule, Prelu) and x is op.operands[1] else found
    else:
        found = None
    if found is None or found < 0 or info.key(found) != op.out.key(axis):
        return None
    return found


def _axis_out(op: Op, x: fx.Node, axis: int) -> int | None:
    """The axis of the result that has the same channels as an axis of an operand; None if there is none."""
    return next((other for other in range(op.out.rank) if _axis_in(op, x, other) == axis), None)


def _adapter(
    program: Program, edge: Edge, read: Tensor | None = None, stand_ins: Tensor | None = None
) -> Adapter:
    """What has to pass along an edge: what is asked for and not known, and the known channels in `stand_ins`.

    So do constants that differ by position, of all channels or those in `read`: known values behind the edge come of
    them, though nobody asks for them.
    """
    source, axis, analysis = edge.source, edge.axis, program.analysed()
    info = program.infos[source]
    facts = analysis.facts[source.name]
    flat = flatten_facts(facts, [other for other in range(info.rank) if other != axis])
    constants = flat.known_value.expand_as(along(torch.zeros(info.sizes[axis]), axis, info.rank)).flatten()
    asked = analysis.demand[source.name] if edge.user is None else _demand_of(program, edge, analysis)
    needed = any_over_others(asked & ~flat.known, axis, info.sizes[axis])
    uneven = any_over_others(facts.known & ~flat.known, axis, info.sizes[axis])
    needed = needed | (uneven if read is None else uneven & read)
    if stand_ins is not None:
        needed = needed | stand_ins
    needed = needed | _pinned(program, source, axis)
    return Adapter(edge, needed.nonzero().flatten(), constants)


def _pinned(program: Program, node: fx.Node, axis: int) -> Tensor:
    """The channels that stay for their number."""
    found = program.pinned_entries(node).get(axis)
    return torch.zeros(program.infos[node].sizes[axis], dtype=torch.bool) if found is None else found


def _demand_of(program: Program, edge: Edge, analysis: Analysis) -> Tensor:
    """What one reader asks of a value."""
    assert edge.user is not None
    op = program.op(edge.user)
    asked = analysis.demand[edge.user.name] & ~analysis.facts[edge.user.name].known
    masks = rule_for(op).backward(op, asked, analysis.facts_of(op))
    mine = [mask for operand, mask in zip(op.operands, masks, strict=True) if operand is edge.source]
    total = mine[0]
    for mask in mine[1:]:
        total = total | mask
    return total
