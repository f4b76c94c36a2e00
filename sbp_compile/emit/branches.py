"""Control flow of a Program to the operator that torch has for it, with branches that follow the module's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from passes.ir.control import WHILE_LOOP, ControlFlow
from sbp_compile.emit.literals import ANCHOR, follow_anchor, has_float_literal

aten = torch.ops.aten


def emit_control_flow(
    flow: ControlFlow,
    graph: fx.Graph,
    root: nn.Module,
    args: tuple[Any, ...],
    anchor: Callable[[], fx.Node],
    name: str,
) -> fx.Node:
    """Return the call in `graph`; its branches become submodules of `root`.

    Where a branch creates values of a dtype, each takes the anchor as one more operand, so that they follow a cast.
    """
    follows = any(map(_creates_floats, flow.branches))
    branches = []
    for number, branch in enumerate(flow.branches):
        is_condition = flow.operator is WHILE_LOOP and number == 0
        attribute = f"{name}_branch_{number}"
        root.add_module(attribute, _emitted_branch(branch, follows, is_condition))
        branches.append(graph.create_node("get_attr", attribute, (), {}))
    *rest, operands = flow.filled(args, tuple(branches))
    operands = (*operands, anchor()) if follows else operands
    return graph.create_node("call_function", flow.operator, (*rest, operands), {}, name=name)


def _creates_floats(branch: fx.GraphModule) -> bool:
    for node in branch.graph.nodes:
        if isinstance(node.target, ControlFlow) and any(map(_creates_floats, node.target.branches)):
            return True
        if has_float_literal((node.args, node.kwargs)):
            return True
    return any(value.is_floating_point() for value in branch.buffers())


def _emitted_branch(branch: fx.GraphModule, follows: bool, is_condition: bool) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in branch.graph.find_nodes(op="placeholder"):
        env[node] = graph.create_node("placeholder", str(node.target), (), {}, name=node.name)
    anchor = graph.create_node("placeholder", ANCHOR, (), {}, name=ANCHOR) if follows else None
    for node in branch.graph.nodes:
        if node.op == "get_attr":
            env[node] = _emitted_constant(graph, root, str(node.target), branch, anchor)
        elif node.op == "call_function":
            env[node] = _emitted_call(graph, root, node, env, anchor)
        elif node.op == "output":
            results = tuple(_own(graph, old, env) for old in node.args[0])
            graph.output(results[0] if is_condition else results)
    return fx.GraphModule(root, graph)


def _emitted_constant(
    graph: fx.Graph, root: nn.Module, name: str, branch: fx.GraphModule, anchor: fx.Node | None
) -> fx.Node:
    value = branch.get_buffer(name)
    root.register_buffer(name, value.clone())
    constant = graph.create_node("get_attr", name, (), {})
    if not value.is_floating_point():
        return constant
    return graph.create_node("call_function", aten.type_as.default, (constant, anchor), {})


def _emitted_call(
    graph: fx.Graph, root: nn.Module, node: fx.Node, env: dict[fx.Node, Any], anchor: fx.Node | None
) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    if isinstance(node.target, ControlFlow):
        return emit_control_flow(node.target, graph, root, args, lambda: _given(anchor), node.name)
    if has_float_literal((args, kwargs)):
        return follow_anchor(graph, node, args, kwargs, _given(anchor))
    return graph.create_node("call_function", node.target, args, kwargs, name=node.name)


def _given(anchor: fx.Node | None) -> fx.Node:
    assert anchor is not None
    return anchor


def _own(graph: fx.Graph, result: Any, env: dict[fx.Node, Any]) -> Any:
    """Return a result as a value of its own: the operators refuse an operand, and an idle cast gives its operand."""
    if not isinstance(result, fx.Node):
        return result
    if "dtype" not in result.meta or result.target is aten.clone.default:
        return env[result]
    return graph.create_node("call_function", aten.clone.default, (env[result],), {})
