"""Samples of theta by the inverse CDF, exact in the far tails and about as cheap as dropout's.

A feature is looked at from its *near bound*, b if mu lies in the upper half of [a, b], else a (the picture is
then mirrored). With s = exp(log_sigma), t = distance of x from that bound in units of s, w = (b-a)/s, and
u = distance of mu beyond the bound in units of s (negative inside), the density of t is

    q(t) = exp(-t(t + 2u)/2) / M on [0, w],      M = m(u) - exp(-w(w + 2u)/2) m(u + w),

where m(v) = (1 - Phi(v)) / phi(v) is Mills' ratio. A uniform number p is the probability of lying farther
from the bound than t. Two formulas, chosen per feature by u, both without branches on data:

1. u <= 2: y = -(u + t) is a normal quantile, sqrt(2) erfinv(erf(alpha/sqrt 2) + p (erf(beta/sqrt 2) - ...));
2. u > 2: t solves t(t + 2u)/2 - log(m(u + t)/m(u)) = -log(p + (1-p) c), c = the share of m(u) beyond w.
   A parabola gives t to 1%, one Halley step to 1e-7 and a second one to 1e-12 (in probability).

Gradients are the implicit ones, -(dF/d parameter) / q, in closed form. What depends on the feature alone is
computed in float64; samples are drawn in float32 unless the parameters are float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbp_compile.nn.truncated import upcast

_TAIL_FROM = 2.0
_SQRT2 = math.sqrt(2.0)


class _Law(NamedTuple):
    """What a sample needs to know of its feature, each of shape (features,), in the dtype of the samples."""

    tail: Tensor  # formula 2 applies
    scale: Tensor  # s, negative where the picture is mirrored
    peak: Tensor  # theta at the mode
    shift: Tensor  # what `scale * displacement` counts from, relative to the mode
    u: Tensor
    w: Tensor
    erf_far: Tensor
    erf_range: Tensor
    u_tail: Tensor  # u, at least 2
    excess_u: Tensor  # 1/m(u) - u
    share_within: Tensor  # 1 - c
    end_weight: Tensor  # exp(-w(w + 2u)/2)
    end_drop: Tensor  # 1 - m(u + w)/m(u)


def sample(mu: Tensor, log_sigma: Tensor, p: Tensor, a: float, b: float) -> Tensor:
    """Evaluate theta at the quantiles `p`, with gradients to `mu` and `log_sigma`.

    `mu`, `log_sigma`: (features,). `p`: (rows, features), strictly between 0 and 1, float32 or float64,
    which is also the dtype of the result; p counts from the bound farther from mu. Raises nothing.
    """
    theta: Tensor = _Sample.apply(mu, log_sigma, p, a, b)  # type: ignore[no-untyped-call]
    return theta


def uniform(rows: int, mu: Tensor) -> Tensor:
    """Uniform numbers of shape (rows, len(mu)) that are never 0 or 1, float64 if `mu` is, else float32."""
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    eps = torch.finfo(dtype).eps
    return torch.rand(rows, mu.shape[0], dtype=dtype, device=mu.device).clamp(eps / 4, 1 - eps / 2)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_sigma: Tensor, p: Tensor, a: float, b: float) -> Tensor:
        law = _law(mu, log_sigma, a, b, p.dtype)
        displacement = torch.where(law.tail, -_tail_distance(law, p), _normal_quantile(law, p))
        log_ratio = torch.addcmul(law.shift, law.scale, displacement)
        theta = (law.peak * log_ratio.exp()).clamp(math.exp(a), math.exp(b))
        ctx.save_for_backward(*law, p, displacement, theta)
        ctx.parameter_dtypes = (mu.dtype, log_sigma.dtype)
        return theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        *law, p, displacement, theta = ctx.saved_tensors
        by_mu, by_log_sigma = _log_theta_gradients(_Law(*law), p, displacement)
        grad = grad * theta
        to_mu, to_log_sigma = ctx.parameter_dtypes
        return (
            (grad * by_mu).sum(0).to(to_mu),
            (grad * by_log_sigma).sum(0).to(to_log_sigma),
            None,
            None,
            None,
        )


def _law(mu: Tensor, log_sigma: Tensor, a: float, b: float, dtype: torch.dtype) -> _Law:
    mu, log_sigma = upcast(mu, log_sigma)
    s = log_sigma.exp()
    mirrored = mu < (a + b) / 2
    u, w = torch.where(mirrored, a - mu, mu - b) / s, (b - a) / s
    tail = u > _TAIL_FROM
    erf_far, erf_near = torch.erf(-(u + w) / _SQRT2), torch.erf(-u / _SQRT2)
    u_tail = u.clamp(min=_TAIL_FROM)
    excess_u, excess_end = _mills_excess(u_tail, dtype), _mills_excess(u_tail + w, dtype)
    end_weight = (-w * (w + 2 * u_tail) / 2).exp()
    end_drop = (w + (excess_end - excess_u)) / (u_tail + w + excess_end)
    mode = mu.clamp(a, b)
    law = _Law(
        tail=tail,
        scale=torch.where(mirrored, -s, s),
        peak=mode.exp(),
        shift=torch.where(tail, 0.0, mu - mode),
        u=u,
        w=w,
        erf_far=erf_far,
        erf_range=erf_near - erf_far,
        u_tail=u_tail,
        excess_u=excess_u,
        share_within=1 - end_weight * (1 - end_drop),
        end_weight=end_weight,
        end_drop=end_drop,
    )
    return _Law(tail, *(value.to(dtype) for value in law[1:]))


def _normal_quantile(law: _Law, p: Tensor) -> Tensor:
    """Formula 1: y = -(u + t); erf keeps its relative accuracy about mu, where wide noise needs it."""
    largest = 1 - torch.finfo(p.dtype).eps / 2
    return torch.erfinv(torch.addcmul(law.erf_far, p, law.erf_range).clamp(-largest, largest)) * _SQRT2


def _tail_distance(law: _Law, p: Tensor) -> Tensor:
    """Formula 2: t."""
    u, hazard_u = law.u_tail, law.u_tail + law.excess_u
    target = -torch.addcmul(1 - law.share_within, p, law.share_within).log()
    growth = 1 + hazard_u * law.excess_u  # twice the mean slope of the hazard, which is close to 1 beyond u
    t = 2 * target / (hazard_u + torch.addcmul(hazard_u.square(), growth, target).sqrt())
    for _ in range(2 if p.dtype == torch.float64 else 1):
        excess = _mills_excess(u + t, p.dtype)
        left = t * (t + 2 * u) / 2 + ((t + (excess - law.excess_u)) / hazard_u).log1p() - target
        step = left / (u + t + excess)
        t = t - step / (1 - step * excess / 2)
    return t


def _mills_excess(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Evaluate 1/m(v) - v, v >= 2, by Laplace's continued fraction 1/(v + 2/(v + 3/(v + ...))).

    It is closed by its limit. 10 levels give 1e-6 of 1/m at v = 2 and 40 give 1e-12; all differences of
    two values use the same number of levels, so that what is left cancels.
    """
    levels = 40 if dtype == torch.float64 else 10
    value = ((v * v + (4 * levels - 1)).sqrt() - v) / 2
    for level in range(levels - 1, 0, -1):
        value = level / (v + value)
    return value


