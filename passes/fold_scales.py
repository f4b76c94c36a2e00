"""fold_scales: per-channel scales and shifts disappear into the weights around them.

A chain of multiplications, additions and the like by per-channel constants is one affine map y = x * s + t.

- backward, into the producer x = W u + b read by nobody else:  W' = s W,  b' = s b + t;  or into every row of the
  table of an embedding that nothing else reads;
- forward, into all consumers W y + b:  W' = W s,  b' = b + W t (the shift only where it adds the same everywhere: no
  zero padding, no stride of a transposed convolution);
- either way through what commutes with it: relu-like ops and max pooling for s >= 0, averages, sums over positions
  and resampling for any s, views and permutations with the channels renumbered, a shift alone into one addend;
- the scale alone forward, x s + t = (x + t/s) s, where the shift has to stay in front of a relu;
- otherwise the chain is left as one multiplication and one addition.

Not covered: scales that vary along more than one axis, and splitting a scale over the operands of an add.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.affine import Affine, affine_chain
from passes.commute import through
from passes.ir.lattice import along
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules.layer import Contraction, contraction_of, emit

aten = torch.ops.aten

LARGEST_SHIFT = 1e4
"""Of t/s: float16 has to hold it, too."""


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


def _decide(program: Program, base: fx.Node, chain: list[fx.Node], joint: Affine, edits: Edits) -> None:
    tail = chain[0]
    path = _pull(program, base, joint)
    if path is not None and not edits.locked & {node for node, _ in path}:
        producer, folded = path[-1]
        edits.produce[producer] = folded
        edits.carries.update({node: None for node, _ in path[1:]})
        edits.carries[base] = tail
        edits.locked |= {node for node, _ in path}
    elif (path := _pull_beside(program, tail, joint)) is not None and not edits.locked & {
        node for node, _ in path
    }:
        producer, folded = path[-1]
        edits.produce[producer] = folded
        edits.carries.update({node: None for node, _ in path})
        edits.locked |= {node for node, _ in path} | {base}
    else:
        found = _push(program, tail, joint)
        if not found or edits.locked & (set(found[0]) | found[1]):
            _split(program, base, chain, joint, edits)
            return
        _consume(*found, base, edits)
    edits.bypass[tail] = base
    edits.locked |= set(chain)


def _consume(takers: dict[fx.Node, Affine], passed: set[fx.Node], base: fx.Node, edits: Edits) -> None:
    edits.consume.update(takers)
    edits.carries.update(dict.fromkeys(passed - set(takers), None))
    edits.locked |= set(takers) | passed | {base}


def _split(program: Program, base: fx.Node, chain: list[fx.Node], joint: Affine, edits: Edits) -> None:
    """Send the scale forward alone, x s + t = (x + t/s) s; else leave the chain in its shortest form."""
    parts = _scale_behind_shift(joint)
    found = None if parts is None else _push(program, chain[0], parts[1])
    if parts is None or not found or edits.locked & (set(found[0]) | found[1]):
        _merge(program, base, chain, joint, edits)
        return
    _consume(*found, base, edits)
    edits.merge[chain[0]] = (base, parts[0])
    edits.carries[chain[0]] = None
    edits.locked |= set(chain)


def _scale_behind_shift(joint: Affine) -> tuple[Affine, Affine] | None:
    """(shift, scale) that make the map in this order; None where there is none, or none that every dtype holds.

    Where the scale is 0, and the shift with it, the value is 0 whatever is added: nothing is.
    """
    off = joint.scale == 0
    if not joint.has_scale or not joint.has_shift or bool((off & (joint.shift != 0)).any()):
        return None
    shift = torch.where(off, 0.0, joint.shift / torch.where(off, 1.0, joint.scale))
    if float(shift.abs().max()) > LARGEST_SHIFT:
        return None
    return Affine(joint.axis, torch.ones_like(shift), shift), Affine(
        joint.axis, joint.scale, torch.zeros_like(shift)
    )


def _merge(program: Program, base: fx.Node, chain: list[fx.Node], joint: Affine, edits: Edits) -> None:
    """Leave a chain as one multiplication and one addition, if it is longer than that."""
    if len(chain) > int(joint.has_scale) + int(joint.has_shift):
        edits.merge[chain[0]] = (base, joint)
        edits.locked |= set(chain)


def _produced_axis(program: Program, node: fx.Node) -> int | None:
    """The channel axis of a call that can take a map of its result; None if it is no such call."""
    found = contraction_of(program, node)
    if found is not None:
        return found.axis
    is_lookup = node.target is aten.embedding.default and program.infos.get(node) is not None
    if not is_lookup or program.held(node.args[0]) is None:
        return None
    table = node.args[0].target  # type: ignore[union-attr]
    readers = [other for other in program.nodes if other.op == "get_attr" and other.target == table]
    return program.infos[node].rank - 1 if len(readers) == 1 else None


def _pull(program: Program, node: fx.Node, joint: Affine) -> list[tuple[fx.Node, Affine]] | None:
    """The path from the chain's base back to a producer that can take the map, with the map at each node."""
    path = [(node, joint)]
    while len(node.users) == 1:
        axis = _produced_axis(program, node)
        if axis is not None:
            return path if joint.axis in (None, axis) else None
        if node.op != "call_function" or program.infos.get(node) is None:
            return None
        if node.target is aten.add.Tensor and not joint.has_scale:
            rest = _pull_into_addend(program, program.op(node), joint)
            return None if rest is None else path + rest
        operand, before = through(program.op(node), joint, backward=True)
        if before is None or operand is None:
            return None
        node, joint = operand, before
        path.append((node, joint))
    return None


