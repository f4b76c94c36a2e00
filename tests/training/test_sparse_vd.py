import itertools
import math

import pytest
import torch
from scipy import integrate
from torch import nn
from torch.nn import functional as F

from sbp_compile.errors import UsageError
from sbp_compile.training.sparse_vd import (
    insert_sparse_layers,
    remove_sparse_layers,
    sparse_layers,
    weight_divergence,
)


def exact_divergence(log_alpha):
    """KL to the log-uniform prior, 0 at infinite alpha, by quadrature."""
    sigma = math.exp(log_alpha / 2)

    def integrand(z):
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) * math.log(abs(1 + sigma * z))

    edges = sorted({-12.0, max(-12.0, min(12.0, -1 / sigma)), 12.0})
    mean = sum(integrate.quad(integrand, a, b, limit=400)[0] for a, b in itertools.pairwise(edges))
    return mean - math.log(sigma) + 0.5 * (0.5772156649015329 + math.log(2))


def sparse_from(layer, init_log_sigma2=-10.0):
    model = nn.Sequential(layer)
    insert_sparse_layers(model, init_log_sigma2)
    return model[0]


@pytest.mark.parametrize("log_alpha", [-8.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0, 8.0])
def test_the_divergence_is_that_of_quadrature(log_alpha):
    found = float(weight_divergence(torch.tensor(log_alpha, dtype=torch.float64)))
    assert found == pytest.approx(exact_divergence(log_alpha), abs=0.009)


def test_the_divergence_falls_and_its_gradient_is_finite():
    log_alpha = torch.linspace(-8, 8, 200, dtype=torch.float64, requires_grad=True)
    values = weight_divergence(log_alpha)
    assert (values.diff() < 0).all()
    values.sum().backward()
    assert log_alpha.grad.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(3, 2), torch.rand(1, 3)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), torch.rand(1, 4, 7, 7)),
        (nn.Conv1d(2, 3, 3, bias=False), torch.rand(1, 2, 6)),
    ],
)
def test_outputs_have_the_moments_of_random_weights(layer, x):
    sparse = sparse_from(layer, init_log_sigma2=-1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.cat([sparse(x) for _ in range(1500)])
        weights = [layer.weight + math.exp(-0.5) * torch.randn_like(layer.weight) for _ in range(1500)]
        direct = torch.cat([torch.func.functional_call(layer, {"weight": w}, (x,)) for w in weights])
    torch.testing.assert_close(samples.mean(0), direct.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(samples.std(0), direct.std(0), rtol=0.12, atol=0.0)


def test_weights_that_are_mostly_noise_are_zero_in_eval_mode():
    sparse = sparse_from(nn.Linear(2, 1)).eval()
    with torch.no_grad():
        sparse.weight.copy_(torch.tensor([[1.0, 0.5]]))
        sparse.log_sigma2.copy_(torch.tensor([[2.9, 2.9]]))  # log alpha: 2.9 and 4.3
    assert sparse(torch.tensor([[3.0, 5.0]])).item() == pytest.approx(3.0 + sparse.bias.item())


def test_layers_are_wrapped_and_come_back_with_what_is_left():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU(), nn.Linear(8, 3))
    insert_sparse_layers(model)
    assert list(sparse_layers(model)) == ["0", "3"]
    with torch.no_grad():
        model[3].log_sigma2[1] = 5.0
    x = torch.rand(2, 1, 4, 4)
    expected = model.eval()(x)
    remove_sparse_layers(model)
    assert [type(part) for part in model] == [nn.Conv2d, nn.Flatten, nn.ReLU, nn.Linear]
    assert (model[3].weight[1] == 0).all()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular"))]
)
def test_a_model_without_such_layers_is_refused(model):
    with pytest.raises(UsageError, match="sparse-vd cannot train it"):
        insert_sparse_layers(model)


def test_a_noiseless_layer_is_the_layer():
    layer = nn.Linear(3, 2)
    x = torch.rand(4, 3)
    sparse = sparse_from(layer, init_log_sigma2=-40.0)
    torch.testing.assert_close(sparse(x), F.linear(x, layer.weight, layer.bias), atol=1e-3, rtol=0)
