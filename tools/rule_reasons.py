"""Why a rule does not claim what it could: (patterns of overloads, law, reason).

tools/validate_rules.py lists what is missing; each missing claim needs a reason here, or a better rule.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

REASONS: tuple[tuple[str, str, str], ...] = ()


def reasons_for(overload: str, law: str) -> tuple[str, ...]:
    """The reasons for what the rule of an overload misses in one law."""
    return tuple(
        reason
        for patterns, about, reason in REASONS
        if about == law and any(fnmatchcase(overload, pattern) for pattern in patterns.split())
    )
