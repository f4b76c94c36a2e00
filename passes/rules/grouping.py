"""Grouped convolutions whose groups keep different numbers of channels.

With X and Y the kept channels, n_g and m_g how many of them group g reads and computes, three forms are exact:

- padded: every group that keeps anything keeps max n_g inputs and max m_g outputs, so some removed channels stay;
- dense: one group over all kept channels, with zeros where a row does not read;
- split: one convolution for each run of neighbouring groups with equal n_g and m_g, on slices, concatenated.

The cheapest by count is taken, per output position and tap: padded max n_g * max m_g for each group, plus |X| for each
input and |Y| for each output that stays for the padding alone (what a 1x1 convolution beside it would do), dense
|X| |Y| (never more than the layer had), split the sum of n_g m_g, if that pays for copying the entries
(`CountingModel`). Widening is monotone, and the rewrite takes whichever form is cheapest for the sets as they are in
the end. Whole groups go in every form.

Not covered: a gather that repeats inputs in front of a depthwise convolution; it pays for none that was met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.ir.cost import Copied, CountingModel
from passes.ir.keep import KeepSets
from passes.ir.rewriter import Rewriter
from passes.rules.layer import Contraction, emit

aten = torch.ops.aten

COST = CountingModel()


@dataclass(frozen=True, eq=False)
class Groups:
    """The kept channels group by group: bool masks (groups, in / groups) and (groups, out / groups)."""

    this: Contraction
    ins: Tensor
    outs: Tensor

    @staticmethod
    def of(this: Contraction, keep: KeepSets) -> Groups:
        ins, outs = keep.get(this.x, this.axis), keep.get(this.op.node, this.axis)
        return Groups(this, ins.view(this.groups, -1), outs.view(this.groups, -1))

    @property
    def used(self) -> Tensor:
        """Groups that keep anything; (groups,)."""
        return self.ins.any(1) | self.outs.any(1)

    @property
    def counts(self) -> Tensor:
        """(n_g, m_g) of each group; int64 (groups, 2)."""
        return torch.stack([self.ins.sum(1), self.outs.sum(1)], 1)

    def runs(self) -> list[tuple[int, int]]:
        """[first, stop) of the neighbouring groups with equal counts, of those that compute something."""
        found: list[tuple[int, int]] = []
        counts = self.counts.tolist()
        for group, (_, outputs) in enumerate(counts):
            if not outputs:
                continue
            if found and found[-1][1] == group and counts[group - 1] == counts[group]:
                found[-1] = found[-1][0], group + 1
            else:
                found.append((group, group + 1))
        return found

    def form(self) -> str:
        """The cheapest form: "padded", "dense" or "split"."""
        counts, used = self.counts, int(self.used.sum())
        inputs, outputs = (int(total) for total in counts.sum(0))
        widest = [max(1, int(largest)) for largest in counts.max(0).values]
        taps = int(self.this.weight[0, 0].numel())
        beside = (used * widest[0] - inputs) * inputs + (used * widest[1] - outputs) * outputs
        padded = used * widest[0] * widest[1] * taps + beside
        dense = inputs * outputs * taps
        whole = self.this.groups * self.this.in_per_group * self.this.out_per_group * taps
        split = int(counts.clamp(min=1).prod(1)[counts[:, 1] > 0].sum()) * taps
        positions = self.this.positions
        saved = (min(padded, dense) - split) * positions
        runs = self.runs() if saved > 0 else []
        copies = [
            Copied(1, int(counts[first:stop, side].sum()) * positions)
            for first, stop in runs
            for side in (0, 1)
        ]
        if len(runs) > 1 and COST.gathers_pay(copies, saved):
            return "split"
        return "padded" if padded <= dense or dense > whole else "dense"


def widen_groups(this: Contraction, keep: KeepSets) -> None:
    """Keep what the cheapest form needs beside what is kept already."""
    groups = Groups.of(this, keep)
    form = groups.form()
    if form == "dense" or bool(groups.ins.all() & groups.outs.all()):
        return
    counts, why = groups.counts, f"groups of {this.op.node.name} keep equally many"
    if form == "split":
        ins = (counts[:, 1] > 0).long()
        outs = torch.zeros_like(ins)
    else:
        ins, outs = (groups.used * side.max().clamp(min=1) for side in counts.T)
    keep.widen(this.x, this.axis, filled(groups.ins, ins).flatten(), why)
    keep.widen(this.op.node, this.axis, filled(groups.outs, outs).flatten(), why)


def filled(kept: Tensor, wanted: Tensor) -> Tensor:
    """At least `wanted` (groups,) of each row of the mask: the first ones that are not kept are added."""
    missing = (wanted - kept.sum(1)).clamp(min=0)
    return kept | (~kept & ((~kept).cumsum(1) <= missing[:, None]))


def emit_groups(this: Contraction, rewriter: Rewriter) -> fx.Node:
    """The call on the kept channels, in the cheapest form."""
    if rewriter.analysis is None:
        return rewriter.copy(this.op.node)
    groups = Groups.of(this, rewriter.analysis.keep)
    counts = groups.counts[groups.used]
    form = groups.form()
    if form == "padded" and bool((counts == counts[0]).all()):
        return emit(this, rewriter, *_weights(groups, 0, this.groups), counts.shape[0])
    return _emit_split(groups, rewriter) if form == "split" else emit(this, rewriter, *_dense(groups), 1)


def _weights(groups: Groups, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the groups in [first, stop), which keep equally many where they keep anything."""
    this = groups.this
    chosen = groups.used[first:stop].nonzero().flatten() + first
    rows = _positions(groups.outs, chosen)
    columns = groups.ins[chosen].nonzero()[:, 1].view(chosen.numel(), -1)
    weight = this.weight[rows]
    index = columns.repeat_interleave(rows.numel() // chosen.numel(), 0)
    index = index.reshape(*index.shape, *[1] * this.spatial_rank).expand(-1, -1, *weight.shape[2:])
    return weight.gather(1, index), None if this.bias is None else this.bias[rows]


def _positions(kept: Tensor, chosen: Tensor) -> Tensor:
    """Flat indices of the kept channels of the chosen groups."""
    mask = torch.zeros_like(kept)
    mask[chosen] = kept[chosen]
    return mask.flatten().nonzero().flatten()


def _dense(groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one group over everything that is kept."""
    this = groups.this
    rows, columns = groups.outs.flatten().nonzero().flatten(), groups.ins.flatten().nonzero().flatten()
    weight = torch.zeros(rows.numel(), columns.numel(), *this.kernel, dtype=torch.float64)
    for group in groups.used.nonzero().flatten().tolist():
        mine = (rows // this.out_per_group == group).nonzero().flatten()
        read = (columns // this.in_per_group == group).nonzero().flatten()
        block = this.weight[rows[mine]][:, columns[read] % this.in_per_group]
        weight[mine[:, None], read[None, :]] = block
    return weight, None if this.bias is None else this.bias[rows]


def _emit_split(groups: Groups, rewriter: Rewriter) -> fx.Node:
    parts = list(_parts(groups, rewriter))
    node = groups.this.op.node
    return rewriter.call(aten.cat.default, (parts, groups.this.axis), like=node)


def _parts(groups: Groups, rewriter: Rewriter) -> Iterator[fx.Node]:
    this = groups.this
    starts = groups.ins.sum(1).cumsum(0)
    for number, (first, stop) in enumerate(groups.runs()):
        start, end = int(starts[first - 1]) if first else 0, int(starts[stop - 1])
        read = (rewriter.value(this.x), this.axis, start, end)
        x = rewriter.call(aten.slice.Tensor, read, like=this.op.node, step=f"slice{number}")
        weights = _weights(groups, first, stop)
        yield emit(this, rewriter, *weights, stop - first, x=x, step=f"part{number}")
