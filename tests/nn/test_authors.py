"""The layer beside the authors' own float32 expressions (group-sparsity-sbp, nets/layers.py), restated here.

They are compared where they are accurate: modes inside the interval and noise neither narrow nor very wide.
"""

import math

import pytest
import torch

from sbp_compile.nn import sampling, truncated
from tests.nn.test_noise import layer_with

A, B = -20.0, 0.0
SQRT2 = math.sqrt(2.0)


def cdf(x):
    return 0.5 * torch.erfc(-x / SQRT2)


def pdf(x):
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def scaled_tail(x):
    return torch.special.erfcx(x)


def bounds(mu, sigma):
    alpha, beta = (A - mu) / sigma, (B - mu) / sigma
    return alpha, beta, cdf(beta) - cdf(alpha)


def authors_kl(mu, log_sigma):
    alpha, beta, z = bounds(mu, log_sigma.exp())
    kl = -log_sigma - torch.log(z) - (alpha * pdf(alpha) - beta * pdf(beta)) / (2 * z)
    return kl + math.log(B - A) - math.log(2 * math.pi * math.e) / 2


def authors_mean(mu, sigma):
    alpha, beta, z = bounds(mu, sigma)
    upper = scaled_tail((sigma - beta) / SQRT2) * torch.exp(B - beta * beta / 2)
    lower = scaled_tail((sigma - alpha) / SQRT2) * torch.exp(A - alpha * alpha / 2)
    return (upper - lower) / (2 * z)


def authors_snr(mu, sigma):
    alpha, beta, z = bounds(mu, sigma)
    ratio = scaled_tail((sigma - beta) / SQRT2) * torch.exp((B - mu) - beta**2 / 2)
    ratio = ratio - scaled_tail((sigma - alpha) / SQRT2) * torch.exp((A - mu) - alpha**2 / 2)
    square = 2 * z * scaled_tail((2 * sigma - beta) / SQRT2) * torch.exp(2 * (B - mu) - beta**2 / 2)
    square = square - 2 * z * scaled_tail((2 * sigma - alpha) / SQRT2) * torch.exp(
        2 * (A - mu) - alpha**2 / 2
    )
    return ratio / torch.sqrt(square - ratio**2)


def authors_sample(mu, sigma, u):
    alpha, beta, _ = bounds(mu, sigma)
    gamma = (cdf(alpha) + u * (cdf(beta) - cdf(alpha))).clamp(1e-5, 1 - 1e-5)
    return (torch.special.ndtri(gamma) * sigma + mu).clamp(A, B).exp()


def grid(dtype=torch.float32):
    values = [
        (mu, log_sigma) for mu in (-3.0, -2.0, -1.0, -0.5) for log_sigma in (-1.5, -1.0, -0.5, 0.0, 0.3)
    ]
    mu, log_sigma = torch.tensor(values, dtype=dtype).T
    return mu.contiguous(), log_sigma.contiguous()


def test_the_divergence_is_theirs():
    mu, log_sigma = grid()
    ours = truncated.divergence(mu, log_sigma, A, B).float()
    torch.testing.assert_close(ours, authors_kl(mu, log_sigma), rtol=1e-4, atol=1e-4)


def test_mean_and_snr_are_theirs():
    mu, log_sigma = grid()
    ours = truncated.moments(mu, log_sigma, A, B)
    torch.testing.assert_close(ours.mean.float(), authors_mean(mu, log_sigma.exp()), rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.snr.float(), authors_snr(mu, log_sigma.exp()), rtol=1e-2, atol=0)


@pytest.mark.parametrize("u", [0.01, 0.3, 0.7, 0.99])
def test_samples_at_a_quantile_are_theirs(u):
    mu, log_sigma = grid(torch.float64)
    ours = sampling.sample(mu, log_sigma, torch.full((1, len(mu)), u, dtype=torch.float64), A, B)[0]
    torch.testing.assert_close(ours, authors_sample(mu, log_sigma.exp(), u), rtol=1e-9, atol=0)


def test_their_mask_is_ours_where_theirs_is_a_number():
    """Their comparison prunes what is not a number; where it is one both agree."""
    values = [(mu / 4, log_sigma / 4) for mu in range(-12, 1) for log_sigma in range(-6, 16)]
    layer = layer_with(values)
    theirs = authors_snr(layer.mu.detach(), layer.log_sigma.detach().exp())
    certain = theirs.isfinite() & ((theirs - 1).abs() > 0.05)
    assert certain.sum() > 100
    assert torch.equal((theirs > 1)[certain], layer.mask()[certain])
