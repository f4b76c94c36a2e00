"""fold_scales: per-channel scales and shifts disappear into the weights around them.

A chain of multiplications, additions and the like by per-channel constants is one affine map y = x * s + t.

- backward, into the producer x = W u + b read by nobody else:  W' = s W,  b' = s b + t;
- forward, into all consumers W y + b:  W' = W s,  b' = b + W t (the shift only where no zero padding meets it);
- either way through what commutes with it: relu-like ops and max pooling for s >= 0, averages and resampling for any s,
  views and permutations with the channels renumbered;
- otherwise the chain is left as one multiplication and one addition.

Not covered: scales that vary along more than one axis, and splitting a scale over the operands of an add.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.lattice import along
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules.contraction import CONVOLUTIONS, LINEAR, Contraction, emit, is_contraction

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


@dataclass
class Edits:
    """What one round decided; nodes touched by one decision are locked for the others."""

    produce: dict[fx.Node, Affine] = field(default_factory=dict)
    consume: dict[fx.Node, Affine] = field(default_factory=dict)
    bypass: dict[fx.Node, fx.Node] = field(default_factory=dict)
    merge: dict[fx.Node, tuple[fx.Node, Affine]] = field(default_factory=dict)
    carries: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    locked: set[fx.Node] = field(default_factory=set)

    @property
    def any(self) -> bool:
        return bool(self.bypass or self.merge)


@dataclass(frozen=True)
class FoldScales:
    """The pass; it has no options."""

    name: str = "fold_scales"

    def __call__(self, program: Program) -> Result:
        edits = Edits()
        for node in program.calls():
            chain = affine_chain(program, node)
            if chain is not None and not edits.locked & set(chain[1]):
                _decide(program, *chain, edits)
        return Result(_apply(program, edits), True) if edits.any else Result(program, False)


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
        if isinstance(x, fx.Node) and value is not None and op.program.constant(x) is None:
            return x, value, in_front
    return None


def _number_or_constant(program: Program, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor([value], dtype=torch.float64)
    found = program.constant(value)
    return found if found is not None and found.is_floating_point() else None


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


def _decide(program: Program, base: fx.Node, chain: list[fx.Node], joint: Affine, edits: Edits) -> None:
    tail = chain[0]
    path = _pull(program, base, joint)
    if path is not None and not edits.locked & {node for node, _ in path}:
        producer, folded = path[-1]
        edits.produce[producer] = folded
        edits.carries.update({node: None for node, _ in path[1:]})
        edits.carries[base] = tail
        edits.locked |= {node for node, _ in path}
    else:
        found = _push(program, tail, joint)
        if not found or edits.locked & (set(found[0]) | found[1]):
            _merge(program, base, chain, joint, edits)
            return
        edits.consume.update(found[0])
        edits.carries.update(dict.fromkeys(found[1] - set(found[0]), None))
        edits.locked |= set(found[0]) | found[1] | {base}
    edits.bypass[tail] = base
    edits.locked |= set(chain)


def _merge(program: Program, base: fx.Node, chain: list[fx.Node], joint: Affine, edits: Edits) -> None:
    """Leave a chain as one multiplication and one addition, if it is longer than that."""
    if len(chain) > int(joint.has_scale) + int(joint.has_shift):
        edits.merge[chain[0]] = (base, joint)
        edits.locked |= set(chain)


def _contraction(program: Program, node: fx.Node) -> Contraction | None:
    if node.target is not LINEAR and node.target not in CONVOLUTIONS:
        return None
    op = program.op(node)
    return Contraction(op) if op.info is not None and is_contraction(op) else None


def _pull(program: Program, node: fx.Node, joint: Affine) -> list[tuple[fx.Node, Affine]] | None:
    """The path from the chain's base back to a producer that can take the map, with the map at each node."""
    path = [(node, joint)]
    while len(node.users) == 1:
        found = _contraction(program, node)
        if found is not None:
            return path if joint.axis in (None, found.axis) else None
        if node.op != "call_function" or program.infos.get(node) is None:
            return None
        operand, before = _through(program.op(node), joint, backward=True)
        if before is None or operand is None:
            return None
        node, joint = operand, before
        path.append((node, joint))
    return None


def _push(
    program: Program, node: fx.Node, joint: Affine
) -> tuple[dict[fx.Node, Affine], set[fx.Node]] | None:
    """The consumers that take the map and the nodes passed on the way; None if some user cannot take it."""
    takers: dict[fx.Node, Affine] = {}
    passed: set[fx.Node] = set()
    for user in node.users:
        found = _contraction(program, user)
        if found is not None and found.x is node:
            padded = bool(found.spatial_rank) and any(found.per_spatial("padding"))
            if joint.axis not in (None, found.axis) or (joint.has_shift and padded):
                return None
            takers[user] = joint
            continue
        if user.op != "call_function" or program.infos.get(user) is None:
            return None
        operand, after = _through(program.op(user), joint, backward=False)
        further = _push(program, user, after) if after is not None and operand is node else None
        if further is None:
            return None
        takers |= further[0]
        passed |= further[1] | {user}
    return (takers, passed) if takers else None


POSITIVE_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default})
MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
AVERAGES = frozenset(
    {
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    }
)  # fmt: skip
RENUMBERINGS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
        aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints,
    }
)  # fmt: skip
LARGEST_RENUMBERING = 1 << 22


