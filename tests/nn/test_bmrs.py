import math

import mpmath as mp
import pytest
import torch
from torch import nn

from sbp_compile.nn import LogNormalNoise, NoiseArgumentError, bmrs_n, bmrs_u, noise_layers, prune, snr_above
from sbp_compile.nn.bmrs import CODES_OFFSET, SMALLEST_LOG, evidence_gain_n, evidence_gain_u
from tests.nn import log_normal_reference as reference
from tests.nn.test_noise import DEAD, LIVE, layer_with

MUS = (-40.0, -21.0, -20.0, -19.9, -14.0, -10.0, -7.5, -1.0, -0.01, 0.0, 0.02, 2.0, 40.0)
LOG_SIGMAS = (-13.0, -7.0, -3.0, -1.0, 0.0, 1.0, 2.0, 3.4, 5.0)
POINTS = [(mu, log_sigma) for mu in MUS for log_sigma in LOG_SIGMAS]
EASY = [(-1.0, 3.4), (-12.0, 1.0), (-20.5, 0.5), (0.5, 2.0), (-5.0, 0.0), (-19.0, -1.0)]


def unnormalised(x, mu, s):
    return mp.exp(-((x - mu) ** 2) / (2 * s * s))


def integrated(mu, log_sigma, low, high, reduced):
    """log of the integral of q r / p over [low, high], both densities normalised by quadrature."""
    with mp.workdps(30):
        s = mp.exp(log_sigma)
        cuts = sorted({low, high, *(min(max(mu + k * s, low), high) for k in range(-9, 10, 3))})
        whole = sorted({-20.0, 0.0, *(min(max(mu + k * s, -20.0), 0.0) for k in range(-9, 10, 3))})
        # mpmath stops at an absolute error, so integrands are brought to a size near 1
        peak = max(unnormalised(x, mu, s) for x in mp.linspace(-20, 0, 401))
        mass = mp.quad(lambda x: unnormalised(x, mu, s) / peak, whole)
        top = max(unnormalised(x, mu, s) * reduced(x) for x in mp.linspace(low, high, 401))
        inner = mp.quad(lambda x: unnormalised(x, mu, s) * reduced(x) / top, cuts)
        return mp.log(20 * inner * top / (mass * peak))


def column(points, index):
    return torch.tensor([point[index] for point in points], dtype=torch.float64)


def close(got, wanted, scale=1.0):
    return abs(got - wanted) < 1e-10 * max(scale, abs(wanted))


def mass(mu, s, low, high):
    return reference._probability((low - mu) / s, (high - mu) / s)


def closed_n(mu, log_sigma, t):
    """The formula of the docstring with 160 digits."""
    with mp.workdps(reference.DIGITS):
        mu, s, t, a, b = mp.mpf(mu), mp.exp(mp.mpf(log_sigma)), mp.mpf(t), mp.mpf(-20), mp.mpf(0)
        both = 1 / (1 / s**2 + 1 / t**2)
        m = both * (mu / s**2 + a / t**2)
        masses = mass(m, mp.sqrt(both), a, b) / (mass(mu, s, a, b) * mass(a, t, a, b))
        total = s**2 + t**2
        return mp.log((b - a) * masses) - mp.log(2 * mp.pi * total) / 2 - (mu - a) ** 2 / (2 * total)


@pytest.mark.parametrize("spread", [0.3, 1e-2])
def test_the_gain_of_bmrs_n_is_the_integral_of_its_definition(spread):
    gains = evidence_gain_n(column(EASY, 0), column(EASY, 1), -20.0, 0.0, spread=spread)
    for (mu, log_sigma), gain in zip(EASY, gains.tolist(), strict=True):
        with mp.workdps(30):
            high = min(-20.0 + 12 * spread, 0.0)
            norm = mp.quad(lambda x: unnormalised(x, -20, spread), [-20.0, -20.0 + 3 * spread, high])
            wanted = integrated(
                mu, log_sigma, -20.0, high, lambda x, norm=norm: unnormalised(x, -20, spread) / norm
            )
        assert close(gain, wanted), (mu, log_sigma)


