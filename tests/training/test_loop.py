from dataclasses import replace

import pytest
import torch

from sbp_compile.errors import UsageError
from sbp_compile.nn import noise_layers
from sbp_compile.training import (
    LeNet500300,
    Phase,
    Recipe,
    evaluate,
    load,
    predict,
    recipe_for,
    train,
    with_noise,
)


class TinyNetwork(LeNet500300):
    def __init__(self, *, noise=True):
        super().__init__((784, 30, 20), noise=noise)


RECIPE = Recipe(
    TinyNetwork,
    dense=Phase(2, batch=20),
    sbp=Phase(2, batch=20),
    kl_weights=(1.0, 1.0, 1.0),
    noise_factor=100.0,
)


class Recorder:
    def __init__(self):
        self.steps, self.epochs = [], []

    def step(self, phase, done, total, loss):
        self.steps.append((phase, done, total))

    def epoch(self, record):
        self.epochs.append(record)


@pytest.fixture
def images(idx_folder):
    return load(f"folder:{idx_folder}")


def test_training_reports_every_step_and_epoch(images):
    recorder = Recorder()
    result = train(images, RECIPE, recorder)
    assert recorder.steps == [(phase, n, 4) for phase in ("dense", "sbp") for n in (1, 2, 3, 4)]
    assert [(e.phase, e.epoch) for e in recorder.epochs] == [
        ("dense", 1),
        ("dense", 2),
        ("sbp", 1),
        ("sbp", 2),
    ]
    assert recorder.epochs[-1].kept == result.kept
    assert recorder.epochs[-1].error == result.masked_error


def test_the_same_seed_gives_the_same_network_and_leaves_the_random_state(images):
    state = torch.get_rng_state()
    first, second = (train(images, RECIPE, Recorder(), seed=4).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    other = train(images, RECIPE, Recorder(), seed=5).model.state_dict()
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_training_prunes_units_and_still_learns(images):
    dense, noisy = Phase(20, batch=20), Phase(60, batch=20, learning_rate=3e-3)
    result = train(images, replace(RECIPE, dense=dense, sbp=noisy, kl_weights=(0.03,) * 3), Recorder())
    assert result.mac_ratio > 3
    assert result.masked_error < 10


def test_too_strong_a_kl_term_prunes_everything(images):
    phase = Phase(60, batch=20, learning_rate=3e-3)
    result = train(images, replace(RECIPE, sbp=phase), Recorder())
    assert result.kept == (0, 0, 0)
    assert result.masked_error == 90


def test_the_noisy_network_starts_from_the_dense_weights():
    dense = TinyNetwork(noise=False)
    model = with_noise(dense, RECIPE)
    assert torch.equal(model.fc2.weight, dense.fc2.weight)
    assert all((layer.log_sigma == RECIPE.init_log_sigma).all() for layer in noise_layers(model))


def test_error_is_a_percentage_and_evaluation_keeps_every_mode():
    logits = torch.eye(4)
    assert evaluate(lambda x: logits[: len(x)], torch.zeros(4, 1), torch.tensor([0, 1, 2, 0])) == 25.0
    model = LeNet500300((784, 4, 3))
    model.fc2.eval()
    modes = [m.training for m in model.modules()]
    assert not predict(model, torch.rand(3, 1, 28, 28)).requires_grad
    assert [m.training for m in model.modules()] == modes


def test_prediction_in_parts_equals_prediction_at_once():
    model, images = LeNet500300((784, 4, 3)), torch.rand(7, 1, 28, 28)
    torch.testing.assert_close(predict(model, images, batch=3), predict(model, images))


def test_the_recipe_depends_on_the_data_size():
    assert recipe_for("lenet5", 4000) != recipe_for("lenet5", 60000)
    with pytest.raises(UsageError, match="'lenet7' is unknown: give one of lenet5"):
        recipe_for("lenet7", 1)
