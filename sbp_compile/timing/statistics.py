"""Interval of a median from few independent measurements, and the drift in them.

The measurements are one log ratio per load of the models, not one per run: neighbouring runs are slow
together, and a model runs about a per cent faster or slower each time it is loaded (where its weights came to
lie in memory). An interval from single runs sees neither and is much too narrow; docs/latency.md has figures.

Now and then a whole load is far off, because another program had the core. The median and an interval between
order statistics are hardly moved by it, and assume nothing about the distribution.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95


def median_interval(values: Floats) -> tuple[float, float]:
    """Interval that holds the median of the distribution of independent `values`, shape (n,), at 95% or more.

    For n < 6 there is none: the smallest and the largest value are returned (75% at n = 3, 94% at 5).
    Source: the sign test inverted; the k-th smallest and k-th largest value hold the median with probability
    1 - 2 P(Binomial(n, 1/2) < k).
    """
    ordered = np.sort(values)
    rank = _rank(len(ordered))
    return float(ordered[rank - 1]), float(ordered[-rank])


def _rank(n: int) -> int:
    """Largest k >= 1 at which the k-th values from both ends still make an interval of the level."""
    below, rank = 0, 0
    while rank < n and 2 * (below + math.comb(n, rank)) <= (1 - LEVEL) * 2**n:
        below += math.comb(n, rank)
        rank += 1
    return max(rank, 1)


def half_width(interval: tuple[float, float]) -> float:
    """Half width of an interval of log ratios, as a fraction of the ratio (0.02 is 2%)."""
    low, high = interval
    return math.expm1((high - low) / 2)


def drift(values: Floats) -> float:
    """How far the medians of the first and the second half of `values`, shape (n,), lie apart; n >= 2."""
    middle = len(values) // 2
    return abs(float(np.median(values[:middle]) - np.median(values[middle:])))