@pytest.mark.parametrize("spread", [1e-6, 0.1, 3.0])
def test_the_gain_of_bmrs_n_is_the_formula_of_its_docstring_wherever_the_posterior_lies(spread):
    gains = evidence_gain_n(column(POINTS, 0), column(POINTS, 1), -20.0, 0.0, spread=spread)
    for (mu, log_sigma), gain in zip(POINTS, gains.tolist(), strict=True):
        assert close(gain, closed_n(mu, log_sigma, spread), scale=10.0), (mu, log_sigma)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gain_of_bmrs_u_is_the_integral_of_its_definition(bits):
    high = -bits * math.log(2)
    gains = evidence_gain_u(column(EASY, 0), column(EASY, 1), -20.0, 0.0, high=high)
    for (mu, log_sigma), gain in zip(EASY, gains.tolist(), strict=True):
        wanted = integrated(mu, log_sigma, SMALLEST_LOG, high, lambda x: 1 / mp.mpf(high - SMALLEST_LOG))
        assert close(gain, wanted), (mu, log_sigma)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gain_of_bmrs_u_is_the_formula_of_its_docstring_wherever_the_posterior_lies(bits):
    high = -bits * math.log(2)
    gains = evidence_gain_u(column(POINTS, 0), column(POINTS, 1), -20.0, 0.0, high=high)
    for (mu, log_sigma), gain in zip(POINTS, gains.tolist(), strict=True):
        with mp.workdps(reference.DIGITS):
            m, s = mp.mpf(mu), mp.exp(mp.mpf(log_sigma))
            low, top = mp.mpf(SMALLEST_LOG), mp.mpf(high)
            wanted = mp.log(20 / (top - low) * mass(m, s, low, top) / mass(m, s, mp.mpf(-20), mp.mpf(0)))
        assert close(gain, wanted, scale=10.0), (mu, log_sigma)


def test_a_posterior_that_is_the_prior_gains_nothing():
    # dF = log E_p[r/p] = 0: the reduced prior explains the data as well as the full one
    mu, log_sigma = torch.tensor([-10.0]), torch.tensor([60.0])
    assert abs(evidence_gain_n(mu, log_sigma, -20.0, 0.0).item()) < 1e-9
    assert abs(evidence_gain_u(mu, log_sigma, -20.0, 0.0, high=-5.0).item()) < 1e-9


def test_the_bmrs_n_of_the_code_is_the_definition_without_a_constant():
    """The authors' expressions, restated in float64 where they are accurate."""
    mu, log_sigma = (
        torch.tensor([-1.0, -5.0, -15.0], dtype=torch.float64),
        torch.tensor([3.4, 2.0, 1.0]).double(),
    )
    var, t2, a, b = (2 * log_sigma).exp(), 1e-12, -20.0, 0.0
    var_qt = 1 / (1 / var + 1 / t2)
    mu_qt = var_qt * (mu / var + a / t2)

    def z(m, v):
        return torch.special.ndtr((b - m) / v.sqrt()) - torch.special.ndtr((a - m) / v.sqrt())

    ones = torch.ones_like(mu)
    code = torch.log(z(mu_qt, var_qt) * (b - a) / (z(mu, var) * z(a * ones, t2 * ones)))
    code += torch.log(var_qt / (var * t2)) / 2 - (mu**2 / var + a**2 / t2 - mu_qt**2 / var_qt) / 2
    wanted = evidence_gain_n(mu, log_sigma, a, b) + CODES_OFFSET
    torch.testing.assert_close(code, wanted, rtol=0, atol=1e-1)  # the code subtracts squares of size 4e14
    assert ((code >= 0) == (wanted >= 0)).all()


def test_dead_units_go_and_live_ones_stay_under_every_criterion():
    layer = layer_with([LIVE, DEAD, (0.0, -5.0), (-0.5, -1.0)])
    for criterion in (bmrs_n(), bmrs_u(8), bmrs_u(4), snr_above(1.0)):
        assert criterion(layer).tolist() == [True, False, True, True], criterion


