"""merge_parallel: layers of one value whose results are added become one layer.

    conv_a(x) + conv_b(x) = conv(x)    W = W_a + W_b, with the taps of b where a's kernel has them; b = b_a + b_b
    conv_a(x) + s x + t                s on the diagonal of the tap that reads a position itself

for the same stride and groups, as in networks that are trained with several branches and meant to be run with one
(Ding et al., RepVGG, CVPR 2021, section 3.3). Where one branch has rows of zeros, their sum has not: the cost model
says whether what stays apart would be worth gathers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, fx

from passes.affine import affine_chain
from passes.ir.cost import Copied, CostModel, CountingModel
from passes.ir.pipeline import Note, Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter, with_replaced
from passes.rules.layer import Contraction, contraction_of, emit, label

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Merged:
    """The layer that stays, with its new weight and bias; `work`: of what was merged, `other` into it, see `_work`."""

    this: Contraction
    other: fx.Node
    weight: Tensor
    bias: Tensor | None
    work: int


@dataclass(frozen=True)
class MergeParallel:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "merge_parallel"

    def __call__(self, program: Program) -> Result:
        found = {
            node: merged for node in program.calls() if (merged := self._merged(program, node)) is not None
        }
        if not found:
            return Result(program, False)
        merged_program = with_replaced(program, lambda rewriter, node: _emit(rewriter, node, found.get(node)))
        notes = tuple(
            Note(label(merged.this.op.node), f"is one layer with {label(merged.other)}, which is added to it")
            for merged in found.values()
        )
        return Result(merged_program, True, notes)

    def _merged(self, program: Program, node: fx.Node) -> Merged | None:
        if node.target is not aten.add.Tensor or node not in program.infos:
            return None
        add = program.op(node)
        if len(add.operands) != 2 or add.operands[0] is add.operands[1] or add.args["alpha"] != 1:
            return None
        for first, second in (add.operands, add.operands[::-1]):
            this = _layer(program, first)
            if this is None or this.op.out != add.out:
                continue
            merged = _with_layer(this, _layer(program, second)) or _with_scale(program, this, second)
            if merged is not None and self._pays(merged):
                return merged
        return None

    def _pays(self, merged: Merged) -> bool:
        """Whether it is no more work, or not by so much that gathers for fewer channels would pay."""
        this = merged.this
        saved = (_work(merged.weight, this.groups) - merged.work) * this.positions
        entries = this.out_channels * this.positions
        return saved <= 0 or not self.cost.gathers_pay([Copied(this.out_channels, entries)] * 2, saved)


def _work(weight: Tensor, groups: int) -> int:
    """Multiply-adds at one position without the rows and columns of zeros."""
    used = (weight.flatten(2) != 0).any(2) if weight.ndim > 2 else weight != 0
    rows, columns = used.any(1), used.view(groups, -1, used.shape[1]).any(1)
    return int(rows.sum()) * int(columns.sum()) // groups * weight[0, 0].numel()


def _emit(rewriter: Rewriter, node: fx.Node, merged: Merged | None) -> fx.Node | None:
    """The layer in the place of the sum, whose original value it holds."""
    if merged is None:
        return None
    new = emit(merged.this, rewriter, merged.weight, merged.bias, merged.this.groups)
    new.meta.pop("origin", None)
    if "origin" in node.meta:
        new.meta["origin"] = node.meta["origin"]
    return new


def _layer(program: Program, node: fx.Node) -> Contraction | None:
    """A layer that only the sum reads."""
    this = contraction_of(program, node) if len(node.users) == 1 else None
    return None if this is None or this.is_transposed else this


def _with_layer(this: Contraction, other: Contraction | None) -> Merged | None:
    """Both layers as one, in the kernel of the first."""
    if other is None or other.x is not this.x or other.op.target is not this.op.target:
        return None
    alike = other.groups == this.groups and other.dtype == this.dtype and other.op.out == this.op.out
    if not alike or (this.spatial_rank and other.per_spatial("stride") != this.per_spatial("stride")):
        return None
    places = _places(this, other)
    if places is None:
        return None
    weight, added = this.own_weight(), other.weight
    for tap, place in places:
        _at(weight, place).add_(_at(added, tap))
    biases = [bias for bias in (this.bias, other.bias) if bias is not None]
    work = sum(_work(layer.weight, layer.groups) for layer in (this, other))
    return Merged(this, other.op.node, weight, sum(biases[1:], biases[0]) if biases else None, work)


def _at(weight: Tensor, tap: tuple[int, ...]) -> Tensor:
    """The view (out, in / groups) of one tap."""
    for index in reversed(tap):
        weight = weight[..., index]
    return weight


def _places(this: Contraction, other: Contraction) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """For each tap of the other kernel the tap of this one that reads the same entry; None if one has none."""
    if not this.spatial_rank:
        return [((), ())]
    axes = []
    for axis in range(this.spatial_rank):
        (pad, step), (other_pad, other_step) = (
            (layer.per_spatial("padding")[axis], layer.per_spatial("dilation")[axis])
            for layer in (this, other)
        )
        found = []
        for tap in range(other.kernel[axis]):
            place, rest = divmod(tap * other_step - other_pad + pad, step)
            if rest or not 0 <= place < this.kernel[axis]:
                return None
            found.append((tap, place))
        axes.append(found)
    return [tuple(zip(*pairs, strict=True)) for pairs in product(*axes)]  # type: ignore[misc]


def _with_scale(program: Program, this: Contraction, addend: fx.Node) -> Merged | None:
    """A layer and x s + t as one layer."""
    chain = affine_chain(program, addend)
    if chain is None or len(addend.users) != 1:
        return None
    base, nodes, joint = chain
    if (
        base is not this.x
        or joint.axis not in (None, this.axis)
        or any(len(node.users) != 1 for node in nodes)
    ):
        return None
    square = this.in_per_group == this.out_per_group and this.info == this.op.out
    if not square or (this.spatial_rank and set(this.per_spatial("stride")) != {1}):
        return None
    place = _own_position(this)
    if place is None:
        return None
    channels = torch.arange(this.out_channels)
    weight = this.own_weight()
    _at(weight, place)[channels, channels % this.in_per_group] += joint.scale
    bias = this.bias
    if joint.has_shift:
        shift = joint.shift.expand(this.out_channels)
        bias = shift if bias is None else bias + shift
    return Merged(this, addend, weight, bias, _work(this.weight, this.groups) + this.out_channels)


def _own_position(this: Contraction) -> tuple[int, ...] | None:
    """The tap that reads the entry at the result's own position."""
    found = []
    for axis in range(this.spatial_rank):
        place, rest = divmod(this.per_spatial("padding")[axis], this.per_spatial("dilation")[axis])
        if rest or place >= this.kernel[axis]:
            return None
        found.append(place)
    return tuple(found)
