"""Bayesian model reduction of the noise: what the evidence gains when a unit's prior is narrowed around zero.

After training the posterior q(theta) under the prior p is known. Under another prior r the log evidence changes by

    dF = log E_q[r(theta) / p(theta)],

and the reduced model is the better one where dF >= 0 (Friston and Penny 2011; for this noise layer Wright, Igel and
Selvan 2024, "BMRS", arXiv 2406.01345). A unit whose better prior lies at zero is pruned: there is no threshold.

Everything is written in x = log theta, where p is uniform on [a, b], 1/p = b - a, and q is the normal density
N(mu, s^2) truncated to [a, b]. The formulas below were derived from this definition and are tested against
numerical integration; the paper's text was not at hand, its authors' code was (saintslab/bmrs-structured-pruning,
modules/layers.py), and where that departs from the definition it is said.

Integrals of normal densities are taken relative to their largest value (`truncated.log_mass`), so that nothing
underflows; exponents are differences of squares, factored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbp_compile.nn.noise import NoiseArgumentError
from sbp_compile.nn.truncated import log_mass, upcast

CODES_OFFSET = math.log(2 * math.pi) / 2
SMALLEST_LOG = -23 * math.log(2)  # the last bit of a float32 number near 1


def evidence_gain_n(mu: Tensor, log_sigma: Tensor, a: float, b: float, *, spread: float = 1e-6) -> Tensor:
    """Return dF of BMRS_N per unit, in nats: r is a normal density of x at a, of width `spread`, truncated to [a, b].

    With t = spread, S^2 = 1 / (1/s^2 + 1/t^2), m = S^2 (mu/s^2 + a/t^2) and Z(mu, s) the mass of N(mu, s^2) on [a, b]:

        dF = log(b - a) - log Z(mu, s) - log Z(a, t) + log Z(m, S)
             - log(2 pi)/2 - log(s^2 + t^2)/2 - (mu - a)^2 / (2 (s^2 + t^2)).

    The authors' code leaves log(2 pi)/2 out, so that its dF is larger by `CODES_OFFSET`, 0.919. It matters: for a
    narrow r, dF is the log ratio of q to p at x = a, and that is below 0 for every mu in the upper half of [a, b],
    however wide the noise, so that the definition itself would hardly prune. `bmrs_n` decides as the code does.

    `mu`, `log_sigma`: shape (units,), any floating dtype; the result is float64. Raises nothing; NaN stays NaN.
    """
    mu, log_sigma = upcast(mu, log_sigma)
    width, log_t = b - a, torch.full_like(mu, math.log(spread))
    mean = mu - a  # positions from here on are distances from a
    share = torch.sigmoid(2 * (log_t - log_sigma))  # S^2 / s^2
    log_both = log_t + torch.nn.functional.logsigmoid(2 * (log_sigma - log_t)) / 2
    peak, joint_peak = mean.clamp(0, width), (mean * share).clamp(0, width)
    moved = joint_peak - peak
    climb = -moved * (moved + 2 * (peak - mean)) * (-2 * log_sigma).exp() / 2
    climb = climb - (joint_peak / spread).square() / 2
    joint = climb + log_mass(mean * share, log_both, 0.0, width)
    alone = log_mass(mean, log_sigma, 0.0, width) + log_mass(torch.zeros_like(mu), log_t, 0.0, width)
    return math.log(width) + joint - alone


def evidence_gain_u(
    mu: Tensor, log_sigma: Tensor, a: float, b: float, *, low: float = SMALLEST_LOG, high: float
) -> Tensor:
    """Return dF of BMRS_U per unit, in nats: r is uniform in x on [low, high], a part of [a, b].

        dF = log (b - a)/(high - low) + log (Phi((high - mu)/s) - Phi((low - mu)/s)) / (Phi(beta) - Phi(alpha)).

    Pruned is what has more of the posterior than of the prior in [low, high]. The authors' code takes low =
    log 2^-23 and high = log 2^-8 or log 2^-4, and mu clipped to [a, b]; here mu is as it is. `low` and `high` are cut
    to [a, b]. Shapes and dtypes as for `evidence_gain_n`. Raises NoiseArgumentError where nothing is left of [low,
    high].
    """
    low, high = max(low, a), min(high, b)
    if not low < high:
        raise NoiseArgumentError(
            f"the reduced range (={low:.3g}, {high:.3g}) must be a part of the log range (={a:g}, {b:g})"
        )
    mu, log_sigma = upcast(mu, log_sigma)
    peak, inner_peak = mu.clamp(a, b), mu.clamp(low, high)
    moved = inner_peak - peak
    climb = -moved * (moved + 2 * (peak - mu)) * (-2 * log_sigma).exp() / 2
    inner = climb + log_mass(mu, log_sigma, low, high)
    return math.log((b - a) / (high - low)) + inner - log_mass(mu, log_sigma, a, b)
