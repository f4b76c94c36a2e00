"""Every architecture builds and computes something; small ones compile exactly, and all of them on demand."""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

import sbp_compile
from sbp_compile.nn import LogNormalNoise, noise_layers
from tests.zoo import PLACEMENTS, ZOO, Places, masked_network
from tests.zoo.masking import with_noise

FAMILIES = (
    "VGG", "ResNet (basic)", "ResNet (bottleneck)", "ResNet (preact)", "ResNeXt", "SE-ResNet", "DenseNet",
    "Inception v1",
    "Xception", "MobileNet v1", "MobileNet v2", "MobileNet v3", "EfficientNet", "RegNet", "ConvNeXt", "ShuffleNet v1",
    "ShuffleNet v2", "GhostNet", "DLA", "HRNet", "RepVGG", "Res2Net", "U-Net", "FCN", "DeepLab", "FPN", "YOLO (CSP)",
    "Super-resolution (pixel shuffle)", "Autoencoder", "Audio (M5)", "Video (C3D)", "MLP-Mixer", "ViT", "DeiT", "Swin",
    "BERT", "LSTM", "Two-tower",
)  # fmt: skip
LEAST_NETWORKS = 60
SHARES = (0.3, 0.5, 0.9)
SMALL = (
    "lenet5", "maxout", "highway", "espcn", "dcgan_generator", "siamese", "gru_classifier", "text_cnn", "dlrm", "gcn",
    "condconv", "experts", "ft_transformer",
)  # fmt: skip
EXACT = 1e-12
DEPENDS = 1e-6


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield
    torch.set_num_threads(threads)


def outputs(network, inputs):
    with torch.no_grad():
        return [value for value in tree_leaves(network(*inputs)) if isinstance(value, torch.Tensor)]


def check_output(name, placement):
    architecture = ZOO[name]
    found = outputs(masked_network(architecture, placement, share=0.5), architecture.example())
    assert all(value.isfinite().all() for value in found)
    spread = max((value[0] - value[1]).abs().max() / value.abs().max() for value in found)
    assert spread > DEPENDS


def float64_error(name, placement, share):
    architecture = ZOO[name]
    network = masked_network(architecture, placement, share)
    batch = "require" if architecture.dynamic_batch else False
    compiled = sbp_compile.compile(network, architecture.example(), dynamic_batch=batch)
    return compiled.report.verification.float64_error


def test_the_zoo_has_every_family_that_it_should():
    assert len(ZOO) >= LEAST_NETWORKS
    assert set(FAMILIES) <= {architecture.family for architecture in ZOO.values()}


@pytest.mark.parametrize("name", ZOO)
def test_every_network_has_noise_at_each_placement(name):
    for placement in PLACEMENTS:
        assert noise_layers(with_noise(ZOO[name], placement)), placement


@pytest.mark.parametrize("name", ZOO)
def test_every_networks_output_is_finite_and_depends_on_the_input(name):
    check_output(name, "random")


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ZOO)
def test_every_networks_output_depends_on_the_input_wherever_the_noise_is(name, placement):
    check_output(name, placement)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_compile_to_themselves(name):
    assert float64_error(name, PLACEMENTS[SMALL.index(name) % len(PLACEMENTS)], share=0.5) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ZOO)
def test_every_network_compiles_to_itself(name, placement, share):
    assert float64_error(name, placement, share) <= EXACT


@pytest.mark.parametrize("share", SHARES)
def test_the_share_of_units_is_off_and_the_first_one_stays(share):
    for layer in noise_layers(masked_network(ZOO["resnet18"], "random", share)):
        kept = layer.mask()
        assert kept[0]
        assert (~kept).sum() == min(round(share * len(kept)), len(kept) - 1)


def test_a_network_is_the_same_each_time_and_another_seed_gives_another():
    first, second, other = (
        masked_network(ZOO["mobilenet_v2"], "random", 0.5, seed).state_dict() for seed in (0, 0, 1)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first.keys() != other.keys()


def test_building_a_network_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    masked_network(ZOO["lenet5"], "hidden", 0.5)
    assert torch.equal(torch.rand(3), wanted)


def test_statistics_and_scales_are_not_trivial():
    network = masked_network(ZOO["resnet18"], "before norm", 0.5)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for values in (
        [norm.running_mean for norm in norms],
        [norm.running_var - 1 for norm in norms],
        [norm.bias for norm in norms],
    ):
        assert (torch.cat(values) != 0).all()
    gammas = torch.cat([norm.weight for norm in norms])
    assert (gammas < 0).any()
    assert (gammas > 0).any()


def test_noise_goes_where_its_placement_says():
    def chosen(places, asked):
        return [isinstance(places.noise(place, 4), LogNormalNoise) for place in asked]

    asked = ("before norm", "after norm", "hidden")
    assert chosen(Places("after norm"), asked) == [False, True, False]
    assert all(chosen(Places("everywhere"), asked))
    assert 50 < sum(chosen(Places("random"), ["hidden"] * 200)) < 110
