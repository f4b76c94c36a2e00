import sys
import types

import pytest
import torch
from torch import nn

from sbp_compile.errors import UsageError
from sbp_compile.nn import LogNormalNoise, NetworkCosts, lightning_callback, log_sparsity, noise_layers
from tests.nn.test_noise_dropin import torch_copies_its_own_deprecated_class
from tests.zoo.places import switch_off

pytestmark = torch_copies_its_own_deprecated_class

X = torch.randn(2, 4)


class Recorder:
    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars[tag, global_step] = scalar_value

    def add_histogram(self, tag, values, global_step):
        self.histograms[tag, global_step] = values


class Module(nn.Module):
    """What the callback asks of a LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), LogNormalNoise(6), nn.ReLU(), nn.Linear(6, 3))
        self.logged = []

    def forward(self, x):
        return self.net(x)

    def log_dict(self, values):
        self.logged.append(values)


def model():
    module = Module()
    switch_off(module.net[1], torch.arange(6) < 2)
    return module


@pytest.fixture
def lightning(monkeypatch):
    """The two modules that the callback imports, as Lightning has them."""
    callbacks = types.ModuleType("lightning.pytorch.callbacks")
    callbacks.Callback = type("Callback", (), {})
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", callbacks)
    return callbacks


def trainer(module):
    return types.SimpleNamespace(optimizers=[torch.optim.Adam(module.parameters())])


def test_a_writer_gets_numbers_and_histograms():
    module, writer = model(), Recorder()
    found = log_sparsity(writer, module, 7, NetworkCosts(module, X), prefix="run")
    assert writer.scalars["run/live/net.1", 7] == 4
    assert writer.scalars["run/macs", 7] == found.macs == 4 * 4 + 4 * 3
    values = writer.histograms["run/log10_snr/net.1", 7]
    torch.testing.assert_close(values, module.net[1].snr().detach().double().log10())


def test_lightning_logs_and_prunes_while_it_trains(lightning):
    module = model()
    callback = lightning_callback(X, patience=2)
    assert isinstance(callback, lightning.Callback)
    run = trainer(module)
    callback.on_fit_start(run, module)
    for _ in range(2):
        callback.on_train_epoch_end(run, module)
    assert [values["sbp/live/net.1"] for values in module.logged] == [4, 4]
    assert [values["sbp/macs_share"] for values in module.logged] == pytest.approx([2 / 3, 2 / 3])
    assert noise_layers(module)[0].num_features == 4
    assert {id(p) for p in run.optimizers[0].param_groups[0]["params"]} == {
        id(p) for p in module.parameters()
    }


def test_lightning_goes_on_from_a_checkpoint(lightning):
    module = model()
    first = lightning_callback(X, patience=2, macs=False)
    first.on_fit_start(trainer(module), module)
    first.on_train_epoch_end(None, module)
    second = lightning_callback(X, patience=2, macs=False)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["epochs"] == 1
    second.on_fit_start(trainer(module), module)
    second.on_train_epoch_end(None, module)
    assert module.net[1].num_features == 4
    assert "sbp/macs" not in module.logged[-1]


def test_without_an_example_it_only_logs(lightning):
    module = model()
    callback = lightning_callback()
    callback.on_fit_start(trainer(module), module)
    callback.on_train_epoch_end(None, module)
    assert callback.pruner is None
    assert module.logged[0]["sbp/live"] == 4


def test_without_lightning_the_callback_is_refused_in_one_line(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="Lightning is not installed: pip install lightning"):
        lightning_callback()
