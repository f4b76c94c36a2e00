"""Recurrent networks of several levels as one call for each level.

    y, h_n, c_n = lstm(x, (h_0, c_0), parameters)  of L levels, D directions
    y_l, h_l, c_l = lstm(y_{l-1}, (h_0, c_0)[l D : (l + 1) D], parameters of level l),  y = y_L,  h_n = cat(h_1 .. h_L)

Dropout between levels is not run in eval mode. The units between two levels are then like any others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.ir.program import Op
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten

RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def unstack(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """The call of the last level, behind those of the others; None where there is one level."""
    levels = op.args["num_layers"]
    parameters = rewriter.map(op.args["params"])
    if levels == 1 or op.args["train"] or len(parameters) % levels:
        return None
    x, each = rewriter.value(op.args["input"]), len(parameters) // levels
    rest = [op.args[name] for name in ("has_biases", "bidirectional", "batch_first")]
    for level in range(levels):
        own = parameters[level * each : (level + 1) * each]
        args = (x, _states(op, rewriter, level), own, rest[0], 1, 0.0, False, *rest[1:])
        last = level == levels - 1
        call = rewriter.call(op.target, args, like=op.node, step="" if last else f"level{level}")
        if not last:
            x = rewriter.call(operator.getitem, (call, 0), like=op.node, step=f"output{level}")
    return call


def _states(op: Op, rewriter: Rewriter, level: int) -> Any:
    directions = 2 if op.args["bidirectional"] else 1
    bounds = level * directions, (level + 1) * directions
    given = op.args["hx"]
    states = [
        rewriter.call(
            aten.slice.Tensor,
            (rewriter.value(state), 0, *bounds),
            like=op.node,
            step=f"state{number}_{level}",
        )
        for number, state in enumerate(given if isinstance(given, (list, tuple)) else [given])
    ]
    return states if isinstance(given, (list, tuple)) else states[0]


def last_states(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
    """One of the last states of a call that was taken apart: those of all levels; the output is that of the last."""
    levels, position = source.args["num_layers"], op.node.args[1]
    call: Any = rewriter.env[source.node]
    if levels == 1 or position == 0 or call.args[4] != 1:
        return None
    states = []
    for level in reversed(range(levels)):
        states.append(rewriter.call(operator.getitem, (call, position), like=op.node, step=f"level{level}"))
        call = call.args[0].args[0] if level else None
    return rewriter.call(aten.cat.default, (states[::-1], 0), like=op.node)
