"""Views: operators that give the same entries another shape.

forward: facts move with the entries; along a block that mixes a dynamic axis with static ones they survive
    where they do not vary.
backward: demand moves back with the entries.
couple: within a separable block the kept entries are one set of flat positions that is a product of index sets
    on both sides: the least fixpoint of projecting to one side and the other. Inseparable blocks are kept whole.
rewrite: a reshape to the kept counts; dynamic sizes stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.axes import (
    Block,
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

aten = torch.ops.aten


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
class View(Rule):
    """A new shape, given as a list of sizes."""

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
        sizes = new_sizes(op, op.arg("size", "shape"), rewriter)
        return rewriter.call(aten.reshape.default, (rewriter.value(op.operands[0]), sizes), like=op.node)


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


def new_sizes(op: Op, sizes: Sequence[Any], rewriter: Rewriter) -> list[Any]:
    """The literal sizes of a result after shrinking; sizes of dynamic axes stay the expressions they were."""
    mapped = rewriter.map(list(sizes))
    return [
        rewriter.size(op.node, axis) if op.out.is_static(axis) else entry for axis, entry in enumerate(mapped)
    ]
