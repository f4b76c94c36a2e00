"""separate_axes: batch * heads as two axes, from the view that multiplied them to the view that takes them apart.

    reshape(T, B*H, D) -> transpose -> bmm -> softmax -> bmm -> transpose -> reshape(T*B, H*D)

A dynamic axis (B) that is multiplied with a static one (H) has no channels that could be numbered. So a reshape that
multiplies them becomes  reshape(..., B, H, ...)  and a flattening of the two, and the flattening sinks:

    f(flatten(x)) = flatten(f'(x))      f pointwise, a permutation, a product or a softmax along other axes, attention
    reshape(flatten(x)) = reshape(x)

Where it meets anything else it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.ir.axes import split_blocks
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program, TensorInfo
from passes.ir.rewriter import Rewriter
from passes.rules import registered_rules
from passes.rules.pointwise import Pointwise, Prelu
from passes.rules.product import SOFTMAXES
from passes.rules.view import RESHAPES

aten = torch.ops.aten

Key = tuple[int, ...]


@dataclass(frozen=True)
class SeparateAxes:
    """The pass; it has no options."""

    name: str = "separate_axes"

    def __call__(self, program: Program) -> Result:
        starts = [node for node in program.calls() if node.target in RESHAPES and _multiplies(program, node)]
        if not starts:
            return Result(program, False)
        found = Sinking(program)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                found.rewriter.placeholder(node)
            elif node.op == "call_function":
                found.emit(node)
        found.rewriter.output()
        return Result(found.rewriter.finish(), True)


@dataclass(frozen=True)
class Wide:
    """A new value with `count` axes from `position` on where the old value has their product; keys: of all axes."""

    node: fx.Node
    position: int
    count: int
    keys: tuple[Key, ...]

    @property
    def factors(self) -> tuple[Key, ...]:
        return self.keys[self.position : self.position + self.count]

    def axis(self, axis: int) -> int:
        """An axis of the old value, which is not the product, in the new one."""
        return axis if axis < self.position else axis + self.count - 1


def _multiplies(program: Program, node: fx.Node) -> bool:
    """Whether a view multiplies a dynamic axis with a static one."""
    source = program.infos.get(node.args[0])  # type: ignore[arg-type]
    target = program.infos.get(node)
    return source is not None and target is not None and _start(_keys(source), _keys(target)) is not None


def _keys(info: TensorInfo) -> tuple[Key, ...]:
    return tuple(info.key(axis) for axis in range(info.rank))


def _info(keys: Sequence[Key]) -> TensorInfo:
    first, second, third = zip(*keys, strict=True) if keys else ((), (), ())
    return TensorInfo(first, second, torch.float64, third)


def _is_static(key: Key) -> bool:
    return len(set(key)) == 1


def _start(source: Sequence[Key], target: Sequence[Key]) -> tuple[int, list[Key]] | None:
    """(the axis of the target that is a product of a dynamic and a static axis, its factors), if there is one.

    A dynamic factor is an axis of the source: sizes that only happen to divide are no factors.
    """
    found = []
    before, after = _info(source), _info(target)
    for block in split_blocks(before, after):
        if block.separable or len(block.ins) == len(block.outs) == 1:
            continue
        factors = _refined([source[axis] for axis in block.ins], [target[axis] for axis in block.outs])
        if factors is None:
            return None
        for axis, keys in zip(block.outs, factors, strict=True):
            dynamic = [key for key in keys if not _is_static(key)]
            if 0 < len(dynamic) < len(keys) and all(key in source for key in dynamic):
                found.append((axis, keys))
    return found[0] if len(found) == 1 else None


def _refined(ins: Sequence[Key], outs: Sequence[Key]) -> list[list[Key]] | None:
    """Sizes of each of `outs` as products of the axes that both sides can be cut into; None if there are none."""
    found: list[list[Key]] = [[]]
    first, second = list(ins), list(outs)
    while first and second:
        small, large = first[0], second[0]
        common = _smaller(small, large)
        if common is None:
            return None
        found[-1].append(common)
        for side in (first, second):
            rest = tuple(size // part for size, part in zip(side[0], common, strict=True))
            if set(rest) == {1}:
                side.pop(0)
                if side is second and second:
                    found.append([])
            else:
                side[0] = rest
    return found if not first and not second and len(found) == len(outs) else None


def _smaller(first: Key, second: Key) -> Key | None:
    """The one of two sizes that divides the other under every example shape."""
    for one, other in ((first, second), (second, first)):
        if all(part and size % part == 0 for part, size in zip(one, other, strict=True)):
            return one
    return None


class Sinking:
    """The new graph, with the wide form of every value that has one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rewriter = Rewriter(program)
        self.wide: dict[fx.Node, Wide] = {}

    def emit(self, node: fx.Node) -> None:
        """The call, on wide operands if possible."""
        found = None
        if node in self.program.infos:
            op = self.program.op(node)
            if node.target in RESHAPES:
                self.emit_view(op)
                return
            handler = HANDLERS.get(node.target)
            if handler is not None and any(operand in self.wide for operand in op.operands):
                found = handler(self, op)
        if found is None:
            self.rewriter.env[node] = self.rewriter.copy(node)
        else:
            self.keep(node, found)

    def keep(self, node: fx.Node, found: Wide) -> None:
        """Remember the wide form, and flatten it for readers that cannot take it."""
        self.wide[node] = found
        dynamic = [axis for axis, key in enumerate(_keys(self.program.infos[node])) if not _is_static(key)]
        sizes: list[Any] = []
        for axis, key in enumerate(_keys(self.program.infos[node])):
            if axis == found.position:
                sizes.append(-1)
            elif axis in dynamic:
                sizes.append(self.size(found.node, found.axis(axis), node))
            else:
                sizes.append(key[0])
        self.rewriter.env[node] = self.rewriter.call(aten.reshape.default, (found.node, sizes), like=node)

    def size(self, x: fx.Node, axis: int, like: fx.Node) -> fx.Node:
        return self.rewriter.call(aten.sym_size.int, (x, axis), like=like, step="size")

    def call(self, op: Op, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> fx.Node:
        return self.rewriter.call(target, args, kwargs, like=op.node, step="wide")

    def emit_view(self, op: Op) -> None:
        source = op.operands[0]
        wide = self.wide.get(source)
        x = self.rewriter.value(source) if wide is None else wide.node
        before = _keys(op.info_of(source)) if wide is None else wide.keys
        after = _keys(op.out)
        if before == after:
            self.rewriter.env[op.node] = x
            return
        sizes = list(self.rewriter.map(op.arg("size", "shape")))
        start = _start(before, after)
        if start is None:
            self.rewriter.env[op.node] = self.rewriter.call(aten.reshape.default, (x, sizes), like=op.node)
            return
        axis, factors = start
        keys = (*after[:axis], *factors, *after[axis + 1 :])
        split = self.split_sizes(op, x, before, sizes, axis, factors)
        node = x if keys == before else self.call(op, aten.reshape.default, (x, split))
        self.wide[op.node] = Wide(node, axis, len(factors), keys)
        self.rewriter.env[op.node] = self.rewriter.call(aten.reshape.default, (node, sizes), like=op.node)

    def split_sizes(
        self, op: Op, x: fx.Node, before: Sequence[Key], sizes: list[Any], axis: int, factors: list[Key]
    ) -> list[Any]:
        """The arguments of the reshape that keeps the factors apart."""
        rest = [*sizes[:axis], *sizes[axis + 1 :]]
        free = -1 not in rest
        parts: list[Any] = []
        for key in factors:
            if _is_static(key):
                parts.append(key[0])
            elif free:
                parts.append(-1)
                free = False
            else:
                parts.append(self.size(x, list(before).index(key), op.node))
        return [*sizes[:axis], *parts, *sizes[axis + 1 :]]

    def permuted(self, op: Op) -> Wide | None:
        wide = self.wide[op.operands[0]]
        rank = op.out.rank
        if op.target is aten.permute.default:
            order = [axis % rank for axis in op.args["dims"]]
        else:
            order = list(range(rank))
            first, second = op.args["dim0"] % rank, op.args["dim1"] % rank
            order[first], order[second] = second, first
        run = list(range(wide.position, wide.position + wide.count))
        wide_order = [new for old in order for new in (run if old == wide.position else [wide.axis(old)])]
        node = self.call(op, aten.permute.default, (wide.node, wide_order))
        keys = tuple(wide.keys[axis] for axis in wide_order)
        return Wide(node, order.index(wide.position), wide.count, keys)

    def pointwise(self, op: Op) -> Wide | None:
        """An elementwise call or attention: every operand is wide in the same place, or is broadcast along it."""
        wide = self.same_product(op, op.operands)
        if wide is None or wide.position >= op.out.rank:
            return None
        new: dict[fx.Node, fx.Node] = {}
        for operand in op.operands:
            aligned = self.aligned(op, operand, wide)
            if aligned is None:
                return None
            new[operand] = aligned
        return self.result(op, new, wide)

    def product(self, op: Op) -> Wide | None:
        wide = self.same_product(op, op.operands)
        if wide is None or wide.position >= op.out.rank - 2:
            return None
        if not all(operand in self.wide for operand in op.operands):
            return None
        return self.result(op, {operand: self.wide[operand].node for operand in op.operands}, wide)

    def attention(self, op: Op) -> Wide | None:
        if not all(operand in self.wide for operand in op.operands[:3]) or op.args["enable_gqa"]:
            return None
        wide = self.same_product(op, op.operands[:3])
        return None if wide is None or wide.position >= op.out.rank - 2 else self.pointwise(op)

    def softmax(self, op: Op) -> Wide | None:
        wide = self.wide[op.operands[0]]
        axis = op.args["dim"] % op.out.rank
        if axis == wide.position:
            return None
        rest = self.rewriter.map(op.node.args[2:])
        node = self.call(
            op, op.target, (wide.node, wide.axis(axis), *rest), self.rewriter.map(dict(op.node.kwargs))
        )
        return Wide(node, wide.position, wide.count, wide.keys)

    def same_product(self, op: Op, operands: Sequence[fx.Node]) -> Wide | None:
        """The wide form that all operands with one share, counted from the last axis of the result."""
        found = [self.wide[operand] for operand in operands if operand in self.wide]
        ranks = {op.info_of(operand).rank for operand in operands if operand in self.wide}
        places = {(wide.position, wide.factors) for wide in found}
        return found[0] if len(places) == 1 and ranks == {op.out.rank} else None

    def aligned(self, op: Op, operand: fx.Node, wide: Wide) -> fx.Node | None:
        """An operand as it is broadcast to the wide result."""
        if operand in self.wide:
            return self.wide[operand].node
        info = op.info_of(operand)
        axis = wide.position - (op.out.rank - info.rank)
        x = self.rewriter.value(operand)
        if axis < 0:
            return x
        if info.key(axis) != (1, 1, 1):
            return None
        for _ in range(wide.count - 1):
            x = self.call(op, aten.unsqueeze.default, (x, axis))
        return x

    def result(self, op: Op, new: dict[fx.Node, fx.Node], wide: Wide) -> Wide:
        """The call on new operands; the factors are those of `wide`, other sizes those of the result."""

        def map_node(node: fx.Node) -> fx.Node:
            return new[node] if node in new else self.rewriter.value(node)

        args, kwargs = fx.node.map_arg((op.node.args, dict(op.node.kwargs)), map_node)
        node = self.call(op, op.target, args, kwargs)
        keys = _keys(op.out)
        full = (*keys[: wide.position], *wide.factors, *keys[wide.position + 1 :])
        return Wide(node, wide.position, wide.count, full)


Handler = Callable[[Sinking, Op], Wide | None]

HANDLERS: dict[object, Handler] = {
    **{
        target: Sinking.pointwise
        for target, rule in registered_rules().items()
        if isinstance(rule, Pointwise) and not isinstance(rule, Prelu)  # its slopes lie along axis 1
    },
    **dict.fromkeys(SOFTMAXES, Sinking.softmax),
    aten.permute.default: Sinking.permuted,
    aten.transpose.int: Sinking.permuted,
    aten.matmul.default: Sinking.product,
    aten.bmm.default: Sinking.product,
    aten.scaled_dot_product_attention.default: Sinking.attention,
}
