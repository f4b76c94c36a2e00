import math

import numpy as np
import pytest
import torch
from torch import nn

from sbp_compile.errors import CompileError
from sbp_compile.nn import LogNormalNoise, NoiseArgumentError, kl_divergence, noise_layers, set_threshold
from tests.nn import log_normal_reference as reference

DEAD = (-1.0, 3.4)  # where units that SBP switched off settle
LIVE = (-0.1, -3.0)


def layer_with(units, **options):
    """A noise layer whose (mu, log_sigma) are `units`."""
    layer = LogNormalNoise(len(units), **options)
    with torch.no_grad():
        for i, (mu, log_sigma) in enumerate(units):
            layer.mu[i], layer.log_sigma[i] = mu, log_sigma
    return layer


def test_a_new_layer_is_close_to_the_identity_and_masks_nothing():
    layer = LogNormalNoise(7)
    assert torch.equal(layer.mu, torch.zeros(7))
    assert torch.equal(layer.log_sigma, torch.full((7,), -5.0))
    assert layer.mask().all()
    x = torch.randn(4, 7)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), x, rtol=0.05, atol=0)


def test_eval_mode_multiplies_by_the_masked_mean():
    layer = layer_with([LIVE, DEAD, (0.0, -5.0)]).eval()
    x = torch.randn(5, 3, 4)
    wanted = x * torch.where(layer.mask(), layer.mean(), 0.0).view(1, 3, 1)
    assert torch.equal(layer(x), wanted)
    assert layer.mask().tolist() == [True, False, True]
    assert torch.equal(layer(x)[:, 1], torch.zeros(5, 4))


def test_statistics_are_the_exact_ones_rounded_to_the_parameters_dtype():
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        layer = layer_with([LIVE, DEAD, (2.0, -8.0)]).to(dtype)
        wanted = [
            reference.exact(*unit) for unit in zip(layer.mu.tolist(), layer.log_sigma.tolist(), strict=True)
        ]
        for column, got in enumerate((layer.mean(), layer.variance(), layer.snr()), start=1):
            assert got.dtype == dtype
            for value, exact in zip(got.tolist(), wanted, strict=True):
                assert reference.relative_error(value, exact[column]) < bound
        assert layer.kl().dtype == dtype
        assert reference.relative_error(layer.kl().item(), sum(exact[0] for exact in wanted)) < bound


def test_kl_is_a_scalar_with_gradients_to_both_parameters():
    layer = layer_with([LIVE, DEAD])
    layer.kl().backward()
    assert layer.kl().shape == ()
    assert layer.mu.grad.abs().min() > 0
    assert (layer.log_sigma.grad < 0).all()  # more noise is always closer to the prior


def test_train_mode_draws_one_sample_per_example_and_feature():
    layer = layer_with([LIVE] * 3)
    theta = layer(torch.ones(4, 3, 5, 6))
    assert torch.equal(theta, theta[:, :, :1, :1].expand_as(theta))
    assert len(theta[:, :, 0, 0].unique()) == 12


def test_per_batch_noise_is_shared_by_the_examples():
    theta = layer_with([LIVE] * 3, per_example=False)(torch.ones(4, 3, 5))
    assert torch.equal(theta, theta[:1, :, :1].expand_as(theta))
    assert len(theta[0, :, 0].unique()) == 3


