"""Sparse variational dropout (Molchanov, Ashukha, Vetrov 2017, arXiv 1701.05369): a baseline, sparse by weights.

Each weight is w ~ N(theta, sigma^2), with alpha = sigma^2 / theta^2 and a log-uniform prior on |w|. Weights with
log alpha > 3 are zero in eval mode. What the compiler removes are the rows and columns that are zero altogether.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbp_compile.errors import UsageError
from sbp_compile.sharding import whole

THRESHOLD = (
    3.0  # log alpha above which a weight is dropped (section 4.2 there: alpha = 20, dropout rate 0.95)
)
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_LOG_ALPHA_RANGE = 8.0  # the authors' code clips log alpha to [-8, 8]
_TINY = 1e-8


def weight_divergence(log_alpha: Tensor) -> Tensor:
    """KL(q(w) || p(w)) of each weight in nats, up to the constant that makes it 0 at infinite alpha.

    The approximation of equation 14 there, negated:
    KL = k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1/alpha) / 2, with k1, k2, k3 = 0.63576, 1.87320, 1.48695; off by
    less than 0.009 nats from the integral.
    """
    return _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


class SparseLayer(nn.Module):
    """What a sparse linear layer or convolution has beyond torch's: noise on its weights.

    Train mode, by the local reparametrisation: outputs are drawn from N(f(x, theta) + bias, f(x^2, sigma^2)), f being
    the layer (equation 12 there). Eval mode: the layer with the weights that are left. `weight` is theta;
    `log_sigma2` has its shape.
    """

    weight: Any  # both bases declare it, in different ways
    bias: Any
    log_sigma2: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; input and output are those of torch's."""
        if not self.training:
            return self.applied(x, self.sparse_weight(), self.bias)
        mean = self.applied(x, self.weight, self.bias)
        variance = self.applied(x * x, self.log_sigma2.exp(), None)
        return mean + (variance + _TINY).sqrt() * torch.randn_like(mean)

    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with other weights."""
        raise NotImplementedError

    def log_alpha(self) -> Tensor:
        """Log of noise over signal, in [-8, 8], of the weight's shape: whole where the layer is sharded."""
        log_theta2: Tensor = 2 * (whole(self.weight).abs() + _TINY).log()
        return (whole(self.log_sigma2) - log_theta2).clamp(-_LOG_ALPHA_RANGE, _LOG_ALPHA_RANGE)

    def kl(self) -> Tensor:
        """Sum over the weights, in nats."""
        return weight_divergence(self.log_alpha()).sum()

    def sparse_weight(self) -> Tensor:
        """Return theta where log alpha is not above the threshold, 0 elsewhere."""
        return torch.where(self.log_alpha() > THRESHOLD, 0.0, self.weight)


class _SparseLinear(SparseLayer, nn.Linear):
    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _SparseConv1d(SparseLayer, nn.Conv1d):
    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _SparseConv2d(SparseLayer, nn.Conv2d):
    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _SparseConv3d(SparseLayer, nn.Conv3d):
    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


_SPARSE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _SparseLinear,
    nn.Conv1d: _SparseConv1d,
    nn.Conv2d: _SparseConv2d,
    nn.Conv3d: _SparseConv3d,
}
_PLAIN = {sparse: plain for plain, sparse in _SPARSE.items()}


def sparse_layers(module: nn.Module) -> dict[str, SparseLayer]:
    """Every sparse layer of `module` by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, SparseLayer)}


def insert_sparse_layers(module: nn.Module, init_log_sigma2: float = -10.0) -> None:
    """Turn every linear layer and convolution of `module` into a sparse one, in place.

    Raises UsageError where there is none, or `module` is one itself.
    """
    found = [name for name, part in module.named_modules() if _can_be_sparse(part)]
    if not found or "" in found:
        raise UsageError("the model has no linear layer or convolution inside: sparse-vd cannot train it")
    for name in found:
        layer = module.get_submodule(name)
        sparse = _like(layer, _SPARSE[type(layer)])
        assert isinstance(sparse, SparseLayer)
        sparse.log_sigma2 = nn.Parameter(torch.full_like(sparse.weight, init_log_sigma2))
        module.set_submodule(name, sparse)


def remove_sparse_layers(module: nn.Module) -> None:
    """Put torch's layers back in place, with the weights that are left: the network of eval mode."""
    for name, sparse in sparse_layers(module).items():
        layer = _like(sparse, _PLAIN[type(sparse)])
        layer.weight = nn.Parameter(sparse.sparse_weight().detach())
        module.set_submodule(name, layer)


def _can_be_sparse(part: nn.Module) -> bool:
    return type(part) in _SPARSE and getattr(part, "padding_mode", "zeros") == "zeros"


def _like(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a layer of another class with the same sizes, weights and mode."""
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = kind(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        made = kind(**{name: getattr(layer, name) for name in names}, bias=has_bias, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
