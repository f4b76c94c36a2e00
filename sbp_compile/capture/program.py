"""ExportedProgram to Program: constants and dtype literals to float64, inputs with two example shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from passes.ir.constants import Constants
from passes.ir.program import Input, Program
from sbp_compile.capture.branches import attribute, copy_control_flow, holds_branches
from sbp_compile.capture.composites import composites
from sbp_compile.capture.dialect import copy_call, provenance, widened
from sbp_compile.capture.export import quiet_export
from sbp_compile.errors import UnsupportedModelError

# A factor that is infinite turns the 0 of a channel that is off into NaN.
_CONVOLUTIONS = (
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_NORMS = (
    "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm", "group_norm", "rms_norm",
    "instance_norm",
)  # fmt: skip
_PRODUCTS = (
    "mul", "div", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "lstm", "gru", "rnn_tanh", "rnn_relu",
)  # fmt: skip
_SCALING = frozenset((*_CONVOLUTIONS, *_NORMS, *_PRODUCTS))
# What casts leave behind: it names a dtype that need not hold in float64, and returns nothing.
_CHECKS = frozenset({torch.ops.aten._assert_tensor_metadata.default})


def program_from_export(
    exported: ExportedProgram,
    axis_names: Mapping[str, Mapping[int, str]] | None = None,
    labels: Mapping[str, str] | None = None,
    *,
    copy: bool = True,
) -> Program:
    """Return the Program of an exported program, in torch's ATen dialect, less its composites.

    `axis_names`: of dynamic axes, by input and axis; `labels`: the user's names of inputs, by the program's.
    `copy`: the program's tensors, whose owner may go on changing them.

    Raises UnsupportedModelError where the graph mutates buffers or inputs, draws random
    numbers, or computes with values that are not finite: NaN anywhere, infinity in a parameter, or in anything that
    values of the network are multiplied with. (An infinite buffer that is added is what an attention mask looks like.)
    """
    with quiet_export():
        exported = decomposed(exported)
    graph = fx.Graph()
    constants = Constants()
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
                constants.put(spec.target, widened(value, copy=copy))
                dtypes[spec.target] = value.dtype
                env[node] = graph.create_node("get_attr", spec.target, (), {})
            elif isinstance(spec.arg, TensorArgument):
                value = node.meta["val"]
                sizes = [hints.sizes(value, which) for which in range(3)]
                names = tuple(sorted((axis_names or {}).get(node.name, {}).items()))
                label = (labels or {}).get(node.name, "")
                inputs.append(Input(node.name, value.dtype, sizes[0], sizes[1], sizes[2], names, label))
                env[node] = graph.create_node("placeholder", node.name, (), {}, name=node.name)
                env[node].meta = provenance(node)
            else:
                env[node] = getattr(spec.arg, "value", None)
        elif node.op == "get_attr":
            env[node] = _attribute(exported, node, graph, constants, dtypes, copy)
        elif node.op == "call_function" and node.target not in _CHECKS:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if holds_branches(node, args):
                env[node] = copy_control_flow(graph, node, args)
            else:
                env[node] = copy_call(graph, node, args, kwargs)
    results = tuple(_results(exported, env))
    graph.create_node("output", "output", (results,), {}, name="output")
    _refuse_broken_values(graph, constants, parameters=set(exported.graph_signature.parameters))
    return Program(graph, constants, dtypes, tuple(inputs), output_dtypes=_output_dtypes(exported))


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """Return the program in the dialect that Programs are made of; UnsupportedModelError where torch cannot."""
    try:
        result: ExportedProgram = exported.run_decompositions(dict(composites()))
        return result
    except Exception as error:  # whatever torch does not like about the user's model
        raise UnsupportedModelError(
            f"torch {torch.__version__} cannot bring the model into its ATen dialect ({error})"
        ) from error


def _refuse_broken_values(graph: fx.Graph, constants: Constants, parameters: set[str]) -> None:
    factors = parameters | _factors(graph)
    for name in read_constants(graph):
        if constants.held(name).is_finite:
            continue
        value = constants[name]
        bad = ~torch.isfinite(value) if name in factors else torch.isnan(value)
        number = int(bad.sum())
        if number:
            first = bad.nonzero()[0].tolist()
            shown = f"{name}{first or ''} is {value[tuple(first)].item()}"
            kind = "NaN or infinite" if name in factors else "NaN"
            raise UnsupportedModelError(
                f"parameter or buffer {name!r} has {number} of {value.numel()} values that are {kind} ({shown}): "
                "nothing exact can be made of it, even where the channel is off, since 0 times that is NaN; was the "
                "model saved after its training diverged?"
            )


def _factors(graph: fx.Graph) -> set[str]:
    """Return the names of the constants that something which depends on an input is multiplied with."""
    varying: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "placeholder" or any(operand in varying for operand in operands):
            varying.add(node)
            packet = getattr(node.target, "overloadpacket", None)
            if getattr(packet, "__name__", "") in _SCALING:
                found.update(str(operand.target) for operand in operands if operand.op == "get_attr")
    return found


def read_constants(graph: fx.Graph) -> list[str]:
    """Return the names of the constants that some output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return list(
        dict.fromkeys(str(node.target) for node in graph.nodes if node in live and node.op == "get_attr")
    )


def _attribute(
    exported: ExportedProgram,
    node: fx.Node,
    graph: fx.Graph,
    constants: Constants,
    dtypes: dict[str, torch.dtype],
    copy: bool,
) -> fx.Node | fx.GraphModule:
    """Return a constant of the graph, or the graph of a branch."""
    value = attribute(exported.graph_module, str(node.target))
    if isinstance(value, fx.GraphModule):
        return value
    constants.put(str(node.target), widened(value, copy=copy))
    dtypes[str(node.target)] = value.dtype
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