def _pull_into_addend(program: Program, add: Op, shift: Affine) -> list[tuple[fx.Node, Affine]] | None:
    """The path of a shift into one addend, the first that has a producer for it."""
    if add.args["alpha"] != 1:
        return None
    for addend in add.operands:
        is_once = add.operands.count(addend) == 1  # in x + x the shift would count twice
        if is_once and add.info_of(addend) == add.out:
            path = _pull(program, addend, shift)
            if path is not None:
                return path
    return None


def _pull_beside(program: Program, tail: fx.Node, joint: Affine) -> list[tuple[fx.Node, Affine]] | None:
    """The path of a shift into what its value is added to."""
    user = next(iter(tail.users)) if len(tail.users) == 1 else None
    if user is None or user.target is not aten.add.Tensor or joint.has_scale:
        return None
    add = program.op(user)
    return _pull_into_addend(program, add, joint) if add.operands.count(tail) == 1 else None


def _push(
    program: Program, node: fx.Node, joint: Affine
) -> tuple[dict[fx.Node, Affine], set[fx.Node]] | None:
    """The consumers that take the map and the nodes passed on the way; None if some user cannot take it."""
    takers: dict[fx.Node, Affine] = {}
    passed: set[fx.Node] = set()
    for user in node.users:
        found = contraction_of(program, user)
        if found is not None and found.x is node:
            if joint.axis not in (None, found.axis) or (joint.has_shift and not _takes_shift(found, joint)):
                return None
            takers[user] = joint
            continue
        if user.op != "call_function" or program.infos.get(user) is None:
            return None
        operand, after = through(program.op(user), joint, backward=False)
        further = _push(program, user, after) if after is not None and operand is node else None
        if further is None:
            return None
        takers |= further[0]
        passed |= further[1] | {user}
    return (takers, passed) if takers else None


def _takes_shift(this: Contraction, joint: Affine) -> bool:
    """Whether the shift adds the same to a row at every position."""
    if not this.may_vary():
        return True
    return this.is_transposed and this.of_constant(joint.shift) is not None


def _apply(program: Program, edits: Edits) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node in edits.bypass:
            rewriter.env[node] = rewriter.value(edits.bypass[node])
        elif node in edits.merge:
            rewriter.env[node] = _emit_affine(program, rewriter, node, *edits.merge[node])
            if node in edits.carries:
                _carry(rewriter.env[node], edits.carries[node])
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
    if node.target is aten.embedding.default:
        return _emit_lookup(program, rewriter, node, edits.produce[node])
    this = contraction_of(program, node)
    assert this is not None
    weight, bias = this.own_weight(), this.bias
    if node in edits.consume:
        weight, bias = consumed(this, weight, bias, edits.consume[node])
    if node in edits.produce:
        weight, bias = produced(weight, bias, edits.produce[node])
    return emit(this, rewriter, weight, bias, this.groups)


def _emit_lookup(program: Program, rewriter: Rewriter, node: fx.Node, after: Affine) -> fx.Node:
    """The embedding with every row of its table scaled and shifted."""
    held, *rest = node.args
    table = program.constant(held)
    assert table is not None
    assert isinstance(held, fx.Node)
    moved = rewriter.constant(table * after.scale + after.shift, str(held.target), rewriter.dtype_of(held))
    return rewriter.call(
        node.target, (moved, *rewriter.map(rest)), rewriter.map(dict(node.kwargs)), like=node
    )


def produced(weight: Tensor, bias: Tensor | None, after: Affine) -> tuple[Tensor, Tensor | None]:
    """Weights of s (W x + b) + t; the weight is written into."""
    scaled = weight.mul_(after.scale.reshape(-1, *([1] * (weight.ndim - 1))))
    if bias is None and not after.has_shift:
        return scaled, None
    held = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias
    return scaled, held * after.scale + after.shift


def consumed(
    this: Contraction, weight: Tensor, bias: Tensor | None, before: Affine
) -> tuple[Tensor, Tensor | None]:
    """Weights of W (s x + t) + b; the weight is written into."""
    if before.has_shift:
        moved = this.of_constant(before.shift)
        assert moved is not None
        bias = moved if bias is None else bias + moved
    return weight.mul_(this.per_input(before.scale)), bias


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
