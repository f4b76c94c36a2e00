"""Which entries of a module's parameters go with the units that are off, by the passes' analysis of its eval graph.

1. The module is captured with thresholds at 0: only units that are off count. Weights that are exactly 0 are taken
   for a tiny number, for training may change them: what counts as constant must be so whatever the weights are.
2. Facts, demand and keep sets are found under the rules of `in_place`.
3. Each use of a state tensor says which of its axes is which axis of a value: weights and biases of convolutions and
   linear layers, everything of a batch norm, vectors that are added or multiplied, the noise itself. A tensor used in
   any other way, or more than once, keeps the values around it whole, and the analysis is repeated.

Input channels that are constants other than 0 leave what they add behind: `Plan.added`, for the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import Canonicalize, Program
from passes.ir.analysis import Analysis, backward, forward, solve
from passes.ir.lattice import Facts, full_mask
from passes.rules import rule_for
from passes.rules.layer import SPATIAL_RANK, describe
from passes.rules.pointwise import Pointwise
from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export
from sbp_compile.errors import UnsupportedModelError
from sbp_compile.nn.in_place import added_constants, in_place_rule, is_depthwise
from sbp_compile.nn.noise import named_noise_layers

aten = torch.ops.aten

BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_SHAPE_ONLY = frozenset(
    {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten._to_copy.default, aten.alias.default,
     aten.detach.default, aten.expand.default, aten.clone.default}
)  # fmt: skip
_TINY = 1e-30


@dataclass
class Plan:
    """What goes.

    `cuts`: for each state tensor, by name, the entries that stay along some of its axes, bool. `added`: for the
    modules, by name, whose removed inputs were constants other than 0, what these added to each output channel,
    float64, at full width. `inputs`: for the same and all other modules that lose inputs, their axis counted from
    the end of the input's shape, and the channels that stay.
    """

    cuts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    def cut(self, name: str, axis: int, kept: Tensor) -> None:
        """Note which entries of a tensor stay along an axis; nothing where all do."""
        if not bool(kept.all()):
            self.cuts.setdefault(name, {})[axis] = kept


def plan_removal(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """Find what may go from `module`, which is left as it is. Raises UnsupportedModelError where that is not known."""
    with _only_off_counts(named_noise_layers(module).values()):
        program = program_from_export(export_module(module, args, kwargs))
    planner = _Planner(module, program)
    while not planner.analyse():
        pass
    return planner.plan()


@contextmanager
def _only_off_counts(layers: Any) -> Iterator[None]:
    saved = [(layer, layer.threshold) for layer in layers]
    try:
        for layer, _ in saved:
            layer.threshold = 0.0
        yield
    finally:
        for layer, threshold in saved:
            layer.threshold = threshold


@dataclass(frozen=True)
class _Use:
    """A call that reads state tensors: the axis of each, by name, that follows an axis of the call's result."""

    node: fx.Node
    axes: tuple[tuple[str, int, int], ...]  # (state name, its axis, the result's axis)


