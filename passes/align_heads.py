"""align_heads: the columns that attention heads need, in the same places in every head.

Heads are an axis beside their columns, so a view of (heads, columns) keeps one set of columns for all heads, and masks
that differ from head to head leave nothing to remove. But nobody sees in which order the columns of a head are

- added up, in a product q k of two values: rows of the layers behind q and k are permuted alike within each head;
- passed on, in a product w v: rows of the layer behind v are permuted, and columns of the layer that reads the result.

The needed columns come first in each head. Then the heads keep as many columns as the one that needs most of them,
instead of all that some head needs. Values between the layers are permuted, nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.analysis import Analysis
from passes.ir.axes import Block, split_blocks
from passes.ir.pipeline import Note, Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.attention import HEADS, Attention
from passes.rules.contraction import ContractionRule
from passes.rules.layer import describe, emit
from passes.rules.product import SCALINGS, Product
from passes.rules.reading import ReadingRule, is_tied
from passes.rules.view import RESHAPES

aten = torch.ops.aten


@dataclass(frozen=True)
class AlignHeads:
    """The pass; it has no options. Needs an analysed Program."""

    name: str = "align_heads"

    def __call__(self, program: Program) -> Result:
        analysis = program.analysed()
        orders = Orders()
        for node in program.calls():
            if node in program.infos and not analysis.keep.is_empty(node):
                for sides in _pairs(program.op(node)):
                    _align(program, analysis, node, sides, orders)
        if not orders.notes:
            return Result(program, False)
        return Result(_apply(program, orders), True, tuple(orders.notes))


@dataclass(frozen=True)
class Side:
    """Heads and columns of a value, as axes; `made` by a layer above it, or else read by one below it."""

    node: fx.Node
    heads: int
    columns: int
    made: bool = True


@dataclass(frozen=True, eq=False)
class Place:
    """A layer and which of its rows or columns are those of the heads: int64 (heads, columns); the values between."""

    layer: fx.Node
    positions: Tensor
    path: tuple[fx.Node, ...]


@dataclass(eq=False)
class Orders:
    """For each layer, the old index of each of its new rows and columns; the values that come to be permuted.

    `taken`: rows (True) and columns of layers that were permuted; nothing is permuted for two reasons at once.
    """

    taken: set[tuple[fx.Node, bool, int]] = field(default_factory=set)
    rows: dict[fx.Node, Tensor] = field(default_factory=dict)
    columns: dict[fx.Node, Tensor] = field(default_factory=dict)
    permuted: set[fx.Node] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)


def _pairs(op: Op) -> Iterator[tuple[Side, Side]]:
    """What has to keep the same order of columns: both factors, or a factor and the result."""
    rule = rule_for(op)
    rank = op.out.rank
    if not isinstance(rule, (Attention, Product)) or rank < 3:
        return
    if any(op.info_of(operand).rank != rank for operand in op.operands[:2]):
        return
    heads, last = rank + HEADS, rank - 1
    first, second = op.operands[:2]
    contracted = last if isinstance(rule, Attention) else last - 1
    yield Side(first, heads, last), Side(second, heads, contracted)
    values = op.operands[2] if isinstance(rule, Attention) else second
    yield Side(values, heads, last), Side(op.node, heads, last, made=False)


def _align(
    program: Program, analysis: Analysis, node: fx.Node, sides: tuple[Side, Side], orders: Orders
) -> None:
    if not all(_is_static(program, side) for side in sides):
        return
    needed = [_needed(program, analysis, side) for side in sides]
    heads = min(mask.shape[0] for mask in needed)
    joint = needed[1] if not sides[1].made else _shared(needed[0], heads) | _shared(needed[1], heads)
    joint = _shared(joint, heads)
    widest, together = int(joint.sum(1).max()), int(joint.any(0).sum())
    if widest >= together or any(mask.shape[0] % heads for mask in needed):
        return
    places = [_layer_above(program, side) if side.made else _layer_below(program, side) for side in sides]
    found = [place for place in places if place is not None]
    taken = [
        (place.layer, side.made, position)
        for side, place in zip(sides, found, strict=False)
        for position in place.positions.flatten().tolist()
    ]
    if len(found) < len(sides) or len(set(taken)) < len(taken) or orders.taken & set(taken):
        return
    orders.taken |= set(taken)
    order = joint.int().argsort(dim=1, descending=True, stable=True)
    for side, place in zip(sides, found, strict=True):
        _permute(program, orders.rows if side.made else orders.columns, place, order, side.made)
        orders.permuted |= set(place.path)
    text = f"heads keep {widest} columns each, which are not the same in all of them"
    orders.notes.append(Note(node.name, text))


def _is_static(program: Program, side: Side) -> bool:
    info = program.infos[side.node]
    return info.is_static(side.heads) and info.is_static(side.columns)


def _shared(mask: Tensor, heads: int) -> Tensor:
    """A mask (heads of q, columns) for each head that several of them may share."""
    return mask.view(heads, -1, mask.shape[1]).any(1)


def _needed(program: Program, analysis: Analysis, side: Side) -> Tensor:
    """Which columns of which heads are asked for and not known; bool (heads, columns)."""
    info, name = program.infos[side.node], side.node.name
    asked = analysis.demand[name] & ~analysis.facts[name].known
    others = [axis for axis in range(info.rank) if axis not in (side.heads, side.columns)]
    asked = asked.any(dim=others) if others else asked
    turned = asked if side.heads < side.columns else asked.T
    return turned.expand(info.sizes[side.heads], info.sizes[side.columns])


def _permute(program: Program, held: dict[fx.Node, Tensor], place: Place, order: Tensor, rows: bool) -> None:
    this = describe(program.op(place.layer))
    size = this.out_channels if rows else this.in_channels
    before = held.get(place.layer, torch.arange(size))
    order = order.repeat_interleave(place.positions.shape[0] // order.shape[0], 0)
    after = before.clone()
    after[place.positions.flatten()] = before[place.positions.gather(1, order).flatten()]
    held[place.layer] = after


def _layer_above(program: Program, side: Side) -> Place | None:
    """The layer that makes the columns, past scalings, permutations, slices and the view that took heads apart."""
    node, heads, columns, path = side.node, side.heads, side.columns, []
    while len(node.users) == 1 and node.op == "call_function" and program.infos.get(node) is not None:
        op = program.op(node)
        path.append(node)
        if op.target in RESHAPES:
            joined = _joined(op, heads, columns, flipped=False)
            return None if joined is None else _rows(program, op.operands[0], node, *joined, path)
        first, second = (_source(op, axis) for axis in (heads, columns))
        if first is None or second is None:
            return None
        heads, columns = first, second
        node = op.operands[0]
    return None


def _rows(
    program: Program, node: fx.Node, user: fx.Node, axis: int, positions: Tensor, path: list[fx.Node]
) -> Place | None:
    while node.op == "call_function" and program.infos.get(node) is not None:
        op, rule = program.op(node), rule_for(program.op(node))
        if not all(_is_apart(program, other, axis, positions) for other in node.users if other is not user):
            return None
        path.append(node)
        if isinstance(rule, ContractionRule):
            fits = describe(op).groups == 1 and describe(op).axis == axis
            return Place(node, positions, tuple(path)) if fits else None
        source = _source(op, axis, positions)
        if source is None:
            return None
        if isinstance(rule, ReadingRule):
            read = rule.reading(op).axes[axis].positions
            positions = positions if read is None else read[positions]
        user, node, axis = node, op.operands[0], source
    return None


def _layer_below(program: Program, side: Side) -> Place | None:
    """The layer that reads the columns, past permutations and the view that puts heads together."""
    heads, columns, path = side.heads, side.columns, [side.node]
    positions: Tensor | None = None
    axis = -1
    while len(path[-1].users) == 1:
        [user] = path[-1].users
        if user.op != "call_function" or program.infos.get(user) is None:
            return None
        op, rule = program.op(user), rule_for(program.op(user))
        if positions is not None and isinstance(rule, ContractionRule):
            fits = describe(op).x is path[-1] and describe(op).groups == 1 and describe(op).axis == axis
            return Place(user, positions, tuple(path)) if fits else None
        joined = (
            _joined(op, heads, columns, flipped=True) if positions is None and op.target in RESHAPES else None
        )
        if joined is not None:
            axis, positions = joined
        elif positions is None:
            first, second = (_target(op, other) for other in (heads, columns))
            if first is None or second is None:
                return None
            heads, columns = first, second
        else:
            found = _target(op, axis)
            if found is None:
                return None
            axis = found
        path.append(user)
    return None


def _joined(op: Op, heads: int, columns: int, *, flipped: bool) -> tuple[int, Tensor] | None:
    """(the axis that a view has for heads and columns on its other side, their positions along it)."""
    blocks = split_blocks(op.info_of(op.operands[0]), op.out)
    blocks = tuple(block.flipped() for block in blocks) if flipped else blocks
    info = op.info_of(op.operands[0]) if flipped else op.out
    block = next((block for block in blocks if heads in block.outs), None)
    if block is None or columns not in block.outs or not block.separable or len(block.ins) != 1:
        return None
    sizes = [info.sizes[axis] for axis in block.outs]
    count = info.sizes[heads] * info.sizes[columns]
    if torch.Size(sizes).numel() != count:
        return None
    first, second = sorted((heads, columns))
    numbers = torch.arange(count).reshape(info.sizes[first], info.sizes[second])
    return block.ins[0], numbers if first == heads else numbers.T


def _source(op: Op, axis: int, positions: Tensor | None = None) -> int | None:
    """The operand's axis behind one of the result's; renumbered axes only where `positions` are followed."""
    rule = rule_for(op)
    if isinstance(rule, ReadingRule):
        read = rule.reading(op).axes[axis]
        followed = is_tied(read) or (positions is not None and read.numbered)
        return read.source if followed else None
    if op.target in RESHAPES:
        blocks = split_blocks(op.info_of(op.operands[0]), op.out)
        return next((block.ins[0] for block in blocks if _is_same(block, axis)), None)
    scales = (
        op.target in SCALINGS and len(op.operands) == 1 and op.info_of(op.operands[0]).rank == op.out.rank
    )
    return axis if scales else None


def _is_same(block: Block, axis: int) -> bool:
    return len(block.ins) == 1 and block.outs == (axis,)


def _target(op: Op, axis: int) -> int | None:
    """The result's axis that is one of the operand's, not renumbered."""
    return next((other for other in range(op.out.rank) if _source(op, other) == axis), None)


def _is_apart(program: Program, user: fx.Node, axis: int, positions: Tensor) -> bool:
    """Whether another reader of a value reads none of the positions."""
    if user.op != "call_function" or program.infos.get(user) is None:
        return False
    op, rule = program.op(user), rule_for(program.op(user))
    if not isinstance(rule, ReadingRule):
        return False
    for read in rule.reading(op).axes:
        if read.source == axis and read.positions is not None:
            return not bool(torch.isin(read.positions, positions).any())
    return False


def _apply(program: Program, orders: Orders) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            rewriter.env[node] = _emit(program, rewriter, node, orders)
            if node in orders.permuted:
                rewriter.env[node].meta.pop("origin", None)
    rewriter.output()
    return rewriter.finish()


def _emit(program: Program, rewriter: Rewriter, node: fx.Node, orders: Orders) -> fx.Node:
    if node not in orders.rows and node not in orders.columns:
        return rewriter.copy(node)
    this = describe(program.op(node))
    weight, bias = this.weight, this.bias
    if node in orders.columns:
        weight = weight[:, orders.columns[node]]
    if node in orders.rows:
        weight = weight[orders.rows[node]]
        bias = None if bias is None else bias[orders.rows[node]]
    return emit(this, rewriter, weight, bias, 1)
