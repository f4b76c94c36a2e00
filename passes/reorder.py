"""What a reordering of one axis can be moved through, and what becomes of it on the other side.

A reordering gives y = x.index_select(axis, index) with a permutation as index. For an operator f of x:

    forward:   f(x[index]) = f'(x)[index']        f' works on x as it lies
    backward:  f(x)[index] = f'(x[index'])        f' gives the reordered result itself

f' is f with its per-channel constants and weights reordered. An order index' of None: the operator took it all.

- elementwise operators: every operand that varies along the axis, constants too;
- pooling, resampling, padding, reductions and softmax along other axes: the axis renumbered where it moved;
- permutations, views: where the reordered entries are again one axis in another order;
- cat: along the axis the segments move as wholes, along another axis every operand is reordered;
- convolution and linear: columns forward, rows backward, and that is the end; with groups only where whole groups
  change places: rows and columns move with their group and the reordering goes on to the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.axes import Block
from passes.ir.program import Op
from passes.rules import rule_for
from passes.rules.joining import Concatenate, joined_axis
from passes.rules.layer import CONVOLUTIONS, LINEAR, Contraction, describe, is_contraction
from passes.rules.padding import ConstantPad
from passes.rules.pointwise import Pointwise, Prelu
from passes.rules.reading import ReadingRule, is_tied
from passes.rules.reduction import Position, Reduction
from passes.rules.spatial import SpatialRule
from passes.rules.view import View, blocks_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Order:
    """y = x.index_select(axis, index), int64; a permutation, unless only layers read it."""

    axis: int
    index: Tensor

    def inverse(self) -> Order:
        return Order(self.axis, self.index.argsort())

    @property
    def is_permutation(self) -> bool:
        return len(set(self.index.tolist())) == self.index.numel()

    def equals(self, other: Order | None) -> bool:
        return other is not None and self.axis == other.axis and torch.equal(self.index, other.index)


@dataclass(frozen=True, eq=False)
class Moved:
    """What becomes of a call: the orders of its operands (backward) or of its result (forward), and its weights.

    rows, columns: positions read in the old weight's axes 0 and 1 (`columns` of shape (groups, in per group));
    operands: a concatenation's operands in their new sequence.
    """

    result: Order | None = None
    operands: dict[fx.Node, Order] = field(default_factory=dict)
    rows: Tensor | None = None
    columns: Tensor | None = None
    sequence: tuple[fx.Node, ...] | None = None


def forward(op: Op, orders: dict[fx.Node, Order]) -> Moved | None:
    """The call on operands that lie as they are, where those in `orders` were reordered; None where it cannot be."""
    first = next(iter(orders.values()))
    rule = rule_for(op)
    if isinstance(rule, Concatenate):
        return _forward_join(op, orders)
    if isinstance(rule, Pointwise):
        return _forward_pointwise(op, orders)
    if op.position is not None or op.operands.count(op.operands[0]) != 1 or op.operands[0] not in orders:
        return None
    if is_layer(op):
        return _forward_contraction(describe(op), first)
    if isinstance(rule, Reduction) and first.axis in rule.axes(op):
        return None if isinstance(rule, Position) else Moved()
    axis = _axis_after(op, first.axis)
    if axis is not None:
        return Moved(Order(axis, first.index))
    if isinstance(rule, View):
        result = _through_view(op, first, backward=False)
        return None if result is None else Moved(result)
    return None


def backward(op: Op, order: Order) -> Moved | None:
    """The call with a result that is reordered already; None where it cannot be."""
    rule = rule_for(op)
    if isinstance(rule, Concatenate):
        return _backward_join(op, order)
    if isinstance(rule, Pointwise):
        return Moved(
            operands={x: held for x in op.operands if (held := _in_operand(op, x, order)) is not None}
        )
    if is_layer(op):
        return _backward_contraction(describe(op), order)
    if op.position is not None or not op.operands:
        return None
    x = op.operands[0]
    axes = range(op.info_of(x).rank)
    source = next((axis for axis in axes if _axis_after(op, axis) == order.axis), None)
    if source is not None:
        return Moved(operands={x: Order(source, order.index)})
    if isinstance(rule, View):
        before = _through_view(op, order, backward=True)
        return None if before is None else Moved(operands={x: before})
    return None


def is_layer(op: Op) -> bool:
    """Whether the call is a convolution or linear layer with constant weights."""
    return op.info is not None and op.target in {LINEAR, *CONVOLUTIONS} and is_contraction(op)


def _in_operand(op: Op, operand: fx.Node, order: Order) -> Order | None:
    """The order as an operand of a broadcasting call sees it; None where it does not vary along the axis."""
    info = op.info_of(operand)
    axis = order.axis - (op.out.rank - info.rank)
    if _is_slope(op, operand):
        axis = order.axis - 1
        return Order(axis, order.index) if axis == 0 and info.rank and info.sizes[0] > 1 else None
    return Order(axis, order.index) if axis >= 0 and info.sizes[axis] > 1 else None


def _is_slope(op: Op, operand: fx.Node) -> bool:
    """Whether an operand is the weight of a prelu, which lies along axis 1 of the other."""
    return isinstance(rule_for(op), Prelu) and operand is op.operands[1]


def _forward_pointwise(op: Op, orders: dict[fx.Node, Order]) -> Moved | None:
    if any(_is_slope(op, x) for x in orders):
        return None
    shifted = [
        Order(order.axis + op.out.rank - op.info_of(x).rank, order.index) for x, order in orders.items()
    ]
    if not all(order.equals(shifted[0]) for order in shifted):
        return None
    constants = {}
    for operand in op.operands:
        wanted = _in_operand(op, operand, shifted[0])
        if wanted is None or operand in orders:
            continue
        if op.program.held(operand) is None:
            return None
        constants[operand] = wanted.inverse()
    return Moved(shifted[0], constants)


def _axis_after(op: Op, axis: int) -> int | None:
    """The result's axis with the numbering of an operand's axis, for calls that treat its indices alike and alone."""
    rule = rule_for(op)
    if isinstance(rule, SpatialRule):
        return axis if axis < rule.spatial(op)[0] else None
    if isinstance(rule, ConstantPad):
        return axis if axis in rule.untouched(op) else None
    if isinstance(rule, Reduction):
        return _axis_beside(op, rule, axis)
    if isinstance(rule, ReadingRule):
        found = [
            place for place, read in enumerate(rule.reading(op).axes) if read.source == axis and is_tied(read)
        ]
        return found[0] if found else None
    if op.target in _ALONG_AN_AXIS:
        return axis if axis != op.axis(op.args["dim"]) else None
    return None


def _axis_beside(op: Op, rule: Reduction, axis: int) -> int | None:
    reduced = rule.axes(op)
    if axis in reduced:
        return None
    return axis if op.args.get("keepdim") else axis - sum(other < axis for other in reduced)


_ALONG_AN_AXIS = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)


def _through_view(op: Op, order: Order, *, backward: bool) -> Order | None:
    """The order on the other side of a view, where it is one axis in another order there too."""
    for block in blocks_of(op):
        here, there = (block.outs, block.ins) if backward else (block.ins, block.outs)
        if order.axis in here:
            infos = op.info_of(op.operands[0]), op.out
            sizes = [infos[int(backward)].sizes[axis] for axis in here]
            others = [infos[1 - int(backward)].sizes[axis] for axis in there]
            return _regrouped(block, order, here, sizes, there, others)
    return None


def _regrouped(
    block: Block, order: Order, here: Sequence[int], sizes: list[int], there: Sequence[int], others: list[int]
) -> Order | None:
    if not block.separable:
        return None
    lying = torch.arange(int(torch.Size(sizes).numel()))
    moved = lying.reshape(sizes).index_select(here.index(order.axis), order.index).reshape(others)
    lying = lying.reshape(others)
    for place, axis in enumerate(there):
        stride = int(torch.Size(others[place + 1 :]).numel())
        index = moved.movedim(place, 0).reshape(others[place], -1)[:, 0] // stride % others[place]
        if torch.equal(lying.index_select(place, index), moved):
            return Order(axis, index)
    return None


def _forward_join(op: Op, orders: dict[fx.Node, Order]) -> Moved | None:
    axis = joined_axis(op)
    first = next(iter(orders.values()))
    if any(order.axis != first.axis for order in orders.values()):
        return None
    if first.axis != axis:
        if not all(operand in orders and orders[operand].equals(first) for operand in op.operands):
            return None
        return Moved(first)
    if not op.out.is_static(axis):
        return None
    parts, start = [], 0
    for operand in op.operands:
        count = op.info_of(operand).sizes[axis]
        index = orders[operand].index if operand in orders else torch.arange(count)
        parts.append(index + start)
        start += count
    return Moved(Order(axis, torch.cat(parts)))


def _backward_join(op: Op, order: Order) -> Moved | None:
    axis = joined_axis(op)
    if len(set(op.operands)) < len(op.operands):
        return None
    if order.axis != axis:
        return Moved(operands=dict.fromkeys(op.operands, order))
    sizes = [op.info_of(operand).sizes[axis] for operand in op.operands]
    ends = torch.tensor(sizes).cumsum(0)
    visited = torch.unique_consecutive(torch.searchsorted(ends, order.index, right=True)).tolist()
    if len(visited) > len(sizes):
        return None
    operands, start = {}, 0
    for number in visited:
        index = order.index[start : start + sizes[number]] - (int(ends[number]) - sizes[number])
        start += sizes[number]
        if not torch.equal(index, torch.arange(sizes[number])):
            operands[op.operands[number]] = Order(axis, index)
    return Moved(operands=operands, sequence=tuple(op.operands[number] for number in visited))


def _groups_of(index: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """(group read at each place, entries within) where a permutation moves groups of `size` entries as wholes."""
    groups = index.reshape(-1, size)
    numbers = groups // size
    return (numbers[:, 0], groups % size) if bool((numbers == numbers[:, :1]).all()) else None


def _spread(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _forward_contraction(this: Contraction, order: Order) -> Moved | None:
    """W'[place of group] = W[group], columns put back in order; the result's groups are reordered like the input's."""
    if order.axis != this.axis:
        return Moved(order) if order.axis in this.leading else None
    found = _groups_of(order.index, this.in_per_group)
    if found is None:
        return None
    moved, within = found
    back = moved.argsort()
    per_group = this.out_channels // this.groups
    result = None if this.groups == 1 else Order(this.axis, _spread(moved, per_group))
    return Moved(result, rows=_spread(back, per_group), columns=within.argsort(1)[back])


def _backward_contraction(this: Contraction, order: Order) -> Moved | None:
    if order.axis != this.axis:
        return Moved(operands={this.x: order}) if order.axis in this.leading else None
    found = _groups_of(order.index, this.out_channels // this.groups)
    if found is None:
        return None
    moved = _spread(found[0], this.in_per_group)
    still = torch.equal(moved, torch.arange(moved.numel()))
    operands = {} if still else {this.x: Order(this.axis, moved)}
    return Moved(operands=operands, rows=order.index)
