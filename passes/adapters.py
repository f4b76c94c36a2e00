"""Adapters: values with several readers, or several parts, need not keep the same entries on every edge.

A coupling keeps the union of what its members need. An *adapter* on one edge, from a value v to a reader, cuts it
loose:

    v' = spread(select(v, S)) + c      S: the entries along one axis that this reader needs, c: constants of the others

`select` is an index_select, `spread` pads one zero and selects again, to full width. v' equals v wherever this reader
looks, so the graph stays exact, and v' is known outside S: the next sweeps cut both sides independently, and what is
left of the adapter is one gather where a reader takes less than the value has, or one pad and a gather where a part
brings less than the sum has. The sweeps also carry c on into the sum.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from passes.ir.cost import Copied
from passes.ir.lattice import along
from passes.ir.pipeline import Note
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.pointwise import Pointwise

aten = torch.ops.aten

COPYING = frozenset({aten.cat.default, aten.index_select.default})
LONGEST_WALK = 256  # upwards through sums, for a question that is only about cost


@dataclass(frozen=True, eq=False)
class Edge:
    """A value on its way to one reader, or to all of them, and the axis whose entries are in question."""

    source: fx.Node
    axis: int
    user: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """What passes along an edge: indices (int64) along the axis, constants (size of the axis,) of the others."""

    edge: Edge
    index: Tensor
    constants: Tensor
    what: str = "channels"

    def cuts(self, program: Program) -> bool:
        """Whether there is an index that does not pass."""
        return self.index.numel() < program.infos[self.edge.source].sizes[self.edge.axis]

    def copies(self, program: Program, cut: Container[fx.Node] = ()) -> Copied:
        """What its gathers copy, where some values are `cut` for all their readers already."""
        sizes, axis, source = program.infos[self.edge.source].sizes, self.edge.axis, self.edge.source
        runs = prod(sizes[1:axis]) * (sizes[axis] if self.edge.user is None else self.index.numel())
        times = 1 if self.edge.user is not None else 2
        beside = [source] if self.edge.user is not None else _partners(program, source)
        is_packed = len(sizes) != 4 or not any(_is_plain(program, value, cut) for value in beside)
        return Copied(times * runs, times * runs * prod(sizes[axis + 1 :]), is_packed)


def _partners(program: Program, node: fx.Node) -> list[fx.Node]:
    """What a value is added to, or combined with in another way, entry by entry."""
    users = [user for user in node.users if _is_pointwise(program, user)]
    return [other for user in users for other in user.all_input_nodes if other is not node]


def _is_pointwise(program: Program, node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(rule_for(program.op(node)), Pointwise)


def _is_plain(program: Program, node: fx.Node, cut: Container[fx.Node]) -> bool:
    """Whether no layer gives a value as it is, packed in blocks: it was copied together, or is a sum with what was."""
    pending, seen = [node], {node}
    while pending and len(seen) < LONGEST_WALK:
        value = pending.pop()
        if value in cut or value.target in COPYING:
            return True
        if _is_pointwise(program, value):
            fresh = [x for x in value.all_input_nodes if program.held(x) is None and x not in seen]
            pending += fresh
            seen.update(fresh)
    return False


def note(program: Program, adapter: Adapter) -> Note:
    """What the report says of it."""
    edge = adapter.edge
    size = program.infos[edge.source].sizes[edge.axis]
    kept = adapter.index.numel()
    if edge.user is None:
        return Note(edge.source.name, f"has {kept} of the {size} {adapter.what} of what it is joined with")
    return Note(edge.user.name, f"reads {kept} of the {size} {adapter.what} of {edge.source.name}")


def with_adapters(program: Program, adapters: Sequence[Adapter]) -> Program:
    """The Program with adapters on its edges, any number of them on one, each along an axis of its own."""
    rewriter = Rewriter(program)
    on: dict[tuple[fx.Node, fx.Node | None], list[Adapter]] = {}
    for adapter in adapters:
        on.setdefault((adapter.edge.source, adapter.edge.user), []).append(adapter)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            held = {source: rewriter.value(source) for source in node.all_input_nodes if (source, node) in on}
            for source in held:
                _emit(program, rewriter, on[source, node])
            rewriter.env[node] = rewriter.copy(node)
            rewriter.env |= held
        _emit(program, rewriter, on.get((node, None), []))
    rewriter.output()
    return rewriter.finish()


def _emit(program: Program, rewriter: Rewriter, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        rewriter.env[adapter.edge.source] = _adapted(program, rewriter, adapter)


def _adapted(program: Program, rewriter: Rewriter, adapter: Adapter) -> fx.Node:
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
