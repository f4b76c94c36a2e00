"""Interval of a median from correlated timings, and the drift in them.

Timings on a shared machine come in spells: neighbouring rounds are slow together. A bootstrap that draws
single rounds would take them for independent and give too narrow an interval; this one draws runs of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
_RESAMPLES = 1000
_ENTRIES_AT_ONCE = 1_000_000


def median_interval(values: Floats, *, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the median by circular block bootstrap, deterministic under `seed`.

    `values` has shape (n,), n >= 1, in order of time; blocks hold ceil(sqrt(n)) neighbours. Source: Politis
    and Romano (1992), "A circular block-resampling procedure for stationary data".
    """
    medians = np.concatenate(list(_resampled_medians(values, np.random.default_rng(seed))))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def _resampled_medians(values: Floats, rng: np.random.Generator) -> Iterator[Floats]:
    n = len(values)
    block = math.ceil(math.sqrt(n))
    offsets = np.arange(block)
    rows = max(1, _ENTRIES_AT_ONCE // n)
    for first in range(0, _RESAMPLES, rows):
        starts = rng.integers(0, n, size=(min(rows, _RESAMPLES - first), math.ceil(n / block)))
        index = (starts[:, :, None] + offsets) % n
        yield np.median(values[index.reshape(len(starts), -1)[:, :n]], axis=1)


def half_width(interval: tuple[float, float]) -> float:
    """Half width of an interval of log ratios, as a fraction of the ratio (0.02 is 2%)."""
    low, high = interval
    return math.expm1((high - low) / 2)


def drift(values: Floats) -> float:
    """How far the medians of the first and the second half of `values`, shape (n,), lie apart; n >= 2."""
    middle = len(values) // 2
    return abs(float(np.median(values[:middle]) - np.median(values[middle:])))
