"""The three laws, for any rule and any sample call.

A sample is a call on variables (`X`) and constants; the laws are tried with random facts, random demand and random keep
sets. "x" is always an x that agrees with what is known of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.analysis import Analysis, is_constant
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Input, Op, Program, TensorInfo
from passes.ir.rewriter import Rewriter
from passes.rules import OPAQUE, rule_for

TOLERANCE = 1e-12


@dataclass(frozen=True)
class X:
    """A variable operand: its shape, dtype and range; along `dynamic` axes other shapes are larger."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    low: float = -2.0
    high: float = 2.0
    dynamic: tuple[int, ...] = ()

    def scaled(self, factor: int) -> tuple[int, ...]:
        return tuple(size * (factor if axis in self.dynamic else 1) for axis, size in enumerate(self.shape))

    def sample(self, generator: torch.Generator) -> Tensor:
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) < 0.5
        if not self.dtype.is_floating_point:
            return torch.randint(0, 4, self.shape, generator=generator).to(self.dtype)
        unit = torch.rand(self.shape, generator=generator, dtype=self.dtype)
        return unit * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Sample:
    """One call: arguments with X for variables and tensors for constants."""

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(overload: Any, *args: Any, **kwargs: Any) -> Sample:
    return Sample(overload, args, kwargs)


