"""Rows of a table by number: embedding, and embedding_bag, which adds, averages or compares several.

forward: a column of the result is known where it is the same in every row of the table (for bags, which may be empty
    or weighted: where it is 0 in every row).
backward: a live column needs that column of the table, and the indices.
couple: columns of table and result keep equal indices. Rows of the table stay.
rewrite: the columns that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op
from passes.rules.base import Rule, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
class Embedding(Rule):
    """One row for each index."""

    def applies(self, op: Op) -> bool:
        table = op.args["weight"]
        return table in op.operands and op.info_of(table).rank == 2

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        columns = flatten_facts(facts[0], (0,))
        shape = (1,) * (op.out.rank - 1) + (-1,)
        return Facts(columns.value.reshape(shape), columns.known.reshape(shape))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        columns = any_over(demand, range(op.out.rank - 1)).reshape(1, -1)
        return [columns, *self.others(op, demand)]

    def others(self, op: Op, demand: Tensor) -> list[Tensor]:
        """What is asked of the operands beside the table."""
        return [demand.any(dim=-1)]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        table, indices = op.operands[:2]
        last = op.out.rank - 1
        keep.tie((table, 1), (op.node, last), f"columns of {op.source.name}")
        keep.fill(table, f"rows that {op.source.name} may look up", (0,))
        for axis in range(last):
            keep.tie((indices, axis), (op.node, axis), f"aligned by {op.source.name}")


@rule(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
class EmbeddingBag(Embedding):
    """Several rows in one; what counts the rows has no rule."""

    def applies(self, op: Op) -> bool:
        return op.position == 0 and super().applies(op)

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        found = super().forward(op, facts)
        return found.forget(found.value != 0)

    def others(self, op: Op, demand: Tensor) -> list[Tensor]:
        return [full_mask(op.info_of(operand), True) for operand in op.operands[1:]]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        table = op.operands[0]
        keep.tie((table, 1), (op.node, 1), f"columns of {op.source.name}")
        keep.fill(table, f"rows that {op.source.name} may look up", (0,))
        for node in (*op.operands[1:], op.node):
            keep.fill(node, f"bags of {op.source.name}", (0,))
