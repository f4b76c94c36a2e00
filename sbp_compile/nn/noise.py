"""Multiplicative log-normal noise of Structured Bayesian Pruning (Neklyudov et al. 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sbp_compile.errors import UsageError
from sbp_compile.nn import truncated


class NoiseArgumentError(UsageError, ValueError):
    """An argument of the noise layer has a value that cannot be used."""


class LogNormalNoise(nn.Module):
    """y = x * theta, log theta ~ N(mu, sigma^2) truncated to `log_range`."""

    def __init__(
        self,
        num_features: int,
        *,
        dim: int = 1,
        log_range: tuple[float, float] = (-20.0, 0.0),
        threshold: float = 1.0,
        per_example: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.dim, self.threshold, self.per_example = num_features, dim, threshold, per_example
        self.log_range = (float(log_range[0]), float(log_range[1]))
        self.mu = nn.Parameter(torch.zeros(num_features))
        self.log_sigma = nn.Parameter(torch.full((num_features,), -5.0))

    def mean(self) -> Tensor:
        """E[theta], shape (num_features,)."""
        return self._moments()[0].to(self.mu.dtype)

    def variance(self) -> Tensor:
        """Var[theta], shape (num_features,)."""
        return self._moments()[1].to(self.mu.dtype)

    def snr(self) -> Tensor:
        """E[theta] / sqrt(Var[theta]), shape (num_features,)."""
        return self._moments()[2].to(self.mu.dtype)

    def mask(self) -> Tensor:
        """True where the unit stays: SNR > threshold, or SNR not a number."""
        return ~(self._moments()[2] <= self.threshold)

    def kl(self) -> Tensor:
        """KL(q || p) summed over the features, nats, scalar."""
        return truncated.kl(self.mu, self.log_sigma, *self.log_range).sum().to(self.mu.dtype)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return truncated.moments(self.mu, self.log_sigma, *self.log_range)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by one sample of theta per example and feature (train) or by mask * mean (eval)."""
        dim = self.dim % x.ndim
        shape = [1] * x.ndim
        shape[dim] = self.num_features
        if not self.training:
            mean, _, snr = self._moments()
            return x * mean.masked_fill(snr <= self.threshold, 0.0).to(x.dtype).view(shape)
        if self.per_example and dim != 0:
            shape[0] = x.shape[0]
        return x * self._sample(shape[0] if dim != 0 else 1).to(x.dtype).view(shape)

    def _sample(self, rows: int) -> Tensor:
        a, b = self.log_range
        mu, s = self.mu.double(), self.log_sigma.double().exp()
        u = torch.rand(rows, self.num_features, dtype=torch.float64, device=mu.device).clamp(1e-12, 1 - 1e-12)
        flip = mu > (a + b) / 2  # work in the lower tail, where Phi keeps its relative accuracy
        centre = torch.where(flip, mu, a + b - mu)
        low, high = (a - centre) / s, ((b - centre) / s).clamp(min=-35.0)
        centre = torch.minimum(centre, b + 35.0 * s)
        p_low, p_high = torch.erfc(-low / math.sqrt(2)) / 2, torch.erfc(-high / math.sqrt(2)) / 2
        y = torch.special.ndtri(p_low + u * (p_high - p_low)).clamp(min=-1e30)
        x = (centre + s * y).clamp(a, b)
        return torch.where(flip, x, a + b - x).clamp(a, b).exp()


def noise_layers(module: nn.Module) -> list[LogNormalNoise]:
    """Every noise layer in `module`, itself included, in the order of `modules()`, each once."""
    return [m for m in module.modules() if isinstance(m, LogNormalNoise)]


def kl_divergence(module: nn.Module) -> Tensor:
    """Sum of `kl()` over all noise layers of `module`; 0 when it has none."""
    total = torch.zeros(())
    for layer in noise_layers(module):
        total = layer.kl() + total.to(layer.mu.device)
    return total


def set_threshold(module: nn.Module, value: float) -> None:
    """Set the SNR threshold of every noise layer of `module`."""
    if not math.isfinite(value):
        raise NoiseArgumentError(f"threshold (={value!r}) must be a finite number")
    for layer in noise_layers(module):
        layer.threshold = float(value)
