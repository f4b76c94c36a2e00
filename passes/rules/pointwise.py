"""Elementwise operators, unary and broadcasting: relu, add, mul, where, masked_fill, prelu, casts.

forward: the op itself runs on the stored facts (they broadcast as the operands do); 0 * unknown is 0.
backward: an entry of an operand is live where an entry of the result that it is broadcast to is.
couple: equal axes keep equal indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, along, any_over_others, full_mask, reduce_to
from passes.ir.program import Op
from passes.rules.base import Rule, rule

aten = torch.ops.aten

COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
CASTS = (aten._to_copy.default, aten.to.dtype)

# Finite for every finite operand: a kept entry that nobody reads may hold anything finite.
SAFE_UNARY = (
    *COPIES, *CASTS,
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.leaky_relu.default, aten.elu.default,
    aten.selu.default, aten.celu.default, aten.gelu.default, aten.silu.default, aten.mish.default,
    aten.sigmoid.default, aten.tanh.default, aten.hardsigmoid.default, aten.hardswish.default,
    aten.softplus.default, aten.log_sigmoid.default, aten.threshold.default, aten.hardshrink.default,
    aten.softshrink.default, aten.abs.default, aten.neg.default, aten.sign.default, aten.square.default,
    aten.sin.default, aten.cos.default, aten.atan.default, aten.asinh.default, aten.erf.default,
    aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default, aten.frac.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.logical_not.default,
    aten.bitwise_not.default, aten.isnan.default, aten.isinf.default, aten.isfinite.default,
    aten.clip.default, aten.nan_to_num.default, aten.sgn.default, aten.signbit.default, aten.erfc.default,
    aten.sinc.default, aten.fix.default, aten.deg2rad.default, aten.rad2deg.default, aten.isneginf.default,
    aten.isposinf.default, aten.positive.default, aten.angle.default, aten.round.decimals,
)  # fmt: skip
SAFE_BINARY = (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.maximum.default, aten.minimum.default, aten.clamp.Tensor, aten.clamp_min.Tensor,
    aten.clamp_max.Tensor, aten.div.Scalar,
    aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar, aten.lt.Tensor, aten.lt.Scalar,
    aten.le.Tensor, aten.le.Scalar, aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar,
    aten.logical_xor.default, aten.bitwise_xor.Tensor,
    aten.lerp.Scalar, aten.lerp.Tensor, aten.fmax.default, aten.fmin.default, aten.hypot.default,
    aten.logaddexp.default, aten.copysign.Tensor, aten.copysign.Scalar, aten.heaviside.default, aten.clip.Tensor,
)  # fmt: skip
# May overflow or leave the domain: an operand of these keeps its original value wherever it is kept.
UNSAFE = (
    aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log2.default,
    aten.log10.default, aten.log1p.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.tan.default, aten.sinh.default, aten.cosh.default, aten.asin.default, aten.acos.default,
    aten.acosh.default, aten.atanh.default, aten.erfinv.default, aten.logit.default,
    aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.atan2.default, aten.special_logit.default,
    aten.lgamma.default, aten.digamma.default, aten.special_i0.default, aten.xlogy.Tensor,
    aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor,
)  # fmt: skip
QUOTIENTS = (
    aten.div.Tensor, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default,
    aten.fmod.Tensor, aten.fmod.Scalar, aten.remainder.Tensor, aten.remainder.Scalar,
)  # fmt: skip


@rule(*SAFE_UNARY, *SAFE_BINARY)
class Pointwise(Rule):
    """Any elementwise op that is finite for finite operands; `filler` stands for what is not known of them."""

    filler = 0

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        plain = set(op.node.all_input_nodes) == set(op.operands)  # no number that only the input decides
        if not plain or not any(fact.any_known for fact in facts):
            return Facts.unknown(op.out)
        values = [torch.where(fact.known, fact.value, self._filler(fact)) for fact in facts]
        env = dict(zip(op.operands, values, strict=True))
        return Facts(schema.call(op.node, env.__getitem__), self.known(op, facts))

    def _filler(self, fact: Facts) -> Tensor:
        return torch.tensor(self.filler, dtype=fact.value.dtype)

    def known(self, op: Op, facts: Sequence[Facts]) -> Tensor:
        """Where the result is known: where every operand is."""
        return _all([_aligned(fact.known, op.out.rank) for fact in facts])

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        return [reduce_to(demand, op.info_of(operand)) for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        for operand in op.operands:
            couple_broadcast(op, operand, keep)


@rule(aten.logical_and.default, aten.bitwise_and.Tensor)
class And(Pointwise):
    """A conjunction, known to be false (all bits 0) where either side is."""

    def known(self, op: Op, facts: Sequence[Facts]) -> Tensor:
        return super().known(op, facts) | self.decided(op, facts)

    def decided(self, op: Op, facts: Sequence[Facts]) -> Tensor:
        """Where one side alone gives the result."""
        return _any([_aligned(fact.known & (fact.value == 0), op.out.rank) for fact in facts])


@rule(aten.logical_or.default, aten.bitwise_or.Tensor)
class Or(And):
    """A disjunction, known to be true (all bits 1) where either side is."""

    def decided(self, op: Op, facts: Sequence[Facts]) -> Tensor:
        is_logical = op.out.dtype == torch.bool
        ones = [fact.value != 0 if is_logical else fact.value == -1 for fact in facts]
        return _any(
            [_aligned(fact.known & mask, op.out.rank) for fact, mask in zip(facts, ones, strict=True)]
        )


@rule(*UNSAFE)
class UnsafePointwise(Pointwise):
    """An elementwise op that can turn a finite operand into a value that is not finite."""

    filler = 1  # torch refuses to divide integers by 0

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        return [full_mask(op.info_of(operand), True) for operand in op.operands]


@rule(aten.mul.Tensor, aten.mul.Scalar)
class Multiply(Pointwise):
    """Product of two tensors; a known zero on either side makes the result a known zero."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if any(isinstance(value, (int, float)) and value == 0 for value in op.node.args):
            return Facts.constant(torch.zeros((1,) * op.out.rank, dtype=op.out.dtype))
        return _with_zeros(super().forward(op, facts), _zeros(op, facts))


