"""The two sweeps and the solution of the keep sets, independent of any operator.

1. `forward`: facts of every value, in graph order; on a DAG one sweep is the fixpoint.
2. `backward`: demand, in reverse order. `dead <= live`: an entry is dead when no live output depends on it. A known
   entry of a result asks nothing of its operands: known beats dead.
3. `solve`: keep sets start at live & unknown, then the couplings widen them until nothing changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op, Program, TensorInfo


class RuleLike(Protocol):
    """The part of a rule that the sweeps call (passes/rules/base.py describes it)."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts: ...
    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]: ...
    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None: ...


class RuleTable(Protocol):
    """Gives the rule of a call."""

    def __call__(self, op: Op) -> RuleLike: ...


@dataclass(frozen=True, eq=False)
class Analysis:
    """Facts and demand by node name, and the keep sets."""

    facts: dict[str, Facts]
    demand: dict[str, Tensor]
    keep: KeepSets

    def renamed(self, names: Mapping[str, str], program: Program) -> Analysis:
        """The same analysis for a graph with the same values under other node names (old name to new)."""
        return Analysis(
            {names[name]: fact for name, fact in self.facts.items() if name in names},
            {names[name]: mask for name, mask in self.demand.items() if name in names},
            self.keep.renamed(names, program.infos),
        )

    def outline(self, names: Collection[str]) -> Analysis:
        """What is known of the values of these names, and the keep sets."""
        return Analysis({name: fact for name, fact in self.facts.items() if name in names}, {}, self.keep)

    def facts_of(self, op: Op) -> list[Facts]:
        return [self.facts[operand.name] for operand in op.operands]


LARGEST_CONSTANT = 1 << 26
PINNED = "a width that runs faster"


def analyze(program: Program, rule_for: RuleTable) -> Analysis:
    """Run both sweeps and solve the keep sets."""
    ops = {node: program.op(node) for node in program.calls()}
    facts = forward(program, ops, rule_for)
    demand = backward(program, ops, facts, rule_for)
    return Analysis(facts, demand, solve(program, ops, facts, demand, rule_for))


def forward(program: Program, ops: dict[fx.Node, Op], rule_for: RuleTable) -> dict[str, Facts]:
    """Facts of every value with known sizes."""
    facts: dict[str, Facts] = {}
    for node in program.graph.nodes:
        info = program.infos.get(node)
        if info is None:
            continue
        constant = program.held(node)
        if info.is_empty:  # all of its entries are known, and none
            facts[node.name] = Facts.unknown(info)
        elif constant is not None:
            facts[node.name] = Facts.held(constant)
        elif node.op == "call_function":
            op = ops[node]
            known = [facts[operand.name] for operand in op.operands]
            facts[node.name] = _evaluate(op, known) or rule_for(op).forward(op, known).finite()
        else:
            facts[node.name] = Facts.unknown(info)
    return facts


def _evaluate(op: Op, known: Sequence[Facts]) -> Facts | None:
    """The op itself on its operands' constants, where everything is known and static; else None."""
    if not known or not op.out.all_static or not schema.is_deterministic(op.target):
        return None
    if set(op.source.all_input_nodes) != set(op.operands) or not all(fact.all_known for fact in known):
        return None
    infos = [op.info_of(operand) for operand in op.operands]
    if not all(info.all_static for info in infos):
        return None
    if max(_numel(info) for info in (*infos, op.out)) > LARGEST_CONSTANT:
        return None
    env = {
        operand: fact.value.expand(info.sizes)
        for operand, fact, info in zip(op.operands, known, infos, strict=True)
    }
    return Facts.constant(op.run(env.__getitem__)).compress()


def _numel(info: TensorInfo) -> int:
    return int(torch.Size(info.sizes).numel())


def is_constant(program: Program, node: fx.Node, facts: dict[str, Facts]) -> bool:
    """Whether a call's value is wholly known and can be emitted as a constant tensor.

    A dynamic axis needs an input axis that gives its size at run time.
    """
    info = program.infos.get(node)
    if node.op != "call_function" or info is None or not facts[node.name].all_known:
        return False
    return all(info.is_static(axis) or size_source(program, info, axis) for axis in range(info.rank))


def size_source(program: Program, info: TensorInfo, axis: int) -> tuple[str, int] | None:
    """An input's name and axis whose size always equals this dynamic one."""
    wanted = info.key(axis)
    for entry in program.inputs:
        for position in range(len(entry.sizes)):
            if entry.key(position) == wanted:
                return entry.name, position
    return None


def backward(
    program: Program, ops: dict[fx.Node, Op], facts: dict[str, Facts], rule_for: RuleTable
) -> dict[str, Tensor]:
    """Demand on every value: the stored mask of entries that some live output depends on."""
    infos = program.infos
    demand: dict[str, Tensor] = {node.name: full_mask(info, False) for node, info in infos.items()}
    opaque_live: set[fx.Node] = set()

    def read(node: fx.Node, mask: Tensor | None) -> None:
        if node in infos:
            demand[node.name] = demand[node.name] | (full_mask(infos[node], True) if mask is None else mask)
        else:
            opaque_live.add(node)

    for node in program.output_node.all_input_nodes:
        read(node, None)
    for node in reversed(program.nodes):
        if node.op != "call_function":
            continue
        if node not in infos:
            if node in opaque_live:
                for operand in node.all_input_nodes:
                    read(operand, None)
            continue
        needed = demand[node.name]
        if not is_constant(program, node, facts):
            _read_operands(ops[node], needed, facts, rule_for, read)
    return demand


def _read_operands(op, needed, facts, rule_for, read) -> None:  # type: ignore[no-untyped-def]
    """Ask the operands for what the unknown, demanded entries of the result depend on."""
    own = facts[op.node.name]
    asked = needed if own.all_known else needed & ~own.known
    if not bool(asked.any()):
        return
    known = [facts[operand.name] for operand in op.operands]
    for operand, mask in zip(op.operands, rule_for(op).backward(op, asked, known), strict=True):
        read(operand, mask)
    for node in op.source.all_input_nodes:
        if node not in op.program.infos:
            read(node, None)


def solve(
    program: Program,
    ops: dict[fx.Node, Op],
    facts: dict[str, Facts],
    demand: dict[str, Tensor],
    rule_for: RuleTable,
) -> KeepSets:
    """The least keep sets that contain what must stay and satisfy every coupling."""
    infos = program.infos
    keep = KeepSets(infos)
    for node in infos:
        known = facts[node.name].known
        whole = (
            node.op == "call_function"
            and facts[node.name].all_known
            and not is_constant(program, node, facts)
        )
        keep.start(node, demand[node.name] if whole else demand[node.name] & ~known)
    for node in infos if program.pinned else ():
        if not keep.is_empty(node) and not is_constant(program, node, facts):
            for axis, mask in program.pinned_entries(node).items():
                keep.widen(node, axis, mask, PINNED)
    live = [op for op in ops.values() if not is_constant(program, op.node, facts)]
    for node in (*program.output_node.all_input_nodes, *_placeholders(program)):
        if node in infos:
            keep.fill(node, "the network's interface")
    order = live
    while True:
        keep.changed = False
        for op in order:
            if op.info is not None and keep.is_empty(op.node):
                continue
            rule_for(op).couple(op, keep, [facts[operand.name] for operand in op.operands])
        if not keep.changed:
            return keep
        order = order[::-1]


def _placeholders(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]