def _log_theta_gradients(law: _Law, p: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate log theta by mu and by log_sigma at fixed p.

    With r = p / exp(-t(t + 2u)/2) and k = (1-p) q(w)/q(t) they are 1 - r - k and -s (t + u (1-r-k) - w k),
    arranged so that neither formula subtracts large numbers.
    """
    u, w = law.u, law.w
    t = torch.where(law.tail, -displacement, -displacement - u)
    end_ratio = ((t - w) * (t + w + 2 * u) / 2).exp()
    k = (1 - p) * end_ratio
    lost = torch.addcmul(k, p, (t * (t + 2 * u) / 2).exp()).clamp(0.0, 1.0)
    by_mu_tail = _tail_shift(law, t, end_ratio)
    by_mu = torch.where(law.tail, by_mu_tail, 1 - lost)
    inner = torch.where(law.tail, -(t + u * by_mu_tail), displacement + u * lost)
    return by_mu, law.scale * torch.addcmul(inner, w, k)


def _tail_shift(law: _Law, t: Tensor, end_ratio: Tensor) -> Tensor:
    """1 - r - k for formula 2, from the drop of Mills' ratio: 1 - m(u + t)/m(u)."""
    excess = _mills_excess(law.u_tail + t, t.dtype)
    drop = (t + (excess - law.excess_u)) / (law.u_tail + t + excess)
    total = torch.addcmul(drop, law.end_weight, law.end_drop - drop) - end_ratio * law.end_drop
    return (total / law.share_within).clamp(0.0, 1.0)
