"""remove_dead: calls and constants that no output needs."""

from __future__ import annotations

from dataclasses import dataclass

from passes.ir.pipeline import Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter


@dataclass(frozen=True)
class RemoveDead:
    """The pass; it has no options."""

    name: str = "remove_dead"

    def __call__(self, program: Program) -> Result:
        rewriter = Rewriter(program)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                rewriter.placeholder(node)
            elif node.op == "call_function":
                rewriter.env[node] = rewriter.copy(node)
        rewriter.output()
        result = rewriter.finish()
        return Result(result, len(result.nodes) != len(program.nodes))
