"""What a machine runs fast: the time of one layer by its widths, as data for each target.

onnxruntime has two ways to run a convolution of images on a processor. The blocked one computes whole blocks of
`block` input and output channels, and takes a layer whose input channels are fewer than a block or a multiple of
`alignment` (a depthwise one: a multiple of `alignment`). The other one lays every window out as a column first and
multiplies exactly as many channels as there are, but whole vectors of columns: 49 cost as much as 64. So a channel more
can make a layer twice as fast. The times are measured: docs/results/widths.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from passes.rules.layer import Contraction

PICOSECOND = 1e-12


@dataclass(frozen=True)
class Layer:
    """A layer but for its widths; `positions`: at which the kernel is applied, for one example."""

    spatial_rank: int
    taps: int
    positions: int
    groups: int = 1
    is_depthwise: bool = False
    is_transposed: bool = False

    @classmethod
    def of(cls, this: Contraction) -> Layer:
        depthwise = this.groups > 1 and this.in_per_group == 1 and this.out_channels == this.groups
        return cls(
            this.spatial_rank,
            prod(this.kernel),
            this.positions * prod(this.op.out.sizes[axis] for axis in this.leading[1:]),
            this.groups,
            depthwise,
            this.is_transposed,
        )

    @property
    def is_of_images(self) -> bool:
        """Whether it is a convolution of images, ordinary or depthwise."""
        return self.spatial_rank == 2 and not self.is_transposed and (self.groups == 1 or self.is_depthwise)

    def macs(self, inputs: int, outputs: int) -> int:
        """Multiply-adds of one example."""
        return inputs * outputs // self.groups * self.taps * self.positions


class Target(Protocol):
    """Knows what a machine runs fast."""

    @property
    def name(self) -> str: ...

    def seconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        """About how long a layer of that many input and output channels takes for one example."""

    def packed(self, layer: Layer, inputs: int, outputs: int) -> tuple[bool, bool]:
        """Whether the layer takes, and whether it gives, channels packed in blocks."""

    def moving(self, channels: int, positions: int, *, at_pool: bool = False) -> float:
        """How long it takes to pack channels or to unpack them, for one example, in seconds.

        `at_pool`: in front of a pool or behind one, and not between layers.
        """

    def passing(self, entries: int) -> float:
        """How long a call takes that only reads and writes so many entries, in seconds."""

    def is_whole(self, channels: int) -> bool:
        """Whether so many channels fill their blocks, which pools and concatenations ask for to stay packed."""

    def pooling(self, channels: int, taps: int, positions: int) -> float:
        """How long a pool of `taps` entries at each of so many positions takes, for one example, in seconds."""

    def widths(self, channels: int) -> tuple[int, ...]:
        """The next widths above `channels` that may be faster."""


@dataclass(frozen=True)
class BlockedConvolutions:
    """A processor with blocked convolutions; times in picoseconds.

    `per_mac`: of a multiply-add, `per_blocked_mac`: in a blocked layer of more than one tap; `per_column_entry`,
    `per_column_row`: of an entry of the columns, and of each row of them (a channel and a tap), for kernels of more
    than one tap; `per_point`: of an entry where there is nothing to lay out;
    `per_moved`: of an entry that is packed or unpacked between layers (110 to 450 were measured, the more the larger
    the image: as outside the caches), `per_moved_at_pool`: at a pool; `per_call`,
    `per_passed`: of anything but layers, and of an entry there; `per_pooled`, `per_tap`: of an entry of a pool's result
    and of an entry that it reads, `_block` where channels fill their blocks;
    `per_depthwise`, `per_unblocked_depthwise`, `per_unblocked_channel`: of depthwise layers.
    """

    name: str
    block: int
    alignment: int = 4
    per_mac: float = 18.0
    per_blocked_mac: float = 17.0
    per_column_entry: float = 260.0
    per_column_row: float = 12e3
    per_point: float = 300.0
    per_moved: float = 450.0
    per_moved_at_pool: float = 100.0
    per_call: float = 600e3
    per_passed: float = 250.0
    per_pooled: float = 300.0
    per_tap: float = 130.0
    per_pooled_block: float = 60.0
    per_tap_block: float = 35.0
    per_depthwise: float = 55.0
    per_unblocked_depthwise: float = 200.0
    per_unblocked_channel: float = 260e3

    def seconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        return self._picoseconds(layer, inputs, outputs) * PICOSECOND

    def _picoseconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        if not layer.is_of_images:
            return self.per_mac * layer.macs(inputs, outputs)
        work = layer.taps * layer.positions
        blocked = self._is_blocked(layer, inputs)
        if layer.is_depthwise:
            if blocked:
                return self.per_depthwise * self._blocks(inputs) * work
            return inputs * (self.per_unblocked_channel + self.per_unblocked_depthwise * work)
        if blocked:
            read = inputs if inputs < self.block else self._blocks(inputs)
            per_mac = self.per_mac if layer.taps == 1 else self.per_blocked_mac
            return per_mac * read * self._blocks(outputs) * work
        columns = self._columns(layer.positions)
        return self.per_mac * inputs * outputs * layer.taps * columns + self._layout(layer, inputs)

    def _is_blocked(self, layer: Layer, inputs: int) -> bool:
        if not layer.is_of_images:
            return False
        return inputs % self.alignment == 0 or (inputs < self.block and not layer.is_depthwise)

    def packed(self, layer: Layer, inputs: int, outputs: int) -> tuple[bool, bool]:
        """Less than a block is read as it lies, but by a depthwise layer."""
        blocked = self._is_blocked(layer, inputs)
        return blocked and (layer.is_depthwise or inputs >= self.block), blocked

    def moving(self, channels: int, positions: int, *, at_pool: bool = False) -> float:
        per_entry, moved = (
            (self.per_moved_at_pool, channels) if at_pool else (self.per_moved, self._blocks(channels))
        )
        return (self.per_call + per_entry * moved * positions) * PICOSECOND

    def passing(self, entries: int) -> float:
        return (self.per_call + self.per_passed * entries) * PICOSECOND

    def is_whole(self, channels: int) -> bool:
        return channels % self.block == 0

    def pooling(self, channels: int, taps: int, positions: int) -> float:
        per_entry, per_tap = (
            (self.per_pooled_block, self.per_tap_block)
            if self.is_whole(channels)
            else (self.per_pooled, self.per_tap)
        )
        return (self.per_call + (per_entry + per_tap * taps) * channels * positions) * PICOSECOND

    def _layout(self, layer: Layer, inputs: int) -> float:
        if layer.taps == 1:
            return self.per_point * inputs * layer.positions
        return inputs * layer.taps * (self.per_column_row + self.per_column_entry * layer.positions)

    def _columns(self, positions: int) -> int:
        """As many as are computed: whole vectors, but for a single position."""
        return positions if positions == 1 else self._blocks(positions)

    def _blocks(self, number: int) -> int:
        return -(-number // self.block) * self.block

    def widths(self, channels: int) -> tuple[int, ...]:
        steps = (self.alignment, self.block)
        return tuple(sorted({-(-channels // step) * step for step in steps} - {channels}))


@dataclass(frozen=True)
class Multiples:
    """A machine that computes whole multiples of `multiple` channels in every layer (tensor cores)."""

    name: str
    multiple: int

    def seconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        padded = [-(-channels // self.multiple) * self.multiple for channels in (inputs, outputs)]
        aligned = (inputs % self.multiple == 0) and (outputs % self.multiple == 0)
        return layer.macs(*padded) * (1.0 if aligned else 1.5) * PICOSECOND

    def packed(self, layer: Layer, inputs: int, outputs: int) -> tuple[bool, bool]:
        return False, False

    def moving(self, channels: int, positions: int, *, at_pool: bool = False) -> float:
        return 0.0

    def passing(self, entries: int) -> float:
        return 0.0

    def is_whole(self, channels: int) -> bool:
        return False

    def pooling(self, channels: int, taps: int, positions: int) -> float:
        return 0.0

    def widths(self, channels: int) -> tuple[int, ...]:
        return tuple({-(-channels // self.multiple) * self.multiple} - {channels})


AVX512 = BlockedConvolutions("cpu-avx512", block=16)
AVX2 = BlockedConvolutions("cpu-avx2", block=8)
TARGETS: dict[str, Target | None] = {
    "none": None,
    "cpu-avx512": AVX512,
    "cpu-avx2": AVX2,
    "cpu-neon": None,  # onnxruntime is built without its blocked convolutions for this processor unless asked
    "cuda": None,  # nothing is known before it is measured
    "cuda-tf32": Multiples("cuda-tf32", 4),
    "cuda-fp16": Multiples("cuda-fp16", 8),
}


def this_cpu() -> Target | None:
    """The target that describes the processor at hand; None where none does."""
    return {"AVX512": AVX512, "AVX2": AVX2}.get(torch.backends.cpu.get_cpu_capability())
