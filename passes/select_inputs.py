"""select_inputs: a gather in front of a linear layer that reads few of its input's entries.

A view or the network's interface can force x to keep entries that the layer does not need (zero columns, constants):

    y = W x + b  =  W[:, I] x[I] + (b + W[:, R] x_R),   I the entries needed, R the others

The multiplications with R go, a gather comes; the cost model says whether that pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.analysis import Analysis
from passes.ir.cost import CostModel, CountingModel
from passes.ir.lattice import all_over_others
from passes.ir.pipeline import Note, Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import LINEAR, Contraction, describe, is_uniform

aten = torch.ops.aten


@dataclass(frozen=True)
class SelectInputs:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "select_inputs"

    def __call__(self, program: Program) -> Result:
        analysis = program.analysed()
        rewriter = Rewriter(program)
        notes = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                rewriter.placeholder(node)
            elif node.op == "call_function":
                found = self._selection(program, node, analysis)
                rewriter.env[node] = rewriter.copy(node) if found is None else _emit(rewriter, *found)
                if found is not None:
                    kept, all_inputs = found[1].numel(), found[0].in_channels
                    notes.append(Note(node.name, f"reads {kept} of its {all_inputs} inputs through a gather"))
        rewriter.output()
        return Result(rewriter.finish(), True, tuple(notes)) if notes else Result(program, False)

    def _selection(
        self, program: Program, node: fx.Node, analysis: Analysis
    ) -> tuple[Contraction, Tensor, Tensor] | None:
        """(the layer, the inputs it needs, what the others add to its bias) where a gather pays."""
        if node.target is not LINEAR or node not in program.infos:
            return None
        op = program.op(node)
        if not isinstance(rule_for(op), ContractionRule):
            return None
        this, facts = describe(op), analysis.facts[op.operands[0].name]
        read = this.columns.any(0)
        unneeded = ~read
        known = all_over_others(facts.known, this.axis, this.in_channels) & read
        extra = torch.zeros(this.out_channels, dtype=this.weight.dtype)
        if bool(known.any()):
            part = this.contribution(
                facts.known_value, known.nonzero().flatten(), torch.arange(this.out_channels)
            )
            if part is not None and is_uniform(part, this.axis):
                unneeded, extra = unneeded | known, part.reshape(-1, this.out_channels)[0]
        count = int(unneeded.sum())
        if count in {0, this.in_channels} or not self.cost.gather_pays(
            this.in_channels - count, count * this.out_channels
        ):
            return None
        return this, (~unneeded).nonzero().flatten(), extra


def _emit(rewriter: Rewriter, this: Contraction, needed: Tensor, extra: Tensor) -> fx.Node:
    node, weight = this.op.node, this.op.args["weight"]
    index = rewriter.constant(needed, f"{node.name}_inputs", torch.int64)
    selected = rewriter.call(
        aten.index_select.default, (rewriter.value(this.x), this.axis, index), like=node, step="inputs"
    )
    dtype, name = rewriter.dtype_of(weight), str(weight.target)
    args = [selected, rewriter.constant(this.weight[:, needed], name, dtype)]
    if this.bias is not None or bool((extra != 0).any()):
        bias = extra if this.bias is None else this.bias + extra
        args.append(rewriter.constant(bias, f"{name.removesuffix('weight')}bias", dtype))
    return rewriter.call(LINEAR, args, like=node)
