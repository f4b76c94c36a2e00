"""How much of a network is left, for logs: live units, signal-to-noise ratios, multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sbp_compile.nn.costs import NetworkCosts
from sbp_compile.nn.noise import named_noise_layers

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerSparsity:
    """One noise layer: its units, how many are live, quantiles of the SNR over all units, KL in nats.

    Units whose parameters are not numbers count as live and not in the quantiles.
    """

    name: str
    units: int
    live: int
    snr: tuple[float, ...]
    kl: float


@dataclass(frozen=True)
class Sparsity:
    """Every noise layer, and multiply-adds of one example before and after compilation where they were asked for."""

    layers: tuple[LayerSparsity, ...]
    quantiles: tuple[float, ...] = QUANTILES
    macs: int | None = None
    dense_macs: int | None = None

    @property
    def live(self) -> int:
        """Live units of all layers."""
        return sum(layer.live for layer in self.layers)

    @property
    def units(self) -> int:
        """Units of all layers."""
        return sum(layer.units for layer in self.layers)

    @property
    def kl(self) -> float:
        """KL of all layers in nats."""
        return sum(layer.kl for layer in self.layers)

    def scalars(self) -> dict[str, float]:
        """Return everything as flat numbers, for loggers: `live/<layer>`, `snr_50/<layer>`, `macs`, ..."""
        found: dict[str, float] = {"live": self.live, "kl": self.kl}
        if self.macs is not None and self.dense_macs is not None:
            found |= {"macs": self.macs, "macs_share": self.macs / max(self.dense_macs, 1)}
        for layer in self.layers:
            found[f"live/{layer.name}"] = layer.live
            for quantile, value in zip(self.quantiles, layer.snr, strict=True):
                found[f"snr_{100 * quantile:g}/{layer.name}"] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kept = "-".join(str(layer.live) for layer in self.layers)
        text = f"live {kept} of {'-'.join(str(layer.units) for layer in self.layers)}, KL {self.kl:.1f}"
        return text if self.macs is None else f"{text}, MACs {self.macs:,} of {self.dense_macs:,}"


def sparsity(
    module: nn.Module, costs: NetworkCosts | None = None, *, quantiles: Sequence[float] = QUANTILES
) -> Sparsity:
    """Tell what is left of a network with noise layers; nothing is changed.

    `costs`: made once with `NetworkCosts(module, example_inputs)`, it adds the multiply-adds that compilation would
    leave under the masks of now. After `fully_shard` all processes must ask together; `costs` are made before.
    Raises nothing but what `costs` of other widths raise.
    """
    layers = []
    with torch.no_grad():
        for name, layer in named_noise_layers(module).items():
            snr = layer.snr().double().cpu()
            snr = snr[~snr.isnan()]
            points = torch.tensor(tuple(quantiles), dtype=torch.float64)
            values = torch.quantile(snr, points).tolist() if snr.numel() else [float("nan")] * len(points)
            live = int(layer.mask().sum())
            layers.append(LayerSparsity(name, layer.num_features, live, tuple(values), float(layer.kl())))
    if costs is None:
        return Sparsity(tuple(layers), tuple(quantiles))
    return Sparsity(tuple(layers), tuple(quantiles), costs.macs(), costs.dense_macs)
