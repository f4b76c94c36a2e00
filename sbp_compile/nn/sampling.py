"""Samples of theta by the inverse CDF, exact in the far tails and about as cheap as dropout's.

A feature is looked at from its *near bound*, b if mu lies in the upper half of [a, b], else a (the picture is
then mirrored). With s = exp(log_sigma), t = distance of x from that bound in units of s, w = (b-a)/s, and
u = distance of mu beyond the bound in units of s (negative inside), the density of t is

    q(t) = exp(-t(t + 2u)/2) / M on [0, w],      M = m(u) - exp(-w(w + 2u)/2) m(u + w),

where m(v) = (1 - Phi(v)) / phi(v) is Mills' ratio. A uniform number p is the probability of lying farther
from the bound than t. Two formulas, chosen per feature by u, without branches on data:

1. u <= 2: y = -(u + t) is a normal quantile, sqrt 2 erfinv(e + p (e' - e)) with e, e' the error functions at
   the far and the near bound; relative to mu, which keeps wide noise accurate.
2. u > 2: t solves t(t + 2u)/2 - log(m(u + t)/m(u)) = -log(p + (1-p) c), c = 1 - M/m(u). A parabola gives
   t to 1%, one Halley step to 1e-6 and a second one to 1e-12 (in probability).

Gradients are the implicit ones, -(dF/d parameter) / q, in closed form. What depends on the feature alone is
computed in float64; samples are drawn in float32 unless the parameters are float64. The arithmetic per
sample works in place: on a CPU most of its time would otherwise go into fresh memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbp_compile.nn.truncated import upcast

_TAIL_FROM = 2.0
_SQRT2 = math.sqrt(2.0)


class _Law(NamedTuple):
    """What a sample needs to know of its feature, each of shape (features,), in the dtype of the samples."""

    tail: Tensor  # 1 where formula 2 applies, else 0
    scale: Tensor  # s, negative where the picture is mirrored
    peak: Tensor  # theta at the mode
    shift: Tensor  # where the displacement starts, relative to the mode
    u: Tensor
    w: Tensor
    erf_far: Tensor
    erf_range: Tensor
    u_tail: Tensor  # u, at least 2
    excess_u: Tensor  # 1/m(u_tail) - u_tail
    share_within: Tensor  # M/m(u)
    end_weight: Tensor  # exp(-w(w + 2u)/2)
    end_drop: Tensor  # 1 - m(u + w)/m(u)


def uniform(rows: int, mu: Tensor, width: int | None = None) -> Tensor:
    """Draw numbers in (0, 1), never 0 or 1, of shape (rows, width or len(mu)); float64 if `mu` is, else float32."""
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    eps = torch.finfo(dtype).eps
    return torch.rand(rows, width or mu.shape[0], dtype=dtype, device=mu.device).clamp_(eps / 4, 1 - eps / 2)


def sample(mu: Tensor, log_sigma: Tensor, p: Tensor, a: float, b: float) -> Tensor:
    """Evaluate theta at the quantiles `p`, with gradients to `mu` and `log_sigma`.

    `mu`, `log_sigma`: (features,). `p`: (rows, features), strictly between 0 and 1, float32 or float64,
    which is also the dtype of the result; p counts from the bound farther from mu. Raises nothing.
    """
    theta: Tensor = _Sample.apply(mu, log_sigma, p, a, b)  # type: ignore[no-untyped-call]
    return theta


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_sigma: Tensor, p: Tensor, a: float, b: float) -> Tensor:
        table = _table(mu, log_sigma, a, b, p.dtype)
        law = _Law(*table.unbind())
        displacement = _with_tail(law, _normal_quantile(law, p), _tail_displacement, p)
        theta = torch.addcmul(law.shift, law.scale, displacement).exp_().mul_(law.peak)
        theta.clamp_(math.exp(a), math.exp(b))
        ctx.save_for_backward(table, p, displacement, theta)
        ctx.parameter_dtypes = (mu.dtype, log_sigma.dtype)
        return theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        table, p, displacement, theta = ctx.saved_tensors
        law = _Law(*table.unbind())
        by_mu, by_log_sigma = _log_theta_gradients(law, p, displacement)
        grad = grad * theta
        to_mu, to_log_sigma = ctx.parameter_dtypes
        grad_mu = by_mu.mul_(grad).sum(0)
        grad_log_sigma = by_log_sigma.mul_(grad).sum(0).mul_(law.scale)
        return grad_mu.to(to_mu), grad_log_sigma.to(to_log_sigma), None, None, None


def _with_tail(law: _Law, inside: Tensor, beyond: Callable[..., Tensor], *samples: Tensor) -> Tensor:
    """Choose `beyond(law, *samples)` for the features of formula 2, `inside` for the others.

    Eagerly on a CPU formula 2 is evaluated only for the features that need it: in training few do, and it
    is the dearer one. A graph must not branch on data, and on a GPU looking at the data would cost more.
    """
    if torch.compiler.is_compiling() or inside.device.type != "cpu":
        return torch.where(law.tail > 0, beyond(law, *samples), inside)
    columns = law.tail.nonzero().squeeze(1)
    if columns.numel() == 0:
        return inside
    part = _Law(*(field[columns] for field in law))
    return inside.index_copy_(1, columns, beyond(part, *(values[:, columns] for values in samples)))


def _table(mu: Tensor, log_sigma: Tensor, a: float, b: float, dtype: torch.dtype) -> Tensor:
    """Compute the fields of `_Law` in float64, one row each, rounded to `dtype`."""
    mu, log_sigma = upcast(mu, log_sigma)
    s = log_sigma.exp()
    mirrored = mu < (a + b) / 2
    u, w = torch.where(mirrored, a - mu, mu - b) / s, (b - a) / s
    tail = u > _TAIL_FROM
    erf_far, erf_near = torch.erf(torch.stack([-(u + w), -u]) / _SQRT2)
    u_tail = u.clamp(min=_TAIL_FROM)
    excess_u, excess_end = _mills_excess(torch.stack([u_tail, u_tail + w]), dtype)
    end_weight = (-w * (w / 2 + u)).exp()
    end_drop = (w + (excess_end - excess_u)) / (u_tail + w + excess_end)
    mode = mu.clamp(a, b)
    law = _Law(
        tail=tail.to(u.dtype),
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
    return torch.stack(law).to(dtype)


def _normal_quantile(law: _Law, p: Tensor) -> Tensor:
    """Evaluate formula 1: y = -(u + t)."""
    largest = 1 - torch.finfo(p.dtype).eps / 2
    quantile = torch.addcmul(law.erf_far, p, law.erf_range).clamp_(-largest, largest).erfinv_()
    return quantile.mul_(_SQRT2)


def _tail_displacement(law: _Law, p: Tensor) -> Tensor:
    """Evaluate formula 2: -t."""
    u, hazard_u = law.u_tail, law.u_tail + law.excess_u
    target = torch.addcmul(1 - law.share_within, p, law.share_within).log_().neg_()
    growth = 1 + hazard_u * law.excess_u  # twice the mean slope of the hazard 1/m, which nears 1 beyond u
    root = torch.addcmul(hazard_u.square(), growth, target).sqrt_().add_(hazard_u)
    t = (2 * target).div_(root)
    for _ in range(2 if p.dtype == torch.float64 else 1):
        v = t + u
        excess = _mills_excess(v, p.dtype)
        left = (excess - law.excess_u).add_(t).div_(hazard_u).log1p_().sub_(target)
        left.addcmul_(t, torch.add(u, t, alpha=0.5))
        step = left.div_(v.add_(excess))
        t.addcdiv_(step, excess.mul_(step).mul_(-0.5).add_(1.0), value=-1.0)
    return t.neg_()


def _mills_excess(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Evaluate 1/m(v) - v, v >= 2, by Laplace's continued fraction 1/(v + 2/(v + 3/(v + ...))).

    It is closed by its limit. 8 levels give 1e-6 of 1/m at v = 2 and 40 give 1e-12; all differences of
    two values use the same number of levels, so that what is left cancels.
    """
    levels = 40 if dtype == torch.float64 else 8
    value = v.square().add_(4 * levels - 1).sqrt_().sub_(v).mul_(0.5)
    for level in range(levels - 1, 0, -1):
        value.add_(v).reciprocal_().mul_(level)
    return value


