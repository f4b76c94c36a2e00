"""Program to a torch module: constants rounded once, dtype literals that follow the module's dtype."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.ir.control import ControlFlow
from passes.ir.program import Program
from sbp_compile.capture.call import Call
from sbp_compile.emit.branches import emit_control_flow
from sbp_compile.emit.literals import ANCHOR, complex_dtype, follow_anchor, has_float_literal, narrowed
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
SMALLEST_LARGEST = 2**24 * SMALLEST_NORMAL


class CompiledModule(nn.Module):
    """The small network with the original's call signature and output structure; `compiled_module` makes it.

    An ordinary module: it can be copied, moved, cast and exported again; train and eval mode are the same.
    Arguments that are no tensors (numbers, None) were fixed at capture and must be given as they were.
    """

    def __init__(self, network: fx.GraphModule, call: Call) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs; `InputError` for a call that is structured otherwise than the captured one."""
        return self._call.nest_results(self.network(*self._call.tensors(args, kwargs)))

    def __reduce__(self) -> tuple[Any, ...]:
        return compiled_module, (self.network, self._call), self.__dict__


def compiled_module(network: fx.GraphModule, call: Call) -> CompiledModule:
    """Return the module for an emitted network.

    Its class is made for it: `forward` shows the original's parameters, from which exporters take the names
    of the inputs.
    """

    def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        return CompiledModule.forward(self, *args, **kwargs)

    forward.__signature__ = call.signature()  # type: ignore[attr-defined]  # inspect reads it, mypy does not know
    name = CompiledModule.__name__
    made: CompiledModule = type(name, (CompiledModule,), {"forward": forward})(network, call)
    return made


def emission_dtype(program: Program) -> torch.dtype:
    """Return the one floating-point dtype of the emitted network.

    The dtype of most of its weights, widened to the narrowest of its inputs: neither a stray buffer nor an input
    that the network casts first decides for all.
    """
    numbers: dict[torch.dtype, int] = {}
    for name, dtype in program.dtypes.items():
        if dtype.is_floating_point:
            numbers[dtype] = numbers.get(dtype, 0) + program.constants.held(name).numel()
    inputs = [entry.dtype for entry in program.inputs if entry.dtype.is_floating_point]
    found = [max(numbers, key=lambda dtype: (numbers[dtype], dtype.itemsize))] if numbers else []
    found += [min(inputs, key=lambda dtype: dtype.itemsize)] if inputs else []
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def emit_graph_module(program: Program, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Return a GraphModule with one positional argument for each input and a tuple of outputs.

    Constants become parameters (floating point) and buffers (the rest), copied and rounded to `dtype`
    (default: the model's own); what is complex is as wide. Float32 weights that are subnormal are flushed to zero where
    that is no more than a rounding of the largest beside them. Raises `UnsupportedModelError` where a finite value is
    infinite after rounding.
    """
    dtype = emission_dtype(program) if dtype is None else dtype
    names = _attribute_names(program)
    root = {names[name]: _rounded(name, value, dtype) for name, value in program.constants.items()}
    module = fx.GraphModule(nn.Module(), fx.Graph())
    graph, anchor_is_used = _emission_graph(program, names, dtype, module)
    for name, value in root.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)
    if anchor_is_used:
        module.register_buffer(ANCHOR, torch.zeros(1, dtype=dtype))
    module.graph = graph
    module.recompile()
    return module


def _attribute_names(program: Program) -> dict[str, str]:
    """Return an attribute name for each constant: the path in the original module with dots replaced."""
    taken = {ANCHOR, *dir(fx.GraphModule), *vars(nn.Module())}
    names = {}
    for name in program.constants:
        wanted = name.replace(".", "_")
        if re.fullmatch(r"val_\d+", wanted):  # torch's ONNX exporter gives such names to values of its own
            wanted = f"constant_{wanted}"
        while wanted in taken:
            wanted += "_"
        names[name] = wanted
        taken.add(wanted)
    return names


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_complex():
        dtype = complex_dtype(dtype)
    elif not value.is_floating_point():
        return _laid_out(value, value.dtype)
    rounded = _laid_out(value, dtype)
    overflown = int((torch.isinf(rounded) & torch.isfinite(value)).sum())
    if overflown:
        raise UnsupportedModelError(
            f"constant {name!r} has {overflown} of {value.numel()} values beyond the range of {dtype} "
            f"(largest magnitude {float(value.abs().max()):.3g}); compile the model in a wider dtype"
        )
    if value.is_complex():
        return rounded
    if dtype == torch.float32 and bool((rounded.abs() >= SMALLEST_LARGEST).any()):
        rounded[rounded.abs() < SMALLEST_NORMAL] = 0.0
    return nn.Parameter(rounded)


def _laid_out(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the standard order of entries.

    Weights with other strides, as slices and permutations leave them, make torch lay out the values behind them in
    another order as well, and the exporters write calls for that.
    """
    return torch.empty(value.shape, dtype=dtype).copy_(value)


def _emission_graph(
    program: Program, names: dict[str, str], dtype: torch.dtype, module: nn.Module
) -> tuple[fx.Graph, bool]:
    """Return the graph over the attributes `names`, and whether it reads the anchor; branches go to `module`."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    shared: dict[str, fx.Node] = {}

    def attribute(name: str) -> fx.Node:
        if name not in shared:
            shared[name] = graph.create_node("get_attr", name, (), {})
        return shared[name]

    def anchor() -> fx.Node:
        return attribute(ANCHOR)

    given = {entry.name: entry.dtype for entry in program.inputs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.create_node("placeholder", node.target, (), {}, name=node.name)
            if given[str(node.target)].is_floating_point and given[str(node.target)] != dtype:
                args = (env[node], anchor())
                env[node] = graph.create_node("call_function", aten.type_as.default, args, {})
        elif node.op == "get_attr":
            env[node] = attribute(names[str(node.target)])
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            args, kwargs = narrowed(args, dtype), narrowed(kwargs, dtype)
            if isinstance(node.target, ControlFlow):
                env[node] = emit_control_flow(node.target, graph, module, args, anchor, node.name)
            elif has_float_literal((args, kwargs)):
                env[node] = follow_anchor(graph, node, args, kwargs, anchor())
            else:
                env[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    graph.create_node("output", "output", (_emitted_outputs(program, graph, env, dtype),), {}, name="output")
    return graph, ANCHOR in shared


def _emitted_outputs(
    program: Program, graph: fx.Graph, env: dict[fx.Node, Any], dtype: torch.dtype
) -> tuple[Any, ...]:
    """Return the outputs in the new graph, in the dtypes of the original's.

    A constant leaves as a copy, which the caller may write into.
    """
    results = list(fx.node.map_arg(program.outputs, env.__getitem__))
    for position, wanted in enumerate(program.output_dtypes):
        if wanted is None or not (wanted.is_floating_point or wanted.is_complex):
            continue
        if wanted != (complex_dtype(dtype) if wanted.is_complex else dtype):
            results[position] = graph.create_node(
                "call_function", aten._to_copy.default, (results[position],), {"dtype": wanted}
            )
    for position, value in enumerate(results):
        if isinstance(value, fx.Node) and value.op == "get_attr":
            results[position] = graph.create_node("call_function", aten.clone.default, (value,), {})
    return tuple(results)
