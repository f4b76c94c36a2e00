"""ExportedProgram to Program: constants and dtype literals to float64, inputs with two example shapes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from passes.ir import schema
from passes.ir.program import Input, Origin, Program
from sbp_compile.capture.export import quiet_export
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def program_from_export(exported: ExportedProgram) -> Program:
    """Return the Program of an exported program, in the ATen dialect that `run_decompositions({})` leaves.

    Raises UnsupportedModelError where the graph mutates buffers or inputs, branches on data, draws random
    numbers, or computes with values that are not finite: NaN anywhere, infinity in a parameter. (An infinite
    buffer is what an attention mask looks like.)
    """
    with quiet_export():
        exported = _decomposed(exported)
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
                inputs.append(
                    Input(node.name, value.dtype, *(hints.sizes(value, which) for which in range(3)))
                )
                env[node] = graph.create_node("placeholder", node.name, (), {}, name=node.name)
                env[node].meta = _meta(node)
            else:
                env[node] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            env[node] = _attribute(exported, node, graph, constants, dtypes)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            args, kwargs = _widened_literals(args), _widened_literals(kwargs)
            env[node] = _call(graph, node, args, kwargs)
    results = tuple(_results(exported, env))
    graph.create_node("output", "output", (results,), {}, name="output")
    _refuse_broken_values(graph, constants, parameters=set(exported.graph_signature.parameters))
    return Program(graph, constants, dtypes, tuple(inputs), output_dtypes=_output_dtypes(exported))


def _decomposed(exported: ExportedProgram) -> ExportedProgram:
    try:
        decomposed: ExportedProgram = exported.run_decompositions({})
        return decomposed
    except Exception as error:  # whatever torch does not like about the user's model
        raise UnsupportedModelError(
            f"torch {torch.__version__} cannot bring the model into its ATen dialect ({error})"
        ) from error


def _call(graph: fx.Graph, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> fx.Node:
    """Copy a call to the new graph; a result that torch's default dtype decides on is cast to float64.

    Such are `ones(2)`, or a quotient of integers: nothing among the arguments would make it float64.
    """
    if schema.is_random(node):
        raise UnsupportedModelError(
            f"{node.name} ({node.target}) draws random numbers in eval mode, so there is no one function to "
            "compile; take it out of the model's forward or pass its result as an input"
        )
    strided = node.args[0] if node.target is aten.as_strided.default else None
    if isinstance(strided, fx.Node) and not strided.meta["val"].is_contiguous():
        raise UnsupportedModelError(
            f"{node.name} ({node.target}) reads the memory of a tensor that is not contiguous, so its result "
            "depends on how that tensor was computed; call contiguous() in front of it"
        )
    if node.target is aten.rms_norm.default and schema.bind(node)["eps"] is None:
        args, kwargs = args[:3], {**kwargs, "eps": _smallest_step(node)}
    made = _takes_default_dtype(node)
    call = graph.create_node(
        "call_function", node.target, args, kwargs, name=f"{node.name}_made" if made else node.name
    )
    if made:
        call = graph.create_node(
            "call_function", aten._to_copy.default, (call,), {"dtype": torch.float64}, name=node.name
        )
    call.meta = _meta(node)
    return call


def _smallest_step(node: fx.Node) -> float:
    """Return the eps that an RMS norm without one takes: that of the dtype it computes in."""
    dtype = node.meta["val"].dtype
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _takes_default_dtype(node: fx.Node) -> bool:
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    literals = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]
    result = node.meta.get("val")
    return (
        isinstance(result, Tensor)
        and result.is_floating_point()
        and not any(_is_floating(value) for value in values)
        and not any(value.is_floating_point for value in literals)
    )


def _refuse_broken_values(graph: fx.Graph, constants: dict[str, Tensor], parameters: set[str]) -> None:
    for name in _read(graph):
        value = constants[name]
        bad = ~torch.isfinite(value) if name in parameters else torch.isnan(value)
        number = int(bad.sum())
        if number:
            kind = "NaN or infinite" if name in parameters else "NaN"
            raise UnsupportedModelError(
                f"parameter or buffer {name!r} has {number} of {value.numel()} values that are {kind}: "
                "nothing exact can be made of it; was the model saved after its training diverged?"
            )


def _read(graph: fx.Graph) -> list[str]:
    """Return the names of the constants that some output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return list(
        dict.fromkeys(str(node.target) for node in graph.nodes if node in live and node.op == "get_attr")
    )


def _is_floating(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_floating(item) for item in value)
    return isinstance(value, Tensor) and value.is_floating_point()


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


def _output_dtypes(exported: ExportedProgram) -> tuple[torch.dtype | None, ...]:
    output = next(iter(reversed(exported.graph.nodes)))
    values = [value.meta.get("val") if isinstance(value, fx.Node) else None for value in output.args[0]]
    return tuple(value.dtype if isinstance(value, Tensor) else None for value in values)


def _tensor_of(exported: ExportedProgram, spec: Any) -> Tensor:
    value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise UnsupportedModelError(f"constant {spec.target!r} is a {kind}, expected a tensor")
    return value.detach()


def _widened(value: Tensor) -> Tensor:
    """Copy a tensor of the user's, who may go on training it, to float64 on the CPU."""
    dtype = torch.float64 if value.dtype in FLOATS else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def _widened_literals(value: Any) -> Any:
    """Make dtype literals follow the constants to float64, and devices follow them to the CPU."""
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
    """Three admissible values for every symbolic size, other ones for every symbol.

    Small ones for a leading axis, multiples of 32 for the others; the third is far from the first two.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self._ranges = exported.range_constraints
        self._values: dict[Any, tuple[int, ...]] = {}

    def sizes(self, value: Tensor, which: int) -> tuple[int, ...]:
        """Return an admissible shape of a value: the first, second or third (`which` = 0, 1, 2)."""
        return tuple(self._size(size, axis == 0, which) for axis, size in enumerate(value.shape))

    def _size(self, size: Any, leading: bool, which: int) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        return int(expression.subs({symbol: self._symbol(symbol, leading)[which] for symbol in symbols}))

    def _symbol(self, symbol: Any, leading: bool) -> tuple[int, ...]:
        if symbol not in self._values:
            count = len(self._values)
            wanted = (2 + 2 * count, 3 + 2 * count, 2003 + 10 * count)
            if not leading:
                wanted = (96 + 64 * count, 128 + 64 * count, 32 * (113 + 7 * count))
            self._values[symbol] = self._admissible(symbol, wanted)
        return self._values[symbol]

    def _admissible(self, symbol: Any, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Return the wanted values where the symbol's range allows them, else others.

        No other symbol has one of them under the same shape, or at least not all of them.
        """
        taken = set(self._values.values())

        def is_apart(triple: tuple[int, ...]) -> bool:
            return all(
                size not in sizes for size, sizes in zip(triple, zip(*taken, strict=True), strict=False)
            )

        allowed = self._ranges.get(symbol)
        low, high = (1, None) if allowed is None else (max(int(allowed.lower), 1), allowed.upper)
        fits = high is None or (low <= min(wanted) and max(wanted) <= high)
        if fits and is_apart(wanted):
            return wanted
        top = int(high) if high is not None and high <= low + 4096 else low + 4096
        ends = [*range(max(low, 2), min(low + 8, top) + 1), *range(max(low, top - 8), top + 1)]
        triples = [
            triple
            for triple in itertools.product(ends, ends, reversed(ends))
            if triple[0] != triple[1] and triple not in taken
        ]
        return next(filter(is_apart, triples), triples[0] if triples else wanted)
