"""fold_permutations: a permutation of one axis disappears into the weights around it.

For y = x.index_select(axis, p), p a permutation:

- backward, through values that nobody else reads, into the producers:  W' = W[p],  b' = b[p];
- forward, through all readers, into the consumers:  W' = W[:, argsort(p)];  a sum or maximum over the axis takes it;
- either way through what passes/reorder.py can move it through, grouped convolutions among it where whole groups
  change places. Repeated entries that layers alone read go forward: W'[:, c] = sum of W[:, k] over p[k] = c.

Every path must end in weights: a permutation that could only be moved stays where it is, one index_select, which
costs what reshape, transpose and reshape cost (docs/results/shuffle.md). No size changes, so no graph gets slower.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.pipeline import Result
from passes.ir.program import Op, Origin, Program
from passes.ir.rewriter import Rewriter
from passes.reorder import Moved, Order, backward, forward, is_layer
from passes.rules import rule_for
from passes.rules.layer import Contraction, describe, emit
from passes.rules.reading import ReadingRule, is_tied

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldPermutations:
    """The pass; `farthest` bounds the calls that one permutation is moved through."""

    farthest: int = 200
    name: str = "fold_permutations"

    def __call__(self, program: Program) -> Result:
        places = {node: number for number, node in enumerate(program.graph.nodes)}
        edits: dict[fx.Node, Edit] = {}
        for node in program.calls():
            found = _permutation(program, node)
            if found is None:
                continue
            x, order = found
            path = _pull(program, node, x, order, places, self.farthest)
            if path is None or path.keys() & edits.keys():
                path = _push(program, node, order, places, self.farthest)
            if path is not None and not path.keys() & edits.keys() and node not in edits:
                edits |= path
                edits[node] = Edit(bypass=x)
        return Result(_apply(program, edits), True) if edits else Result(program, False)


@dataclass
class Edit:
    """What happens to one call or constant.

    value: the new value is the old one's index_select by it; constants of that use are reordered too.
    """

    value: Order | None = None
    moved: Moved = field(default_factory=Moved)
    merged: Tensor | None = None
    bypass: fx.Node | None = None


Path = dict[fx.Node, Edit]


def _permutation(program: Program, node: fx.Node) -> tuple[fx.Node, Order] | None:
    """(x, order) of a call that reads all of one static axis of x in another order, perhaps with repetitions."""
    if node not in program.infos or not isinstance(rule := rule_for(program.op(node)), ReadingRule):
        return None
    op = program.op(node)
    reading, x = rule.reading(op), op.operands[0]
    moved = [read for read in reading.axes if not is_tied(read)]
    if reading.order != list(range(op.out.rank)) or reading.dropped:
        return None
    if len(moved) != 1 or moved[0].positions is None:
        return None
    axis, positions = moved[0].source or 0, moved[0].positions
    covers = torch.unique(positions).numel() == op.info_of(x).sizes[axis]
    return (x, Order(axis, positions)) if covers else None


def _pull(
    program: Program, node: fx.Node, x: fx.Node, order: Order, places: dict[fx.Node, int], farthest: int
) -> Path | None:
    """The edits that make x come out reordered for `node`; None where something on the way back cannot."""
    if not order.is_permutation:
        return None
    path: Path = {}
    wanted = {x: order}
    askers: dict[fx.Node, set[fx.Node]] = {x: {node}}
    queue = [(-places[x], x)]
    while queue:
        _, value = heapq.heappop(queue)
        if set(value.users) != askers[value] or len(path) > farthest:
            return None
        if program.held(value) is not None:
            path[value] = Edit(wanted[value])
            continue
        if value.op != "call_function" or value not in program.infos:
            return None
        moved = backward(program.op(value), wanted[value])
        if moved is None:
            return None
        path[value] = Edit(wanted[value], moved)
        for operand, before in moved.operands.items():
            if operand not in wanted:
                wanted[operand], askers[operand] = before, set()
                heapq.heappush(queue, (-places[operand], operand))
            if not before.equals(wanted[operand]):
                return None
            askers[operand].add(value)
    return path


def _push(
    program: Program, node: fx.Node, order: Order, places: dict[fx.Node, int], farthest: int
) -> Path | None:
    """The edits that let all readers of a permutation take x as it lies; None where some reader cannot."""
    if not order.is_permutation:
        return _merge(program, node, order)
    path: Path = {}
    orders = {node: order}
    queue: list[tuple[int, fx.Node]] = []
    waiting: set[fx.Node] = set()

    def enqueue(users: list[fx.Node]) -> None:
        for user in users:
            if user not in waiting:
                waiting.add(user)
                heapq.heappush(queue, (places[user], user))

    enqueue(list(node.users))
    while queue:
        _, user = heapq.heappop(queue)
        if user.op != "call_function" or user not in program.infos or len(path) > farthest:
            return None
        op = program.op(user)
        moved = forward(op, {x: orders[x] for x in op.operands if x in orders})
        if moved is None:
            return None
        path |= {constant: Edit(held) for constant, held in moved.operands.items()}
        path[user] = Edit(
            None if moved.result is None else moved.result.inverse(),
            Moved(rows=moved.rows, columns=moved.columns),
        )
        if moved.result is not None:
            orders[user] = moved.result
            enqueue(list(user.users))
    return path


def _merge(program: Program, node: fx.Node, order: Order) -> Path | None:
    """The layers that read entries repeatedly, with the columns of equal ones added up."""
    path: Path = {}
    for user in node.users:
        op = program.op(user)
        if user.op != "call_function" or not is_layer(op) or describe(op).x is not node:
            return None
        this = describe(op)
        if this.axis != order.axis or this.groups > 1:
            return None
        path[user] = Edit(merged=order.index)
    return path


def _apply(program: Program, edits: Path) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        edit = edits.get(node)
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "get_attr" and edit is not None and edit.value is not None:
            rewriter.env[node] = _reordered_constant(program, rewriter, node, edit.value)
        elif node.op == "call_function":
            rewriter.env[node] = (
                rewriter.copy(node) if edit is None else _edited(program.op(node), rewriter, edit)
            )
    rewriter.output()
    return rewriter.finish()


def _reordered_constant(program: Program, rewriter: Rewriter, node: fx.Node, order: Order) -> fx.Node:
    value = program.constants[str(node.target)].index_select(order.axis, order.index)
    return rewriter.constant(value, str(node.target), rewriter.dtype_of(node))


def _edited(op: Op, rewriter: Rewriter, edit: Edit) -> fx.Node:
    if edit.bypass is not None:
        return rewriter.value(edit.bypass)
    moved = edit.moved
    if edit.merged is not None or moved.rows is not None or moved.columns is not None:
        new = _emit_layer(describe(op), rewriter, edit)
    elif moved.sequence is not None:
        values = [rewriter.value(operand) for operand in moved.sequence]
        new = rewriter.call(op.target, (values, op.args["dim"]), like=op.node)
    else:
        new = rewriter.copy(op.node)
    if edit.value is not None:
        _carry(new, edit.value, op.out.rank)
    return new


def _emit_layer(this: Contraction, rewriter: Rewriter, edit: Edit) -> fx.Node:
    weight, bias, moved = this.weight, this.bias, edit.moved
    if edit.merged is not None:
        shape = (weight.shape[0], int(edit.merged.max()) + 1, *weight.shape[2:])
        weight = torch.zeros(shape, dtype=weight.dtype).index_add(1, edit.merged, weight)
    if moved.rows is not None:
        weight = weight[moved.rows]
        bias = None if bias is None else bias[moved.rows]
    if moved.columns is not None:
        columns = moved.columns.repeat_interleave(this.out_channels // this.groups, 0)
        shape = (*columns.shape, *([1] * this.spatial_rank))
        weight = weight.gather(1, columns.reshape(shape).expand(weight.shape))
    return emit(this, rewriter, weight, bias, this.groups)


def _carry(new: fx.Node, order: Order, rank: int) -> None:
    """The new node now holds the original value in another order."""
    origin: Origin | None = new.meta.get("origin")
    if origin is not None:
        kept = list(origin.kept or (None,) * rank)
        before = kept[order.axis]
        kept[order.axis] = order.index if before is None else before[order.index]
        new.meta["origin"] = Origin(origin.name, tuple(kept))
