import math

import mpmath as mp
import pytest
import torch

from sbp_compile.nn import truncated
from tests.nn import log_normal_reference as reference

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


def quantities(mu, log_sigma, log_range=reference.LOG_RANGE):
    """KL, mean, variance and SNR as the layer hands them out: rounded to the parameters' dtype."""
    values = (truncated.divergence(mu, log_sigma, *log_range), *truncated.moments(mu, log_sigma, *log_range))
    return dict(zip(reference.QUANTITIES, (value.to(mu.dtype) for value in values), strict=True))


def parameters(points, dtype=torch.float64):
    mu, log_sigma = torch.tensor(points, dtype=dtype).T.contiguous()
    return mu.requires_grad_(), log_sigma.requires_grad_()


def exact_at(mu, log_sigma, index):
    """The exact values at the parameters as they are after rounding to their dtype."""
    return reference.exact(mu[index].item(), log_sigma[index].item())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("column", range(4), ids=reference.QUANTITIES)
def test_values_agree_with_50_digits_wherever_they_are_representable(dtype, column):
    mu, log_sigma = parameters(reference.points(), dtype)
    got = quantities(mu, log_sigma)[reference.QUANTITIES[column]].tolist()
    wanted = [exact_at(mu, log_sigma, i)[column] for i in range(len(got))]
    tiny = torch.finfo(dtype).tiny
    errors = [reference.relative_error(g, w) for g, w in zip(got, wanted, strict=True) if abs(w) > tiny]
    assert len(errors) > 0.95 * len(got)
    assert max(errors) < BOUNDS[dtype]


@pytest.mark.parametrize("column", range(4), ids=reference.QUANTITIES)
def test_gradients_agree_with_50_digits(column):
    # Each is judged against the larger of the two, mu taken in units of s: either can pass through 0.
    points = reference.points(count=60)[::3]
    mu, log_sigma = parameters(points)
    got = torch.autograd.grad(quantities(mu, log_sigma)[reference.QUANTITIES[column]].sum(), (mu, log_sigma))
    for i, point in enumerate(points):
        by_mu, by_log_sigma = reference.gradients(*point)[column]
        s = mp.exp(mp.mpf(point[1]))
        scale = max(abs(by_mu) * s, abs(by_log_sigma))
        assert reference.relative_error(got[0][i].item(), by_mu, scale / s) < 1e-11, point
        assert reference.relative_error(got[1][i].item(), by_log_sigma, scale) < 1e-11, point


@pytest.mark.parametrize("quantity", reference.QUANTITIES)
def test_gradients_agree_with_finite_differences(quantity):
    mu, log_sigma = parameters([(m, ls) for m in (-21.0, -1.0, 0.7) for ls in (-2.0, 0.0, 3.4)])
    assert torch.autograd.gradcheck(
        lambda *p: quantities(*p)[quantity], (mu, log_sigma), eps=1e-5, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [(-20.0, 5.0), (-75.0, 75.0), (-300.0, 300.0)])
def test_values_and_gradients_are_finite_far_beyond_the_range_of_training(dtype, limit):
    mus = [-1000.0, -40.0, -20.0, -19.0, -10.0, -1.0, 0.0, 0.1, 5.0, 40.0, 1000.0]
    mu, log_sigma = parameters([(m, ls) for m in mus for ls in torch.linspace(*limit, 41).tolist()], dtype)
    kl = truncated.divergence(mu, log_sigma, -20.0, 0.0)
    values = (kl, *truncated.moments(mu, log_sigma, -20.0, 0.0))
    assert all(value.isfinite().all() for value in values)
    if dtype == torch.float64:  # rounding a gradient of size 1/s to float16 cannot keep it finite
        for value in values:
            assert all(
                g.isfinite().all()
                for g in torch.autograd.grad(value.sum(), (mu, log_sigma), retain_graph=True)
            )


