"""merge_normalized: of the channels that are constant in front of a layer or RMS norm, one or two stand for all.

Behind the norm a channel r with the constant c_r depends on the input, but only through the two numbers of its row:

    y_r = gamma_r c_r / s - gamma_r mean / s + beta_r        (an RMS norm has no mean)

So with v_r = gamma_r (c_r, 1), and v_r = sum_b C_rb v_b over a basis B of these vectors (at most two channels, one
for constants that are all 0, more where constants differ from token to token),

    y_r = sum_b C_rb y_b + beta_r - sum_b C_rb beta_b,

and the layers that read y take W'_b = W_b + sum_r C_rb W_r, W'_r = 0 and the rest into their biases. Nothing reads
y_r then, so that x and y lose r and the norm is computed over what stays (passes/rules/normalization.py). Norms of one
width, such as those along a residual stream, take the same channels where they can.

All that reads y must be a linear layer or a convolution, directly or behind operators that treat every channel alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.ir.analysis import forward
from passes.ir.axes import split_blocks
from passes.ir.basis import express
from passes.ir.lattice import Facts, all_over_others
from passes.ir.pipeline import Note, Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import Contraction, describe, emit
from passes.rules.normalization import LARGEST_SHARE, LayerNorm, OverLastAxes

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeNormalized:
    """The pass; it has no options."""

    name: str = "merge_normalized"

    def __call__(self, program: Program) -> Result:
        norms = [op for op in map(program.op, program.calls()) if _is_norm(op)]
        readers = {op.node: found for op in norms if (found := _readers(op))}
        if not readers:
            return Result(program, False)
        facts = forward(program, {node: program.op(node) for node in program.calls()}, rule_for)
        changed: dict[fx.Node, tuple[Contraction, Tensor, Tensor]] = {}
        chosen: dict[int, Tensor] = {}
        notes: list[Note] = []
        for norm, layers in readers.items():
            op = program.op(norm)
            shares = _shares(op, facts[op.args["input"].name], layers, chosen)
            if shares is not None:
                count = f"{shares[0].numel()} constant channels through {shares[1].numel()} of them"
                notes.append(Note(norm.name, f"is read with {count}"))
                changed.update({layer.op.node: (layer, *_merged(layer, *shares)) for layer in layers})
        return Result(_rewritten(program, changed), True, tuple(notes)) if changed else Result(program, False)


def _rewritten(program: Program, changed: dict[fx.Node, tuple[Contraction, Tensor, Tensor]]) -> Program:
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node in changed:
            this, weight, bias = changed[node]
            rewriter.env[node] = emit(this, rewriter, weight, bias, this.groups)
        elif node.op == "call_function":
            rewriter.env[node] = rewriter.copy(node)
    rewriter.output()
    return rewriter.finish()


def _is_norm(op: Op) -> bool:
    """Whether the call is a norm over one axis with constant weight and bias."""
    rule = rule_for(op)
    if not isinstance(rule, OverLastAxes) or len(rule.weighted(op)) > 1:
        return False
    vectors = (op.args.get(name) for name in ("weight", "bias"))
    return all(vector is None or op.program.held(vector) is not None for vector in vectors)


def _readers(op: Op) -> list[Contraction]:
    """The layers that read a norm's result; none where anything else reads it or a border hides its constants."""
    found = list(_readers_of(op.program, op.node, op.out.rank - 1))
    return [] if None in found else [this for this in found if this is not None]


def _readers_of(program: Program, node: fx.Node, axis: int) -> Iterator[Contraction | None]:
    """Each layer behind a value whose channels lie along `axis`; None for another reader."""
    for user in node.users:
        op = program.op(user) if user in program.infos else None
        if op is None:
            yield None
        elif isinstance(rule_for(op), ContractionRule):
            this = describe(op)
            alone = user.all_input_nodes.count(node) == 1 and this.x is node
            yield this if alone and this.axis == axis and this.groups == 1 and not _has_border(this) else None
        else:
            behind = _axis_behind(op, axis)
            if behind is None:
                yield None
            else:
                yield from _readers_of(program, user, behind)


