"""What a rule is, the table of rules, and the opaque rule that everything without one falls back to.

A rule describes one family of operators by four methods, declared together and run apart; "x" always means an x that
agrees with what is known of it:

1. forward: an entry claimed known has that value whatever the unknown entries are;
2. backward: changing a dead entry changes no live result;
3. couple and rewrite: the rewritten op on the kept entries of x gives the kept entries of op(x), wherever the removed
   entries of x are dead (or known, for the ops that absorb them beforehand).

tests/passes/rules holds each rule to these laws on random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, fx

from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op

if TYPE_CHECKING:
    from passes.ir.rewriter import Rewriter


class Rule:
    """The conservative answers: nothing known, everything live, everything kept, copied as it is.

    `otherwise`: the rule of the calls that this one does not cover; the opaque one if there is none.
    """

    otherwise: Rule | None = None

    def applies(self, op: Op) -> bool:
        """Whether the rule covers this call (for example: its weight is a constant)."""
        return True

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        """Facts of the result from the facts of `op.operands`."""
        return Facts.unknown(op.out)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        """For each operand, the stored mask of entries that the demanded entries of the result depend on."""
        return [full_mask(op.info_of(operand), True) for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Widen the keep sets of operands and result until `rewrite` can serve them."""
        why = f"{op.target} has no rule" if type(self) is Rule else f"{op.target} keeps its operands whole"
        for node in (*op.operands, op.node):
            if node in op.program.infos:
                keep.fill(node, why)

    def rewrite(self, op: Op, rewriter: Rewriter) -> fx.Node:
        """The call in the new graph, on the kept entries."""
        return rewriter.copy(op.node) if op.position is None else rewriter.piece(op)


class Pieces(Rule):
    """A call with several results has nothing to say for itself: each of its pieces has a rule, or the opaque one."""

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        """Leave it to the pieces."""


OPAQUE = Rule()
PIECES = Pieces()
_RULES: dict[object, Rule] = {}


def rule(*overloads: object) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: register one instance of a rule for the listed operator overloads."""

    def register(cls: type[Rule]) -> type[Rule]:
        instance = cls()
        for overload in overloads:
            _RULES[overload] = instance
        return cls

    return register


def registered_rules() -> dict[object, Rule]:
    """The table: operator overload to rule."""
    return dict(_RULES)


def rule_for(op: Op) -> Rule:
    """The rule of a call; the opaque one where none is registered, none applies, or sizes are not known.

    So it is for tensors without entries: no rule has to think of them. A piece has the rule of the call that it is a
    result of.
    """
    found = _RULES.get(op.target)
    if op.info is None:
        return PIECES if op.is_read_by_pieces else OPAQUE
    if found is None or op.has_empty_tensors:
        return OPAQUE
    while found is not None and not found.applies(op):
        found = found.otherwise
    return found or OPAQUE
