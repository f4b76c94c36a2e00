"""The rules, one file per op family; importing the package registers them all."""

from passes.rules import (
    contraction,
    creation,
    joining,
    lookup,
    ordering,
    padding,
    pointwise,
    recurrent,
    reduction,
    resample,
    selection,
    view,
    window,
)
from passes.rules.base import OPAQUE, PIECES, Rule, registered_rules, rule, rule_for

__all__ = [
    "OPAQUE",
    "PIECES",
    "Rule",
    "contraction",
    "creation",
    "joining",
    "lookup",
    "ordering",
    "padding",
    "pointwise",
    "recurrent",
    "reduction",
    "registered_rules",
    "resample",
    "rule",
    "rule_for",
    "selection",
    "view",
    "window",
]
