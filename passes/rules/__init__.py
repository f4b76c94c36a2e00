"""The rules, one file per op family; importing the package registers them all."""

from passes.rules import (
    contraction,
    filling,
    joining,
    normalization,
    padding,
    pointwise,
    reduction,
    resample,
    scan,
    selection,
    view,
    window,
)
from passes.rules.base import OPAQUE, Rule, registered_rules, rule, rule_for

__all__ = [
    "OPAQUE",
    "Rule",
    "contraction",
    "filling",
    "joining",
    "normalization",
    "padding",
    "pointwise",
    "reduction",
    "registered_rules",
    "resample",
    "rule",
    "rule_for",
    "scan",
    "selection",
    "view",
    "window",
]
