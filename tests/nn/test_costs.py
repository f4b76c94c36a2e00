import math

import pytest
import torch
from torch import nn

import sbp_compile
from passes.ir.cost import count
from sbp_compile.nn import (
    LogNormalNoise,
    NetworkCosts,
    NoiseArgumentError,
    mac_kl_weights,
    noise_layers,
    prune_to_latency,
    prune_to_macs,
    sparsity,
)
from tests.nn.test_noise import DEAD
from tests.nn.test_noise_dropin import torch_copies_its_own_deprecated_class

pytestmark = torch_copies_its_own_deprecated_class


def network():
    """3x3 convolution (6 channels, 6x6 positions), noise; 8 hidden units, noise; 3 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), LogNormalNoise(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(216, 8), nn.ReLU(), LogNormalNoise(8), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer in noise_layers(model):
            layer.log_sigma.copy_(torch.linspace(-5, layer.num_features / 20, layer.num_features))
    return model


X = torch.randn(2, 1, 8, 8)
CONV, HIDDEN, HEAD = 9 * 36, 36, 3


def expected(channels, hidden):
    return channels * CONV + channels * hidden * HIDDEN + hidden * HEAD


@pytest.fixture(scope="module")
def captured():
    model = network()
    return model, NetworkCosts(model, X)


def test_capture_leaves_the_model_as_it_was(captured):
    model, _ = captured
    assert all(layer.off is None and layer.threshold == 1.0 for layer in noise_layers(model))
    assert not model.training


def test_multiply_adds_are_those_of_the_compiled_network(captured):
    _, costs = captured
    assert costs.dense_macs == expected(6, 8)
    masks = {"1": torch.arange(6) < 2, "6": torch.arange(8) > 4}
    assert costs.macs(masks) == expected(2, 3)
    twin = network()
    for layer, mask in zip(noise_layers(twin), masks.values(), strict=True):
        layer.switch_off(~mask)
    compiled = sbp_compile.compile(twin, X, verify=False)
    assert count(compiled.program).macs == costs.macs(masks)


def test_the_current_masks_count_without_a_new_capture(captured):
    model, costs = captured
    assert costs.macs() == expected(*(int(layer.mask().sum()) for layer in noise_layers(model)))
    layer = noise_layers(model)[1]
    saved = layer.log_sigma.detach().clone()
    with torch.no_grad():
        layer.mu[:4], layer.log_sigma[:4] = DEAD
    live = int(layer.mask().sum())
    assert costs.macs() == expected(6, live)
    with torch.no_grad():
        layer.log_sigma.copy_(saved)
        layer.mu.zero_()


def test_a_unit_costs_its_row_and_the_columns_that_read_it(captured):
    _, costs = captured
    assert costs.macs_per_unit() == {"1": CONV + 8 * HIDDEN, "6": 6 * HIDDEN + HEAD}


def test_layer_weights_follow_the_cost_of_a_unit_and_leave_the_kl_its_weight():
    model = network()
    weights = mac_kl_weights(model, X)
    assert weights["1"] / weights["6"] == pytest.approx((CONV + 8 * HIDDEN) / (6 * HIDDEN + HEAD))
    assert 6 * weights["1"] + 8 * weights["6"] == pytest.approx(14)


def test_a_layer_that_is_not_called_costs_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.noise, self.other = nn.Linear(4, 6), LogNormalNoise(6), LogNormalNoise(2)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.noise(self.linear(x)).relu())

    costs = NetworkCosts(Unused(), torch.ones(2, 4))
    assert costs.macs_per_unit() == {"noise": 6, "other": 0}


def test_a_model_without_noise_is_refused():
    with pytest.raises(
        NoiseArgumentError, match="the model has no noise layers: put some in with insert_noise"
    ):
        NetworkCosts(nn.Linear(2, 2), torch.ones(2, 2))


def test_costs_of_wider_layers_are_not_those_of_the_model(captured):
    """One unit would be broadcast over all that were there, and every one count as left."""
    model, costs = fresh_costs(captured)
    with torch.no_grad():
        model[1].survive(torch.arange(6) == 0)
        model[1].mu, model[1].log_sigma = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    with pytest.raises(
        NoiseArgumentError, match="'1' has 1 units, and had 6 when its costs were captured: make new"
    ):
        sparsity(model, costs)


def fresh_costs(captured):
    """A twin of the captured model whose masks may be changed."""
    model = network()
    costs = NetworkCosts.__new__(NetworkCosts)
    vars(costs).update(vars(captured[1]))
    costs.layers = dict(zip(captured[1].layers, noise_layers(model), strict=True))
    return model, costs


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_most_units_that_meet_the_budget_stay_the_best_first(captured, share):
    _, costs = fresh_costs(captured)
    fit = prune_to_macs(costs, share)
    assert fit.macs <= share * fit.dense_macs
    assert fit.macs == costs.macs() == expected(*fit.kept.values())
    snr = {(name, i): v for name, layer in costs.layers.items() for i, v in enumerate(layer.snr().tolist())}
    off = {(name, i) for name, layer in costs.layers.items() for i in layer.off.nonzero().flatten().tolist()}
    kept = set(snr) - off
    assert min(snr[unit] for unit in kept) >= max(snr[unit] for unit in off)
    name, unit = max(off, key=snr.__getitem__)
    more = {name: mask.clone() for name, mask in costs.current().items()}
    more[name][unit] = True
    assert costs.macs(more) > share * fit.dense_macs


def test_a_budget_can_be_a_number_and_one_that_is_met_already_changes_nothing(captured):
    model, costs = fresh_costs(captured)
    assert prune_to_macs(costs, 10**9).macs == costs.dense_macs
    assert all(layer.mask().all() for layer in noise_layers(model))
    assert prune_to_macs(costs, expected(2, 2)).macs <= expected(2, 2)


def test_units_that_are_off_stay_off_and_another_score_orders_otherwise(captured):
    model, costs = fresh_costs(captured)
    first, second = noise_layers(model)
    first.switch_off(torch.arange(6) == 0)
    prune_to_macs(costs, 0.5, score=lambda layer: torch.arange(layer.num_features) / layer.num_features)
    assert first.off[0]
    assert second.mask()[-1]
    assert not second.mask()[0]
    assert first.mask()[-1]


def test_one_unit_of_each_layer_stays_or_the_budget_is_refused(captured):
    model, costs = fresh_costs(captured)
    assert prune_to_macs(costs, expected(1, 1)).kept == {"1": 1, "6": 1}
    model, costs = fresh_costs(captured)
    with pytest.raises(
        NoiseArgumentError, match=r"budget of 10 MACs cannot be met: the 2 best units, .* \(363 MACs\)"
    ):
        prune_to_macs(costs, 10)
    assert all(layer.off is None for layer in noise_layers(model))


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf, True])
def test_a_budget_that_is_no_number_is_refused(captured, budget):
    with pytest.raises(NoiseArgumentError, match="`budget`"):
        prune_to_macs(captured[1], budget)


def test_a_score_of_the_wrong_shape_is_refused(captured):
    with pytest.raises(NoiseArgumentError, match=r"`score` gave shape \(\) for 1, which has 6 features"):
        prune_to_macs(captured[1], 0.5, score=lambda layer: layer.snr().mean())


def test_a_latency_budget_is_met_by_what_was_measured(captured, monkeypatch):
    _, costs = fresh_costs(captured)
    monkeypatch.setattr(NetworkCosts, "seconds", lambda self, masks, **_: self.macs(masks) * 1e-6)
    fit = prune_to_latency(costs, 1e-6 * expected(3, 3))
    assert fit.seconds == pytest.approx(1e-6 * fit.macs)
    assert fit.macs <= expected(3, 3)
    with pytest.raises(NoiseArgumentError, match="`seconds`"):
        prune_to_latency(costs, 0.0)


def test_latency_is_measured_in_onnxruntime(captured):
    _, costs = captured
    assert 0 < costs.seconds(costs.whole(), budget_s=0.1) < 0.1


def test_sparsity_tells_live_units_quantiles_and_multiply_adds(captured):
    model, costs = fresh_costs(captured)
    noise_layers(model)[0].switch_off(torch.arange(6) < 2)
    found = sparsity(model, costs)
    assert [(layer.name, layer.units, layer.live) for layer in found.layers] == [("1", 6, 4), ("6", 8, 8)]
    assert (found.live, found.units, found.macs, found.dense_macs) == (12, 14, expected(4, 8), expected(6, 8))
    snr = noise_layers(model)[1].snr().double()
    assert found.layers[1].snr[2] == pytest.approx(snr.quantile(0.5).item())
    assert found.kl == pytest.approx(sum(layer.kl().item() for layer in noise_layers(model)))
    scalars = found.scalars()
    assert scalars["live/1"] == 4
    assert scalars["macs_share"] == expected(4, 8) / expected(6, 8)
    assert scalars["snr_50/6"] == pytest.approx(snr.quantile(0.5).item())
    assert str(found).startswith("live 4-8 of 6-8, KL ")
    assert found.to_dict()["layers"][0]["live"] == 4


def test_sparsity_needs_no_example_and_survives_what_is_not_a_number():
    layer = LogNormalNoise(3)
    with torch.no_grad():
        layer.mu[0] = math.nan
    found = sparsity(layer)
    assert (found.live, found.macs) == (3, None)
    assert "macs" not in found.scalars()
    assert not any(math.isnan(value) for value in found.layers[0].snr)
    assert sparsity(nn.Linear(2, 2)).units == 0
