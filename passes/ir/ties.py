"""Which axes of a Program's values are one coupling: tied by the rules, index by index."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from passes.ir.analysis import RuleTable
from passes.ir.keep import KeepSets
from passes.ir.program import Program

Axis = tuple[fx.Node, int]


class Ties(KeepSets):
    """Keep sets in which everything is kept, and which remember what the rules tie together."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.infos)
        self._leaders: dict[tuple[str, int], tuple[str, int]] = {}

    def tie(self, first: Axis, second: Axis, why: str = "") -> None:
        one, other = self.coupling(first), self.coupling(second)
        if one != other:
            self._leaders[other] = one

    def coupling(self, axis: Axis) -> tuple[str, int]:
        """A name for the coupling that an axis belongs to: equal for tied axes."""
        found = axis[0].name, axis[1]
        path = []
        while found in self._leaders:
            path.append(found)
            found = self._leaders[found]
        for passed in path:
            self._leaders[passed] = found
        return found


def ties(program: Program, rule_for: RuleTable) -> Ties:
    """The couplings of an analysed Program."""
    found = Ties(program)
    facts = program.analysed().facts
    for node in _calls(program):
        op = program.op(node)
        rule_for(op).couple(op, found, [facts[operand.name] for operand in op.operands])
    return found


def _calls(program: Program) -> Iterable[fx.Node]:
    return (node for node in program.calls() if node in program.infos)
