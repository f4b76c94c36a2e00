"""Views: operators that give the same entries another shape or another order of axes.

forward: facts move with the entries; along a block that mixes a dynamic axis with static ones they survive
    where they do not vary.
backward: demand moves back with the entries.
couple: within a separable block the kept entries are one set of flat positions that is a product of index
    sets on both sides: the least fixpoint of projecting to one side and the other. Others are kept whole.
rewrite: a reshape to the kept counts; sizes of dynamic axes stay the expressions they were.

Permutations, squeezes and the like are readings (passes/rules/reading.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.axes import (
    Block,
    Reading,
    any_over,
    carry,
    flatten_facts,
    inseparable_axes,
    outer,
    projections,
    split_blocks,
)
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.base import Rule, rule
from passes.rules.reading import Description, ReadingRule, rank_of

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@rule(*RESHAPES, aten.flatten.using_ints, aten.unflatten.int)
class View(Rule):
    """A new shape for the same entries in the same order."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        blocks, source = blocks_of(op), op.info_of(op.operands[0])
        flat = flatten_facts(facts[0], inseparable_axes(blocks))
        parts = (carry(part, blocks, source, op.out) for part in (flat.value, flat.known))
        return Facts(*parts).compress()

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        blocks = [block.flipped() for block in blocks_of(op)]
        flat = any_over(demand, inseparable_axes(blocks))
        return [carry(flat, blocks, op.out, op.info_of(op.operands[0]))]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        for block in blocks_of(op):
            couple_block(op, block, keep)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        x = rewriter.value(op.operands[0])
        if op.target is aten.flatten.using_ints:
            return rewriter.copy(op.node)
        if op.target is aten.unflatten.int:
            first = op.axis(op.args["dim"], op.operands[0])
            sizes = new_sizes(op, op.args["sizes"], rewriter, first)
            return rewriter.call(op.target, (x, first, sizes), like=op.node)
        sizes = new_sizes(op, op.arg("size", "shape"), rewriter)
        return rewriter.call(aten.reshape.default, (x, sizes), like=op.node)


def blocks_of(op: Op) -> tuple[Block, ...]:
    """How a view groups the axes of its operand and its result."""
    return split_blocks(op.info_of(op.operands[0]), op.out)


def couple_block(op: Op, block: Block, keep: KeepSets) -> None:
    """Make both sides of a block keep the same positions."""
    source = op.operands[0]
    if not block.separable:
        why = f"{op.node.name} mixes them with a dynamic axis"
        keep.fill(source, why, block.ins)
        keep.fill(op.node, why, block.outs)
        return
    sides = [(source, axis) for axis in block.ins], [(op.node, axis) for axis in block.outs]
    while True:
        sets = [[keep.get(*entry) for entry in side] for side in sides]
        first, second = (outer(masks) for masks in sets)
        if torch.equal(first, second):
            return
        for side, masks in zip(sides, sets, strict=True):
            wanted = projections(first | second, [mask.numel() for mask in masks])
            for entry, mask in zip(side, wanted, strict=True):
                keep.widen(*entry, mask, f"regrouped by {op.node.name}")


def new_sizes(op: Op, sizes: Sequence[Any], rewriter: Rewriter, first: int = 0) -> list[Any]:
    """Sizes of the result's axes from `first` on: kept counts; a dynamic axis keeps its entry."""
    mapped = rewriter.map(sizes)
    return [
        rewriter.size(op.node, axis) if op.out.is_static(axis) else entry
        for axis, entry in enumerate(mapped, first)
    ]


def _permute(op: Op) -> Reading:
    return Reading.of_axes([axis % rank_of(op) for axis in op.args["dims"]])


def _transpose(op: Op) -> Reading | None:
    rank = rank_of(op)
    if rank < 2:
        return None
    first, second = (op.args.get(name, default) % rank for name, default in (("dim0", 0), ("dim1", 1)))
    axes = list(range(rank))
    axes[first], axes[second] = second, first
    return Reading.of_axes(axes)


def _unsqueeze(op: Op) -> Reading:
    axes: list[int | None] = list(range(rank_of(op)))
    axes.insert(op.axis(op.args["dim"]), None)
    return Reading.of_axes(axes)


def _squeeze(op: Op) -> Reading:
    dropped = _squeezed(op)
    return Reading.of_axes([axis for axis in range(rank_of(op)) if axis not in dropped], dropped)


def _squeezed(op: Op) -> list[int]:
    info = op.info_of(op.operands[0])
    asked = op.args.get("dim", range(info.rank))
    asked = [asked] if isinstance(asked, int) else asked
    return sorted({axis % info.rank for axis in asked if info.is_static(axis) and info.sizes[axis] == 1})


REARRANGEMENTS: dict[object, Description] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
}
SQUEEZES: dict[object, Description] = dict.fromkeys(
    (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze
)


@rule(*REARRANGEMENTS)
class Rearrange(ReadingRule):
    """Axes in another order, or a new axis of size 1."""

    table = REARRANGEMENTS


@rule(*SQUEEZES)
class Squeeze(ReadingRule):
    """Axes of size 1 dropped; an axis that only shrinks to size 1 must not go with them."""

    table = SQUEEZES

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        x, dropped = rewriter.value(op.operands[0]), _squeezed(op)
        return rewriter.call(aten.squeeze.dims, (x, dropped), like=op.node) if dropped else x
