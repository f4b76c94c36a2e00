"""The dense baseline: the plain architecture at full width, without any noise arithmetic.

It is for sizes and timings alone: masked channels hold zero rows, and a multiplication by a mask that could
not be folded into a weight is dropped, since the network that was trained with it would not have it.
"""

from __future__ import annotations

import torch
from torch import fx

from passes import Canonicalize, FoldScales, Pipeline, RemoveDead
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten


def plain_architecture(program: Program) -> Program:
    """Return the Program with its scales folded and the remaining masks dropped."""
    folding = Pipeline((FoldScales(), Canonicalize()), name="fold", repeat=True)
    folded = Pipeline((Canonicalize(), folding, RemoveDead()), name="dense")(program).program
    rewriter = Rewriter(folded)
    for node in folded.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            masked = _masked_operand(folded, node)
            rewriter.env[node] = rewriter.copy(node) if masked is None else rewriter.value(masked)
    rewriter.output()
    return rewriter.finish()


def _masked_operand(program: Program, node: fx.Node) -> fx.Node | None:
    """Return x where the call is x * mask with zeros in the mask."""
    if node.target is not aten.mul.Tensor or node not in program.infos:
        return None
    first, second = node.args
    for x, other in ((first, second), (second, first)):
        mask = program.constant(other)
        if not isinstance(x, fx.Node) or mask is None or not bool((mask == 0).any()):
            continue
        if program.infos[x].sizes == program.infos[node].sizes:
            return x
    return None
