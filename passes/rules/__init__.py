"""The rules, one file per op family; importing the package registers them all."""

from passes.rules import contraction, pointwise, view, window
from passes.rules.base import OPAQUE, Rule, registered_rules, rule, rule_for

__all__ = [
    "OPAQUE",
    "Rule",
    "contraction",
    "pointwise",
    "registered_rules",
    "rule",
    "rule_for",
    "view",
    "window",
]
