"""The noise in a user's own loop after `fully_shard`: one process for what is refused, several for the numbers."""

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import sbp_compile
from sbp_compile.errors import UnsupportedModelError, UsageError
from sbp_compile.nn import (
    LogNormalNoise,
    NetworkCosts,
    NoiseArgumentError,
    TrainingPruner,
    bmrs_n,
    clip_noise,
    elbo_loss,
    insert_noise,
    kl_divergence,
    match_widths,
    named_noise_layers,
    noise_layers,
    parameter_groups,
    prune,
    remove_noise,
    remove_off_units,
    sampling,
    snr_above,
    sparsity,
    variational_parameters,
)

EXAMPLES = 10
WHOLE = StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    """Noise inside blocks, in the model itself, and one unit wide: one of two processes has nothing of it."""

    def __init__(self):
        super().__init__()
        self.noise = LogNormalNoise(6)
        self.blocks = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 8)])
        self.narrow = nn.Linear(8, 1)
        self.last = nn.Linear(1, 3)

    def forward(self, x):
        x = self.noise(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.last(self.narrow(x))


def network():
    torch.manual_seed(0)
    model = Net()
    insert_noise(model, ["blocks.*", "narrow"], init_log_sigma=-1.0)
    model.double()
    for layer in noise_layers(model):
        nn.init.normal_(layer.mu, -0.5, 0.3)
        nn.init.uniform_(layer.log_sigma, -3.0, 3.5)
    model.blocks[1].noise_after.switch_off(torch.tensor([False, True, False, False, True]))
    return model


def sharded(model):
    fully_shard(model.blocks[0])
    fully_shard(model.blocks[1], reshard_after_forward=False)
    return fully_shard(model)


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (EXAMPLES,), generator=generator)


def draw_rows(rank, size, monkeypatch):
    """Let the noise of a process be its examples' rows of the draws for the joint batch."""

    def uniform(rows, mu, width=None):
        generator = torch.Generator().manual_seed(len(mu))
        joint = torch.rand(EXAMPLES, len(mu), generator=generator, dtype=torch.float64)
        return joint[rank::size]

    monkeypatch.setattr(sampling, "uniform", uniform)


def loss(model, rank=0, size=1):
    images, labels = (part[rank::size] for part in data())
    nll = F.cross_entropy(model(images), labels, reduction="none")
    return elbo_loss(nll, model, 50, 0.7, layer_weights=[1.0, 3.0, 0.5, 2.0, 1.5])


def trained(model, rank=0, size=1):
    """Take three steps; returns gradients of the first and all that the model holds at the end."""
    optimizer = torch.optim.Adam(parameter_groups(model, 0.05, weight_decay=0.1))
    gradients = {}
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, rank, size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradients = gradients or {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        clip_noise(model, mu=(-0.9, 0.0), log_sigma=(-2.5, 3.0))
    return gradients, get_model_state_dict(model, options=WHOLE)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def observed(model):
    """What logs and criteria say."""
    kept = {name: layer.mask() for name, layer in named_noise_layers(model).items()}
    found = sparsity(model).scalars(), float(kl_divergence(model).detach()), prune(model, bmrs_n())
    return *found, kept, get_model_state_dict(model, options=WHOLE)


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            draw_rows(rank, 2, patch)
            model = sharded(network())
            results = *trained(model, rank, 2), observed(model)
        torch.save(results, f"{folder}/results-{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    draw_rows(0, 1, monkeypatch)
    model = network()
    gradients, state = trained(model)
    expected = gradients, state, observed(model)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"results-{rank}.pt", weights_only=True)
        torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-13)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def work_in_part(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    try:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        insert_noise(model, ["0"], init_log_sigma=-1.0)
        kl_divergence(model).backward()
        expected = [parameter.grad.clone() for parameter in variational_parameters(model)]
        fully_shard(model[0], reshard_after_forward=2)
        fully_shard(model)
        output = model(data()[0])
        assert (
            len(model[0].noise_after.mu.placements) == 2
        )  # of half of the processes, until it is given back
        elbo_loss(0 * output.sum(), model, 1).backward()
        found = [parameter.grad.full_tensor() for parameter in variational_parameters(model)]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_the_divergence_reaches_shards_of_which_a_forward_left_larger_parts(tmp_path):
    torch.multiprocessing.spawn(work_in_part, args=(str(tmp_path),), nprocs=4)


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def model(one_process):
    return sharded(network())


def test_a_sharded_model_learns_as_a_whole_one(model, monkeypatch):
    draw_rows(0, 1, monkeypatch)
    assert isinstance(noise_layers(model)[0].mu, DTensor)
    plain = network()
    torch.testing.assert_close(trained(model), trained(plain), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(observed(model), observed(plain), rtol=1e-12, atol=1e-14)
    images, _ = data()
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def test_units_that_are_off_are_in_the_full_state_dict(model):
    state = get_model_state_dict(model, options=WHOLE)
    prune(model, snr_above(100.0))
    pruned = get_model_state_dict(model, options=WHOLE)
    assert sum("noise" in name and name.endswith(".off") for name in pruned) == 5
    plain = network()
    plain.load_state_dict(pruned)
    assert [layer.mask().sum() for layer in noise_layers(plain)] == [0] * 5
    assert sum(name.endswith(".off") for name in state) == 1


@pytest.mark.slow
def test_multiply_adds_need_costs_from_before(one_process):
    plain = network().float()
    example = torch.randn(2, 6)
    costs = NetworkCosts(plain, example)
    expected = sparsity(plain, costs).macs
    model = sharded(plain)
    assert sparsity(model, costs).macs == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda model, example: sbp_compile.compile(model, example),
        lambda model, example: NetworkCosts(model, example),
        lambda model, example: sbp_compile.save_model(model, example, Path("never.pt")),
    ],
)
def test_what_needs_a_whole_model_says_how_to_get_one(model, call):
    with pytest.raises(UnsupportedModelError, match="load its full state dict"):
        call(model, data()[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, example: remove_off_units(model, example), r"switch units off with prune\(\)"),
        (lambda model, example: TrainingPruner(model, example), r"switch units off with prune\(\)"),
        (lambda model, example: match_widths(model, {}), "before fully_shard"),
        (lambda model, example: insert_noise(model, nn.Linear), "put the noise in before fully_shard"),
        (lambda model, example: remove_noise(model), "take the noise out before fully_shard"),
    ],
)
def test_what_would_change_a_sharded_model_is_refused(model, call, message):
    with pytest.raises(UsageError, match=message) as error:
        call(model, data()[0])
    assert "\n" not in str(error.value)


