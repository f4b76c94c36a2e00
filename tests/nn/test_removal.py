import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sbp_compile
from sbp_compile.errors import UnsupportedModelError, UsageError, VerificationError
from sbp_compile.nn import (
    NORMS,
    LogNormalNoise,
    NoiseArgumentError,
    TrainingPruner,
    elbo_loss,
    insert_noise,
    match_widths,
    named_noise_layers,
    noise_layers,
    parameter_groups,
    remove_off_units,
)
from sbp_compile.training.models import ConvBlock, LeNet5
from tests.nn.test_noise_dropin import torch_copies_its_own_deprecated_class
from tests.zoo.places import switch_off

pytestmark = torch_copies_its_own_deprecated_class

X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3


def plain():
    """Bias behind the noise (a removed channel is a constant), a padded layer, a pool, a flatten, hidden units."""
    return nn.Sequential(
        ConvBlock(1, 6, 3), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """A depthwise layer inside a residual block: what is off in a branch alone stays in the stream."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, bias=False)
        self.expand, self.norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = (
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
        )
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm(self.expand(x))))))
        return self.head((x + self.project(y)).mean((2, 3)))


def noisy(build, where, seed=0):
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.bias.uniform_(-0.5, 0.5)
            if isinstance(part, ConvBlock):
                part.bias.uniform_(-0.5, 0.5)
    insert_noise(model, where, init_log_sigma=-2.0)
    return model.double()


def train(model, optimizer, steps, seed):
    model.train()
    torch.manual_seed(seed)
    for _ in range(steps):
        loss = elbo_loss(F.cross_entropy(model(X), Y), model, len(X))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def every_second_off(model, first=0):
    """Switch off what was unit 0, 2, 4, ... of the whole layer, from `first` on."""
    for layer in noise_layers(model):
        width = layer.num_features if layer.survivors is None else len(layer.survivors)
        units = (torch.arange(width) % 2 == 0) & (torch.arange(width) >= first)
        layer.switch_off(units if layer.survivors is None else units[layer.survivors])


def trained(build, where, optimise, remove):
    """Five steps, some units off and removed or frozen; more steps, more units, more steps."""
    model = noisy(build, where)
    optimizer = optimise(model)
    train(model, optimizer, 5, seed=1)
    for first in (4, 0):
        every_second_off(model, first)
        removal = remove_off_units(model, X[:2], optimizer=optimizer, remove=remove)
        train(model, optimizer, 4, seed=2 + first)
    return model.eval(), removal


def sgd(model):
    return torch.optim.SGD(parameter_groups(model, 0.05), momentum=0.9)


def adam(model):
    return torch.optim.Adam(parameter_groups(model, 1e-3), amsgrad=True)


CASES = {
    "plain": (plain, ["1", "4", "7"]),
    "behind norms": (plain, ["2", "7"]),
    "residual": (Residual, ["expand", "norm2"]),
}


@pytest.mark.parametrize(
    ("case", "optimise"),
    [
        ("plain", adam),
        ("residual", sgd),
        pytest.param("plain", sgd, marks=pytest.mark.slow),
        pytest.param("residual", adam, marks=pytest.mark.slow),
        pytest.param("behind norms", sgd, marks=pytest.mark.slow),
        pytest.param("behind norms", adam, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_as_if_the_units_were_only_frozen(case, optimise):
    small, removed = trained(*CASES[case], optimise, remove=True)
    whole, frozen = trained(*CASES[case], optimise, remove=False)
    assert removed.parameters_after < 0.9 * removed.parameters_before
    assert frozen.parameters_after >= frozen.parameters_before
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(X), whole(X), rtol=1e-8, atol=1e-9)
    kl = [sum(layer.kl() for layer in noise_layers(model)) for model in (small, whole)]
    if case == "behind norms":  # elsewhere units that are not off went, too
        torch.testing.assert_close(*kl, rtol=1e-8, atol=1e-9)
    names = named_noise_layers(whole)
    for name, layer in named_noise_layers(small).items():
        kept = (
            torch.ones(names[name].num_features, dtype=torch.bool)
            if layer.survivors is None
            else layer.survivors
        )
        torch.testing.assert_close(layer.log_sigma, names[name].log_sigma[kept], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_momentum_that_is_not_carried_over_shows():
    """The comparison above can fail: forgetting the optimiser's state is far outside its tolerance."""
    whole, _ = trained(*CASES["behind norms"], sgd, remove=False)
    model = noisy(*CASES["behind norms"])
    optimizer = sgd(model)
    train(model, optimizer, 5, seed=1)
    every_second_off(model)
    remove_off_units(model, X[:2])
    train(model, sgd(model), 8, seed=2)
    with torch.no_grad():
        assert (model.eval()(X) - whole(X)).abs().max() > 1e-4


def test_modules_noise_layers_and_optimiser_stay_the_same_objects_and_widths_are_true():
    model = noisy(plain, ["2", "7"])
    parts, optimizer = list(model.modules()), adam(model)
    train(model, optimizer, 1, seed=0)
    groups, scheduler = optimizer.param_groups[0], torch.optim.lr_scheduler.StepLR(optimizer, 1)
    every_second_off(model)
    removal = remove_off_units(model, X[:2], optimizer=optimizer)
    assert removal.units == {"0.noise": 3, "2.noise_after": 4, "7.noise_after": 5}
    assert list(model.modules()) == parts
    assert optimizer.param_groups[0] is groups
    learning = [p for p in model.parameters() if p.requires_grad]
    ids = {id(p) for p in learning}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == ids
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in learning)
    assert (model[1].out_channels, model[2].num_features, model[4].in_channels) == (4, 4, 4)
    assert (model[7].out_features, model[9].in_features, model[2].noise_after.num_features) == (5, 5, 4)
    assert model[2].noise_after.off is None
    train(model, optimizer, 1, seed=0)
    scheduler.step()


