"""Rules for shrinking a module where it stands: its code stays, only its weights and widths may change.

The passes' own analysis with a shorter list of operators. A rewritten graph may move constants into a basis, gather,
split groups or change sizes in a view; a module's code cannot. So:

- convolutions and linear layers with constant weights: as in the passes, but a removed input that is a constant other
  than 0 must be flat and meet no border, so that all it adds is one number for each output channel;
- grouped convolutions keep their groups whole, but for depthwise ones, whose inputs and outputs go together;
- pointwise operators, pooling, resampling, permutations, concatenation: as in the passes;
- views that only merge axes (a flatten); means over axes that stay whole;
- every other operator keeps its operands and results whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ir.analysis import RuleLike
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, any_over_others
from passes.ir.program import Op
from passes.rules import OPAQUE, rule_for
from passes.rules.contraction import ContractionRule
from passes.rules.joining import Concatenate
from passes.rules.layer import Contraction, describe
from passes.rules.pointwise import Pointwise
from passes.rules.reduction import Mean
from passes.rules.resample import Resample
from passes.rules.view import Rearrange, View, blocks_of
from passes.rules.window import AdaptiveMeanPool, MaxPool, MeanPool


def in_place_rule(op: Op) -> RuleLike:
    """The rule of a call in a module whose code cannot change."""
    found = rule_for(op)
    if isinstance(found, ContractionRule):
        return _CONTRACTION
    if isinstance(found, Mean):
        return _MEAN
    if isinstance(found, View):
        return found if all(len(block.outs) <= 1 for block in blocks_of(op)) else OPAQUE
    kinds = (Pointwise, MaxPool, MeanPool, AdaptiveMeanPool, Resample, Rearrange, Concatenate)
    return found if isinstance(found, kinds) else OPAQUE


def is_depthwise(this: Contraction) -> bool:
    """Whether each input channel makes one output channel, and nothing else."""
    return this.groups > 1 and this.in_per_group == 1 and this.out_per_group == 1


class _InPlaceContraction(ContractionRule):
    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        this = describe(op)
        for axis in this.leading:
            if this.info.is_static(axis):
                keep.tie((this.x, axis), (op.node, axis), f"aligned by {op.node.name}")
        for node in (this.x, op.node):
            keep.fill(node, f"positions of {op.node.name}", this.spatial)
        if is_depthwise(this):
            keep.tie((this.x, this.axis), (op.node, this.axis), f"channel by channel in {op.node.name}")
        elif this.groups > 1:
            for node in (this.x, op.node):
                keep.fill(node, f"groups of {op.node.name}", (this.axis,))
        kept = keep.get(this.x, this.axis)
        if not bool(kept.any()):
            first = torch.arange(len(kept)) == 0
            keep.widen(this.x, this.axis, first, f"{op.node.name} reads at least one channel")
        if facts[0].any_known:
            keep.widen(
                this.x, this.axis, _unmovable(this, facts[0]), f"constants at borders of {op.node.name}"
            )


class _WholeMean(Mean):
    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        keep.fill(op.operands[0], f"the mean of {op.node.name}", self.axes(op))
        super().couple(op, keep, facts)


def _nonzero(this: Contraction, facts: Facts) -> Tensor:
    return any_over_others(facts.known_value != 0, this.axis, this.in_channels)


def _is_flat(this: Contraction, stored: Tensor) -> bool:
    return all(size == 1 for axis, size in enumerate(stored.shape) if axis != this.axis)


def _unmovable(this: Contraction, facts: Facts) -> Tensor:
    """Channels of x whose constants no number for each output channel can stand for."""
    nonzero = _nonzero(this, facts)
    movable = _is_flat(this, facts.known_value) and not this.may_vary()
    return torch.zeros_like(nonzero) if movable or this.groups > 1 else nonzero


def added_constants(this: Contraction, facts: Facts, kept: Tensor) -> Tensor | None:
    """What the removed constant channels of x add to each output channel, float64 (out,); None for nothing."""
    if this.groups > 1 or not facts.any_known:
        return None
    gone = _nonzero(this, facts) & ~kept
    if not bool(gone.any()):
        return None
    constants = facts.known_value.expand(
        [this.in_channels if axis == this.axis else 1 for axis in range(this.info.rank)]
    ).flatten()
    weight = this.weight.flatten(2).sum(2) if this.spatial_rank else this.weight
    return weight[:, gone] @ constants[gone]


_CONTRACTION, _MEAN = _InPlaceContraction(), _WholeMean()
