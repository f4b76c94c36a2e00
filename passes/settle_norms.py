"""settle_norms: what a group or instance norm makes of constants goes into its bias.

    y = gamma (x - mean) / sqrt(var + eps) + beta    where y is known:    y = 0 (x - mean) / sqrt(var + eps) + y

A runtime takes the mean of equal numbers with a rounding error, and 1 / sqrt(eps) makes a large one of it. In the
original, too: there the channels are as many, here they are a larger part of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.ir.lattice import Facts, all_over_others, any_over_others
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter, with_replaced
from passes.rules import rule_for
from passes.rules.normalization import OverGroups


@dataclass(frozen=True)
class SettleNorms:
    """The pass; it has no options."""

    name: str = "settle_norms"

    def __call__(self, program: Program) -> Result:
        found = {
            node: vectors for node in program.calls() if (vectors := _vectors(program, node)) is not None
        }
        if not found:
            return Result(program, False)

        def settled(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
            if node not in found:
                return None
            dtype = node.meta.get("dtype", torch.float64)
            vectors = {
                name: rewriter.constant(vector, f"{node.name}_{name}", dtype)
                for name, vector in zip(("weight", "bias"), found[node], strict=True)
            }
            given = program.op(node).args
            args = [vectors[name] if name in vectors else rewriter.map(given[name]) for name in given]
            return rewriter.call(node.target, args, like=node)

        return Result(with_replaced(program, settled), True)


def _vectors(program: Program, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a norm that is given constants; None for anything else. float64 (channels,)."""
    if node not in program.infos:
        return None
    op = program.op(node)
    rule = rule_for(op)
    if not isinstance(rule, OverGroups) or any(program.held(vector) is None for vector in rule.vectors(op)):
        return None
    facts, size = program.analysed().facts, op.out.sizes[1]
    weight, bias = (
        torch.full((size,), default, dtype=torch.float64)
        if vector is None
        else vector.to(torch.float64, copy=True)
        for vector, default in ((op.constant("weight"), 1.0), (op.constant("bias"), 0.0))
    )
    values, known = _by_channel(op, facts[node.name])
    moved = any_over_others(
        facts[op.args["input"].name].known_value != 0, 1, size
    )  # zeros are exact as they are
    known &= (weight != 0) & moved.view(rule.groups(op), -1).any(1).repeat_interleave(rule.per_group(op))
    if not bool(known.any()):
        return None
    return torch.where(known, 0.0, weight), torch.where(known, values, bias)


def _by_channel(op: Op, facts: Facts) -> tuple[Tensor, Tensor]:
    """The value of each channel, and whether it is known and the same throughout; both (channels,)."""
    size = op.out.sizes[1]
    values = facts.expand((1,), op.out).known_value.movedim(1, 0).flatten(1)
    return values[:, 0], all_over_others(facts.known, 1, size) & (values == values[:, :1]).all(1)
