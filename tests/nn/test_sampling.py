import math

import mpmath as mp
import pytest
import torch
from scipy import stats

from sbp_compile.nn import sampling, truncated
from tests.nn import log_normal_reference as reference

# mu inside the interval, at its bounds, and beyond them by a little, by far, and by very far
POINTS = [
    (mu, log_sigma)
    for mu in (
        -40.0,
        -20.5,
        -20.01,
        -20.0,
        -15.0,
        -10.01,
        -9.9,
        -1.0,
        -0.01,
        0.0,
        0.003,
        0.02,
        0.1,
        1.0,
        5.0,
        40.0,
    )
    for log_sigma in (-12.0, -5.0, -3.0, -1.0, 0.0, 1.0, 2.0, 3.4, 5.0)
]
QUANTILES = (1e-5, 1e-3, 0.02, 0.2, 0.5, 0.8, 0.98, 0.999)


def log_theta(mu, log_sigma, p):
    """log theta as mpmath numbers, from the displacement: theta itself cannot resolve 1 - 1e-18."""
    law = sampling._Law(*sampling._table(mu, log_sigma, *reference.LOG_RANGE, p.dtype).unbind())
    moved = sampling._with_tail(law, sampling._normal_quantile(law, p), sampling._tail_displacement, p)
    bound = torch.where(mu < -10, -20.0, 0.0).to(mu.dtype)
    origin = torch.where(law.tail > 0, bound, mu).tolist()
    with mp.workdps(reference.DIGITS):
        sign = torch.where(mu < -10, -1, 1).tolist()
        scale = [g * mp.exp(ls) for g, ls in zip(sign, log_sigma.tolist(), strict=True)]
        rows = moved.tolist()
        return [[o + s * mp.mpf(d) for o, s, d in zip(origin, scale, row, strict=True)] for row in rows]


def grid(dtype):
    mu, log_sigma = torch.tensor(POINTS, dtype=dtype).T.contiguous()
    return mu, log_sigma, torch.tensor(QUANTILES, dtype=dtype)[:, None].expand(-1, len(POINTS)).contiguous()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_samples_lie_at_their_quantiles_even_in_the_far_tails(dtype, bound):
    mu, log_sigma, p = grid(dtype)
    x = log_theta(mu, log_sigma, p)
    for j in range(len(POINTS)):
        for i in range(len(QUANTILES)):
            below = reference.cdf(x[i][j], mu[j].item(), log_sigma[j].item())
            far_side = below if mu[j] >= -10 else 1 - below
            assert abs(far_side - p[i, j].item()) < bound, (POINTS[j], QUANTILES[i])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
def test_theta_is_the_exponential_of_the_quantile(dtype, bound):
    mu, log_sigma, p = grid(dtype)
    theta = sampling.sample(mu, log_sigma, p, *reference.LOG_RANGE)
    for row, exact_row in zip(theta.tolist(), log_theta(mu, log_sigma, p), strict=True):
        for got, x in zip(row, exact_row, strict=True):
            inside = min(max(x, mp.mpf(-20)), mp.mpf(0))
            assert reference.relative_error(got, mp.exp(inside)) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-3), (torch.float64, 1e-9)])
def test_gradients_are_those_of_the_quantile(dtype, bound):
    # In units of what a gradient can reach: 1 for mu, s for log_sigma. The largest float32 errors are those
    # of rare samples (p = 1e-5), which float32 places to 3% of their own probability.
    mu, log_sigma, p = grid(dtype)
    mu.requires_grad_()
    log_sigma.requires_grad_()
    x = log_theta(mu.detach(), log_sigma.detach(), p)
    for i in range(0, len(QUANTILES), 2):
        theta = sampling.sample(mu, log_sigma, p[i : i + 1], *reference.LOG_RANGE)
        by_mu, by_log_sigma = torch.autograd.grad(theta.log().sum(), (mu, log_sigma))
        for j in range(0, len(POINTS), 2):
            point = (mu[j].item(), log_sigma[j].item())
            wanted_mu, wanted_log_sigma = reference.quantile_gradient(x[i][j], *point)
            assert abs(by_mu[j].item() - wanted_mu) < bound, (point, QUANTILES[i])
            size = min(math.exp(point[1]), 20.0)
            assert abs(by_log_sigma[j].item() - wanted_log_sigma) < bound * size, (point, QUANTILES[i])


