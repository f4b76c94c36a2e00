"""Why a rule does not claim what it could: (patterns of overloads, laws, reason).

tools/validate_rules.py lists what is missing; each missing claim needs a reason here, or a better rule. A pattern may
name a rule file instead (`rules/window`), for what all of its operators share.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from passes.rules.pointwise import QUOTIENTS, UNSAFE

_UNSAFE = " ".join(str(overload) for overload in (*UNSAFE, *QUOTIENTS, "aten.pow.Tensor_Scalar"))
_COMPARISONS = " ".join(f"aten.{name}.*" for name in ("eq", "ne", "lt", "le", "gt", "ge"))
_ONE_ENTRY = (
    "A call on one entry, or whose result its arguments decide alone, is not looked for: no network makes it."
)

REASONS: tuple[tuple[str, str, str], ...] = (
    (
        _UNSAFE,
        "backward",
        "May overflow or leave its domain: the operands keep their own values wherever they are kept, so all of them "
        "are asked for.",
    ),
    (
        "aten.isnan.* aten.isinf.* aten.isfinite.* aten.isposinf.* aten.isneginf.*",
        "forward backward",
        "Always the same for finite values, but asked for the sake of the others.",
    ),
    (
        f"{_COMPARISONS} aten.clamp* aten.minimum.* aten.maximum.* aten.floor_divide.* aten.div.*_mode "
        "aten.heaviside.* aten.prelu.*",
        "forward backward",
        "Decided by the range of the dtype or by extreme arguments (no integer equals 1.5, no truth value exceeds 1, "
        "a clamp whose bounds meet): ranges are not tracked.",
    ),
    (
        "aten.pow.* aten.float_power.* aten.fmod.* aten.remainder.*",
        "forward backward",
        "x ** 0, 1 ** x and x % 1 of integers do not depend on x: such a call is not looked for.",
    ),
    (
        "rules/contraction",
        "forward",
        "A channel counts as known where it is known at all positions: positions are never removed one by one.",
    ),
    (
        "rules/contraction",
        "backward",
        "Demand is passed on channel by channel, for all positions: positions are never removed one by one.",
    ),
    (
        "rules/window rules/resample rules/padding",
        "forward backward",
        "Which entries a position reads is found axis by axis: several positions count as the box around them.",
    ),
    (
        "rules/window rules/resample rules/padding",
        "couple",
        "Positions are kept whole; that some arguments would do with fewer (a window of 1, whole steps) is not looked "
        "for.",
    ),
    (
        "aten.std.* aten.var.* rules/ordering rules/scan rules/reduction",
        "forward backward",
        _ONE_ENTRY,
    ),
    (
        "rules/scan",
        "couple",
        "Axes whose entries meet are kept whole, zeros at their ends too.",
    ),
    (
        "rules/reduction",
        "couple",
        "A product keeps the indices whose constants it cannot make up for; with a constant 0 among them it could drop "
        "all the others, and is known already.",
    ),
    (
        "aten.cumprod.* aten.xlogy.*",
        "forward backward",
        "0 times unknown is looked for in products of two tensors alone.",
    ),
    (
        "aten.copysign.*",
        "forward backward",
        "A zero with a sign equals the other one; which of them it is may still show in a later division.",
    ),
    (
        "aten.masked_fill.*",
        "forward",
        "Known wherever it is finite, but minus infinity is what the mask is for.",
    ),
    (
        "rules/strided rules/shuffling",
        "forward backward couple",
        "Positions are kept whole, and several of them count as the box around them.",
    ),
    (
        "rules/contraction",
        "couple",
        "Groups keep equally many channels each; that fewer would do where the weights of a group are all 0 is left to "
        "the next round, when its channels are known.",
    ),
    (
        "rules/recurrent",
        "forward backward couple",
        "A unit counts at all steps and for all examples of the batch together: neither of these are removed.",
    ),
    (
        "rules/lookup",
        "forward backward",
        "A table is read by rows that only the input names, column by column; rows that no constant index names stay.",
    ),
    (
        "rules/routing aten.index.Tensor aten.index_select.*",
        "forward backward couple",
        "Where entries go is the input's choice: along the axes where they meet, all of an axis is one, known where "
        "it is 0 (or one number, where entries are only read).",
    ),
    (
        "aten.scaled_dot_product_attention.*",
        "backward",
        "Where a query attends to one position alone, queries and keys do not count: such a call is not looked for.",
    ),
)


def reasons_for(overload: str, module: str, law: str) -> tuple[str, ...]:
    """The reasons for what the rule of an overload, which lives in a module, misses in one law."""
    home = "rules/" + module.rsplit(".", 1)[-1]
    return tuple(
        reason
        for patterns, laws, reason in REASONS
        if law in laws.split()
        and any(pattern == home or fnmatchcase(overload, pattern) for pattern in patterns.split())
    )
