"""Chains of per-channel multiplications and additions, read as one affine map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.program import Op, Program

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Affine:
    """y = x * scale + shift, both of shape (size of `axis`,), or (1,) with axis None for one number everywhere."""

    axis: int | None
    scale: Tensor
    shift: Tensor

    def then(self, after: Affine) -> Affine | None:
        """Compose with the map that comes after; None where they vary along different axes."""
        if self.axis is not None and after.axis is not None and self.axis != after.axis:
            return None
        axis = self.axis if after.axis is None else after.axis
        return Affine(axis, self.scale * after.scale, self.shift * after.scale + after.shift)

    @property
    def has_shift(self) -> bool:
        return bool((self.shift != 0).any())

    @property
    def has_scale(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def keeps_order(self) -> bool:
        return bool((self.scale >= 0).all())


def affine_chain(program: Program, tail: fx.Node) -> tuple[fx.Node, list[fx.Node], Affine] | None:
    """(base, nodes of the chain, the joint map) of the maximal chain that ends at `tail`, if one ends there."""
    step = affine_step(program, tail)
    if step is None or _continues(program, tail):
        return None
    base, joint = step
    nodes = [tail]
    while len(base.users) == 1 and (step := affine_step(program, base)) is not None:
        longer = step[1].then(joint)
        if longer is None:
            break
        nodes.append(base)
        base, joint = step[0], longer
    return base, nodes, joint


def _continues(program: Program, node: fx.Node) -> bool:
    """Whether the chain goes on in the only user."""
    if len(node.users) != 1:
        return False
    user = next(iter(node.users))
    own, after = affine_step(program, node), affine_step(program, user)
    return own is not None and after is not None and after[0] is node and own[1].then(after[1]) is not None


def affine_step(program: Program, node: fx.Node) -> tuple[fx.Node, Affine] | None:
    """(x, map) if the call is x * c, x / c, x + c, x - c, c - x or -x with a per-channel constant c."""
    read = _READERS.get(node.target)
    info = program.infos.get(node)
    if node.op != "call_function" or read is None or info is None or not info.dtype.is_floating_point:
        return None
    found = read(program.op(node))
    if found is None:
        return None
    x, scale, shift = found
    x_info = program.infos.get(x)
    if x_info is None or not x_info.has_shape_of(info):
        return None
    parts = [_vector(part, info.rank) for part in (scale, shift)]
    axes = {part[0] for part in parts if part is not None and part[0] is not None}
    if any(part is None for part in parts) or len(axes) > 1 or x_info.dtype != info.dtype:
        return None
    scale_vector, shift_vector = (part[1] for part in parts if part is not None)
    size = max(scale_vector.numel(), shift_vector.numel())
    return x, Affine(next(iter(axes), None), scale_vector.expand(size), shift_vector.expand(size))


def _vector(value: Tensor, rank: int) -> tuple[int | None, Tensor] | None:
    """(axis, vector) of a constant that varies along one axis at most."""
    if value.ndim > rank:
        return None
    shape = (1,) * (rank - value.ndim) + tuple(value.shape)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if len(axes) > 1:
        return None
    return (axes[0] if axes else None), value.reshape(-1).to(torch.float64)


Reading = tuple[fx.Node, Tensor, Tensor]


def _operands(op: Op) -> tuple[fx.Node, Tensor, bool] | None:
    """(x, constant, x came first) of a binary call with exactly one constant operand."""
    first, second = (op.node.args[0], op.node.args[1]) if len(op.node.args) > 1 else (op.node.args[0], None)
    for x, other, in_front in ((first, second, True), (second, first, False)):
        value = _number_or_constant(op.program, other)
        if isinstance(x, fx.Node) and value is not None and op.program.held(x) is None:
            return x, value, in_front
    return None


def _number_or_constant(program: Program, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor([value], dtype=torch.float64)
    held = program.held(value)
    return held.read() if held is not None and held.dtype.is_floating_point else None


_ONE, _ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def _read_mul(op: Op) -> Reading | None:
    found = _operands(op)
    return None if found is None else (found[0], found[1], _ZERO)


def _read_div(op: Op) -> Reading | None:
    found = _operands(op)
    if found is None or not found[2] or bool((found[1] == 0).any()):
        return None
    return found[0], 1.0 / found[1], _ZERO


def _read_sum(sign: float) -> Any:
    def read(op: Op) -> Reading | None:
        found = _operands(op)
        alpha = op.args.get("alpha", 1)
        if found is None or not isinstance(alpha, (int, float)):
            return None
        x, constant, in_front = found
        if in_front:
            return x, _ONE, constant * (sign * alpha)
        return x, _ONE * (sign * alpha), constant

    return read


def _read_neg(op: Op) -> Reading:
    return op.operands[0], -_ONE, _ZERO


_READERS: dict[Any, Any] = {
    aten.mul.Tensor: _read_mul,
    aten.mul.Scalar: _read_mul,
    aten.div.Tensor: _read_div,
    aten.div.Scalar: _read_div,
    aten.add.Tensor: _read_sum(1.0),
    aten.add.Scalar: _read_sum(1.0),
    aten.sub.Tensor: _read_sum(-1.0),
    aten.sub.Scalar: _read_sum(-1.0),
    aten.neg.default: _read_neg,
}
