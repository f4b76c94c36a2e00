"""Where a network's noise layers go, and how units are switched off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbp_compile.nn import LogNormalNoise

RANDOM_SHARE = 0.4


class Places:
    """Where noise goes: at the places called `placement`, "everywhere", or at "random" ones.

    Networks ask at "before norm" (in front of a layer's bias and norm), "after norm" (in front of the
    activation), "after activation", "hidden" (units between linear layers, attention's values), "on input",
    "on blocks" (a block's output), "both sides of adds", "on flattened" and "on output".
    """

    def __init__(self, placement: str, seed: int = 0):
        self.placement = placement
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, place: str, features: int, dim: int = 1) -> nn.Module:
        """A noise layer for `features` along `dim` if `place` is chosen, else nothing."""
        return LogNormalNoise(features, dim=dim) if self._chosen(place) else nn.Identity()

    def _chosen(self, place: str) -> bool:
        if self.placement == "random":
            return torch.rand((), generator=self.generator).item() < RANDOM_SHARE
        return self.placement in {place, "everywhere"}


def switch_off(layer: LogNormalNoise, units: Tensor) -> None:
    """Give the units the posterior that dead ones settle at: mu -1, log_sigma 3.4 (SNR 0.33)."""
    with torch.no_grad():
        layer.mu[units] = -1.0
        layer.log_sigma[units] = 3.4