@pytest.mark.parametrize(
    ("shape", "dim", "drawn"),
    [
        ((6, 3), 1, (6, 3)),
        ((6, 3), -1, (6, 3)),
        ((6, 3, 5), 1, (6, 3, 1)),
        ((6, 5, 3), 2, (6, 1, 3)),
        ((6, 5, 3), -1, (6, 1, 3)),
        ((6, 3, 2, 2, 2), 1, (6, 3, 1, 1, 1)),
        ((6, 2, 3, 2), -2, (6, 1, 3, 1)),
        ((3,), 0, (3,)),
        ((3,), -1, (3,)),
        ((3, 8, 8), 0, (3, 1, 1)),
        ((3, 8, 8), -3, (3, 1, 1)),
    ],
)
def test_features_may_lie_along_any_dimension_of_any_rank(shape, dim, drawn):
    layer = layer_with([LIVE, DEAD, (-2.0, -1.0)], dim=dim)
    theta = layer(torch.ones(shape))
    first = theta[tuple(slice(0, size) for size in drawn)]
    assert torch.equal(theta, first.expand(shape))
    assert len(first.unique()) == math.prod(drawn)
    factor = layer.eval()(torch.ones(shape)).movedim(dim, -1)
    assert torch.equal(factor, torch.where(layer.mask(), layer.mean(), 0.0).expand_as(factor))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_an_empty_batch_passes_with_zero_gradients(shape):
    layer = LogNormalNoise(3)
    out = layer(torch.ones(shape))
    out.sum().backward()
    assert out.shape == shape
    assert torch.equal(layer.mu.grad, torch.zeros(3))


def test_training_reaches_the_parameters_and_the_input():
    torch.manual_seed(0)
    layer = layer_with([LIVE, (-2.0, 0.0)])
    x = torch.rand(4000, 2, 2, requires_grad=True)
    (layer(x).sum() / x.detach().sum()).backward()
    by_mu = torch.autograd.grad(layer.mean().sum() / 2, layer.mu)[0]
    torch.testing.assert_close(layer.mu.grad, by_mu, rtol=0.05, atol=0)
    assert (x.grad > 0).all()


def test_eval_mode_has_gradients_too():
    layer = layer_with([LIVE, DEAD]).eval()
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.mu.grad[0] > 0
    assert layer.mu.grad[1] == 0


def test_samples_repeat_with_the_seed():
    layer, x = LogNormalNoise(5), torch.ones(3, 5)
    torch.manual_seed(4)
    first = layer(x)
    torch.manual_seed(4)
    assert torch.equal(layer(x), first)


def test_the_threshold_decides_the_mask():
    layer = layer_with([LIVE, (-1.0, 1.0), DEAD])
    low, high = layer.snr()[2].item(), layer.snr()[1].item()
    assert low < high
    for threshold, kept in ((0.0, 3), ((low + high) / 2, 2), (high * 1.01, 1), (math.inf, 0)):
        layer.threshold = threshold
        assert layer.mask().sum() == kept


def test_a_parameter_that_is_not_a_number_prunes_nothing():
    layer = layer_with([(math.nan, -5.0), (0.0, math.nan), DEAD]).eval()
    assert layer.mask().tolist() == [True, True, False]
    assert layer(torch.ones(1, 3)).isnan().tolist() == [[True, True, False]]


def test_the_mask_does_not_depend_on_the_dtype_of_the_parameters():
    values = [(mu / 8, log_sigma / 16) for mu in range(-40, 8, 4) for log_sigma in range(40)]
    layer = layer_with(values)
    masks = [
        layer.to(dtype).mask() for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    assert 0 < masks[0].sum() < len(values)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_units_that_are_off_are_zero_in_both_modes_and_learn_nothing():
    layer = layer_with([LIVE, (0.0, -5.0), LIVE])
    whole = layer.kl()
    layer.switch_off(torch.tensor([False, True, False]))
    layer.switch_off(torch.tensor([False, False, True]))
    assert layer.mask().tolist() == [True, False, False]
    assert layer.kl() < whole
    for mode in (True, False):
        out = layer.train(mode)(torch.ones(4, 3))
        assert (out[:, 0] > 0).all()
        assert torch.equal(out[:, 1:], torch.zeros(4, 2))
    layer.zero_grad()
    (layer.train()(torch.ones(4, 3)).sum() + layer.kl()).backward()
    for parameter in layer.parameters():
        assert parameter.grad[0] != 0
        assert parameter.grad[1:].tolist() == [0, 0]
    layer.off = None
    assert layer.mask().all()


@pytest.mark.parametrize("units", [torch.ones(2, dtype=torch.bool), torch.ones(3)])
def test_a_mask_that_does_not_fit_is_refused(units):
    layer = LogNormalNoise(3)
    with pytest.raises(NoiseArgumentError, match=r"`units` .* bool mask of shape \(3,\)"):
        layer.switch_off(units)
    assert layer.off is None


def test_a_unit_that_is_off_draws_as_if_it_were_on():
    layer, x = layer_with([LIVE] * 4), torch.ones(3, 4)
    torch.manual_seed(2)
    wanted = layer(x)
    layer.switch_off(torch.tensor([False, True, False, False]))
    torch.manual_seed(2)
    assert torch.equal(layer(x)[:, [0, 2, 3]], wanted[:, [0, 2, 3]])


def test_functions_walk_over_all_noise_layers_of_a_module_once():
    shared = layer_with([LIVE, DEAD])
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(shared, layer_with([DEAD] * 3)))
    assert noise_layers(model) == [model[1], model[2][1]]
    assert noise_layers(shared) == [shared]
    torch.testing.assert_close(kl_divergence(model), model[1].kl() + model[2][1].kl())
    set_threshold(model, 0.1)
    assert [layer.threshold for layer in noise_layers(model)] == [0.1, 0.1]
    assert model[1].mask().all()


