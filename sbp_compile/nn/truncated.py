"""Moments and divergence of the truncated log-normal, exact to about 1e-13 wherever they exist.

x = log theta ~ N(mu, s^2) truncated to [a, b], s = exp(log_sigma); the prior of x is uniform on [a, b].
The textbook forms (Neklyudov et al. 2017) are differences of normal tails that underflow,
overflow or cancel over most of the range that training visits. Here every quantity is a ratio of integrals

    E[f] = int f(x) exp(g(x)) dx / int exp(g(x)) dx,    g(x) = -(x - mu)^2 / (2 s^2) + constant,

of smooth functions with positive weights, so nothing cancels:

1. the integrals run over the *live window*, the part of [a, b] around the mode where exp(g) (and its tilt
   by theta^2, which the variance needs) is above exp(-42) of its peak;
2. there they are one 64-point Gauss-Legendre rule in t in [-1, 1]; the window keeps the integrand within
   reach of that rule whatever s is (48 points already give 1e-13);
3. g is a parabola in t, written about its mean so that its constant never appears;
4. theta is measured from its value at the mode, so the variance is central from the start.

All arithmetic is float64 on the device of the parameters. Window and nodes are constants for autograd,
the integrand is not, so gradients are as well conditioned as values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NODES_NUMPY, _WEIGHTS_NUMPY = np.polynomial.legendre.leggauss(64)
_NODES = torch.from_numpy(_NODES_NUMPY)
_MEAN_WEIGHTS = torch.from_numpy(_WEIGHTS_NUMPY / 2)
_PARABOLA = torch.stack([_NODES, _NODES * _NODES - 1 / 3])

_CUT = 42.0
_LOG_SIGMA_LIMIT = 80.0


class Moments(NamedTuple):
    """Per feature, float64: E[theta], Var[theta], and their ratio E[theta] / sqrt(Var[theta])."""

    mean: Tensor
    variance: Tensor
    snr: Tensor


class _Window(NamedTuple):
    """x = mode + centre + half t with t in [-1, 1]; per feature, constants for autograd."""

    mode: Tensor
    centre: Tensor
    half: Tensor


def upcast(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Convert the parameters to float64; |log_sigma| saturates at 80, so that s^4 stays in range."""
    return mu.double(), log_sigma.double().clamp(-_LOG_SIGMA_LIMIT, _LOG_SIGMA_LIMIT)


def moments(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> Moments:
    """Mean, variance and signal-to-noise ratio of theta (Neklyudov et al. 2017).

    E[theta^n] = exp(n mu + n^2 s^2 / 2) (Phi(n s - alpha) - Phi(n s - beta)) / z, with alpha = (a - mu) / s,
    beta = (b - mu) / s, z = Phi(beta) - Phi(alpha), evaluated as the module says.
    `mu` and `log_sigma` have shape (features,) and any floating dtype; the results are float64 and
    differentiable. Nothing is raised; a parameter that is not a number gives results that are not.
    """
    mu, log_sigma = upcast(mu, log_sigma)
    window = _live_window(mu.detach(), log_sigma.detach(), a, b)
    density = _MEAN_WEIGHTS.to(mu.device) * _log_density(window, mu, log_sigma).exp()
    density = density / density.sum(1, keepdim=True)
    nodes = _NODES.to(mu.device)
    growth = torch.expm1(window.centre[:, None] + window.half[:, None] * nodes)  # theta / exp(mode) - 1
    mean = (density * growth).sum(1)
    variance = (density * (growth - mean[:, None]).square()).sum(1)
    peak = window.mode.exp()
    return Moments(peak * (1 + mean), peak.square() * variance, (1 + mean) / variance.sqrt())


def divergence(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> Tensor:
    """KL(q || p) of each feature in nats (Neklyudov et al. 2017), shape (features,), float64.

    The closed form log(b-a) - log s - log z - log(2 pi e)/2 - (alpha phi(alpha) - beta phi(beta)) / (2z),
    rearranged as log(b-a) + E_q[g] - log int exp(g), which stays exact where those terms cancel: for wide
    noise, where the KL vanishes like s^-4, and for a mode far outside [a, b], where they are of size
    beta^2 / 2.
    """
    mu, log_sigma = upcast(mu, log_sigma)
    window = _live_window(mu.detach(), log_sigma.detach(), a, b)
    weights = _MEAN_WEIGHTS.to(mu.device)
    g = _log_density(window, mu, log_sigma)
    above = torch.expm1(g)
    mass = (above - g) @ weights  # the mean of g is 0, so this is int exp(g) / length - 1
    return ((b - a) / (2 * window.half)).log() + ((g * above) @ weights) / (1 + mass) - mass.log1p()


def log_mass(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> Tensor:
    """Log of the integral of exp(-((x - mu)^2 - (m - mu)^2) / (2 s^2)) over [a, b], m = mu clipped to [a, b].

    The mass of a normal density on an interval, relative to its largest value there, per feature in float64;
    it does not underflow wherever mu lies.
    """
    mu, log_sigma = upcast(mu, log_sigma)
    window = _live_window(mu, log_sigma, a, b)
    c, h = window.centre, window.half
    mean = -(c * (c + 2 * (window.mode - mu)) + h.square() / 3) * (-2 * log_sigma).exp() / 2
    above = torch.expm1(_log_density(window, mu, log_sigma)) @ _MEAN_WEIGHTS.to(mu.device)
    return (2 * h).log() + mean + above.log1p()


def _log_density(window: _Window, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Evaluate log q, less its mean over the window, at the nodes: (features, nodes)."""
    precision = (-2 * log_sigma).exp()
    slope = -(window.centre + (window.mode - mu)) * window.half * precision
    curvature = -window.half.square() * precision / 2
    return torch.stack([slope, curvature], dim=1) @ _PARABOLA.to(mu.device)


def _live_window(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> _Window:
    """Find the part of [a, b] that matters to any of the integrals."""
    s2 = (2 * log_sigma).exp()
    mode = mu.clamp(a, b)
    shift = mode - mu
    low = torch.minimum(_reach(-shift, s2), mode - a)
    high = torch.minimum(_reach(shift - 2 * s2, s2), b - mode)  # theta^2 moves the mode up by 2 s^2
    return _Window(mode, (high - low) / 2, (high + low) / 2)


def _reach(offset: Tensor, s2: Tensor) -> Tensor:
    """Solve d (d + 2 offset) / (2 s^2) = 42 for d > 0, without cancellation for either sign of `offset`."""
    drop = 2 * _CUT * s2
    root = (offset.square() + drop).sqrt() + offset.abs()
    return torch.where(offset > 0, drop / root, root)