def _through(op: Op, joint: Affine, *, backward: bool) -> tuple[fx.Node | None, Affine | None]:
    """(operand, the map on the other side of the call) if the call commutes with the map, else (.., None)."""
    if not op.operands:
        return None, None
    operand = op.operands[0]
    if op.target in POSITIVE_HOMOGENEOUS:
        return operand, joint if joint.keeps_order and not joint.has_shift else None
    if op.target in MAX_POOLS:
        same = joint.axis in (None, _pool_axis(op))
        return operand, joint if joint.keeps_order and same else None
    if op.target in AVERAGES:
        same = joint.axis in (None, _pool_axis(op))
        return operand, joint if same and not joint.has_shift else None
    if op.target in RENUMBERINGS and len(op.operands) == 1:
        return operand, _renumber(op, joint, backward)
    return operand, None


def _pool_axis(op: Op) -> int:
    """The channel axis of a pooling call: the one before the pooled axes."""
    rank = {"1d": 1, "2d": 2, "3d": 3}[str(op.target).split(".")[1][-2:]]
    return op.out.rank - rank - 1


def _renumber(op: Op, joint: Affine, backward: bool) -> Affine | None:
    """The map in the coordinates of a view's other side, found by sending the operand's positions through it."""
    if joint.axis is None:
        return joint
    source, target = op.info_of(op.operands[0]), op.out
    here, there = (target, source) if backward else (source, target)
    count = int(torch.Size(source.sizes).numel())
    if count > LARGEST_RENUMBERING or count == 0 or not here.is_static(joint.axis):
        return None
    sizes = here.sizes
    labels = along(torch.arange(sizes[joint.axis]), joint.axis, here.rank).expand(sizes).flatten()
    moved = _apply_view(op, torch.arange(count).reshape(source.sizes), target.sizes)
    if backward:
        flat = torch.empty(count, dtype=torch.int64)
        flat[moved.flatten()] = labels
    else:
        flat = labels[moved.flatten()]
    return _along_one_axis(flat.reshape(there.sizes), joint, there)


def _apply_view(op: Op, positions: Tensor, out_sizes: tuple[int, ...]) -> Tensor:
    if op.target in {aten.permute.default, aten.transpose.int}:
        moved: Tensor = op.target(positions, *op.node.args[1:])
        return moved
    return positions.reshape(out_sizes)


def _along_one_axis(labels: Tensor, joint: Affine, info: Any) -> Affine | None:
    for axis in info.static_axes:
        line = labels
        for other in range(labels.ndim):
            if other != axis:
                line = line.narrow(other, 0, 1)
        if bool((labels == line).all()):
            index = line.flatten()
            return Affine(axis, joint.scale[index], joint.shift[index])
    return None


def _apply(program: Program, edits: Edits) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node in edits.bypass:
            rewriter.env[node] = rewriter.value(edits.bypass[node])
        elif node in edits.merge:
            rewriter.env[node] = _emit_affine(program, rewriter, node, *edits.merge[node])
        elif node.op == "call_function":
            rewriter.env[node] = _emit_edited(program, rewriter, node, edits)
            if node in edits.carries:
                _carry(rewriter.env[node], edits.carries[node])
    rewriter.output()
    return rewriter.finish()


def _carry(new: fx.Node, source: fx.Node | None) -> None:
    """The new node now holds the original value of `source`, or none."""
    new.meta.pop("origin", None)
    if source is not None and "origin" in source.meta:
        new.meta["origin"] = source.meta["origin"]


def _emit_edited(program: Program, rewriter: Rewriter, node: fx.Node, edits: Edits) -> fx.Node:
    if node not in edits.produce and node not in edits.consume:
        return rewriter.copy(node)
    this = _contraction(program, node)
    assert this is not None
    weight, bias = this.weight, this.bias
    if node in edits.consume:
        weight, bias = consumed(this, weight, bias, edits.consume[node])
    if node in edits.produce:
        weight, bias = produced(weight, bias, edits.produce[node])
    return emit(this, rewriter, weight, bias, this.groups)


def produced(weight: Tensor, bias: Tensor | None, after: Affine) -> tuple[Tensor, Tensor | None]:
    """Weights of s (W x + b) + t."""
    scaled = weight * after.scale.reshape(-1, *([1] * (weight.ndim - 1)))
    if bias is None and not after.has_shift:
        return scaled, None
    held = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias
    return scaled, held * after.scale + after.shift


def consumed(
    this: Contraction, weight: Tensor, bias: Tensor | None, before: Affine
) -> tuple[Tensor, Tensor | None]:
    """Weights of W (s x + t) + b."""

    def per_input(vector: Tensor) -> Tensor:
        grouped = vector.expand(this.in_channels).reshape(this.groups, 1, this.in_per_group)
        rows = grouped.expand(-1, this.out_channels // this.groups, -1).reshape(
            this.out_channels, this.in_per_group
        )
        return rows.reshape(*rows.shape, *([1] * this.spatial_rank))

    if before.has_shift:
        moved = (weight * per_input(before.shift)).flatten(1).sum(1)
        bias = moved if bias is None else bias + moved
    return weight * per_input(before.scale), bias


def _emit_affine(
    program: Program, rewriter: Rewriter, tail: fx.Node, base: fx.Node, joint: Affine
) -> fx.Node:
    info = program.infos[tail]
    dtype = tail.meta.get("dtype", info.dtype)
    x = rewriter.value(base)
    for target, vector, wanted, last in (
        (aten.mul.Tensor, joint.scale, joint.has_scale, not joint.has_shift),
        (aten.add.Tensor, joint.shift, joint.has_shift, True),
    ):
        if wanted:
            shaped = along(vector, info.rank - 1 if joint.axis is None else joint.axis, info.rank)
            constant = rewriter.constant(
                shaped, f"{tail.name}_{'shift' if last and joint.has_shift else 'scale'}", dtype
            )
            x = rewriter.call(target, (x, constant), like=tail, step="" if last else "scale")
    return x
