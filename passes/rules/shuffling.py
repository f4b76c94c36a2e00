"""Operators that regroup positions and channels: pixel_shuffle, pixel_unshuffle, unfolding and folding of windows.

Each channel of one side (the *narrow* one) belongs to a run of n consecutive channels of the other (the *wide* one):

    pixel_shuffle    (B, C r r, H, W) -> (B, C, H r, W r)     wide -> narrow, n = r r
    pixel_unshuffle  (B, C, H r, W r) -> (B, C r r, H, W)     narrow -> wide, n = r r
    im2col           (B, C, H, W) -> (B, C k k, L)            narrow -> wide, n = k k
    col2im           (B, C k k, L) -> (B, C, H, W)            wide -> narrow, n = k k

The result is linear in the operand, channel by channel, with weights 0 and 1.

forward: on static positions the op itself runs on what is known and, for what is not, on the mask. Along dynamic
    positions a run of equal constants stays that constant where no border and no sum changes it; zeros always stay.
backward: on static positions the op's transpose runs on the demand; else a whole run is asked for.
couple: a channel stays with its whole run; positions are kept whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.rules.base import Rule, rule
from passes.rules.spatial import run

aten = torch.ops.aten


class Shuffling(Rule):
    """What the four have in common; `widens` says on which side the runs are."""

    widens: bool
    spatial_before = 2
    spatial_after = 2

    def transposed(self, op: Op, demand: Tensor) -> Tensor:
        """The transpose of the op, on a demand in float64 at full size along channels and positions."""
        raise NotImplementedError

    def keeps_constants(self, op: Op) -> bool:
        """Whether a channel that holds one number everywhere comes out as that number."""
        return True

    def applies(self, op: Op) -> bool:
        """Whether the channels can be numbered."""
        x = op.info_of(op.operands[0])
        plain = len(op.operands) == 1 and set(op.node.all_input_nodes) == set(op.operands)
        channels = self.axes(op)
        return (
            plain
            and 0 not in x.sizes + op.out.sizes
            and x.is_static(channels[0])
            and op.out.is_static(channels[1])
        )

    def axes(self, op: Op) -> tuple[int, int]:
        """The channel axis of the operand and of the result."""
        return op.info_of(op.operands[0]).rank - self.spatial_before - 1, op.out.rank - self.spatial_after - 1

    def run_length(self, op: Op) -> int:
        """How many channels of the wide side belong to one of the narrow side."""
        before, after = self.axes(op)
        sizes = op.info_of(op.operands[0]).sizes[before], op.out.sizes[after]
        return max(sizes) // min(sizes)

    def is_static(self, op: Op) -> bool:
        """Whether the positions can be numbered."""
        before, after = self.axes(op)
        infos = ((op.info_of(op.operands[0]), before), (op.out, after))
        return all(info.is_static(axis) for info, channel in infos for axis in range(channel, info.rank))

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        if not facts[0].any_known:
            return Facts.unknown(op.out)
        if not self.is_static(op):
            return self.flat(op, facts[0])
        x = op.info_of(op.operands[0])
        full = facts[0].expand(range(self.axes(op)[0], x.rank), x)
        unknown = _run(op, (~full.known).to(torch.float64)) != 0
        return Facts(_run(op, full.known_value), ~unknown).compress()

    def flat(self, op: Op, facts: Facts) -> Facts:
        """Facts along dynamic positions: runs of equal constants, or of zeros."""
        x, before = op.info_of(op.operands[0]), self.axes(op)[0]
        facts = flatten_facts(facts, range(before + 1, x.rank)).expand((before,), x)
        if not self.keeps_constants(op):
            facts = facts.forget(facts.value != 0)
        value, known = facts.known_value, facts.known.expand(facts.value.shape)
        if self.widens:
            value, known = (part.repeat_interleave(self.run_length(op), before) for part in (value, known))
        else:
            shape = [*value.shape[:before], -1, self.run_length(op), *value.shape[before + 1 :]]
            runs = [part.reshape(shape) for part in (value, known)]
            value = runs[0].select(before + 1, 0)
            known = (runs[1] & (runs[0] == value.unsqueeze(before + 1))).all(before + 1)
        shape = [*value.shape[: before + 1], *([1] * self.spatial_after)]
        return Facts(value.reshape(shape), known.reshape(shape)).compress()

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        x, (before, after) = op.info_of(op.operands[0]), self.axes(op)
        if self.is_static(op):
            sizes = [*demand.shape[:after], *op.out.sizes[after:]]
            return [self.transposed(op, demand.expand(sizes).to(torch.float64)) > 0]
        demand = any_over(demand, range(after + 1, op.out.rank))
        length = self.run_length(op)
        sizes = list(demand.shape)
        sizes[after] = op.out.sizes[after]
        demand = demand.expand(sizes)
        if self.widens:
            demand = demand.reshape([*sizes[:after], -1, length, *sizes[after + 1 :]]).any(after + 1)
        else:
            demand = demand.repeat_interleave(length, after)
        return [demand.reshape([*demand.shape[: after + 1], *([1] * (x.rank - before - 1))])]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        x, (before, after) = op.operands[0], self.axes(op)
        for axis in range(after):
            keep.tie((x, axis), (op.node, axis), f"aligned by {op.node.name}")
        keep.fill(x, f"positions of {op.node.name}", tuple(range(before + 1, op.info_of(x).rank)))
        keep.fill(op.node, f"positions of {op.node.name}", tuple(range(after + 1, op.out.rank)))
        ends = (x, before), (op.node, after)
        narrow, wide = ends if self.widens else ends[::-1]
        length, why = self.run_length(op), f"{op.node.name} moves {self.run_length(op)} channels together"
        stay = keep.get(*narrow) | keep.get(*wide).view(-1, length).any(1)
        keep.widen(*narrow, stay, why)
        keep.widen(*wide, stay.repeat_interleave(length), why)


def _run(op: Op, value: Tensor) -> Tensor:
    return run(op, value.to(torch.float64)).to(value.dtype)


@rule(aten.pixel_shuffle.default)
class PixelShuffle(Shuffling):
    """Channels to positions."""

    widens = False

    def transposed(self, op: Op, demand: Tensor) -> Tensor:
        result: Tensor = aten.pixel_unshuffle.default(demand, op.args["upscale_factor"])
        return result


@rule(aten.pixel_unshuffle.default)
class PixelUnshuffle(Shuffling):
    """Positions to channels."""

    widens = True

    def transposed(self, op: Op, demand: Tensor) -> Tensor:
        result: Tensor = aten.pixel_shuffle.default(demand, op.args["downscale_factor"])
        return result


@rule(aten.im2col.default)
class Unfold(Shuffling):
    """Windows as columns; what lies outside is 0."""

    widens = True
    spatial_after = 1

    def keeps_constants(self, op: Op) -> bool:
        return not any(op.args["padding"])

    def transposed(self, op: Op, demand: Tensor) -> Tensor:
        sizes = op.info_of(op.operands[0]).sizes[-2:]
        result: Tensor = aten.col2im.default(demand, sizes, *_windows(op))
        return result


@rule(aten.col2im.default)
class Fold(Shuffling):
    """Columns added up where their windows overlap."""

    widens = False
    spatial_before = 1

    def keeps_constants(self, op: Op) -> bool:
        return False

    def transposed(self, op: Op, demand: Tensor) -> Tensor:
        result: Tensor = aten.im2col.default(demand, *_windows(op))
        return result


def _windows(op: Op) -> list[Any]:
    return [op.args[name] for name in ("kernel_size", "dilation", "padding", "stride")]
