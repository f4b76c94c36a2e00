"""Running a Program in float64, value by value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.program import Program

Observer = Callable[[fx.Node, Any], None]


def run(program: Program, inputs: Iterable[Tensor], observe: Observer | None = None) -> tuple[Any, ...]:
    """The flat outputs for the given inputs (floating-point ones are widened to float64).

    `observe` is called with every call's node and value in graph order. Values are freed after their
    last use, and constants are read when they are used.
    """
    feeds = {
        entry.name: value.to(entry.working_dtype) for entry, value in zip(program.inputs, inputs, strict=True)
    }
    env: dict[fx.Node, Any] = {}
    last_use = _last_uses(program)

    def value_of(node: fx.Node) -> Any:
        constant = program.constant(node)
        return env[node] if constant is None else constant

    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                return tuple(fx.node.map_arg(node.args[0], value_of))
            if node.op == "placeholder":
                env[node] = feeds[str(node.target)]
            elif node.op == "call_function":
                env[node] = schema.call(node, value_of)
                if observe is not None:
                    observe(node, env[node])
            for operand in last_use.get(node, ()):
                env.pop(operand, None)
    raise AssertionError("a graph ends with its output")


def _last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(program.nodes):
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                uses.setdefault(node, []).append(operand)
    return uses
