"""How the weight of the KL goes over the steps of training: functions of the step, as data.

warmup = Anneal(steps=1000)
loss = elbo_loss(nll, model, num_examples, kl_weight=warmup(step))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sbp_compile.nn.noise import NoiseArgumentError


@dataclass(frozen=True)
class Anneal:
    """From `start`, after `delay` steps, to `end` in `steps` steps, along a line or half a cosine; then constant.

    With the defaults a warm-up from 0 to 1 (Soenderby et al. 2016, arXiv 1602.02282). A start above the end presses
    hard first and lets the network recover. Raises NoiseArgumentError for weights below 0 and steps below 1.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0
    delay: int = 0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"`steps` (={self.steps}) must be at least 1")
        _check(self.delay >= 0, f"`delay` (={self.delay}) must be at least 0")
        _check(self.start >= 0 and self.end >= 0, f"weights (={self.start}, {self.end}) must be at least 0")
        _check(self.shape in ("linear", "cosine"), f"`shape` (={self.shape!r}) must be 'linear' or 'cosine'")

    def __call__(self, step: int) -> float:
        """Weight at a step, counted from 0."""
        progress = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cycle:
    """Every `period` steps: from `low` to `high` along a line in the first `ramp` of the period, then constant.

    Cyclical annealing (Fu et al. 2019, arXiv 1903.10145); after `cycles` periods `high` for good (None: for ever).
    Raises NoiseArgumentError for weights below 0, a period below 1, or a ramp outside (0, 1].
    """

    period: int
    ramp: float = 0.5
    low: float = 0.0
    high: float = 1.0
    cycles: int | None = None

    def __post_init__(self) -> None:
        _check(self.period >= 1, f"`period` (={self.period}) must be at least 1")
        _check(0 < self.ramp <= 1, f"`ramp` (={self.ramp}) must be above 0 and at most 1")
        _check(self.low >= 0 and self.high >= 0, f"weights (={self.low}, {self.high}) must be at least 0")

    def __call__(self, step: int) -> float:
        """Weight at a step, counted from 0."""
        if self.cycles is not None and step >= self.cycles * self.period:
            return self.high
        progress = min(step % self.period / (self.ramp * self.period), 1.0)
        return self.low + (self.high - self.low) * progress


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise NoiseArgumentError(message)
