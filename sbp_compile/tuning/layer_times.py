"""How long layers of given widths took on a machine, and a target that goes by it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

from passes.targets import PICOSECOND, Layer, Target
from sbp_compile.timing import environment

PLAIN_MAC = 20 * PICOSECOND
ALIGNMENTS = (4, 8, 16)
LEAST_SHARE = 0.2  # of a measured time that is left when packing is taken off

Key = tuple[Layer, int, int]


def key_of(layer: Layer, inputs: int, outputs: int) -> Key:
    """What the time of a layer is kept under: a depthwise layer has as many groups as channels."""
    return (replace(layer, groups=inputs) if layer.is_depthwise else layer), inputs, outputs


@dataclass
class LayerTimes:
    """Seconds of single layers, by `key_of`, on one machine: processor, onnxruntime, provider, threads, batch."""

    processor: str
    onnxruntime: str
    provider: str
    threads: int
    batch: int
    seconds: dict[Key, float] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, *, batch: int = 1, threads: int = 1, provider: str = "cpu") -> LayerTimes:
        """Nothing measured yet, for this processor and this onnxruntime."""
        here = environment()
        return cls(str(here["processor"]), str(here["onnxruntime"]), provider, threads, batch)

    @property
    def machine(self) -> tuple[str, str, str, int, int]:
        """What must agree for times to be comparable."""
        return self.processor, self.onnxruntime, self.provider, self.threads, self.batch

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.processor}, onnxruntime {self.onnxruntime}, {self.provider}, {threads}, batch {self.batch}"


@dataclass
class Measured:
    """A target that knows what was measured, and takes a table's guess for the rest.

    The guess is scaled by how far the table is off where both are known.
    """

    times: LayerTimes
    table: Target | None = None
    name: str = "measured"

    def __post_init__(self) -> None:
        self._scales = {of_images: self._measured_over_guessed(of_images) for of_images in (False, True)}

    def seconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        """Measured with plain channels on both sides; what packs and unpacks them there is taken off."""
        found = self.times.seconds.get(key_of(layer, inputs, outputs))
        if found is None:
            return self._scales[layer.is_of_images] * self._guess(layer, inputs, outputs)
        sides = zip(self.packed(layer, inputs, outputs), (inputs, outputs), strict=True)
        moved = sum(self.moving(width, layer.positions) for packed, width in sides if packed)
        return max(found / self.times.batch - moved, LEAST_SHARE * found / self.times.batch)

    def packed(self, layer: Layer, inputs: int, outputs: int) -> tuple[bool, bool]:
        """As the table says."""
        return (False, False) if self.table is None else self.table.packed(layer, inputs, outputs)

    def moving(self, channels: int, positions: int, *, at_pool: bool = False) -> float:
        """As the table says."""
        return 0.0 if self.table is None else self.table.moving(channels, positions, at_pool=at_pool)

    def passing(self, entries: int) -> float:
        """As the table says."""
        return 0.0 if self.table is None else self.table.passing(entries)

    def is_whole(self, channels: int) -> bool:
        """As the table says."""
        return self.table is not None and self.table.is_whole(channels)

    def pooling(self, channels: int, taps: int, positions: int) -> float:
        """As the table says."""
        return 0.0 if self.table is None else self.table.pooling(channels, taps, positions)

    def widths(self, channels: int) -> tuple[int, ...]:
        """The table's, and the next multiples of 4, 8 and 16."""
        steps = {-(-channels // step) * step for step in ALIGNMENTS}
        known = set() if self.table is None else set(self.table.widths(channels))
        return tuple(sorted((steps | known) - {channels}))

    def _guess(self, layer: Layer, inputs: int, outputs: int) -> float:
        if self.table is not None:
            return self.table.seconds(layer, inputs, outputs)
        macs = outputs * layer.taps * layer.positions
        return PLAIN_MAC * (macs if layer.is_depthwise else macs * inputs // layer.groups)

    def _measured_over_guessed(self, of_images: bool) -> float:
        """The median of the measured layers of a kind."""
        ratios = [
            seconds / self.times.batch / self._guess(layer, inputs, outputs)
            for (layer, inputs, outputs), seconds in self.times.seconds.items()
            if layer.is_of_images == of_images
        ]
        return statistics.median(ratios) if ratios else 1.0
