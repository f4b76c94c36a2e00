"""The three laws, for any rule and any sample call.

A sample is a call on variables (`X`) and constants; the laws are tried with random facts, random demand and random keep
sets, on all results of a call that has several. "x" is always an x that agrees with what is known of it.
"""

import operator
from dataclasses import dataclass, replace
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
        node = graph.create_node("call_function", sample.overload, args, dict(sample.kwargs), name="y")
        results = _results(graph, node)
        graph.create_node("output", "output", (tuple(results),), {})
        dtypes = {name: value.dtype for name, value in self.constants.items()}
        self.program = Program(graph, self.constants, dtypes, tuple(inputs))
        ops = [self.program.op(node) for node in results]
        self.ops = [op for op in ops if op.info is not None and rule_for(op) is not OPAQUE]
        self.op: Op = ops[0]
        self.base = {node: variable.sample(self.generator) for node, variable in self.variables}
        self.facts = [self._facts(operand) for operand in self.op.operands]

    @property
    def is_covered(self) -> bool:
        return bool(self.ops)

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

    def resize(self) -> None:
        """Go on at larger sizes of the dynamic axes; the facts stay as they are."""
        for position, (node, variable) in enumerate(self.variables):
            value = self.base[node]
            for axis in variable.dynamic:
                value = value.narrow(axis, 0, 1)
            larger = replace(variable, shape=variable.scaled(2))
            self.variables[position] = node, larger
            self.base[node] = value.expand(larger.shape).clone()

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

    def run(self, op: Op, values: dict[fx.Node, Tensor]) -> Tensor:
        def get(node: fx.Node) -> Tensor:
            return values[node] if node in values else self.constants[str(node.target)]

        return op.run(get)  # type: ignore[no-any-return]

    def forward(self, op: Op) -> Facts:
        return rule_for(op).forward(op, self.facts).finite()