class _Planner:
    def __init__(self, module: nn.Module, captured: Program) -> None:
        self.module = module
        self.noise = named_noise_layers(module)
        self.state = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        self.captured = captured
        self.dependent = _dependent(captured)
        self.program = Canonicalize()(_without_zeros(captured, self.dependent)).program
        self.of_origin = {
            node.meta["origin"].name: node for node in self.program.calls() if node.meta.get("origin")
        }
        self.whole: set[fx.Node] = set()  # values of self.program that keep everything
        self.layers: list[fx.Node] = []  # convolutions and linear layers whose weights are state tensors
        self.uses: list[_Use] = []
        _refuse_unseen(module, captured)
        self._find_uses()

    def analyse(self) -> bool:
        """Find facts and keep sets; False where more values had to be made whole, and it must be done again."""
        infos = self.program.infos
        ops = {node: self.program.op(node) for node in self.program.calls()}
        facts = forward(self.program, ops, in_place_rule)
        for node in self.whole:
            facts[node.name] = Facts.unknown(infos[node])
        demand = backward(self.program, ops, facts, in_place_rule)
        for node in self.whole:
            demand[node.name] = full_mask(infos[node], True)
        keep = solve(self.program, ops, facts, demand, in_place_rule)
        self.analysis = Analysis(facts, demand, keep)
        before = len(self.whole)
        for node in (*self.layers, *(use.node for use in self.uses)):
            found = self._value(node)
            if found is None or keep.is_empty(found):
                self._make_whole(node)
        return len(self.whole) == before

    def plan(self) -> Plan:
        plan = Plan()
        for node in self.layers:
            self._plan_layer(plan, node)
        for use in self.uses:
            found = self._value(use.node)
            if found is not None:
                for name, own, axis in use.axes:
                    plan.cut(name, own, self.analysis.keep.get(found, axis))
        return plan

    def _plan_layer(self, plan: Plan, node: fx.Node) -> None:
        found = self.of_origin.get(node.name)
        if found is None:
            return
        this = describe(self.program.op(found))
        rows, columns = (self.analysis.keep.get(value, this.axis) for value in (found, this.x))
        weight, bias = _name_of(node.args[1]), _name_of(node.args[2] if len(node.args) > 2 else None)
        assert weight is not None
        out_axis = 1 if this.is_transposed else 0
        plan.cut(weight, out_axis, rows)
        if not is_depthwise(this):
            plan.cut(weight, 1 - out_axis, columns)
        if bias is not None:
            plan.cut(bias, 0, rows)
        if bool(columns.all()):
            return
        owner = weight.rpartition(".")[0]
        plan.inputs[owner] = this.axis - this.info.rank, columns
        added = added_constants(this, self.analysis.facts[this.x.name], columns)
        if added is not None:
            plan.added[owner] = added
            plan.cut(f"{owner}.bias" if owner else "bias", 0, rows)

    def _value(self, node: fx.Node) -> fx.Node | None:
        """The value of the canonical program that has the same channels as a captured one."""
        found = self.of_origin.get(node.name)
        if found is not None:
            return found
        if node.target is BATCH_NORM:
            result = next((user for user in node.users if user.args[1] == 0), None)
            return None if result is None else self._value(result) or self._value(node.args[0])  # type: ignore[arg-type]
        if not isinstance(rule_for(self.captured.op(node)), Pointwise):
            return None
        infos = self.captured.infos
        alike = [
            x for x in node.all_input_nodes if x in self.dependent and infos[x].has_shape_of(infos[node])
        ]
        return self._value(alike[0]) if alike else None

    def _make_whole(self, node: fx.Node) -> None:
        """Keep everything of a captured call's result and operands, or of what is nearest to them."""
        near = [node, *(operand for operand in node.all_input_nodes if operand in self.dependent)]
        for value in near:
            found = self._value(value) if value.op == "call_function" else None
            if found is not None and found in self.program.infos:
                self.whole.add(found)
            elif value is node:
                self.whole.update(self._nearest_readers(node))

    def _nearest_readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            found = self.of_origin.get(user.name)
            if found is not None and found in self.program.infos:
                yield found
            elif user.op == "call_function":
                yield from self._nearest_readers(user)

    def _find_uses(self) -> None:
        calls = [node for node in self.captured.calls() if node in self.dependent]
        readers: dict[str, set[fx.Node]] = {}
        for node in calls:
            for name in self._leaves(node):
                readers.setdefault(name, set()).add(node)
        several = {name for name, nodes in readers.items() if len(nodes) > 1} | _tied(self.module)
        for node in calls:
            leaves = self._leaves(node)
            if not leaves:
                continue
            use = self._use(node)
            fits = use is not None and not any(
                name in several for name in leaves if self.captured.constants[name].numel() > 1
            )
            if not fits:
                self._make_whole(node)
            elif node.target in SPATIAL_RANK:
                self.layers.append(node)
            elif use is not None and use.axes:
                self.uses.append(use)

    def _leaves(self, node: fx.Node) -> set[str]:
        """Names of the constants that a call reads, itself or through calls on constants alone."""
        found: set[str] = set()
        pending = [operand for operand in node.all_input_nodes if operand not in self.dependent]
        while pending:
            value = pending.pop()
            if value.op == "get_attr":
                found.add(str(value.target))
            pending += value.all_input_nodes
        layer = self._noise_of(node)
        if layer is not None:  # beside its parameters a noise layer reads tables that all share
            found = {name for name in found if name.startswith(layer)}
        return found

    def _noise_of(self, node: fx.Node) -> str | None:
        """Prefix of the state names of the noise layer that a call belongs to."""
        name = str(node.meta.get("module", ""))
        return (f"{name}." if name else "") if name in self.noise else None

    def _use(self, node: fx.Node) -> _Use | None:
        """How a call uses the state it reads; None where that is not understood."""
        info = self.captured.infos.get(node)
        prefix = self._noise_of(node)
        if prefix is not None:
            return self._noise_use(node, prefix)
        if node.target in SPATIAL_RANK:
            return self._layer_use(node)
        if node.target is BATCH_NORM:
            names = [_name_of(argument) for argument in node.args[1:5]]
            if any(
                name is None and argument is not None
                for name, argument in zip(names, node.args[1:5], strict=True)
            ):
                return None
            return _Use(node, tuple((name, 0, 1) for name in names if name is not None))
        if info is None or not isinstance(rule_for(self.captured.op(node)), Pointwise):
            return None
        axes = []
        for operand in node.all_input_nodes:
            if operand not in self.dependent:
                found = self._vector(operand, info.rank)
                if found is None:
                    return None
                axes += found
        return _Use(node, tuple(axes))

    def _noise_use(self, node: fx.Node, prefix: str) -> _Use | None:
        info = self.captured.infos.get(node)
        if node.target is not aten.mul.Tensor or info is None:
            return None
        axis = self.noise[prefix.removesuffix(".")].dim % info.rank
        return _Use(node, tuple((f"{prefix}{part}", 0, axis) for part in ("mu", "log_sigma")))

    def _layer_use(self, node: fx.Node) -> _Use | None:
        """A layer of torch's own, whose bias can take constants in; its axes are planned apart."""
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        name = _name_of(weight)
        owner = None if name is None else self.module.get_submodule(name.rpartition(".")[0])
        is_plain = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and name is not None
        if not is_plain or not str(name).endswith("weight") or (bias is not None and _name_of(bias) is None):
            return None
        return _Use(node, ())

    def _vector(self, operand: fx.Node, rank: int) -> list[tuple[str, int, int]] | None:
        """Where the one axis of a broadcast state tensor lies in a result of that rank; [] for a single number."""
        info = self.captured.infos.get(operand)
        if info is None:
            return None
        long = [axis for axis, size in enumerate(info.sizes) if size > 1]
        if not long:
            return []
        leaf = operand
        while leaf.op == "call_function" and leaf.target in _SHAPE_ONLY:
            leaf = leaf.all_input_nodes[0]
        if leaf.op != "get_attr" or len(long) > 1 or str(leaf.target) not in self.state:
            return None
        own = [axis for axis, size in enumerate(self.captured.constants[str(leaf.target)].shape) if size > 1]
        if len(own) != 1:
            return None
        return [(str(leaf.target), own[0], long[0] + rank - info.rank)]


