"""Control flow of an exported graph: its operators with branches in float64, as a Program holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.ir.control import SUPPORTED, ControlFlow
from sbp_compile.capture.dialect import copy_call, provenance, widened, widened_literals
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten


def copy_control_flow(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    """Copy a call whose arguments hold branches (GraphModules) to the new graph.

    Raises UnsupportedModelError for an operator other than `cond` and `while_loop`, and for what a branch may not do.
    """
    if node.target not in SUPPORTED:
        names = " and ".join(map(str, SUPPORTED))
        raise UnsupportedModelError(
            f"the graph holds control flow of a kind that cannot be compiled ({node.name}: {node.target}); known are "
            f"{names}: write it with one of them, or export the branch that is used"
        )
    branches = tuple(_branch(value) for value in args if isinstance(value, fx.GraphModule))
    plain = (None if isinstance(value, fx.GraphModule) else value for value in args)
    rest = tuple(
        tuple(value) if isinstance(value, list) else value for value in plain
    )  # lists in a loaded file
    rest = _without_unread_operands(rest, branches)
    call = graph.create_node("call_function", ControlFlow(node.target, branches), rest, {}, name=node.name)
    call.meta = provenance(node)
    return call


def _without_unread_operands(args: tuple[Any, ...], branches: Sequence[fx.GraphModule]) -> tuple[Any, ...]:
    """Take the last operands that no branch reads from the call and from its branches, all but the first one."""
    *rest, operands = args
    inputs = [branch.graph.find_nodes(op="placeholder") for branch in branches]
    first = len(inputs[0]) - len(operands)
    kept = []
    for position, operand in enumerate(operands):
        nodes = [nodes[first + position] for nodes in inputs]
        if any(node.users for node in nodes) or (first + position == 0):
            kept.append(operand)
            continue
        for node in nodes:
            node.graph.erase_node(node)
    for branch in branches:
        branch.recompile()
    return (*rest, tuple(kept))


def holds_branches(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether a call has graphs among its arguments, or should have."""
    return node.target in SUPPORTED or any(isinstance(value, fx.GraphModule) for value in args)


def _branch(module: fx.GraphModule) -> fx.GraphModule:
    """Return the same graph with its constants and literals in float64."""
    root, graph = nn.Module(), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        _refuse_complex(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        if node.op == "placeholder":
            env[node] = graph.create_node("placeholder", str(node.target), (), {}, name=node.name)
        elif node.op == "get_attr":
            value = attribute(module, str(node.target))
            env[node] = value
            if isinstance(value, Tensor):
                name = f"constant_{len(list(root.buffers()))}"
                root.register_buffer(name, widened(value).read())
                env[node] = graph.create_node("get_attr", name, (), {})
        elif node.op == "output":
            results = args[0]
            graph.output(tuple(results) if isinstance(results, (tuple, list)) else (results,))
        elif holds_branches(node, args):
            env[node] = copy_control_flow(graph, node, args)
        elif node.target is aten.type_as.default:
            cast = {
                "dtype": widened_literals(node.meta["val"].dtype)
            }  # an operand less, and static all the same
            env[node] = graph.create_node(
                "call_function", aten._to_copy.default, args[:1], cast, name=node.name
            )
            env[node].meta = provenance(node)
        else:
            env[node] = copy_call(graph, node, args, kwargs)
    return fx.GraphModule(root, graph)


def _refuse_complex(node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_complex():
        raise UnsupportedModelError(
            f"{node.name} ({node.target}) is complex ({value.dtype}) inside a branch or a loop; compute with its real "
            "and imaginary parts there"
        )


def attribute(module: torch.nn.Module, path: str) -> Any:
    """Return what a module holds under a dotted path."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