def _has_border(this: Contraction) -> bool:
    return bool(this.spatial_rank) and any(this.per_spatial("padding"))


def _axis_behind(op: Op, axis: int) -> int | None:
    """The channel axis of a result that holds entries or means of entries of each channel; None if there is none."""
    rank = op.info_of(op.operands[0]).rank
    if op.target is aten.permute.default:
        return [position % rank for position in op.args["dims"]].index(axis)
    if op.target is aten.reshape.default:
        return _axis_behind_view(op, axis)
    if op.target is aten.slice.Tensor:
        return None if op.args["dim"] % rank == axis else axis
    if op.target is aten.select.int:
        dropped = [op.args["dim"] % rank]
    elif op.target is aten.mean.dim and op.args["dim"]:
        dropped = [] if op.args["keepdim"] else [other % rank for other in op.args["dim"]]
        if axis in {other % rank for other in op.args["dim"]}:
            return None
    else:
        return None
    return None if axis in dropped else axis - sum(other < axis for other in dropped)


def _axis_behind_view(op: Op, axis: int) -> int | None:
    """The axis of a view's result that numbers the channels as they were, beside axes of size 1."""
    for block in split_blocks(op.info_of(op.operands[0]), op.out):
        if block.ins == (axis,):
            outs = [out for out in block.outs if op.out.sizes[out] != 1]
            return outs[0] if len(outs) == 1 else None
    return None


def _shares(
    op: Op, x: Facts, layers: list[Contraction], chosen: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(merged channels, their basis, the coefficients, what is left of beta) where merging makes the norm smaller.

    `chosen`: the bases of norms before this one, by width.
    """
    axis, size = op.out.rank - 1, op.out.sizes[-1]
    known = all_over_others(x.known, axis, size)
    gamma, beta = _vector(op, "weight", 1.0), _vector(op, "bias", 0.0)
    maps = _maps(op, x, gamma)
    read = torch.stack([layer.columns.any(0) for layer in layers]).any(0)
    targets = (known & read & (maps != 0).any(1)).nonzero().flatten()
    if targets.numel() < 2:
        return None
    available = chosen.get(size, targets[:0])
    basis, coefficients = express(maps, targets, available[known[available]])
    stay = size - int(known.sum()) + basis.numel()
    is_enough = not isinstance(rule_for(op), LayerNorm) or stay <= LARGEST_SHARE * size
    if basis.numel() >= targets.numel() or not is_enough:
        return None
    chosen[size] = torch.cat([available, basis[~torch.isin(basis, available)]])
    return targets, basis, coefficients, beta[targets] - coefficients @ beta[basis]


def _vector(op: Op, name: str, default: float) -> Tensor:
    held = op.constant(name)
    return torch.full((op.out.sizes[-1],), default, dtype=torch.float64) if held is None else held


def _maps(op: Op, x: Facts, gamma: Tensor) -> Tensor:
    """v_r for every channel: its constants at all places, and 1 where there is a mean; (channels, places)."""
    value = x.expand((op.out.rank - 1,), op.out).known_value
    places = value.reshape(-1, op.out.sizes[-1]).T
    largest = places.abs().max()
    places = places / largest if bool(largest) else places
    if isinstance(rule_for(op), LayerNorm):
        places = torch.cat([places, torch.ones_like(places[:, :1])], 1)
    return places * gamma[:, None]


def _merged(
    this: Contraction, targets: Tensor, basis: Tensor, coefficients: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that reads the basis alone."""
    taken = this.weight[:, targets]
    weight = this.weight.index_fill(1, targets, 0.0)
    weight[:, basis] += torch.einsum("or...,rb->ob...", taken, coefficients)
    bias = torch.zeros(this.out_channels, dtype=weight.dtype) if this.bias is None else this.bias
    taps = taken.flatten(2).sum(2) if this.spatial_rank else taken
    return weight, bias + taps @ rest
