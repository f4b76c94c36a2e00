import math

import pytest
import torch

from sbp_compile.errors import UsageError
from sbp_compile.nn import noise_layers
from sbp_compile.training import LeNet5, LeNet500300, VGGLike, keep_random, kept_units, live_masks, mac_ratio

VGG_WIDTHS = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (LeNet5, (3, 18, 284, 283)),
        (LeNet5, (1, 2, 2, 1)),
        (LeNet500300, (245, 160, 55)),
        (lambda: VGGLike(VGG_WIDTHS), (3, 4, 5, 1, 8, 2, 3, 4, 5, 6, 7, 8, 6, 6, 2)),
    ],
)
def test_random_masks_keep_exactly_the_counts_asked_for(build, counts):
    model = build()
    keep_random(model, counts, seed=3)
    assert kept_units(model) == counts


def test_the_same_seed_keeps_the_same_units():
    models = [LeNet500300() for _ in range(2)]
    for model in models:
        keep_random(model, (10, 10, 10), seed=7)
    for one, other in zip(*map(noise_layers, models), strict=True):
        assert torch.equal(one.mu, other.mu)
        assert torch.equal(one.mask(), other.mask())


def test_a_network_without_noise_keeps_everything():
    assert kept_units(LeNet5(noise=False)) == (20, 50, 800, 500)
    assert mac_ratio(LeNet5(noise=False)) == 1.0


def test_a_network_without_units_has_an_infinite_ratio():
    model = LeNet500300()
    keep_random(model, (0, 0, 0))
    assert math.isinf(mac_ratio(model))


def test_flattened_values_and_their_channel_are_counted_together():
    model = LeNet5((2, 3, 48, 5))
    layers = noise_layers(model)
    with torch.no_grad():
        layers[1].log_sigma[0] = 3.4  # channel 0 masked: its flattened values are constants
        layers[2].log_sigma[16:32] = 3.4  # all values of channel 1 masked: nobody reads it
        layers[2].log_sigma[32] = 3.4
    assert kept_units(model) == (2, 1, 15, 5)


def test_units_that_do_not_count_have_no_influence():
    model = LeNet5((3, 6, 96, 8)).eval()
    with torch.no_grad():
        noise_layers(model)[1].log_sigma[:2] = 3.4
        noise_layers(model)[2].log_sigma[40:70] = 3.4
    images = torch.rand(4, 1, 28, 28)
    expected = model(images)
    with torch.no_grad():
        model.block2.conv.weight[~live_masks(model)[1]] = torch.randn(())
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("counts", [(3, 18, 284), (21, 1, 16, 1), (3, 2, 33, 1), (3, 2, 1, 1), (-1, 2, 2, 1)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(UsageError, match="count"):
        keep_random(LeNet5(), counts)
