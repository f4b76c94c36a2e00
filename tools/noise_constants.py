"""Noise layers as the constants that they are in eval mode, for exporters that cannot take the layers as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbp_compile.nn import LogNormalNoise


def with_constants(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Replace a network's noise layers, in place, by products with a constant in the dtype of their parameters.

    torch's older ONNX exporter has no float64 arithmetic that onnxruntime could run at its opsets, and the layers'
    arithmetic is no TorchScript. The network is run once on the inputs, which says what rank each layer sees.
    """
    ranks: dict[nn.Module, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: ranks.update({layer: args[0].ndim}))
        for layer in network.modules()
        if isinstance(layer, LogNormalNoise)
    ]
    with torch.no_grad():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    for part in list(network.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, LogNormalNoise) and child in ranks:
                setattr(part, name, MaskedMean(child, ranks[child]))


class MaskedMean(nn.Module):
    """Multiplication with a noise layer's masked mean."""

    theta: Tensor

    def __init__(self, layer: LogNormalNoise, rank: int) -> None:
        super().__init__()
        shape = [1] * rank
        shape[layer.dim] = layer.num_features
        masked = (layer.mean() * layer.mask()).detach().to(layer.mu.dtype)
        self.register_buffer("theta", masked.view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.theta
