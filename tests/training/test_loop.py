from dataclasses import replace

import pytest
import torch

from sbp_compile.errors import ModelFileError, UsageError
from sbp_compile.nn import noise_layers
from sbp_compile.training import (
    Conditions,
    LeNet500300,
    Phase,
    Recipe,
    Task,
    evaluate,
    load,
    networks,
    noisy_network,
    predict,
    recipe_for,
    structure,
    train,
)
from sbp_compile.training.checkpoint import State, read_state, refuse_other_run
from sbp_compile.training.recipes import Dropout, GroupLasso, Noise, SparseVD, pressed

QUICK = Phase(2, batch=20)
SHORT = Phase(30, batch=20, learning_rate=3e-3)
LONG = Phase(60, batch=20, learning_rate=3e-3)
WEAK = Noise(QUICK, (1.0, 1.0, 1.0), noise_factor=100.0)


class TinyNetwork(LeNet500300):
    def __init__(self, *, noise=True):
        super().__init__((784, 30, 20), noise=noise)


class StoppedError(Exception):
    pass


class Recorder:
    def __init__(self, stop_after=None):
        self.steps, self.epochs, self.stop_after = [], [], stop_after

    def step(self, phase, done, total, loss):
        self.steps.append((phase, done, total))
        if len(self.steps) == self.stop_after:
            raise StoppedError

    def epoch(self, record):
        self.epochs.append(record)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(networks.CLASSES, "tiny", TinyNetwork)


@pytest.fixture
def task(idx_folder):
    return Task(load(f"folder:{idx_folder}"))


def recipe(settings, dense=QUICK):
    return Recipe("tiny", dense, {"it": settings})


def run(task, settings, **options):
    return train(task, recipe(settings, options.pop("dense", QUICK)), "it", Recorder(), **options)


def test_training_reports_every_step_and_epoch(task):
    recorder = Recorder()
    result = train(task, recipe(WEAK), "it", recorder)
    assert recorder.steps == [(phase, n, 4) for phase in ("dense", "it") for n in (1, 2, 3, 4)]
    assert [(e.phase, e.epoch) for e in recorder.epochs] == [("dense", 1), ("dense", 2), ("it", 1), ("it", 2)]
    assert recorder.epochs[-1].kept == result.kept
    assert recorder.epochs[-1].error == result.masked_error


