"""shrink_channels: every value, weight and size cut to its kept channels.

Needs an analysed Program whose removed constants were absorbed (analyze_channels, absorb_constants). Values that are
wholly known become constants; values of which nothing is kept are not emitted. A call with several results is emitted
by the first of its pieces that is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.ir.analysis import Analysis, is_constant
from passes.ir.pipeline import Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter
from passes.rules import PIECES, rule_for


@dataclass(frozen=True)
class ShrinkChannels:
    """The pass; it has no options."""

    name: str = "shrink_channels"

    def __call__(self, program: Program) -> Result:
        analysis = program.analysed()
        if not removes_anything(program, analysis):
            return Result(program, False)
        rewriter = Rewriter(program, analysis)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                rewriter.placeholder(node)
            elif node.op == "call_function":
                _emit(program, analysis, rewriter, node)
        rewriter.output()
        return Result(rewriter.finish(), True)


def removes_anything(program: Program, analysis: Analysis) -> bool:
    """Whether some call is a constant or loses entries."""
    for node, info in program.infos.items():
        if node.op != "call_function":
            continue
        if is_constant(program, node, analysis.facts) and not _is_expanded_constant(program, node):
            return True
        if not all(analysis.keep.is_full(node, axis) for axis in info.static_axes):
            return True
    return False


def _is_expanded_constant(program: Program, node: fx.Node) -> bool:
    return "expand" in str(node.target) and program.held(node.args[0]) is not None


def _emit(program: Program, analysis: Analysis, rewriter: Rewriter, node: fx.Node) -> None:
    op = program.op(node)
    if node not in program.infos:
        if rule_for(op) is not PIECES and all(
            _is_available(program, analysis, rewriter, operand) for operand in node.all_input_nodes
        ):
            rewriter.env[node] = rewriter.copy(node)
        return
    if is_constant(program, node, analysis.facts) or analysis.keep.is_empty(node):
        return
    rewriter.env[node] = rule_for(op).rewrite(op, rewriter)


def _is_available(program: Program, analysis: Analysis, rewriter: Rewriter, node: fx.Node) -> bool:
    """Whether a value was emitted, or is a constant that is emitted when it is asked for."""
    return node in rewriter.env or node.op == "get_attr" or is_constant(program, node, analysis.facts)