class Case:
    """A sample as a Program of one call, with random facts of its variables."""

    def __init__(self, sample: Sample, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.variables: list[tuple[fx.Node, X]] = []
        self.constants: dict[str, Tensor] = {}
        graph = fx.Graph()
        inputs: list[Input] = []

        def place(value: Any) -> Any:
            if isinstance(value, X):
                name = f"x{len(inputs)}"
                inputs.append(Input(name, value.dtype, value.shape, value.scaled(2), value.scaled(5)))
                node = graph.create_node("placeholder", name, (), {}, name=name)
                self.variables.append((node, value))
                return node
            if isinstance(value, Tensor):
                name = f"c{len(self.constants)}"
                self.constants[name] = value
                return graph.create_node("get_attr", name, (), {})
            if isinstance(value, (list, tuple)):
                return type(value)(place(item) for item in value)
            return value

        args = tuple(place(value) for value in sample.args)
        self.node = graph.create_node("call_function", sample.overload, args, dict(sample.kwargs), name="y")
        graph.create_node("output", "output", ((self.node,),), {})
        dtypes = {name: value.dtype for name, value in self.constants.items()}
        self.program = Program(graph, self.constants, dtypes, tuple(inputs))
        self.op: Op = self.program.op(self.node)
        self.rule = rule_for(self.op)
        self.base = {node: variable.sample(self.generator) for node, variable in self.variables}
        self.facts = [self._facts(operand) for operand in self.op.operands]

    @property
    def is_covered(self) -> bool:
        return self.rule is not OPAQUE and self.op.info is not None

    def coin(self, probability: float = 0.5) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def _facts(self, operand: fx.Node) -> Facts:
        if operand.op == "get_attr":
            return Facts.constant(self.constants[str(operand.target)])
        info = self.op.info_of(operand)
        value = self.base[operand]
        known = self.mask(info)
        for axis in range(value.ndim):
            value = value if info.is_static(axis) else value.narrow(axis, 0, 1)
        self.base[operand] = value.expand(self.base[operand].shape).clone()
        if self.coin(0.3):  # a flat constant along some axes, as biases leave behind
            for axis in range(value.ndim):
                if known.shape[axis] == 1 and self.coin(0.7):
                    value = value.narrow(axis, 0, 1)
            self.base[operand] = value.expand(self.base[operand].shape).clone()
        if self.coin(0.3) and value.is_floating_point():
            value = torch.zeros_like(value)
            self.base[operand] = torch.zeros_like(self.base[operand])
        return Facts(value, known)

    def mask(self, info: TensorInfo) -> Tensor:
        """A random mask in stored form: it varies along a random choice of static axes."""
        stored = [
            size if self.coin(0.5) and info.is_static(axis) else 1 for axis, size in enumerate(info.sizes)
        ]
        density = float(torch.rand((), generator=self.generator)) if self.coin(0.8) else 1.0
        return torch.rand(stored, generator=self.generator) < density

    def values(self, free: dict[fx.Node, Tensor] | None = None) -> dict[fx.Node, Tensor]:
        """Values that agree with the facts; entries not known, or set in `free`, are drawn anew."""
        found = {}
        for (node, variable), facts in zip(self.variables, self._variable_facts(), strict=True):
            fresh = variable.sample(self.generator)
            redrawn = ~facts.known if free is None else (free[node] & ~facts.known)
            found[node] = torch.where(redrawn.expand(fresh.shape), fresh, self.base[node])
        return found

    def _variable_facts(self) -> list[Facts]:
        by_node = dict(zip(self.op.operands, self.facts, strict=True))
        return [by_node[node] for node, _ in self.variables]

    def run(self, values: dict[fx.Node, Tensor]) -> Tensor:
        def get(node: fx.Node) -> Tensor:
            return values[node] if node in values else self.constants[str(node.target)]

        args, kwargs = fx.node.map_arg((self.node.args, dict(self.node.kwargs)), get)
        return self.node.target(*args, **kwargs)  # type: ignore[no-any-return,operator]


def check_forward(case: Case) -> None:
    """Law 1: an entry claimed known has that value whatever the unknown entries are."""
    facts = case.rule.forward(case.op, case.facts).finite()
    for _ in range(3):
        result = case.run(case.values())
        known = facts.known.expand(result.shape) & _finite(result)
        _assert_equal(facts.value.expand(result.shape)[known], result[known], case, "forward claims")


def check_backward(case: Case) -> None:
    """Law 2: changing a dead entry changes no live result."""
    facts = case.rule.forward(case.op, case.facts).finite()
    demand = case.mask(case.op.out) & ~facts.known
    masks = case.rule.backward(case.op, demand, case.facts)
    live: dict[fx.Node, Tensor] = {}
    for operand, mask in zip(case.op.operands, masks, strict=True):
        live[operand] = live.get(operand, full_mask(case.op.info_of(operand), False)) | mask
    before = case.run(
        case.values({node: full_mask(case.op.info_of(node), False) for node, _ in case.variables})
    )
    for _ in range(3):
        dead = {node: ~live[node] for node, _ in case.variables}
        after = case.run(case.values(dead))
        asked = demand.expand(before.shape) & _finite(before)
        _assert_equal(before[asked], after[asked], case, "backward calls dead what changes")


def check_rewrite(case: Case) -> None:
    """Law 3: the rewritten op on the kept entries of x gives the kept entries of op(x) that are known or live."""
    facts = case.rule.forward(case.op, case.facts).finite()
    by_name = {node.name: fact for node, fact in zip(case.op.operands, case.facts, strict=True)}
    by_name["y"] = facts
    demand = case.mask(case.op.out)
    keep = KeepSets(case.program.infos)
    demands = {"y": demand}
    masks = case.rule.backward(case.op, demand & ~facts.known, case.facts)
    for operand, mask in zip(case.op.operands, masks, strict=True):
        held = demands.get(operand.name, full_mask(case.op.info_of(operand), False))
        demands[operand.name] = held | mask
    for node in (*case.op.operands, case.node):
        keep.start(node, demands[node.name] & ~by_name[node.name].known)
    if is_constant(case.program, case.node, by_name) or keep.is_empty(case.node):
        return
    _solve(case, keep)
    analysis = Analysis(by_name, demands, keep)
    program = _absorbed(case, analysis)
    values = case.values()
    wanted = case.run(values)
    result = _run_rewritten(program, case, analysis, values)
    mine = demand.expand(wanted.shape) | facts.known.expand(wanted.shape)
    for axis in case.op.out.static_axes:
        index = keep.index(case.node, axis)
        if index is not None:
            wanted, mine = wanted.index_select(axis, index), mine.index_select(axis, index)
    assert result.shape == wanted.shape, f"{case.node.target}: have {result.shape}, want {wanted.shape}"
    mine = mine & _finite(wanted)
    _assert_equal(wanted[mine], result[mine], case, "rewrite")


def _solve(case: Case, keep: KeepSets) -> None:
    keep.changed = True
    while keep.changed:
        keep.changed = False
        case.rule.couple(case.op, keep, case.facts)


def _absorbed(case: Case, analysis: Analysis) -> Program:
    """Constants of removed channels absorbed first, by the rules that do so."""
    absorb = getattr(case.rule, "absorb", None)
    if absorb is None:
        return case.program
    rewriter = Rewriter(case.program)
    for node, _ in case.variables:
        rewriter.placeholder(node)
    rewriter.env[case.node] = absorb(case.op, rewriter, case.facts, analysis.keep) or rewriter.copy(case.node)
    rewriter.output()
    return rewriter.finish()


def _run_rewritten(program: Program, case: Case, analysis: Analysis, values: dict[fx.Node, Tensor]) -> Tensor:
    rewriter = Rewriter(program, analysis)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    feeds = {}
    for node in placeholders:
        old = next(variable for variable, _ in case.variables if variable.name == node.name)
        if not analysis.keep.is_empty(old):
            rewriter.placeholder(node)
            feeds[node.name] = rewriter.slice(values[old], node)
    call_node = next(node for node in program.calls())
    new = rule_for(program.op(call_node)).rewrite(program.op(call_node), rewriter)
    rewriter.graph.create_node("output", "output", (new,), {})
    env: dict[fx.Node, Any] = {}
    for node in rewriter.graph.nodes:
        if node.op == "placeholder":
            env[node] = feeds[node.name]
        elif node.op == "get_attr":
            env[node] = rewriter.constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
        else:
            return env[node.args[0]]
    raise AssertionError


def _finite(value: Tensor) -> Tensor:
    return torch.isfinite(value) if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)


def _assert_equal(wanted: Tensor, found: Tensor, case: Case, what: str) -> None:
    wanted, found = wanted.to(torch.float64), found.to(torch.float64)
    if wanted.numel():
        scale = max(1.0, float(wanted.abs().max()))
        worst = float((wanted - found).abs().max())
        assert worst <= TOLERANCE * scale * 10, f"{case.node.format_node()}: {what}: off by {worst:.1e}"