@rule(*QUOTIENTS)
class Divide(UnsafePointwise):
    """Quotient and remainder, 0 for a known 0; safe where the divisor is a constant without zeros."""

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        return _with_zeros(super().forward(op, facts), _zeros(op, facts[:1]))

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        if _is_sure_not_zero(op.node.args[1], facts[1:]):
            return Pointwise.backward(self, op, demand, facts)
        return super().backward(op, demand, facts)


def _is_sure_not_zero(divisor: object, facts: Sequence[Facts]) -> bool:
    if facts:
        return facts[0].all_known and bool((facts[0].value != 0).all())
    return isinstance(divisor, (int, float)) and divisor != 0


@rule(aten.pow.Tensor_Scalar)
class Power(UnsafePointwise):
    """x ** number; safe for the exponents 0, 1, 2, ..."""

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        exponent = op.args["exponent"]
        if isinstance(exponent, (int, float)) and exponent >= 0 and float(exponent).is_integer():
            return Pointwise.backward(self, op, demand, facts)
        return super().backward(op, demand, facts)


WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
MASKED_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


@rule(*WHERE, *MASKED_FILL)
class Where(Pointwise):
    """A choice between "yes" and "no", tensors or numbers.

    With a known condition only the chosen side counts; between equal constants no condition does.
    """

    def applies(self, op: Op) -> bool:
        condition = op.info_of(op.args["mask"]) if op.target in MASKED_FILL else op.info_of(op.operands[0])
        return condition.dtype == torch.bool

    def arguments(self, op: Op) -> dict[str, Any]:
        """The arguments by what they are."""
        order = ("no", "condition", "yes") if op.target in MASKED_FILL else ("condition", "yes", "no")
        return dict(zip(order, op.args.values(), strict=True))

    def roles(self, op: Op) -> list[str]:
        """What each tensor operand is."""
        return [role for role, value in self.arguments(op).items() if value in op.program.infos]

    def known(self, op: Op, facts: Sequence[Facts]) -> Tensor:
        found = dict(zip(self.roles(op), facts, strict=True))
        number = full_mask(op.out, True)
        yes, no = (
            _aligned(found[role].known, op.out.rank) if role in found else number for role in ("yes", "no")
        )
        always, never = _decided(op, found["condition"])
        both = _all([_aligned(found["condition"].known, op.out.rank), yes, no])
        return both | (always & yes) | (never & no) | (yes & no & self._are_equal(op, found))

    def _are_equal(self, op: Op, found: Mapping[str, Facts]) -> Tensor:
        """Where both sides hold the same stored value."""
        yes, no = (
            _aligned(found[role].value, op.out.rank) if role in found else self.arguments(op)[role]
            for role in ("yes", "no")
        )
        return torch.as_tensor(yes == no)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        roles = self.roles(op)
        always, never = _decided(op, facts[roles.index("condition")])
        masks = {"condition": demand & ~(never | always), "yes": demand & ~never, "no": demand & ~always}
        return [
            reduce_to(masks[role], op.info_of(operand))
            for role, operand in zip(roles, op.operands, strict=True)
        ]