def test_a_bias_behind_the_noise_goes_into_the_next_layers_bias():
    model = noisy(plain, ["9"]).eval()
    model[0].noise.switch_off(torch.arange(6) < 3)
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([0.5, -1.0, 0.25])
    wanted = model(X).detach()
    assert remove_off_units(model, X[:2]).units == {"0.noise": 3}
    assert model[0].bias.shape == (3,)
    assert not model[1].bias.requires_grad
    torch.testing.assert_close(model(X), wanted)


def test_a_constant_at_a_padded_border_stays():
    model = nn.Sequential(
        ConvBlock(1, 6, 3), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 3)
    ).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0]))
    model[0].noise.switch_off(torch.tensor([True, True, False, False, True, False]))
    assert remove_off_units(model, X[:2]).units == {"0.noise": 2}
    assert model[0].noise.off.tolist() == [True, False, False, False]


def test_what_only_the_weights_of_now_make_constant_stays():
    model = noisy(Residual, ["expand"])
    with torch.no_grad():
        model.norm.weight[0], model.norm2.weight.data[1], model.project.weight[:, 2] = 0.0, 0.0, 0.0
    model.expand.noise_after.switch_off(torch.arange(12) == 11)
    assert remove_off_units(model, X[:2]).units == {"expand.noise_after": 1}
    assert model.project.in_channels == 11


def test_lenet_loses_whole_channels_of_its_flattened_units():
    torch.manual_seed(0)
    model = LeNet5((4, 6, 96, 8)).eval()
    images = torch.randn(2, 1, 28, 28)
    for layer in noise_layers(model):
        switch_off(layer, torch.arange(layer.num_features) % 3 == 0)
    first, second, flat, hidden = noise_layers(model)
    first.switch_off(first.mask().logical_not())
    flat.switch_off(torch.arange(96) < 40)  # channels 0 and 1 and half of 2
    hidden.switch_off(hidden.mask().logical_not())
    wanted = model(images)
    remove_off_units(model, images)
    assert [layer.num_features for layer in noise_layers(model)] == [2, 4, 64, 5]
    assert flat.off.sum() == 8
    torch.testing.assert_close(model(images), wanted)
    assert second.survivors.tolist() == [False, False, True, True, True, True]


def test_a_smaller_model_can_be_saved_and_loaded_into_a_fresh_one():
    model = noisy(plain, ["2", "7"])
    every_second_off(model)
    model[0].noise.off = None
    remove_off_units(model, X[:2])
    model[7].noise_after.switch_off(torch.arange(5) == 0)
    model[0].noise.switch_off(torch.arange(6) == 0)
    remove_off_units(model, X[:2])
    fresh = noisy(plain, ["2", "7"], seed=5)
    match_widths(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(X), model.eval()(X))
    drawn = []
    for one in (copy.deepcopy(model).train(), copy.deepcopy(fresh).train()):
        torch.manual_seed(4)
        drawn.append(one(X))
    assert torch.equal(*drawn)
    assert torch.equal(copy.deepcopy(model.eval())(X), model(X))
    with pytest.raises(UsageError, match="it is of another model"):
        match_widths(nn.Linear(2, 2), model.state_dict())


