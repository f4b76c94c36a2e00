"""The rules, one file per op family; importing the package registers them all."""

from passes.rules import (
    attention,
    contraction,
    joining,
    padding,
    pointwise,
    product,
    reduction,
    resample,
    selection,
    shuffling,
    strided,
    view,
    window,
)
from passes.rules.base import OPAQUE, Rule, registered_rules, rule, rule_for

__all__ = [
    "OPAQUE",
    "Rule",
    "attention",
    "contraction",
    "joining",
    "padding",
    "pointwise",
    "product",
    "reduction",
    "registered_rules",
    "resample",
    "rule",
    "rule_for",
    "selection",
    "shuffling",
    "strided",
    "view",
    "window",
]