def _decided(op: Op, condition: Facts) -> tuple[Tensor, Tensor]:
    """Where a condition is known to be true, and where it is known to be false; with the result's rank."""
    return (
        _aligned(condition.known & condition.value, op.out.rank),
        _aligned(condition.known & ~condition.value, op.out.rank),
    )


@rule(aten.prelu.default)
class Prelu(Pointwise):
    """max(x, 0) + a min(x, 0), with one slope or one for each index of axis 1."""

    def applies(self, op: Op) -> bool:
        info, slope = op.info_of(op.operands[0]), op.info_of(op.operands[1])
        return slope.all_static and (
            slope.sizes in {(), (1,)} or (info.rank > 1 and slope.sizes == info.sizes[1:2])
        )

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        x, slope = facts
        if not x.any_known or not slope.any_known:
            return Facts.unknown(op.out)
        known = slope.known.reshape(-1)
        if self.is_per_channel(op):
            x, known = x.expand((1,), op.out), along(known, 1, op.out.rank)
        value = slope.value.expand(op.info_of(op.operands[1]).sizes)
        return Facts(torch.prelu(x.known_value, value), x.known & known).compress()

    def is_per_channel(self, op: Op) -> bool:
        """Whether the slopes lie along axis 1."""
        return op.info_of(op.operands[1]).sizes not in {(), (1,)}

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        info = op.info_of(op.operands[1])
        if self.is_per_channel(op):
            return [demand, any_over_others(demand, 1, info.sizes[0])]
        return [demand, full_mask(info, bool(demand.any()))]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        x, slope = op.operands
        couple_broadcast(op, x, keep)
        if self.is_per_channel(op):
            keep.tie((slope, 0), (op.node, 1), f"aligned by {op.node.name}")
        else:
            keep.fill(slope, "broadcast")


def couple_broadcast(op: Op, operand: fx.Node, keep: KeepSets) -> None:
    """Tie an operand's axes to the result's; an axis that is broadcast is kept."""
    info = op.info_of(operand)
    offset = op.out.rank - info.rank
    for axis in info.static_axes:
        if info.sizes[axis] == op.out.sizes[axis + offset] and op.out.is_static(axis + offset):
            keep.tie((operand, axis), (op.node, axis + offset), f"aligned by {op.node.name}")
        else:
            keep.fill(operand, "broadcast", (axis,))


def _aligned(stored: Tensor, rank: int) -> Tensor:
    return stored.reshape((1,) * (rank - stored.ndim) + tuple(stored.shape))


def _all(masks: Sequence[Tensor]) -> Tensor:
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result


def _any(masks: Sequence[Tensor]) -> Tensor:
    result = masks[0]
    for mask in masks[1:]:
        result = result | mask
    return result


def _zeros(op: Op, facts: Sequence[Facts]) -> Tensor | None:
    if op.out.dtype == torch.bool:
        return None
    return _any([_aligned(fact.known & (fact.value == 0), op.out.rank) for fact in facts])


def _with_zeros(facts: Facts, zeros: Tensor | None) -> Facts:
    if zeros is None or not bool(zeros.any()):
        return facts
    return Facts(
        torch.where(zeros, torch.zeros((), dtype=facts.value.dtype), facts.value), facts.known | zeros
    )
