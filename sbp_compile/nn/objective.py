"""What the noise learns from, and how fast: the variational bound, parameter groups, clipping."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.nn.noise import (
    LayerNumbers,
    NoiseArgumentError,
    kl_divergence,
    named_noise_layers,
    noise_layers,
)
from sbp_compile.sharding import has_shards, is_sharded

# The authors clip both parameters to this range before every use (group-sparsity-sbp, nets/layers.py).
AUTHORS_RANGE = (-20.0, 5.0)


def elbo_loss(
    nll: Tensor,
    module: nn.Module,
    num_examples: int,
    kl_weight: float = 1.0,
    *,
    layer_weights: LayerNumbers | None = None,
) -> Tensor:
    """mean(nll) + kl_weight * KL / num_examples: a scalar with gradients.

    The negative variational lower bound, per example (Neklyudov et al. 2017, arXiv 1705.07283, section 2), where
    `kl_weight` is 1 and `nll` the negative log-likelihood in nats: one number per example, or their mean.
    `num_examples`: how many the whole training set has (not the batch; on several machines, all of them together).
    `layer_weights`: one factor on each noise layer's KL, in order or by name (`mac_kl_weights` gives some).
    In several processes each computes the same KL and gradients are averaged, so it counts once; after `fully_shard`
    it is the KL of the whole noise, too, and each process learns its shard of it.

    Raises NoiseArgumentError for a count below 1, a weight below 0, weights that do not fit the layers, or noise layers
    outside of what is sharded.
    """
    if isinstance(num_examples, bool) or not num_examples >= 1:
        raise NoiseArgumentError(f"`num_examples` (={num_examples!r}) must be at least 1")
    if not isinstance(kl_weight, Real) or not kl_weight >= 0:
        raise NoiseArgumentError(f"`kl_weight` (={kl_weight!r}) must be a number >= 0")
    kl = kl_divergence(module, layer_weights).to(nll.device)
    return nll.mean() + kl * (float(kl_weight) / num_examples)


def variational_parameters(module: nn.Module) -> list[nn.Parameter]:
    """`mu` and `log_sigma` of every noise layer of `module`, each parameter once, in order.

    After `fully_shard` they are the shards. Raises NoiseArgumentError while they are not: where a forward has left
    them gathered, or the noise was left out.
    """
    _check_shards(module)
    found = {id(p): p for layer in noise_layers(module) for p in (layer.mu, layer.log_sigma)}
    return list(found.values())


def parameter_groups(
    module: nn.Module, lr: float, *, noise_factor: float = 10.0, **options: Any
) -> list[dict[str, Any]]:
    """Two groups for an optimiser: the weights at `lr`, the noise at `noise_factor` times that.

    10 is the authors' factor. `options` (`weight_decay`, ...) are those of the weights' group; the noise is never
    decayed, for its prior is in the loss. Frozen parameters are left out, and a group without parameters is, too.
    Schedulers of torch scale each group's own rate, so the factor stays. Raises NoiseArgumentError for a rate or
    factor that is not a positive number, and as `variational_parameters` does.
    """
    for name, value in (("lr", lr), ("noise_factor", noise_factor)):
        if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
            raise NoiseArgumentError(f"`{name}` (={value!r}) must be a number > 0")
    noise = [p for p in variational_parameters(module) if p.requires_grad]
    known = {id(p) for p in noise}
    weights = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {**options, "params": weights, "lr": lr},
        {"params": noise, "lr": lr * noise_factor, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clip_noise(
    module: nn.Module,
    *,
    mu: tuple[float, float] = AUTHORS_RANGE,
    log_sigma: tuple[float, float] = AUTHORS_RANGE,
) -> None:
    """Put every noise parameter back into its range, in place: to be called after each optimiser step.

    The defaults are the authors'. They clip inside the graph, where a parameter that has left its range gets no
    gradient any more and stays outside; here it comes back. The arithmetic of the layer needs no clipping. Errors as
    for `variational_parameters`.
    """
    _check_shards(module)
    with torch.no_grad():
        for layer in noise_layers(module):
            layer.mu.clamp_(*mu)
            layer.log_sigma.clamp_(*log_sigma)


def _check_shards(module: nn.Module) -> None:
    if not has_shards(module):
        return
    for name, layer in named_noise_layers(module).items():
        if not is_sharded(layer.mu):
            raise NoiseArgumentError(
                f"the noise layer {name!r} is not sharded while other parameters are: apply fully_shard to the whole "
                "model, and call this before its forward, after the backward, or after reshard()"
            )
