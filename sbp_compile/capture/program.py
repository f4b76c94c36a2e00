"""ExportedProgram to Program: constants to float64, dtype literals with them, inputs with two example shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from passes.ir.program import Input, Origin, Program
from sbp_compile.capture.export import quiet_export
from sbp_compile.errors import UnsupportedModelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def program_from_export(exported: ExportedProgram) -> Program:
    """The Program of an exported program (in the ATen dialect that `run_decompositions({})` leaves).

    Raises UnsupportedModelError where the graph mutates buffers or inputs.
    """
    with quiet_export():
        exported = exported.run_decompositions({})
    graph = fx.Graph()
    constants: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    inputs: list[Input] = []
    env: dict[fx.Node, Any] = {}
    hints = SizeHints(exported)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is not InputKind.USER_INPUT:
                value = _tensor_of(exported, spec)
                constants[spec.target], dtypes[spec.target] = _widened(value), value.dtype
                env[node] = graph.create_node("get_attr", spec.target, (), {})
            elif isinstance(spec.arg, TensorArgument):
                value = node.meta["val"]
                inputs.append(Input(node.name, value.dtype, hints.sizes(value, 0), hints.sizes(value, 1)))
                env[node] = graph.create_node("placeholder", node.name, (), {}, name=node.name)
                env[node].meta = _meta(node)
            else:
                env[node] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            env[node] = _attribute(exported, node, graph, constants, dtypes)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            args, kwargs = _widened_literals(args), _widened_literals(kwargs)
            env[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
            env[node].meta = _meta(node)
    graph.create_node("output", "output", (tuple(_results(exported, env)),), {}, name="output")
    return Program(graph, constants, dtypes, tuple(inputs))


def _attribute(
    exported: ExportedProgram,
    node: fx.Node,
    graph: fx.Graph,
    constants: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
) -> fx.Node:
    value: Any = exported.graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"the graph holds control flow ({node.name}): branches on data cannot be compiled; "
            "export the branch that is used"
        )
    constants[str(node.target)], dtypes[str(node.target)] = _widened(value), value.dtype
    return graph.create_node("get_attr", str(node.target), (), {})


def _results(exported: ExportedProgram, env: dict[fx.Node, Any]) -> list[Any]:
    output = next(iter(reversed(exported.graph.nodes)))
    results = []
    for spec, value in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(
                f"the model changes its state while it runs ({spec.kind.name.lower()} {spec.target!r}); "
                "compile a version that only computes outputs"
            )
        results.append(env[value] if isinstance(value, fx.Node) else value)
    return results


def _tensor_of(exported: ExportedProgram, spec: Any) -> Tensor:
    if spec.target in exported.state_dict:
        return exported.state_dict[spec.target].detach()
    value = exported.constants.get(spec.target)
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(f"constant {spec.target!r} is a {type(value).__name__}, expected a tensor")
    return value.detach()


def _widened(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.to(torch.float64) if value.dtype in FLOATS else value.clone()


def _widened_literals(value: Any) -> Any:
    """dtype literals follow the constants to float64; devices follow them to the CPU."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in FLOATS else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return type(value)(_widened_literals(item) for item in value)
    if isinstance(value, dict):
        return {key: _widened_literals(item) for key, item in value.items()}
    return value


def _meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {"origin": Origin(node.name)}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        meta["dtype"] = value.dtype
    stack = node.meta.get("nn_module_stack")
    if stack:
        meta["module"] = list(stack.values())[-1][0]
    return meta


class SizeHints:
    """Two admissible values for every symbolic size: small for a leading axis, multiples of 32 for the others."""

    def __init__(self, exported: ExportedProgram) -> None:
        self._ranges = exported.range_constraints
        self._values: dict[Any, tuple[int, int]] = {}

    def sizes(self, value: Tensor, which: int) -> tuple[int, ...]:
        return tuple(self._size(size, axis == 0, which) for axis, size in enumerate(value.shape))

    def _size(self, size: Any, leading: bool, which: int) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        return int(expression.subs({symbol: self._symbol(symbol, leading)[which] for symbol in symbols}))

    def _symbol(self, symbol: Any, leading: bool) -> tuple[int, int]:
        if symbol not in self._values:
            count = len(self._values)
            first, second = (2 + 2 * count, 3 + 2 * count) if leading else (96 + 64 * count, 128 + 64 * count)
            self._values[symbol] = self._admissible(symbol, first, second)
        return self._values[symbol]

    def _admissible(self, symbol: Any, first: int, second: int) -> tuple[int, int]:
        allowed = self._ranges.get(symbol)
        if allowed is None:
            return first, second
        low, high = int(allowed.lower), allowed.upper
        if first < low:
            first, second = low, low + 1
        if second > high:
            first, second = int(high) - 1, int(high)
        return first, second
