import pytest
import torch

from sbp_compile.errors import UsageError
from sbp_compile.nn import noise_layers
from sbp_compile.training import LeNet5, LeNet500300, VGGLike

SMALL_VGG = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)
BUILDERS = [LeNet5, LeNet500300, lambda noise=True: VGGLike(SMALL_VGG, noise=noise)]
VGG_SBP = (64, 62, 128, 126, 234, 155, 31, 79, 73, 9, 59, 73, 56, 56, 27)
VGG_SBPA = (44, 54, 92, 115, 234, 155, 31, 76, 55, 9, 34, 35, 21, 21, 280)


def ratio(model, kept):
    return sum(model.macs(model.units)) / sum(model.macs(kept))


@pytest.mark.parametrize("build", BUILDERS)
def test_dense_state_dict_is_the_noisy_one_without_the_noise(build):
    noisy = build().state_dict().keys()
    assert build(noise=False).state_dict().keys() == {k for k in noisy if "noise" not in k}


@pytest.mark.parametrize("build", BUILDERS)
def test_network_with_vanishing_noise_equals_the_dense_network(build):
    dense, noisy = build(noise=False).eval(), build().eval()
    noisy.load_state_dict(noisy.state_dict() | dense.state_dict())
    for layer in noise_layers(noisy):
        torch.nn.init.constant_(layer.log_sigma, -15.0)
    x = torch.rand(2, *dense.input_shape)
    torch.testing.assert_close(noisy(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_units_are_the_noise_layers_widths_in_order(build):
    assert build().units == tuple(layer.num_features for layer in noise_layers(build()))


def test_multiply_adds_match_the_ratios_of_the_paper():
    assert ratio(LeNet5(), (3, 18, 284, 283)) == pytest.approx(10.77, abs=0.01)
    assert ratio(LeNet500300(), (245, 160, 55)) == pytest.approx(11.23, abs=0.01)
    with torch.device("meta"):
        vgg = VGGLike()
    assert ratio(vgg, VGG_SBP) == pytest.approx(2.30, abs=0.01)
    assert ratio(vgg, VGG_SBPA) == pytest.approx(3.16, abs=0.01)


@pytest.mark.parametrize(
    ("build", "widths"), [(LeNet5, (3, 18, 284, 283)), (LeNet500300, (245, 160, 55)), (VGGLike, SMALL_VGG)]
)
def test_a_pruned_structure_can_be_built_as_it_stands(build, widths):
    model = build(widths, noise=False).eval()
    assert model(torch.rand(2, *model.input_shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "widths"),
    [(LeNet5, (20, 50, 800)), (LeNet5, (2, 2, 33, 5)), (LeNet5, (0, 1, 1, 1)), (LeNet500300, (785, 1, 1))],
)
def test_impossible_widths_are_refused_by_name(build, widths):
    with pytest.raises(UsageError, match=r"`widths"):
        build(widths)


def test_a_wrong_image_size_is_an_error():
    with pytest.raises((RuntimeError, ValueError), match="1024"):
        LeNet500300()(torch.rand(2, 1, 32, 32))