def test_a_module_without_noise_has_no_divergence():
    assert noise_layers(nn.Linear(2, 2)) == []
    assert kl_divergence(nn.Linear(2, 2)).item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, r"`num_features` \(=0\) must be an integer >= 1"),
        ((2.5,), {}, r"`num_features` \(=2.5\) must be an integer >= 1"),
        ((True,), {}, r"`num_features` \(=True\) must be an integer >= 1"),
        ((3,), {"dim": "channels"}, r"`dim` \(='channels'\) must be an integer"),
        ((3,), {"log_range": (0.0, 0.0)}, r"`log_range` \(=\(0.0, 0.0\)\) must be two finite numbers"),
        ((3,), {"log_range": (0.0, -20.0)}, r"`log_range` .* a < b"),
        ((3,), {"log_range": (-math.inf, 0.0)}, r"`log_range` .* finite"),
        ((3,), {"log_range": (-20.0,)}, r"`log_range` .* two"),
        ((3,), {"log_range": -20.0}, r"`log_range` .* two"),
        ((3,), {"threshold": -1.0}, r"`threshold` \(=-1.0\) must be a number >= 0"),
        ((3,), {"threshold": math.nan}, r"`threshold` \(=nan\) must be a number >= 0"),
        ((3,), {"threshold": "1"}, r"`threshold` \(='1'\) must be a number >= 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, options, message):
    with pytest.raises(NoiseArgumentError, match=message) as caught:
        LogNormalNoise(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CompileError)


def test_numpy_numbers_are_numbers():
    layer = LogNormalNoise(np.int64(3), threshold=np.float32(0.5))
    assert layer.mu.shape == (3,)
    set_threshold(layer, np.float64(2))
    assert layer.threshold == 2.0


@pytest.mark.parametrize("value", [-0.5, math.nan, None])
def test_a_bad_threshold_changes_no_layer(value):
    model = nn.Sequential(LogNormalNoise(2), LogNormalNoise(3))
    with pytest.raises(NoiseArgumentError, match="threshold"):
        set_threshold(model, value)
    assert [layer.threshold for layer in noise_layers(model)] == [1.0, 1.0]


@pytest.mark.parametrize("mode", [True, False])
def test_an_input_that_does_not_fit_is_refused(mode):
    layer = LogNormalNoise(3).train(mode)
    with pytest.raises(NoiseArgumentError, match=r"`num_features` \(=3\) .* dimension 1 .* \(2, 4, 5\)"):
        layer(torch.ones(2, 4, 5))
    with pytest.raises(NoiseArgumentError, match=r"`num_features` \(=3\) .* \(2, 1\)"):
        layer(torch.ones(2, 1))  # would broadcast
    with pytest.raises(NoiseArgumentError, match=r"`dim` \(=1\) .* \(3,\)"):
        layer(torch.ones(3))


def test_repr_shows_the_arguments():
    assert repr(LogNormalNoise(3, dim=-1, threshold=2)) == (
        "LogNormalNoise(3, dim=-1, log_range=(-20.0, 0.0), threshold=2.0, per_example=True)"
    )
