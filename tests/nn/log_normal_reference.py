"""The truncated log-normal in mpmath, by the textbook forms with 160 working digits: at least 50 are right.

`exact(mu, log_sigma)` gives the KL, mean, variance and SNR, `gradients` their derivatives, `cdf` the
distribution of log theta. The worst cancellation in the range, the variance at s = exp(-20), costs 40 digits.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath as mp  # type: ignore[import-untyped]

Number = Any  # mpmath's mpf, or a float

DIGITS = 160
QUANTITIES = ("kl", "mean", "variance", "snr")
LOG_RANGE = (-20.0, 0.0)

EDGE_MU = (
    -40,
    -25,
    -20.5,
    -20.001,
    -20,
    -19.99,
    -17,
    -10.1,
    -10,
    -5,
    -1,
    -0.1,
    -1e-4,
    0,
    1e-4,
    0.02,
    0.5,
    2,
    5,
    40,
)
EDGE_LOG_SIGMA = (-20, -17, -13, -10, -7, -5, -3, -1.5, -0.5, 0, 0.6, 1.2, 2, 2.7, 3.4, 4, 5)


def points(count: int = 150, seed: int = 0) -> list[tuple[float, float]]:
    """The grid of edge cases and `count` random points of [-20, 5] x [-20, 5], as (mu, log_sigma)."""
    draw = random.Random(seed)
    grid = [(float(mu), float(log_sigma)) for mu in EDGE_MU for log_sigma in EDGE_LOG_SIGMA]
    return grid + [(draw.uniform(-20, 5), draw.uniform(-20, 5)) for _ in range(count)]


def _tail(v: Number) -> Number:
    return mp.erfc(v / mp.sqrt(2)) / 2


def _probability(low: Number, high: Number) -> Number:
    """Phi(high) - Phi(low), taken in the tail where both are small."""
    if low + high < 0:
        low, high = -high, -low
    return _tail(low) - _tail(high)


def _density(v: Number) -> Number:
    return mp.exp(-v * v / 2) / mp.sqrt(2 * mp.pi)


def _evaluate(mu: Number, log_sigma: Number, a: Number, b: Number) -> tuple[Number, ...]:
    s = mp.exp(log_sigma)
    alpha, beta = (a - mu) / s, (b - mu) / s
    z = _probability(alpha, beta)
    entropy_term = (alpha * _density(alpha) - beta * _density(beta)) / (2 * z)
    kl = mp.log(b - a) - log_sigma - mp.log(z) - mp.log(2 * mp.pi * mp.e) / 2 - entropy_term
    mean = mp.exp(mu + s * s / 2) * _probability(alpha - s, beta - s) / z
    square = mp.exp(2 * mu + 2 * s * s) * _probability(alpha - 2 * s, beta - 2 * s) / z
    variance = square - mean * mean
    return kl, mean, variance, mean / mp.sqrt(variance)


@cache
def exact(mu: float, log_sigma: float, log_range: tuple[float, float] = LOG_RANGE) -> tuple[Number, ...]:
    """(KL, mean, variance, SNR) as mpmath numbers."""
    with mp.workdps(DIGITS):
        return _evaluate(*map(mp.mpf, (mu, log_sigma, *log_range)))


@cache
def gradients(
    mu: Number, log_sigma: Number, log_range: tuple[float, float] = LOG_RANGE
) -> list[tuple[Number, Number]]:
    """((d/dmu, d/dlog_sigma) of each quantity), by central differences of step 1e-35."""
    with mp.workdps(DIGITS):
        step = mp.mpf(10) ** -35
        mu, log_sigma, a, b = map(mp.mpf, (mu, log_sigma, *log_range))
        above, below = _evaluate(mu + step, log_sigma, a, b), _evaluate(mu - step, log_sigma, a, b)
        wider, narrower = _evaluate(mu, log_sigma + step, a, b), _evaluate(mu, log_sigma - step, a, b)
        by_mu = [(p - q) / (2 * step) for p, q in zip(above, below, strict=True)]
        by_log_sigma = [(p - q) / (2 * step) for p, q in zip(wider, narrower, strict=True)]
        return list(zip(by_mu, by_log_sigma, strict=True))


def cdf(x: Number, mu: Number, log_sigma: Number, log_range: tuple[float, float] = LOG_RANGE) -> Number:
    """P(log theta < x), as an mpmath number; `x` may be one."""
    with mp.workdps(DIGITS):
        x, mu, log_sigma, a, b = map(mp.mpf, (x, mu, log_sigma, *log_range))
        s = mp.exp(log_sigma)
        return _probability((a - mu) / s, (x - mu) / s) / _probability((a - mu) / s, (b - mu) / s)


def quantile_gradient(
    x: Number, mu: Number, log_sigma: Number, log_range: tuple[float, float] = LOG_RANGE
) -> tuple[Number, Number]:
    """(dx/dmu, dx/dlog_sigma) of the sample x of log theta at a fixed quantile."""
    with mp.workdps(DIGITS):
        step = mp.mpf(10) ** -30
        mu, log_sigma, x = map(mp.mpf, (mu, log_sigma, x))
        scaled = step * mp.exp(log_sigma)

        def slope(f: Callable[[Number], Number], h: Number) -> Number:
            return (f(h) - f(-h)) / (2 * h)

        density = slope(lambda h: cdf(x + h, mu, log_sigma, log_range), scaled)
        by_mu = slope(lambda h: cdf(x, mu + h, log_sigma, log_range), scaled)
        by_log_sigma = slope(lambda h: cdf(x, mu, log_sigma + h, log_range), step)
        return -by_mu / density, -by_log_sigma / density


def relative_error(got: float, wanted: Number, scale: Number = None) -> float:
    """|got - wanted| / |scale or wanted| as a float; 0/0 is 0."""
    with mp.workdps(DIGITS):
        error, size = abs(mp.mpf(got) - wanted), abs(wanted if scale is None else scale)
        return float(error / size) if size else float(error)