def _name_of(value: object) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _dependent(program: Program) -> set[fx.Node]:
    """Nodes that depend on the network's input."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _without_zeros(program: Program, dependent: set[fx.Node]) -> Program:
    """The program with every weight that multiplies a value and is exactly 0 replaced by a tiny number."""
    factors: set[str] = set()
    for node in program.calls():
        if node in dependent and (node.target in SPATIAL_RANK or node.target is BATCH_NORM):
            factors.update(filter(None, [_name_of(node.args[1])]))
        elif node in dependent and node.target is aten.mul.Tensor:
            factors.update(str(x.target) for x in node.all_input_nodes if x.op == "get_attr")
    constants = dict(program.constants)
    for name in factors:
        if constants[name].is_floating_point():
            constants[name] = torch.where(constants[name] == 0, _TINY, constants[name])
    return program.replace(constants=constants)


def _tied(module: nn.Module) -> set[str]:
    """Names of parameters that have another name too."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _refuse_unseen(module: nn.Module, program: Program) -> None:
    """Parameters that eval mode does not use may read channels in train mode."""
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and node.users}
    held = {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in read}
    unseen = [name for name, p in module.named_parameters() if id(p) not in held]
    if unseen:
        raise UnsupportedModelError(
            f"parameter {unseen[0]!r} is not used in eval mode, so what it reads in training is not known: "
            "leave the units where they are, switched off, or take the part out that only training uses"
        )
