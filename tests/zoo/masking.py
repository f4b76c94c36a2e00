"""Networks of the zoo as they stand after training: weights, statistics and masks that are not trivial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbp_compile.nn import noise_layers
from tests.zoo.architecture import BATCH, Architecture
from tests.zoo.places import Places, switch_off

PLACEMENTS = ("before norm", "after norm", "hidden", "random")
CALIBRATION_BATCH = 8
LEAST_DEVIATION = 1e-3

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
Norm = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)


def masked_network(architecture: Architecture, placement: str, share: float, seed: int = 0) -> nn.Module:
    """Build the network in eval mode, with a `share` of each noise layer's units off.

    Weights are scaled and batch norm's statistics taken layer by layer on the example, with the masks on, so
    that values stay of order 1 through any depth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = with_noise(architecture, placement, seed).eval()
        with torch.no_grad():
            _randomise(network)
            for layer in noise_layers(network):
                layer.mu.normal_(-0.3, 0.2)
                switch_off(layer, _units(len(layer.mu), share))
            _calibrate(
                network, architecture.example(CALIBRATION_BATCH if architecture.dynamic_batch else BATCH)
            )
    return network


def with_noise(architecture: Architecture, placement: str, seed: int = 0) -> nn.Module:
    """Build the network as it is before training.

    One without hidden units has "hidden" noise after its activations.
    """
    network = architecture.build(Places(placement, seed))
    if placement == "hidden" and not noise_layers(network):
        network = architecture.build(Places("after activation", seed))
    return network


def _units(count: int, share: float) -> Tensor:
    """A share of the units, at random; never the first, so that masks one after the other leave a path."""
    off = torch.zeros(count, dtype=torch.bool)
    off[1 + torch.randperm(count - 1)[: round(share * count)]] = True
    return off


def _randomise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (_BatchNorm, *Norm)):
            if module.weight is not None:
                signs = torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0)
                module.weight.copy_(signs * torch.empty_like(module.weight).uniform_(0.5, 1.5))
            if module.bias is not None:
                module.bias.normal_(0.0, 0.3)
        elif isinstance(module, (nn.Linear, *Convolution)) and module.bias is not None:
            module.bias.normal_(0.0, 0.2)


def _calibrate(network: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Run the example once, in which each layer is scaled and each batch norm gets its statistics."""
    seen: set[nn.Module] = set()
    handles = []
    for module in network.modules():
        if isinstance(module, (nn.Linear, *Convolution)):
            handles.append(module.register_forward_hook(_once(seen, _scale)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(_once(seen, _take_statistics)))
    network(*example)
    for handle in handles:
        handle.remove()


def _once(seen: set[nn.Module], hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook for a module's first call only: one that is called at several places keeps its weights."""

    def first(module: nn.Module, *tensors: Any) -> Any:
        if module in seen:
            return None
        seen.add(module)
        return hook(module, *tensors)

    return first


def _scale(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Scale the weights so that the output's deviation is 1; returns the output."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    deviation = output.transpose(axis, 0).flatten(1).std(1).square().mean().sqrt()
    if not deviation > LEAST_DEVIATION:
        return output
    layer.weight.div_(deviation)
    return layer.forward(*inputs)


def _take_statistics(norm: _BatchNorm, inputs: tuple[Tensor]) -> None:
    """Set the running statistics to about those of the input; random ones where a channel is constant."""
    channels = inputs[0].transpose(0, 1).flatten(1)
    mean, variance = channels.mean(1), channels.var(1, correction=0)
    constant = variance <= LEAST_DEVIATION**2
    floor = 0.25 * variance[~constant].mean() if not constant.all() else variance.new_tensor(1.0)
    variance = torch.where(constant, 1.0, variance.maximum(floor)) * torch.empty_like(mean).uniform_(0.7, 1.4)
    norm.running_mean.copy_(mean + 0.3 * variance.sqrt() * torch.randn_like(mean))
    norm.running_var.copy_(variance)