def _log_theta_gradients(law: _Law, p: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate log theta by mu, and by log_sigma in units of `law.scale`, at fixed p.

    With r = p / exp(-t(t + 2u)/2) and k = (1-p) q(w)/q(t) they are 1 - r - k and -(t + u (1-r-k) - w k),
    arranged so that neither formula subtracts large numbers.
    """
    u, tail = law.u, law.tail
    t = (tail - 1) * u - displacement
    # Underflow makes exp many times slower; exp(-80) is nothing next to 1.
    rise = torch.add(u, t, alpha=0.5).mul_(t).clamp_(min=-80.0).exp_()  # 1 / exp(-t(t + 2u)/2)
    k = (1 - p).mul_(rise).mul_(law.end_weight)
    lost = torch.addcmul(k, p, rise).clamp_(0.0, 1.0)
    lost = _with_tail(law, lost, _tail_loss, t, rise)
    by_mu = (1 - tail) - lost
    return by_mu, lost.mul_(u).add_(displacement).addcmul_(law.w, k)


def _tail_loss(law: _Law, t: Tensor, rise: Tensor) -> Tensor:
    """Evaluate -(1 - r - k) for formula 2 from the drop of Mills' ratio, 1 - m(u + t)/m(u)."""
    v = t + law.u_tail
    excess = _mills_excess(v, t.dtype)
    drop = (excess - law.excess_u).add_(t).div_(v.add_(excess))
    drop.mul_((law.end_weight - 1) / law.share_within)
    return drop.addcmul_(rise - 1, law.end_weight * law.end_drop / law.share_within).clamp_(-1.0, 0.0)
