"""separate_edges: values with several readers, or several parts, need not keep the same channels on every edge.

A coupling keeps the union of what its members need: a residual stream with ten readers is as wide as all of them ask
for, and so is everything added to it. An *adapter* on one edge, from a value v to a reader, cuts it loose:

    v' = spread(select(v, S)) + c      S: the channels this reader needs and v does not know, c: v's known constants

`select` is an index_select, `spread` pads one zero channel and selects again, to full width. v' equals v wherever this
reader looks, so the graph stays exact, and v' is known outside S: the next sweeps cut both sides independently, and
what is left of the adapter is one gather where a reader takes less than the value has, or one pad and a gather where a
part brings less than the sum has. The sweeps also carry c on into the sum.

Edges are looked for from the contractions: a layer that reads channels it does not need, or makes rows that nobody
needs, is followed through elementwise and per-channel operators to the value where the coupling begins. The cost model
says whether the multiply-adds saved are worth the entries moved.

Not covered: groups, couplings through views, and constants that differ by position: they stay in S, asked for or not,
since a known entry asks nothing of its operands and yet has to come out as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx

from passes.ir.analysis import Analysis
from passes.ir.axes import flatten_facts
from passes.ir.cost import Copied, CostModel, CountingModel, macs_by_node
from passes.ir.lattice import along, any_over_others
from passes.ir.pipeline import Note, Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import Contraction, describe
from passes.rules.pointwise import Pointwise, Prelu
from passes.rules.reading import is_tied
from passes.rules.spatial import SpatialRule
from passes.rules.view import Rearrange

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Edge:
    """A value on its way to one reader, or to all of them, and the axis whose channels are in question."""

    source: fx.Node
    axis: int
    user: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """What passes along an edge: indices (int64) of the channels, constants (size of the axis,) of the others."""

    edge: Edge
    index: Tensor
    constants: Tensor

    def cuts(self, program: Program) -> bool:
        """Whether there is a channel that does not pass."""
        return self.index.numel() < program.infos[self.edge.source].sizes[self.edge.axis]

    def copies(self, program: Program) -> Copied:
        """What its gathers copy."""
        sizes, axis = program.infos[self.edge.source].sizes, self.edge.axis
        runs = prod(sizes[1:axis]) * (sizes[axis] if self.edge.user is None else self.index.numel())
        times = 1 if self.edge.user is not None else 2
        is_packed = self.edge.user is None or len(sizes) != 4 or not _is_joined(program, self.edge.source)
        return Copied(times * runs, times * runs * prod(sizes[axis + 1 :]), is_packed)


@dataclass(frozen=True)
class SeparateEdges:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "separate_edges"

    def __call__(self, program: Program) -> Result:
        chosen: dict[tuple[fx.Node, fx.Node | None], Adapter] = {}
        macs = macs_by_node(program)
        for this in _layers(program):
            for adapters, saved in (_wasted_reads(program, this, macs), _wasted_rows(program, this, macs)):
                if adapters and self.cost.gathers_pay([entry.copies(program) for entry in adapters], saved):
                    chosen |= {(entry.edge.source, entry.edge.user): entry for entry in adapters}
        if not chosen:
            return Result(program, False)
        notes = tuple(_note(program, adapter) for adapter in chosen.values())
        return Result(_apply(program, chosen), True, notes)


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


def _is_joined(program: Program, node: fx.Node) -> bool:
    """Whether a value is a concatenation, or what elementwise operators make of one alone."""
    while node.op == "call_function" and node.target is not aten.cat.default:
        op = program.op(node)
        variable = [x for x in op.operands if program.held(x) is None]
        if len(variable) != 1 or not isinstance(rule_for(op), Pointwise):
            return False
        node = variable[0]
    return node.op == "call_function"


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


def _note(program: Program, adapter: Adapter) -> Note:
    edge = adapter.edge
    size = program.infos[edge.source].sizes[edge.axis]
    kept = adapter.index.numel()
    if edge.user is None:
        return Note(edge.source.name, f"has {kept} of the {size} channels of what it is joined with")
    return Note(edge.user.name, f"reads {kept} of the {size} channels of {edge.source.name}")


def _apply(program: Program, chosen: dict[tuple[fx.Node, fx.Node | None], Adapter]) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            held = {
                source: rewriter.value(source) for source in node.all_input_nodes if (source, node) in chosen
            }
            for source in held:
                rewriter.env[source] = _emit(program, rewriter, chosen[source, node])
            rewriter.env[node] = rewriter.copy(node)
            rewriter.env |= held
        if (node, None) in chosen:
            rewriter.env[node] = _emit(program, rewriter, chosen[node, None])
    rewriter.output()
    return rewriter.finish()


def _emit(program: Program, rewriter: Rewriter, adapter: Adapter) -> fx.Node:
    """spread(select(v, S)) + c, at v's full width."""
    source, axis = adapter.edge.source, adapter.edge.axis
    info, kept = program.infos[source], adapter.index
    size = info.sizes[axis]

    def select(x: fx.Node, positions: Tensor, step: str) -> fx.Node:
        index = rewriter.constant(positions, f"{source.name}_{step}_index", torch.int64)
        return rewriter.call(aten.index_select.default, (x, axis, index), like=source, step=step)

    x = select(rewriter.value(source), kept, "selected")
    pads = [0] * (2 * (info.rank - 1 - axis)) + [0, 1]
    x = rewriter.call(aten.constant_pad_nd.default, (x, pads, 0.0), like=source, step="padded")
    positions = torch.full((size,), kept.numel()).index_copy(0, kept, torch.arange(kept.numel()))
    x = select(x, positions, "spread")
    constants = adapter.constants.index_fill(0, kept, 0.0)
    if bool((constants != 0).any()):
        dtype = source.meta.get("dtype", info.dtype)
        shift = rewriter.constant(along(constants, axis, info.rank), f"{source.name}_constants", dtype)
        x = rewriter.call(aten.add.Tensor, (x, shift), like=source, step="joined")
    return x