def _results(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The call, or a reader of each of its results."""
    count = len(node.target._schema.returns)  # type: ignore[union-attr]
    if count == 1:
        return [node]
    names = (f"y{position}" for position in range(count))
    return [
        graph.create_node("call_function", operator.getitem, (node, position), {}, name=name)
        for position, name in enumerate(names)
    ]


def check_forward(case: Case) -> None:
    """Law 1: an entry claimed known has that value whatever the unknown entries are."""
    for op in case.ops:
        facts = case.forward(op)
        for _ in range(3):
            result = case.run(op, case.values())
            known = facts.known.expand(result.shape) & _finite(result)
            _assert_equal(facts.value.expand(result.shape)[known], result[known], op, "forward claims")


def check_backward(case: Case) -> None:
    """Law 2: changing a dead entry changes no live result."""
    for op in case.ops:
        demand = case.mask(op.out) & ~case.forward(op).known
        live = {operand: full_mask(op.info_of(operand), False) for operand in op.operands}
        for operand, mask in zip(op.operands, rule_for(op).backward(op, demand, case.facts), strict=True):
            live[operand] = live[operand] | mask
        before = case.run(
            op, case.values({node: full_mask(op.info_of(node), False) for node, _ in case.variables})
        )
        for _ in range(3):
            after = case.run(op, case.values({node: ~live[node] for node, _ in case.variables}))
            asked = demand.expand(before.shape) & _finite(before)
            _assert_equal(before[asked], after[asked], op, "backward calls dead what changes")


def check_rewrite(case: Case) -> None:
    """Law 3: the rewritten op on the kept entries of x gives the kept entries of op(x) that are known or live."""
    analysis = start_keeping(case)
    solve(case, analysis)
    check_kept(case, analysis)


def start_keeping(case: Case) -> Analysis:
    """Facts, random demand, and the keep sets before any coupling."""
    by_name = {node.name: fact for node, fact in zip(case.op.operands, case.facts, strict=True)}
    demands = {node.name: full_mask(case.op.info_of(node), False) for node in case.op.operands}
    for op in case.ops:
        by_name[op.node.name] = facts = case.forward(op)
        demands[op.node.name] = demand = case.mask(op.out)
        masks = rule_for(op).backward(op, demand & ~facts.known, case.facts)
        for operand, mask in zip(op.operands, masks, strict=True):
            demands[operand.name] = demands[operand.name] | mask
    keep = KeepSets(case.program.infos)
    for node in (*case.op.operands, *(op.node for op in case.ops)):
        keep.start(node, demands[node.name] & ~by_name[node.name].known)
    return Analysis(by_name, demands, keep)


def left_over(case: Case, analysis: Analysis) -> list[Op]:
    """The results of which something is kept and that are no constants."""
    ops = [op for op in case.ops if not is_constant(case.program, op.node, analysis.facts)]
    return [op for op in ops if not analysis.keep.is_empty(op.node)]


def solve(case: Case, analysis: Analysis) -> None:
    """Widen the keep sets until the rules can serve them."""
    keep = analysis.keep
    keep.changed = True
    while keep.changed:
        keep.changed = False
        for op in left_over(case, analysis):
            rule_for(op).couple(op, keep, case.facts)


def check_kept(case: Case, analysis: Analysis) -> None:
    """Law 3 for given keep sets."""
    kept, keep = left_over(case, analysis), analysis.keep
    if not kept:
        return
    values = case.values()
    results = _run_rewritten(_absorbed(case, analysis), case, analysis, values)
    for op in kept:
        wanted, result = case.run(op, values), results[op.node.name]
        mine = (analysis.demand[op.node.name] | analysis.facts[op.node.name].known).expand(wanted.shape)
        for axis in op.out.static_axes:
            index = keep.index(op.node, axis)
            if index is not None:
                wanted, mine = wanted.index_select(axis, index), mine.index_select(axis, index)
        assert result.shape == wanted.shape, f"{op.target}: have {result.shape}, want {wanted.shape}"
        mine = mine & _finite(wanted)
        _assert_equal(wanted[mine], result[mine], op, "rewrite")


def _absorbed(case: Case, analysis: Analysis) -> Program:
    """Constants of removed channels absorbed first, by the rules that do so."""
    absorb = getattr(rule_for(case.op), "absorb", None)
    if absorb is None:
        return case.program
    rewriter = Rewriter(case.program)
    for node, _ in case.variables:
        rewriter.placeholder(node)
    node = case.op.node
    rewriter.env[node] = absorb(case.op, rewriter, case.facts, analysis.keep) or rewriter.copy(node)
    rewriter.output()
    return rewriter.finish()


def _run_rewritten(
    program: Program, case: Case, analysis: Analysis, values: dict[fx.Node, Tensor]
) -> dict[str, Tensor]:
    """The kept results of the rewritten call, by name."""
    rewriter = Rewriter(program, analysis)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    feeds = {}
    for node in placeholders:
        old = next(variable for variable, _ in case.variables if variable.name == node.name)
        if not analysis.keep.is_empty(old):
            rewriter.placeholder(node)
            feeds[node.name] = rewriter.slice(values[old], node)
    names = []
    for node in program.output_node.all_input_nodes:
        if (
            node.name in analysis.facts
            and not is_constant(program, node, analysis.facts)
            and not analysis.keep.is_empty(node)
        ):
            op = program.op(node)
            rewriter.env[node] = rule_for(op).rewrite(op, rewriter)
            names.append(node.name)
    results = tuple(new for old, new in rewriter.env.items() if old.name in names)
    rewriter.graph.create_node("output", "output", (results,), {})
    env: dict[fx.Node, Any] = {}
    for node in rewriter.graph.nodes:
        if node.op == "placeholder":
            env[node] = feeds[node.name]
        elif node.op == "get_attr":
            env[node] = rewriter.constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
    return dict(zip(names, (env[node] for node in results), strict=True))


def _finite(value: Tensor) -> Tensor:
    return torch.isfinite(value) if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)


def _real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).to(torch.float64)


def _assert_equal(wanted: Tensor, found: Tensor, op: Op, what: str) -> None:
    wanted, found = _real(wanted), _real(found)
    if wanted.numel():
        scale = max(1.0, float(wanted.abs().max()))
        worst = float((wanted - found).abs().max())
        assert worst <= TOLERANCE * scale * 10, f"{op.source.format_node()}: {what}: off by {worst:.1e}"