@pytest.mark.slow
def test_a_smaller_model_compiles_as_before():
    model = noisy(plain, ["2", "7"]).eval()
    every_second_off(model)
    first = sbp_compile.compile(model, X[:2])
    remove_off_units(model, X[:2])
    second = sbp_compile.compile(model, X[:2])
    torch.testing.assert_close(second.module(X), first.module(X))
    assert second.report.after.macs == first.report.after.macs
    assert second.report.before.macs < first.report.before.macs


def test_sizes_written_into_the_code_are_found_and_everything_is_put_back():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.noise, self.head = nn.Conv2d(1, 4, 3), LogNormalNoise(4), nn.Linear(144, 3)

        def forward(self, x):
            return self.head(self.noise(self.conv(x)).view(-1, 144))

    model = Fixed().double()
    optimizer = adam(model)
    model.noise.switch_off(torch.arange(4) == 0)
    state, wanted = copy.deepcopy(model.state_dict()), model.eval()(X)
    with pytest.raises(VerificationError, match=r"does not run with fewer channels \(shape '\[-1, 144\]'"):
        remove_off_units(model, X[:2], optimizer=optimizer)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.conv.out_channels, model.noise.num_features) == (4, 4)
    assert torch.equal(model(X), wanted)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    assert remove_off_units(model, X[:2], remove=False).units == {"head": 36}
    torch.testing.assert_close(model(X), wanted)


def test_a_part_that_only_training_uses_is_refused():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.noise = nn.Linear(4, 6), LogNormalNoise(6)
            self.head, self.auxiliary = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            x = self.noise(self.body(x))
            return self.head(x) + self.auxiliary(x) if self.training else self.head(x)

    model = Auxiliary()
    model.noise.switch_off(torch.arange(6) < 3)
    with pytest.raises(UnsupportedModelError, match=r"'auxiliary.weight' is not used in eval mode"):
        remove_off_units(model, torch.ones(2, 4))


def test_shared_layers_keep_their_widths():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry, self.noise, self.shared = nn.Linear(4, 6), LogNormalNoise(6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.noise(self.entry(x))
            return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))

    model = Shared().eval()
    model.noise.switch_off(torch.arange(6) < 3)
    assert not remove_off_units(model, torch.ones(2, 4))
    assert model.entry.out_features == 6


def test_tied_weights_keep_their_widths_and_the_rest_goes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.noise, self.head = LogNormalNoise(6, dim=-1), nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x):
            x = self.words(x)
            return self.head(x + self.down(self.noise(torch.relu(self.up(x)))))

    model = Tied().eval()
    model.noise.switch_off(torch.arange(6) < 2)
    assert remove_off_units(model, torch.tensor([[1, 2, 3], [4, 5, 6]])).units == {"noise": 2}
    assert model.head.weight is model.words.weight


def test_wrapped_modules_are_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(noisy(plain, ["7"]))
        with pytest.raises(UsageError, match="give the module inside DistributedDataParallel"):
            remove_off_units(wrapped, X[:2])
    finally:
        torch.distributed.destroy_process_group()


def test_units_go_after_they_were_dead_often_enough():
    model = noisy(plain, ["7"])
    optimizer = sgd(model)
    pruner = TrainingPruner(model, X[:2], optimizer=optimizer, every=2, patience=2)
    layer = model[7].noise_after
    switch_off(layer, torch.arange(10) < 4)
    assert [pruner.epoch_end() for _ in range(3)] == [None] * 3
    with torch.no_grad():  # one comes back to life
        layer.mu[0], layer.log_sigma[0] = -0.1, -3.0
    saved = pruner.state_dict()
    assert pruner.epoch_end().units == {"7.noise_after": 3}
    assert layer.num_features == 7
    assert layer.mask().all()
    switch_off(layer, torch.arange(7) == 6)
    again = TrainingPruner(model, X[:2], optimizer=optimizer, every=2, patience=1)
    again.load_state_dict(saved | {"counts": {}})
    assert again.epoch_end().units == {"7.noise_after": 1}
    assert layer.survivors.tolist() == [True, False, False, False, True, True, True, True, True, False]
    train(model, optimizer, 1, seed=0)


