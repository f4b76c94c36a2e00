"""absorb_constants: what removed channels contributed goes into the weights and biases of their consumers.

The Program stays at full width and every value stays what it was; only the weights of contractions change, such that
no column that is not zero reads a removed channel. So facts and keep sets stay true and are carried over.
"""

from __future__ import annotations

from dataclasses import dataclass

from passes.ir.analysis import Analysis, is_constant
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule


@dataclass(frozen=True)
class AbsorbConstants:
    """The pass; it has no options."""

    name: str = "absorb_constants"

    def __call__(self, program: Program) -> Result:
        analysis = program.analysed()
        rewriter = Rewriter(program)
        changed = False
        for node in program.graph.nodes:
            if node.op == "placeholder":
                rewriter.placeholder(node)
            elif node.op == "call_function":
                op = program.op(node)
                new = _absorbed(op, rewriter, analysis)
                changed |= new is not None
                rewriter.env[node] = new or rewriter.copy(node)
        rewriter.output()
        if not changed:
            return Result(program, False)
        absorbed = rewriter.finish()
        names = {old.name: new.name for old, new in rewriter.env.items()}
        return Result(absorbed.replace(analysis=analysis.renamed(names, absorbed)), True)


def _absorbed(op: Op, rewriter: Rewriter, analysis: Analysis):  # type: ignore[no-untyped-def]
    rule = rule_for(op)
    if not isinstance(rule, ContractionRule) or op.info is None:
        return None
    if is_constant(op.program, op.node, analysis.facts) or analysis.keep.is_empty(op.node):
        return None
    return rule.absorb(op, rewriter, analysis.facts_of(op), analysis.keep)