def test_the_definition_prunes_no_mode_in_the_upper_half_and_the_codes_constant_does():
    layer = layer_with([(-1.0, log_sigma / 4) for log_sigma in range(40)])
    assert bmrs_n(offset=0.0)(layer).all()
    assert not bmrs_n()(layer).all()


def test_fewer_bits_prune_more():
    layer = layer_with([(mu, log_sigma) for mu in (-8.0, -4.0, -1.0) for log_sigma in (0.0, 1.0, 2.0, 3.0)])
    kept = [int(bmrs_u(bits)(layer).sum()) for bits in (2, 4, 8, 16)]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_what_is_not_a_number_is_never_pruned():
    layer = layer_with([(math.nan, -5.0), (0.0, math.nan), DEAD])
    for criterion in (bmrs_n(), bmrs_u(), snr_above()):
        assert criterion(layer).tolist() == [True, True, False]


@pytest.mark.parametrize("log_sigma", [-300.0, -80.0, -40.0, 300.0])
@pytest.mark.parametrize("mu", [-1000.0, -20.0, -10.0, 0.0, 1000.0])
def test_gains_are_numbers_for_extreme_parameters_and_a_sharp_live_unit_loses(mu, log_sigma):
    point = torch.tensor([mu], dtype=torch.float64), torch.tensor([log_sigma], dtype=torch.float64)
    gains = evidence_gain_n(*point, -20.0, 0.0), evidence_gain_u(*point, -20.0, 0.0, high=-5.0)
    assert not any(gain.isnan() for gain in gains)
    if mu >= 0 and log_sigma < 0:
        assert all(gain < -10 for gain in gains)


def test_pruning_switches_units_off_and_leaves_the_decision_to_the_criterion():
    model = nn.Sequential(layer_with([LIVE, DEAD]), layer_with([DEAD, (-1.0, 1.0)]))
    assert noise_layers(model)[1].mask().tolist() == [False, False]
    assert prune(model, bmrs_n()) == {"0": 1, "1": 1}
    assert model[1].mask().tolist() == [False, True]
    assert [layer.threshold for layer in noise_layers(model)] == [0.0, 0.0]
    assert prune(model, snr_above(0.0), layers=["0"], threshold=1.0) == {"0": 1}
    assert (model[0].threshold, model[1].threshold) == (1.0, 0.0)


def test_an_unknown_layer_changes_nothing():
    model = nn.Sequential(layer_with([LIVE, DEAD]))
    with pytest.raises(NoiseArgumentError, match=r"`layers` \('conv'\) is no noise layer; there are 0"):
        prune(model, bmrs_n(), layers=["0", "conv"])
    assert model[0].off is None


@pytest.mark.parametrize("kept", [torch.ones(2), torch.ones(3, dtype=torch.bool), [True, False]])
def test_a_criterion_that_gives_no_mask_changes_nothing(kept):
    model = nn.Sequential(layer_with([LIVE]), layer_with([LIVE, DEAD]))
    with pytest.raises(NoiseArgumentError, match="it must give a bool mask of shape"):
        prune(model, lambda layer: layer.mask() if layer is model[0] else kept)
    assert model[0].off is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: snr_above(-1.0), r"`threshold` \(=-1.0\) must be a number >= 0"),
        (lambda: snr_above("1"), r"`threshold` \(='1'\)"),
        (lambda: bmrs_n(spread=0.0), r"`spread` \(=0.0\) must be a number > 0"),
        (lambda: bmrs_u(0), r"`bits` \(=0\) must be a number > 0"),
        (lambda: bmrs_u(23), r"`bits` \(=23\) must be below 23"),
        (lambda: bmrs_u(8)(LogNormalNoise(2, log_range=(-3.0, 0.0))), r"the reduced range \(=-3, -5.55\)"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(NoiseArgumentError, match=message):
        make()
