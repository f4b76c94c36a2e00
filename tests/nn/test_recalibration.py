import copy

import pytest
import torch
from torch import nn

from sbp_compile.nn import LogNormalNoise, NoiseArgumentError, recalibrate_norms


def noisy(norm=None):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5) if norm is None else norm
    model = nn.Sequential(nn.Linear(3, 5), LogNormalNoise(5), norm)
    with torch.no_grad():
        model[1].log_sigma.fill_(0.5)
    return model


def test_statistics_become_those_of_the_expected_noise():
    model, batches = noisy(), torch.randn(2, 40, 3)
    for batch in batches:
        model.train()(batch)
    assert recalibrate_norms(model, batches) == 1
    expected = model[:2].eval()(batches.flatten(0, 1)).unflatten(0, (2, 40))
    torch.testing.assert_close(model[2].running_mean, expected.mean((0, 1)))
    torch.testing.assert_close(model[2].running_var, expected.var(1).mean(0))


def test_everything_but_the_statistics_stays_as_it_was():
    model = noisy().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    recalibrate_norms(model, [torch.randn(8, 3)])
    assert [part.training for part in model] == [True, False, True]
    assert model[2].momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("batches", "message"),
    [([torch.randn(8, 3), torch.randn(8, 4)], "shapes cannot be multiplied"), ([], "`batches` is empty")],
    ids=["wrong", "none"],
)
def test_after_a_failure_everything_is_as_it_was(batches, message):
    model = noisy().train()
    model(torch.randn(8, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, NoiseArgumentError), match=message):
        recalibrate_norms(model, batches)
    assert all(part.training for part in model.modules())
    assert model[2].momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm1d(5, track_running_stats=False)], ids=["none", "untracked"]
)
def test_without_statistics_no_batch_is_read(norm):
    def batches():
        raise AssertionError("read")
        yield

    assert recalibrate_norms(noisy(norm), batches()) == 0