def test_a_pruner_from_before_changes_nothing(one_process):
    model = network()
    pruner = TrainingPruner(model, data()[0])
    sharded(model)
    before = get_model_state_dict(model, options=WHOLE)
    with pytest.raises(UsageError, match="the module is sharded"):
        pruner.epoch_end()
    assert get_model_state_dict(model, options=WHOLE).keys() == before.keys()


def test_noise_outside_of_what_is_sharded_is_refused(one_process):
    model = network()
    fully_shard(model.blocks[0])
    with pytest.raises(NoiseArgumentError, match="'noise' is in none of the modules that are sharded"):
        elbo_loss(torch.zeros(()), model, 10)
    with pytest.raises(NoiseArgumentError, match="'noise' is not sharded while other parameters are"):
        parameter_groups(model, 1e-3)


@pytest.mark.parametrize(
    "call", [variational_parameters, lambda model: parameter_groups(model, 1.0), clip_noise]
)
def test_parameters_that_a_forward_left_gathered_are_no_shards(model, call):
    images, _ = data()
    with torch.no_grad():
        model(images)
    with pytest.raises(NoiseArgumentError, match=r"after reshard\(\)"):
        call(model)
    model.reshard()
    model.blocks[1].reshard()
    call(model)


def test_noise_that_is_called_past_the_sharded_model_is_refused(model):
    with pytest.raises(NoiseArgumentError, match="call the module that fully_shard was applied to"):
        model.noise(data()[0])
    assert all(isinstance(value, DTensor) for value in variational_parameters(model))


def test_flat_shards_are_refused():
    layer = LogNormalNoise(4)
    layer.mu = nn.Parameter(torch.zeros(2))  # what FullyShardedDataParallel leaves of it between steps
    with pytest.raises(NoiseArgumentError, match=r"not with FullyShardedDataParallel"):
        layer.kl()


def test_a_full_state_dict_goes_back_into_shards(model):
    torch.manual_seed(3)
    state = {name: torch.rand_like(value) if value.is_floating_point() else value
             for name, value in network().state_dict().items()}  # fmt: skip
    set_model_state_dict(model, dict(state), options=WHOLE)
    torch.testing.assert_close(get_model_state_dict(model, options=WHOLE), state)


def test_units_that_are_off_go_back_into_shards(model):
    pruned = network()
    prune(pruned, snr_above(100.0))
    state = pruned.state_dict()
    set_model_state_dict(model, dict(state), options=WHOLE)
    torch.testing.assert_close(get_model_state_dict(model, options=WHOLE), state)
