"""Interval of a mean from few independent measurements, and the drift in them.

The measurements are one log ratio per load of the models, not one per run: neighbouring runs are slow
together, and a model runs about a per cent faster or slower each time it is loaded (where its weights came to
lie in memory). An interval from single runs sees neither and is much too narrow; docs/latency.md has figures.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NORMAL_975 = 1.959963984540054


def student_975(degrees: int) -> float:
    """0.975 quantile of Student's t, `degrees` >= 2; 1% too small at 2 degrees, within 0.1% from 4.

    Source: Abramowitz and Stegun 26.7.5, the expansion in 1 / degrees.
    """
    z = _NORMAL_975
    terms: tuple[float, ...] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))


def mean_interval(values: Floats) -> tuple[float, float]:
    """95% interval of the mean of independent `values`, shape (n,), n >= 3, by Student's t."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    middle, reach = float(np.mean(values)), student_975(len(values) - 1) * error
    return middle - reach, middle + reach


def half_width(interval: tuple[float, float]) -> float:
    """Half width of an interval of log ratios, as a fraction of the ratio (0.02 is 2%)."""
    low, high = interval
    return math.expm1((high - low) / 2)


def drift(values: Floats) -> float:
    """How far the means of the first and the second half of `values`, shape (n,), lie apart; n >= 2."""
    middle = len(values) // 2
    return abs(float(np.mean(values[:middle]) - np.mean(values[middle:])))
