"""First moments and divergence of the truncated log-normal; replaced piece by piece, see noise.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CUT = 42.0
_NODES, _WEIGHTS = (torch.from_numpy(v.copy()) for v in np.polynomial.legendre.leggauss(96))


def _reach(slope: Tensor, s: Tensor) -> Tensor:
    root = (slope * slope + 2 * _CUT * s * s).sqrt() + slope.abs()
    return torch.where(slope > 0, 2 * _CUT * s * s / root, root)


def _window(mu: Tensor, s: Tensor, a: float, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mode, displacements from it, quadrature weights, window length); constants for autograd."""
    mode = mu.clamp(a, b)
    shift = mode - mu
    low = torch.minimum(_reach(-shift, s), mode - a)
    high = torch.minimum(_reach(shift - 2 * s * s, s), b - mode)
    half = (low + high) / 2
    nodes, weights = _NODES.to(mu.device), _WEIGHTS.to(mu.device)
    d = half[:, None] * nodes + ((high - low) / 2)[:, None]
    return mode, d, weights / 2, 2 * half


def _exponent(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mu, log_sigma = mu.double(), log_sigma.double()
    with torch.no_grad():
        mode, d, w, length = _window(mu, log_sigma.exp(), a, b)
    g = -d * (d + 2 * (mode - mu)[:, None]) * ((-2 * log_sigma).exp() / 2)[:, None]
    return mode, d, w, length, g


def moments(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, SNR) of theta in float64."""
    mode, d, w, _, g = _exponent(mu, log_sigma, a, b)
    p = w * g.exp()
    p = p / p.sum(1, keepdim=True)
    e = torch.expm1(d)
    mean = (p * e).sum(1)
    variance = (p * (e - mean[:, None]) ** 2).sum(1)
    scale = mode.exp()
    return scale * (1 + mean), scale * scale * variance, (1 + mean) * variance.rsqrt()


def kl(mu: Tensor, log_sigma: Tensor, a: float, b: float) -> Tensor:
    """KL(q || p) per feature, nats, float64."""
    _, _, w, length, g = _exponent(mu, log_sigma, a, b)
    g = g - (w * g).sum(1, keepdim=True)
    e = torch.expm1(g)
    z1 = (w * (e - g)).sum(1)
    return ((b - a) / length).log() + (w * g * e).sum(1) / (1 + z1) - z1.log1p()