def test_gradients_agree_with_finite_differences():
    p = torch.tensor([[0.03], [0.4], [0.9]], dtype=torch.float64).expand(-1, 12).contiguous()
    mu = torch.tensor([-21.0, -20.0, -11.0, -2.0, 0.0, 1.5] * 2, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([0.0] * 6 + [2.0] * 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, ls: sampling.sample(m, ls, p, *reference.LOG_RANGE),
        (mu, log_sigma),
        eps=1e-6,
        atol=1e-7,
        rtol=1e-5,
    )


def test_a_second_derivative_is_refused_and_not_made_up():
    mu = torch.zeros(3, requires_grad=True)
    theta = sampling.sample(mu, torch.zeros(3), torch.full((1, 3), 0.3), *reference.LOG_RANGE)
    (grad,) = torch.autograd.grad(theta.square().sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mu", [-22.0, -20.0, -7.0, 0.0, 0.05, 2.0])
@pytest.mark.parametrize("log_sigma", [-4.0, 0.0, 3.4])
def test_samples_follow_the_truncated_log_normal(mu, log_sigma):
    torch.manual_seed(3)
    parameters = torch.tensor([mu]), torch.tensor([log_sigma])
    theta = sampling.sample(*parameters, sampling.uniform(20_000, parameters[0]), *reference.LOG_RANGE)
    x, s = theta.double().log().flatten(), math.exp(log_sigma)
    law = stats.truncnorm((-20 - mu) / s, (0 - mu) / s, loc=mu, scale=s)
    # float32 samples near theta = 1 have ties; the statistic, not its p-value, is what they leave intact
    assert stats.kstest(x.numpy(), law.cdf).statistic < 1.95 / math.sqrt(len(x)) + 1e-3


def test_mean_and_variance_of_samples_are_those_of_the_formulas():
    torch.manual_seed(0)
    mu = torch.tensor([-0.02, -1.0, 0.1, -6.0, 0.0], dtype=torch.float64)
    log_sigma = torch.tensor([-5.0, 3.4, -3.0, 0.5, -2.0], dtype=torch.float64)
    theta = sampling.sample(mu, log_sigma, sampling.uniform(200_000, mu), *reference.LOG_RANGE)
    mean, variance, _ = truncated.moments(mu, log_sigma, *reference.LOG_RANGE)
    assert ((theta.mean(0) - mean).abs() < 5 * (variance / len(theta)).sqrt()).all()
    torch.testing.assert_close(theta.var(0), variance, rtol=0.03, atol=0)


def test_the_gradient_of_the_sampled_mean_is_the_gradient_of_the_mean():
    torch.manual_seed(0)
    mu = torch.tensor([-0.02, -1.0, 0.1, -3.0, 0.0], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([-5.0, 3.0, -2.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    theta = sampling.sample(mu, log_sigma, sampling.uniform(200_000, mu), *reference.LOG_RANGE)
    got = torch.autograd.grad(theta.mean(0).sum(), (mu, log_sigma))
    wanted = torch.autograd.grad(truncated.moments(mu, log_sigma, -20.0, 0.0).mean.sum(), (mu, log_sigma))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_samples_and_gradients_are_finite_and_in_range_for_any_finite_parameters(dtype):
    mus = (-1000.0, -40.0, -20.0, -19.9, -10.0, -0.1, 0.0, 0.01, 3.0, 40.0, 1000.0)
    values = [(m, ls) for m in mus for ls in (-300.0, -80.0, -40.0, -20.0, -5.0, 0.0, 5.0, 20.0, 80.0, 300.0)]
    mu, log_sigma = torch.tensor(values, dtype=dtype).T.contiguous()
    mu.requires_grad_()
    log_sigma.requires_grad_()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    p = sampling.uniform(4, mu)
    p[0], p[1] = eps / 4, 1 - eps / 2
    theta = sampling.sample(mu, log_sigma, p, *reference.LOG_RANGE)
    grads = torch.autograd.grad(theta.sum(), (mu, log_sigma))
    assert ((theta >= math.exp(-20) * (1 - 1e-6)) & (theta <= 1)).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_one_rare_draw_does_not_switch_off_a_narrow_unit():
    # The smallest uniform number is a tail event of 5 sigma, not the far end of the interval.
    mu, log_sigma = torch.tensor([-0.01, 0.0, 0.5]), torch.tensor([-5.0, -5.0, -1.0])
    theta = sampling.sample(mu, log_sigma, torch.full((1, 3), 2.0**-25), *reference.LOG_RANGE)
    assert (theta > torch.tensor([0.94, 0.94, 0.05])).all()


def test_uniform_numbers_are_never_0_or_1_and_follow_the_parameters_dtype():
    for dtype in (torch.float16, torch.float32, torch.float64):
        p = sampling.uniform(1000, torch.zeros(7, dtype=dtype))
        assert p.dtype == torch.promote_types(dtype, torch.float32)
        assert p.shape == (1000, 7)
        assert ((p > 0) & (p < 1)).all()


def test_a_graph_evaluates_both_formulas_and_gives_the_same_samples(monkeypatch):
    mu, log_sigma, p = grid(torch.float64)
    mu.requires_grad_()
    eager = sampling.sample(mu, log_sigma, p, *reference.LOG_RANGE)
    (eager_grad,) = torch.autograd.grad(eager.log().sum(), mu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    graph = sampling.sample(mu, log_sigma, p, *reference.LOG_RANGE)
    (graph_grad,) = torch.autograd.grad(graph.log().sum(), mu)
    assert torch.equal(eager, graph)
    torch.testing.assert_close(eager_grad, graph_grad, rtol=1e-12, atol=1e-13)