def test_one_unit_of_a_layer_survives():
    model = noisy(plain, ["7"])
    switch_off(model[7].noise_after, torch.ones(10, dtype=torch.bool))
    assert TrainingPruner(model, X[:2], patience=1).epoch_end().units == {"7.noise_after": 9}


@pytest.mark.parametrize("options", [{"every": 0}, {"patience": 0.5}])
def test_a_bad_interval_is_refused(options):
    with pytest.raises(NoiseArgumentError, match="must be an integer >= 1"):
        TrainingPruner(nn.Linear(1, 1), torch.ones(1, 1), **options)


def test_noise_behind_norms_lets_everything_go():
    model = noisy(plain, [*NORMS, "4", "7"])
    every_second_off(model)
    remove_off_units(model, X[:2])
    assert all(layer.off is None for layer in noise_layers(model))


ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def perceptron():
    """Six hidden units, two of them off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    insert_noise(model, "0")
    model[0].noise_after.switch_off(torch.arange(6) < 2)
    return model


def learn(model, optimizer):
    optimizer.zero_grad()
    model.train()(ROWS).square().sum().backward()
    optimizer.step()


def test_statistics_of_rows_and_columns_follow_the_parameters():
    model = perceptron()
    optimizer = torch.optim.Adafactor(model.parameters())
    learn(model, optimizer)
    before = dict(optimizer.state[model[0].weight])
    remove_off_units(model, ROWS, optimizer=optimizer)
    after = optimizer.state[model[0].weight]
    assert torch.equal(after["row_var"], before["row_var"][2:])
    assert torch.equal(after["col_var"], before["col_var"])
    learn(model, optimizer)


@pytest.mark.parametrize("use", [remove_off_units, TrainingPruner])
def test_an_optimiser_whose_state_cannot_follow_is_refused_before_anything_changes(use):
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(UsageError, match="LBFGS remembers all parameters as one vector"):
        use(model, ROWS, optimizer=optimizer)
    assert model[0].weight.shape == (6, 4)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_units_leave_in_inference_mode_and_under_autocast_as_elsewhere(mode):
    model = perceptron()
    with mode():
        model[0].noise_after.switch_off(torch.arange(6) < 3)
        assert remove_off_units(model, ROWS).units == {"0.noise_after": 3}
    assert not any(value.is_inference() for value in model.state_dict().values())
    learn(model, torch.optim.SGD(model.parameters(), 0.1))


class WithFlags(nn.Module):
    """Results that are no numbers to subtract, and some that are not finite."""

    def __init__(self):
        super().__init__()
        self.body = perceptron()

    def forward(self, x):
        y = self.body(x)
        return y, y > 0, torch.where(y > 0, torch.inf, torch.nan)


def test_flags_and_infinities_among_the_results_are_compared_as_they_are():
    assert remove_off_units(WithFlags(), ROWS).units == {"body.0.noise_after": 2}


class BreaksWhenNarrow(nn.Module):
    """Gives NaN as soon as a layer is narrower than it was."""

    def __init__(self):
        super().__init__()
        self.body = perceptron()

    def forward(self, x):
        return self.body(x) * (1.0 if self.body[0].weight.shape[0] == 6 else torch.nan)


def test_a_module_that_gives_nan_with_fewer_channels_keeps_them():
    model = BreaksWhenNarrow()
    with pytest.raises(VerificationError, match="gives something else with fewer channels"):
        remove_off_units(model, ROWS)
    assert model.body[0].weight.shape == (6, 4)


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was():
    model = perceptron()
    state = {**model.state_dict(), "0.weight": torch.zeros(3, 4), "2.weight": torch.zeros(3)}
    with pytest.raises(UsageError, match=r"'2.weight' has shape \(3,\) in the state"):
        match_widths(model, state)
    assert model[0].weight.shape == (6, 4)


def test_counts_of_other_widths_are_refused():
    model = perceptron()
    pruner = TrainingPruner(model, ROWS)
    pruner.epoch_end()
    counts = pruner.state_dict()
    remove_off_units(model, ROWS)
    with pytest.raises(
        NoiseArgumentError, match=r"the counts of '0.noise_after' are of 6 units, the model has 4"
    ):
        pruner.load_state_dict(counts)
