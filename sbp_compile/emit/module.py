"""Program to a torch module: constants rounded once, dtype literals that follow the module's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.ir.program import Program

aten = torch.ops.aten
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class CompiledModule(nn.Module):
    """The small network with the original's call signature and output structure.

    An ordinary module: it can be copied, moved, cast and exported again; train and eval mode are the same.
    """

    def __init__(self, graph_module: fx.GraphModule, in_spec: Any, out_spec: Any, inputs: tuple[int, ...]) -> None:
        super().__init__()
        self.network = graph_module
        self._in_spec = in_spec
        self._out_spec = out_spec
        self._inputs = inputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._in_spec.child(1).context if hasattr(self._in_spec, "child") else list(kwargs)
        ordered = {name: kwargs[name] for name in names if name in kwargs}
        leaves = self._in_spec.flatten_up_to((args, ordered))
        results = self.network(*(leaves[position] for position in self._inputs))
        return self._out_spec.unflatten(list(results))


def emission_dtype(program: Program) -> torch.dtype:
    """The one floating-point dtype of the emitted network: its inputs', else its constants' widest."""
    for entry in program.inputs:
        if entry.dtype.is_floating_point:
            return entry.dtype
    floats = [dtype for dtype in program.dtypes.values() if dtype.is_floating_point]
    result = floats[0] if floats else torch.float32
    for dtype in floats[1:]:
        result = torch.promote_types(result, dtype)
    return result


def emit_graph_module(program: Program, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """A GraphModule with one positional argument for each input and a tuple of outputs.

    Constants become parameters (floating point) and buffers (the rest) of dtype `dtype` (default: the model's own).
    Float32 weights that are subnormal are flushed to zero.
    """
    dtype = emission_dtype(program) if dtype is None else dtype
    root: dict[str, Any] = {}
    names = {name: name.replace(".", "_") for name in program.constants}
    if len(set(names.values())) != len(names):
        names = {name: f"constant_{position}" for position, name in enumerate(program.constants)}
    for name, value in program.constants.items():
        root[names[name]] = _rounded(value, dtype)
    anchor = "dtype_anchor"
    graph = _emission_graph(program, names, anchor, root, dtype)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name, value in root.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)
    module.graph = graph
    module.recompile()
    return module


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if dtype == torch.float32:
        rounded = torch.where(rounded.abs() < SMALLEST_NORMAL, torch.zeros((), dtype=dtype), rounded)
    return nn.Parameter(rounded)


def _emission_graph(
    program: Program, names: dict[str, str], anchor: str, root: dict[str, Any], dtype: torch.dtype
) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    shared: dict[str, fx.Node] = {}

    def attribute(name: str) -> fx.Node:
        if name not in shared:
            shared[name] = graph.create_node("get_attr", name, (), {})
        return shared[name]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.create_node("placeholder", node.target, (), {}, name=node.name)
        elif node.op == "get_attr":
            env[node] = attribute(names[str(node.target)])
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if _has_float_literal((args, kwargs)):
                root.setdefault(anchor, torch.zeros(1, dtype=dtype))
                env[node] = _follow_anchor(graph, node, args, kwargs, attribute(anchor))
            else:
                env[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        else:
            results = fx.node.map_arg(node.args[0], env.__getitem__)
            graph.create_node("output", "output", (tuple(results),), {}, name="output")
    return graph


def _has_float_literal(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point
    if isinstance(value, (list, tuple)):
        return any(_has_float_literal(item) for item in value)
    return isinstance(value, dict) and any(_has_float_literal(item) for item in value.values())


CREATIONS = {
    aten.full.default: aten.new_full.default,
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
}


def _follow_anchor(graph: fx.Graph, node: fx.Node, args: Any, kwargs: dict[str, Any], anchor: fx.Node) -> fx.Node:
    """A call with a floating-point dtype literal, rewritten to take the dtype from the anchor at run time."""
    if node.target in CREATIONS:
        return graph.create_node("call_function", CREATIONS[node.target], (anchor, *args), {}, name=node.name)
    if node.target in {aten._to_copy.default, aten.to.dtype}:
        return graph.create_node("call_function", aten.type_as.default, (args[0], anchor), {}, name=node.name)
    plain = {key: value for key, value in kwargs.items() if not isinstance(value, torch.dtype)}
    plain_args = tuple(None if isinstance(value, torch.dtype) else value for value in args)
    result = graph.create_node("call_function", node.target, plain_args, plain, name=node.name)
    return graph.create_node("call_function", aten.type_as.default, (result, anchor), {})
