"""lay_out_constants: what uneven constants add to a layer's result becomes a constant map behind the layer.

A channel that is known but differs by position, or meets zero padding, adds K = conv(x_R) to the result, and K fits
into no bias. absorb_constants would keep a basis of such channels. With static positions

    y = conv(x) = conv_{W_R = 0}(x) + K

is exact as well: the channels R go, K comes as one more constant. The cost model says which is cheaper: the columns of
the basis, or adding K. The graph stays at full width; the next sweeps cut what nothing reads any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.analysis import PINNED, is_constant
from passes.ir.cost import CostModel, CountingModel
from passes.ir.keep import KeepSets
from passes.ir.lattice import all_over_others, any_over_others
from passes.ir.pipeline import Note, Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.layer import Contraction, describe, emit, varying

aten = torch.ops.aten


@dataclass(frozen=True)
class LayOutConstants:
    """The pass; `cost` decides."""

    cost: CostModel = field(default_factory=CountingModel)
    name: str = "lay_out_constants"

    def __call__(self, program: Program) -> Result:
        rewriter, notes = Rewriter(program), []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                rewriter.placeholder(node)
            elif node.op == "call_function":
                found = self._laid_out(program, node)
                rewriter.env[node] = rewriter.copy(node) if found is None else _emit(rewriter, *found)
                if found is not None:
                    notes.append(Note(node.name, "constants that differ by position are added behind it"))
        rewriter.output()
        return Result(rewriter.finish(), True, tuple(notes)) if notes else Result(program, False)

    def _laid_out(self, program: Program, node: fx.Node) -> tuple[Contraction, Tensor, Tensor] | None:
        """(the layer, its weight without the uneven constants, K) where that is cheaper than a basis."""
        if node not in program.infos or not isinstance(rule_for(program.op(node)), ContractionRule):
            return None
        this, analysis = describe(program.op(node)), program.analysed()
        if is_constant(program, node, analysis.facts) or analysis.keep.is_empty(node):
            return None
        found = _uneven(this, program) if all(this.op.out.is_static(axis) for axis in this.spatial) else None
        if found is None:
            return None
        channels, total = found
        basis = analysis.keep.get(this.x, this.axis)[channels]
        if not bool((basis & ~_pinned(analysis.keep, this)[channels]).any()):
            return None
        entries = analysis.keep.count(node, this.axis) * this.positions
        taps = int(this.weight[0, 0].numel())
        if not self.cost.map_pays(entries, int(basis.sum()) * taps * entries // this.groups):
            return None
        weight = this.own_weight()
        blocks = weight.view(this.groups, this.out_per_group, *weight.shape[1:])
        blocks[channels // this.in_per_group, :, channels % this.in_per_group] = 0.0
        return this, weight, total


def _pinned(keep: KeepSets, this: Contraction) -> Tensor:
    """The channels of x that stay whether or not they stand for constants; bool, (channels,)."""
    found = torch.zeros(this.in_channels, dtype=torch.bool)
    for reason, mask in keep.reason_masks(this.x.name, this.axis):
        if reason == PINNED:
            found |= mask
    return found


def _uneven(this: Contraction, program: Program) -> tuple[Tensor, Tensor] | None:
    """(the known channels of x that add to kept rows what differs by position, what they add); None without any.

    int64 (channels,), and stored values of y, 0 in rows that are neither kept nor known: a known row stays what it is,
    for the layers behind it will absorb it.
    """
    facts, rows = program.analysed().facts[this.x.name], program.analysed().keep.get(this.op.node, this.axis)
    if not facts.any_known:
        return None
    known = all_over_others(facts.known, this.axis, this.in_channels) & this.channels_read(rows)
    channels = (
        (known & any_over_others(facts.known_value != 0, this.axis, this.in_channels)).nonzero().flatten()
    )
    own = program.analysed().facts[this.op.node.name].known
    index = (rows | any_over_others(own, this.axis, this.out_channels)).nonzero().flatten()
    part = this.contribution(facts.known_value, channels, index) if channels.numel() else None
    if part is None:
        return None
    group = index // this.out_per_group
    groups = torch.unique(group[varying(part, this.axis) & rows[index]])
    channels = channels[torch.isin(channels // this.in_per_group, groups)]
    if not channels.numel():
        return None
    laid_out = torch.isin(group, groups).nonzero().flatten()
    index, part = index[laid_out], part.index_select(this.axis, laid_out)
    shape = list(part.shape)
    shape[this.axis] = this.out_channels
    return channels, torch.zeros(shape, dtype=part.dtype).index_copy(this.axis, index, part)


def _emit(rewriter: Rewriter, this: Contraction, weight: Tensor, total: Tensor) -> fx.Node:
    node = this.op.node
    part = emit(this, rewriter, weight, this.bias, this.groups, step="varying")
    dtype = rewriter.dtype_of(this.op.args["weight"])
    constant = rewriter.constant(total, f"{node.name}_constants", dtype)
    return rewriter.call(aten.add.Tensor, (part, constant), like=node)