def test_the_same_seed_gives_the_same_network_and_leaves_the_random_state(task):
    state = torch.get_rng_state()
    first, second, other = (
        run(task, WEAK, conditions=Conditions(seed=seed)).model.state_dict() for seed in (4, 4, 5)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_training_prunes_units_and_still_learns(task):
    settings = Noise(LONG, (0.03,) * 3, noise_factor=100.0)
    result = run(task, settings, dense=Phase(20, batch=20))
    assert result.mac_ratio > 3
    assert result.masked_error < 10


def test_too_strong_a_kl_term_prunes_everything(task):
    result = run(task, replace(WEAK, phase=LONG))
    assert result.kept == (0, 0, 0)
    assert result.masked_error == 90


@pytest.mark.parametrize(
    "settings",
    [
        SparseVD(SHORT, kl_weight=0.01, factor=100.0, warm_up=0.1),
        GroupLasso(SHORT, 0.3),
    ],
)
def test_baselines_leave_a_network_that_the_compiler_shrinks(task, settings):
    result = run(task, settings, dense=Phase(20, batch=20))
    found = structure(result.model, task.example)
    assert found.kept == result.kept
    assert found.dense_macs / found.macs == pytest.approx(result.mac_ratio)
    assert result.mac_ratio > 1.05
    assert result.masked_error < 10
    assert {type(part) for part in result.model.modules()} == {type(part) for part in result.dense.modules()}


def test_dropout_prunes_nothing(task):
    result = run(task, Dropout(QUICK))
    assert result.kept == (784, 30, 20)
    assert any(isinstance(part, torch.nn.Dropout) for part in result.model.modules())


def test_without_a_method_the_dense_network_is_the_result(task):
    result = train(task, Recipe("tiny", QUICK), "dense", Recorder())
    assert result.dense_error == result.masked_error
    assert result.mac_ratio == 1.0


@pytest.mark.parametrize(
    ("settings", "stop_after"),
    [*((WEAK, step) for step in (1, 3, 4, 5, 8)), (SparseVD(QUICK), 6), (GroupLasso(QUICK, 0.1), 6)],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(task, tmp_path, settings, stop_after):
    whole = run(task, settings)
    conditions = Conditions(checkpoint=tmp_path / "run.ckpt", checkpoint_s=0.0)
    with pytest.raises(StoppedError):
        train(task, recipe(settings), "it", Recorder(stop_after), conditions)
    state = read_state(tmp_path / "run.ckpt") if (tmp_path / "run.ckpt").exists() else State({})
    recorder = Recorder()
    result = train(task, recipe(settings), "it", recorder, conditions, state=state)
    assert len(recorder.steps) <= 8 - stop_after + 1
    expected, found = whole.method.module.state_dict(), result.method.module.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected | found)
    assert [epoch["epoch"] for epoch in state.epochs] == [1, 2, 1, 2]
    assert read_state(tmp_path / "run.ckpt").finished


def test_a_finished_run_gives_its_result_again_without_a_step(task, tmp_path):
    conditions = Conditions(checkpoint=tmp_path / "run.ckpt")  # whose interval is longer than the run
    result = run(task, WEAK, conditions=conditions)
    recorder = Recorder()
    again = train(task, recipe(WEAK), "it", recorder, conditions, state=read_state(tmp_path / "run.ckpt"))
    assert recorder.steps == []
    assert (again.kept, again.masked_error) == (result.kept, result.masked_error)


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    with pytest.raises(UsageError, match="seed was 3 and is 4"):
        refuse_other_run(State({"seed": 3}), {"seed": 4}, tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not a zip", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"x\.ckpt"):
        read_state(tmp_path / "x.ckpt")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_float32_parameters(task, precision):
    result = run(task, WEAK, conditions=Conditions(precision=precision))
    assert {value.dtype for value in result.model.parameters()} == {torch.float32}
    assert all(value.isfinite().all() for value in result.model.parameters())


def test_labels_beyond_the_outputs_are_refused(task):
    task.labels[0] = 12
    with pytest.raises(UsageError, match="13 classes"):
        run(task, WEAK)


def test_a_loss_that_is_no_number_stops_the_run(task):
    diverging = Noise(Phase(3, batch=20, learning_rate=1e18))
    with pytest.raises(
        UsageError, match=r"the loss is (nan|inf) at step \d of it: give a lower --learning-rate"
    ):
        run(task, diverging)


def test_random_labels_are_the_same_labels_in_another_order(idx_folder):
    data = load(f"folder:{idx_folder}")
    plain, shuffled = Task(data), Task(data, random_labels=1)
    assert not torch.equal(plain.labels, shuffled.labels)
    assert torch.equal(plain.labels.sort().values, shuffled.labels.sort().values)
    assert torch.equal(plain.test_labels, shuffled.test_labels)


def test_augmentation_moves_whole_images_by_up_to_four_pixels(task):
    task.augment = True
    task.images = torch.zeros(40, 2, 9, 9)
    task.images[:, :, 4, 4] = 1.0
    torch.manual_seed(0)
    images, _ = task.batch(torch.arange(40))
    assert images.shape == (40, 2, 9, 9)
    assert torch.equal(images.sum((1, 2, 3)), torch.full((40,), 2.0))
    assert len({tuple(image.nonzero()[0].tolist()) for image in images}) > 20


def test_the_noisy_network_starts_from_the_dense_weights(task):
    dense = TinyNetwork(noise=False)
    model = noisy_network(dense, task.example, -2.0)
    assert torch.equal(model.fc2.weight, dense.fc2.weight)
    assert all((layer.log_sigma == -2.0).all() for layer in noise_layers(model))


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
    assert recipe_for("resnet20", 10) == recipe_for("resnet20", 50000)
    with pytest.raises(UsageError, match="'lenet7' is unknown: give one of lenet5"):
        recipe_for("lenet7", 1)


def test_a_method_without_a_recipe_is_refused_with_those_that_have_one():
    with pytest.raises(UsageError, match="--method sbp has no recipe for tiny: give dense or one of it"):
        recipe(WEAK).settings("sbp")


def test_pressure_scales_what_presses_towards_zero():
    assert pressed(WEAK, 3.0).pressure == 3.0
    assert pressed(SparseVD(QUICK, kl_weight=2.0), 3.0).kl_weight == 6.0
    assert pressed(GroupLasso(QUICK, 2.0), 3.0).strength == 6.0
    assert pressed(Dropout(QUICK), 3.0) == Dropout(QUICK)