@pytest.mark.parametrize("quantity", reference.QUANTITIES)
def test_float32_gradients_are_finite_over_the_range_of_training(quantity):
    mus = [-40.0, -20.1, -20.0, -10.0, -1.0, 0.0, 0.1, 5.0, 40.0]
    points = [(m, ls) for m in mus for ls in torch.linspace(-20, 5, 51).tolist()]
    mu, log_sigma = parameters(points, torch.float32)
    grads = torch.autograd.grad(quantities(mu, log_sigma)[quantity].sum(), (mu, log_sigma))
    assert all(grad.isfinite().all() for grad in grads)


def test_wide_noise_is_the_prior():
    mu, log_sigma = parameters([(m, ls) for m in (-30.0, -20.0, -3.0, 0.0, 5.0) for ls in (12.0, 20.0)])
    got = quantities(mu, log_sigma)
    torch.testing.assert_close(got["kl"], torch.zeros_like(mu), atol=1e-10, rtol=0)
    mean, square = (1 - math.exp(-20)) / 20, (1 - math.exp(-40)) / 40
    torch.testing.assert_close(got["mean"], torch.full_like(mu, mean), atol=0, rtol=1e-6)
    snr = mean / math.sqrt(square - mean**2)
    torch.testing.assert_close(got["snr"], torch.full_like(mu, snr), atol=0, rtol=1e-6)
    assert snr == pytest.approx(1 / 3, abs=1e-9)


def test_kl_is_positive_and_falls_with_wider_noise():
    log_sigma = torch.linspace(-20, 8, 300, dtype=torch.float64)
    for mu in (-25.0, -20.0, -10.0, 0.0, 3.0):
        kl = truncated.divergence(torch.full_like(log_sigma, mu), log_sigma, -20.0, 0.0)
        assert (kl > 0).all()
        assert (kl.diff() < 0).all()


def test_kl_does_not_change_when_the_interval_is_mirrored():
    mu, log_sigma = parameters([(m, ls) for m in (0.5, 0.0, -3.0, -9.0) for ls in (-9.0, -1.0, 1.0, 3.0)])
    mirrored = truncated.divergence(-20.0 - mu, log_sigma, -20.0, 0.0)
    torch.testing.assert_close(truncated.divergence(mu, log_sigma, -20.0, 0.0), mirrored, atol=0, rtol=1e-11)


@pytest.mark.parametrize("log_range", [(-1.0, 0.0), (-8.0, 2.0), (-50.0, 0.0), (-100.0, -90.0)])
def test_other_ranges_are_as_accurate(log_range):
    a, b = log_range
    mus = [a - 5, a, (a + b) / 2, b - 0.1, b, b + 0.3, b + 5]
    points = [(m, ls) for m in mus for ls in (-15.0, -5.0, -1.0, 0.5, 1.5, 2.5, 3.5, 5.0)]
    mu, log_sigma = parameters(points)
    got = quantities(mu, log_sigma, log_range)
    for column, name in enumerate(reference.QUANTITIES):
        for i, point in enumerate(points):
            wanted = reference.exact(*point, log_range)[column]
            assert reference.relative_error(got[name][i].item(), wanted) < 1e-9, (name, point)


def test_kl_agrees_with_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    for mu, log_sigma in ((-3.0, 0.5), (-1.0, 3.4), (0.4, -1.0)):
        s = math.exp(log_sigma)
        x = mu + s * torch.randn(2_000_000, dtype=torch.float64, generator=generator)
        x = x[(x > -20) & (x < 0)]
        z = float(
            reference.cdf(0, mu, log_sigma, (-1e6, 1e6)) - reference.cdf(-20, mu, log_sigma, (-1e6, 1e6))
        )
        log_ratio = -((x - mu) ** 2) / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi) * z) + math.log(20)
        got = truncated.divergence(torch.tensor([mu]), torch.tensor([log_sigma]), -20.0, 0.0)
        tolerance = 5 * log_ratio.std().item() / math.sqrt(len(x))
        assert got.item() == pytest.approx(log_ratio.mean().item(), abs=tolerance)


def test_parameters_that_are_not_numbers_give_nan_and_not_a_number_that_looks_right():
    mu, log_sigma = torch.tensor([math.nan, 0.0]), torch.tensor([-5.0, math.nan])
    assert all(value.isnan().all() for value in quantities(mu, log_sigma).values())
