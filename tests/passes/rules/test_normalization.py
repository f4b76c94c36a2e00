import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import AnalyzeChannels, default_pipeline
from passes.rules.normalization import standardize
from tests.passes.rules.between import LIVE, Between, compiled, free_axes, kept_after, kept_by
from tests.passes.support import capture, check, error, run, shapes_of, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")


class Masked(nn.Module):
    """linear -> mask -> norm -> mask -> linear on rows, with masked channels of which the norm's own are live."""

    def __init__(self, norm, before, after, constants=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 12), norm, nn.Linear(12, 3)
        for vector in norm.parameters():
            vector.data = torch.rand(vector.shape) + 0.5
        kept = torch.arange(12)
        self.register_buffer("before", (kept < before).float())
        self.register_buffer("after", (kept < after).float())
        self.register_buffer("constants", torch.randn(12) * (kept >= before) * constants)

    def forward(self, x):
        x = self.first(x) * self.before + self.constants
        return self.last(torch.relu(self.norm(x) * self.after))


@pytest.mark.parametrize("constants", [False, True], ids=["zeros", "constants"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer", "rms"])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.3}], ids=str)
def test_channels_masked_on_both_sides_go_and_still_count_in_the_statistics(norm, constants, options):
    module = Masked(norm(12, **options), before=5, after=5, constants=constants)
    shapes = shapes_of(check(module, torch.randn(2, 7, 4)))
    assert shapes["first.weight"] == (5, 4)
    assert shapes["last.weight"] == (3, 5)


def test_a_layer_norm_that_would_lose_little_stays_whole():
    result = check(Masked(nn.LayerNorm(12), before=10, after=10), torch.randn(2, 7, 4))
    assert aten.layer_norm.default in targets_of(result)
    assert shapes_of(result)["first.weight"] == (12, 4)


def test_an_rms_norm_stays_one_operator_whatever_it_loses():
    result = check(Masked(nn.RMSNorm(12), before=11, after=11, constants=True), torch.randn(2, 7, 4))
    assert aten.rms_norm.default in targets_of(result)
    assert shapes_of(result)["first.weight"] == (11, 4)


def test_a_norm_of_half_precision_is_not_written_out():
    module = Masked(nn.LayerNorm(12), before=5, after=5).bfloat16()
    result = default_pipeline()(capture(module, torch.randn(2, 7, 4).bfloat16())).program
    assert aten.layer_norm.default in targets_of(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_rms_norm_without_eps_takes_that_of_the_models_dtype(dtype):
    x, module = torch.full((2, 8), 1e-4, dtype=dtype), nn.RMSNorm(8).to(dtype)
    (found,) = run(capture(module, x), x.double())
    assert error(module(x).detach().double(), found) <= (1e-12 if dtype is torch.float64 else 1e-2)


def test_constants_that_differ_from_token_to_token_count_at_their_token():
    class Positions(Masked):
        def __init__(self, norm):
            super().__init__(norm, before=5, after=5)
            self.register_buffer("positions", torch.randn(7, 12) * (torch.arange(12) >= 4))

        def forward(self, x):
            return self.last(torch.relu(self.norm(self.first(x) * self.before + self.positions) * self.after))

    assert shapes_of(check(Positions(nn.LayerNorm(12)), torch.randn(2, 7, 4)))["first.weight"] == (5, 4)
    assert shapes_of(check(Positions(nn.RMSNorm(12)), torch.randn(2, 7, 4)))["first.weight"] == (12, 4)


def test_a_gamma_of_zero_makes_a_constant():
    module = Masked(nn.LayerNorm(12), before=12, after=12)
    module.norm.weight.data[3:] = 0.0
    program = AnalyzeChannels()(capture(module, torch.randn(2, 7, 4))).program
    facts = next(program.analysed().facts[node.name] for node in program.calls() if "norm" in node.name)
    assert facts.known.flatten().tolist() == [False] * 3 + [True] * 9
    check(module, torch.randn(2, 7, 4))


def test_a_norm_of_constants_alone_is_a_constant():
    for norm in (nn.LayerNorm(12), nn.RMSNorm(12)):
        module = Masked(norm, before=0, after=12, constants=True)
        assert targets_of(check(module, torch.randn(2, 7, 4))) in (
            [aten.sym_size.int, aten.expand.default],
            [aten.expand.default],
        )


def test_norms_over_several_axes_and_computed_weights_are_exact():
    def several(x):
        return F.layer_norm(x, (6, 8, 8))

    def computed(x):
        scale = x.mean((0, 2, 3))
        return F.layer_norm(x.movedim(1, -1), (6,), scale, scale + 1).movedim(-1, 1)

    def computed_rms(x):
        return F.rms_norm(x.movedim(1, -1), (6,), x.mean((0, 2, 3)), 1e-5).movedim(-1, 1)

    parts = {f.__name__: Between(f) for f in (several, computed, computed_rms)}
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, 2 * LIVE)


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
def test_instances_are_normalised_each_alone(dynamic):
    weight, bias = torch.rand(6) + 0.5, torch.randn(6)
    parts = {
        "plain": Between(lambda x: F.instance_norm(x)),
        "affine": Between(lambda x: F.instance_norm(x, weight=weight, bias=bias)),
        "zeros": Between(lambda x: F.instance_norm(x, weight=weight, bias=bias), bias=False),
        "running": Between(lambda x: F.instance_norm(x, weight, weight, bias, bias, use_input_stats=False)),
    }
    assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_a_computed_weight_of_an_instance_norm_keeps_what_the_channels_keep():
    module = Between(lambda x: F.instance_norm(x, weight=x.mean((0, 2, 3))))
    assert kept_after(compiled(module, 8, 8)) == LIVE


@pytest.mark.parametrize("dynamic", [True, FREE], ids=["static", "free"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_without_a_live_channel_go(groups, dynamic):
    module = Between(lambda x: F.group_norm(x, groups, module.weight, module.weight))
    module.weight = torch.rand(6) + 0.5
    module.mask.copy_(torch.tensor([0.7, 0.7, 0, 0, 0, 0]).view(6, 1, 1))
    assert kept_after(compiled(module, 8, 8, dynamic=dynamic)) == {1: 6, 2: 3, 3: 2, 6: 2}[groups]


def test_channels_masked_behind_a_group_norm_are_not_read_on():
    mask = torch.tensor([1.0, 0, 0, 1, 0, 0]).view(6, 1, 1)
    module = Between(lambda x: torch.relu(F.group_norm(x, 2) * mask))
    result = compiled(module, 8, 8)
    assert shapes_of(result)["second.weight"][1] == 2
    assert aten.index_select.default in targets_of(result)
    assert not default_pipeline()(result).changed or targets_of(
        default_pipeline()(result).program
    ) == targets_of(result)


def test_a_constant_that_rounding_could_blow_up_is_not_called_known():
    _, trusted = standardize(torch.full((1, 1, 1), 1e6, dtype=torch.float64), (2,), 1e-12)
    assert not bool(trusted.all())
    module = Between(lambda x: F.instance_norm(1e6 * x, eps=1e-12))
    assert kept_after(compiled(module, 7, 7)) >= LIVE


def test_statistics_of_zeros_leave_zeros():
    value, trusted = standardize(torch.zeros(1, 4, dtype=torch.float64), (1,), 0.0)
    assert bool(trusted.all())
    assert bool((value == 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_around_norms_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    norms = (nn.LayerNorm(12), nn.RMSNorm(12), nn.LayerNorm(12, bias=False), nn.RMSNorm(12, eps=0.1))
    for norm in norms:
        module = Masked(norm, number(0, 13), number(0, 13), constants=bool(number(0, 2)))
        module.before.copy_(torch.rand(12, generator=generator) < 0.4)
        module.after.copy_(torch.rand(12, generator=generator) < 0.6)
        module.constants.copy_(torch.randn(12, generator=generator) * (module.before == 0))
        check(module, torch.randn(2, 7, 4, generator=generator))
