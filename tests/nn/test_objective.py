import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbp_compile.nn import (
    Anneal,
    Cycle,
    LogNormalNoise,
    NoiseArgumentError,
    clip_noise,
    elbo_loss,
    insert_noise,
    kl_divergence,
    noise_layers,
    parameter_groups,
    set_threshold,
    variational_parameters,
)
from tests.nn.test_noise import DEAD, LIVE, layer_with


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), layer_with([LIVE, DEAD, LIVE, DEAD]), nn.Linear(4, 2), layer_with([LIVE] * 2)
    )


def test_the_loss_is_the_mean_and_the_divergence_per_example():
    model = network()
    nll = torch.tensor([1.0, 2.0, 6.0])
    kl = kl_divergence(model)
    torch.testing.assert_close(elbo_loss(nll, model, 50), 3.0 + kl / 50)
    torch.testing.assert_close(elbo_loss(nll.mean(), model, 50, 0.25), 3.0 + 0.25 * kl / 50)
    assert elbo_loss(nll, nn.Linear(2, 2), 50).item() == 3.0
    assert elbo_loss(nll, model, 50, 0.0).item() == 3.0


def test_the_loss_has_gradients_to_weights_and_noise():
    model = network()
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    elbo_loss(F.cross_entropy(model(x), y, reduction="none"), model, 8).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_weights_per_layer_are_given_in_order_or_by_name():
    model = network()
    first, second = (layer.kl() for layer in noise_layers(model))
    for weights in ([2.0, 0.5], {"3": 0.5, "1": 2.0}):
        torch.testing.assert_close(kl_divergence(model, weights), 2 * first + 0.5 * second)
        loss = elbo_loss(torch.zeros(()), model, 10, 3.0, layer_weights=weights)
        torch.testing.assert_close(loss, 0.3 * (2 * first + 0.5 * second))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"`weights` \(=\(1.0,\)\) must have 2 entries, one per noise layer"),
        ({"1": 1.0}, "one number per noise layer; missing or unknown: 3"),
        ({"1": 1.0, "3": 1.0, "conv": 1.0}, "missing or unknown: conv"),
    ],
)
def test_weights_that_do_not_fit_the_layers_are_refused(weights, message):
    with pytest.raises(NoiseArgumentError, match=message):
        kl_divergence(network(), weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"`num_examples` \(=0\)"),
        ((True,), r"`num_examples` \(=True\)"),
        ((5, -1.0), r"`kl_weight` \(=-1.0\) must be a number >= 0"),
        ((5, math.nan), r"`kl_weight` \(=nan\)"),
    ],
)
def test_a_bad_argument_of_the_loss_is_named(arguments, message):
    with pytest.raises(NoiseArgumentError, match=message):
        elbo_loss(torch.zeros(()), network(), *arguments)


def test_variational_parameters_are_those_of_all_layers_once():
    model = network()
    found = variational_parameters(nn.Sequential(model, model[1]))
    assert [id(p) for p in found] == [
        id(p) for layer in (model[1], model[3]) for p in (layer.mu, layer.log_sigma)
    ]


def test_the_noise_learns_faster_and_is_not_decayed():
    model = network()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, weight_decay=0.1))
    weights, noise = optimizer.param_groups
    assert (weights["lr"], noise["lr"]) == (1e-3, 1e-2)
    assert (weights["weight_decay"], noise["weight_decay"]) == (0.1, 0.0)
    assert len(weights["params"]) + len(noise["params"]) == len(list(model.parameters()))
    assert noise["params"] == variational_parameters(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert noise["lr"] == 10 * weights["lr"] == 5e-3


def test_a_group_without_parameters_is_left_out():
    model = nn.Sequential(nn.Linear(2, 2))
    assert len(parameter_groups(model, 0.1)) == 1
    insert_noise(model, nn.Linear)
    model[0].weight.requires_grad_(requires_grad=False)
    model[0].bias.requires_grad_(requires_grad=False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1, noise_factor=30)] == [2]


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1.0, "noise_factor": -1}, {"lr": "fast"}])
def test_a_rate_that_is_not_positive_is_refused(options):
    with pytest.raises(NoiseArgumentError, match="must be a number > 0"):
        parameter_groups(network(), **options)


def test_clipping_puts_parameters_back_into_the_authors_range():
    layer = layer_with([(-30.0, 7.0), (9.0, -40.0), (-1.0, 2.0)])
    clip_noise(layer)
    assert layer.mu.tolist() == [-20.0, 5.0, -1.0]
    assert layer.log_sigma.tolist() == [5.0, -20.0, 2.0]
    clip_noise(layer, mu=(-2.0, 0.0), log_sigma=(-8.0, 3.0))
    assert layer.mu.tolist() == [-2.0, 0.0, -1.0]
    assert layer.log_sigma.tolist() == [3.0, -8.0, 2.0]


def test_thresholds_per_layer():
    model = network()
    set_threshold(model, {"3": 2.0, "1": 0.1})
    assert [layer.threshold for layer in noise_layers(model)] == [0.1, 2.0]
    set_threshold(model, [1.0, 3.0])
    assert [layer.threshold for layer in noise_layers(model)] == [1.0, 3.0]
    for bad in ([1.0, -1.0], {"1": 1.0}, [1.0]):
        with pytest.raises(NoiseArgumentError):
            set_threshold(model, bad)
    assert [layer.threshold for layer in noise_layers(model)] == [1.0, 3.0]


def test_a_warm_up_rises_along_a_line_after_its_delay():
    weight = Anneal(steps=10, delay=5)
    assert [weight(step) for step in (0, 5, 6, 10, 15, 1000)] == pytest.approx([0, 0, 0.1, 0.5, 1, 1])


def test_a_cosine_falls_from_high_pressure():
    weight = Anneal(steps=4, start=3.0, end=1.0, shape="cosine")
    assert [weight(step) for step in range(6)] == pytest.approx(
        [3.0, 2 + math.sqrt(0.5), 2.0, 2 - math.sqrt(0.5), 1.0, 1.0]
    )


def test_cycles_rise_and_hold():
    weight = Cycle(period=4, ramp=0.5, high=2.0, cycles=2)
    assert [weight(step) for step in range(10)] == [0, 1, 2, 2, 0, 1, 2, 2, 2, 2]
    assert Cycle(period=2)(100) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Anneal(steps=0),
        lambda: Anneal(steps=1, start=-1.0),
        lambda: Anneal(steps=1, delay=-1),
        lambda: Anneal(steps=1, shape="step"),
        lambda: Cycle(period=0),
        lambda: Cycle(period=2, ramp=0.0),
        lambda: Cycle(period=2, low=-1.0),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make):
    with pytest.raises(NoiseArgumentError):
        make()


def test_a_layer_without_examples_still_has_a_loss():
    layer = LogNormalNoise(3)
    assert elbo_loss(torch.zeros(0).sum(), layer, 1).requires_grad
