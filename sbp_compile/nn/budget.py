"""Pruning to a target: the best channels of all layers stay until a budget is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sbp_compile.nn.costs import NetworkCosts
from sbp_compile.nn.noise import LogNormalNoise, NoiseArgumentError

Score = Callable[[LogNormalNoise], Tensor]


@dataclass(frozen=True)
class Fit:
    """What is left after pruning to a budget: units by layer, multiply-adds, and seconds where they were measured."""

    kept: Mapping[str, int]
    macs: int
    dense_macs: int
    seconds: float | None = None


def signal_to_noise(layer: LogNormalNoise) -> Tensor:
    """E[theta] / sqrt(Var[theta]): the default order of channels, the best first."""
    return layer.snr()


def prune_to_macs(
    costs: NetworkCosts, budget: float, *, score: Score = signal_to_noise, least: int = 1
) -> Fit:
    """Switch off the worst units of all layers until the compiled network has at most `budget` multiply-adds.

    `budget`: multiply-adds of one example, or a share of the dense network's if below 1. `score`: higher is better,
    compared across layers. `least`: the best units of each layer that stay whatever they score. Units that are
    masked already (off, or below their threshold) stay masked.

    Raises NoiseArgumentError, having changed nothing, for a budget that is no positive number, or that the network
    exceeds with `least` units in every layer.
    """
    limit = _limit(budget, costs)
    return _fit(
        costs, _Order(costs, score, least), lambda masks: costs.macs(masks) <= limit, f"{limit:,.0f} MACs"
    )


def prune_to_latency(
    costs: NetworkCosts,
    seconds: float,
    *,
    batch: int = 1,
    threads: int = 1,
    score: Score = signal_to_noise,
    least: int = 1,
    measure_s: float = 3.0,
) -> Fit:
    """Do the same until the compiled network takes at most `seconds` for a batch, measured in onnxruntime here.

    Each of about log2(number of units) networks is measured for `measure_s` seconds. Latency is not quite monotone
    in the units kept, so the answer is one that was measured to fit, not always the largest.
    """
    if not 0 < seconds < math.inf:
        raise NoiseArgumentError(f"`seconds` (={seconds!r}) must be a positive number")
    measured: dict[int, float] = {}

    def fits(masks: Mapping[str, Tensor]) -> bool:
        took = costs.seconds(masks, batch=batch, threads=threads, budget_s=measure_s)
        if took <= seconds:
            measured[sum(int(mask.sum()) for mask in masks.values())] = took
        return took <= seconds

    fit = _fit(costs, _Order(costs, score, least), fits, f"{seconds:.3g} s")
    return Fit(fit.kept, fit.macs, fit.dense_macs, measured[sum(fit.kept.values())])


class _Order:
    """All units that may stay, the best first; the `least` best of each layer before all others."""

    def __init__(self, costs: NetworkCosts, score: Score, least: int) -> None:
        self.masks = costs.current()
        ranked: list[tuple[bool, float, str, int]] = []
        for name, mask in self.masks.items():
            scores = _scores(name, costs.layers[name], score)
            units = sorted(mask.nonzero().flatten().tolist(), key=lambda unit: (-scores[unit], unit))
            ranked += [(place >= least, -scores[unit], name, unit) for place, unit in enumerate(units)]
        self.units = [(name, unit) for _, _, name, unit in sorted(ranked)]
        self.fewest = sum(not beyond for beyond, *_ in ranked)

    def best(self, number: int) -> dict[str, Tensor]:
        masks = {name: torch.zeros_like(mask) for name, mask in self.masks.items()}
        for name, unit in self.units[:number]:
            masks[name][unit] = True
        return masks


def _scores(name: str, layer: LogNormalNoise, score: Score) -> list[float]:
    with torch.no_grad():
        found = score(layer).double()
    if found.shape != (layer.num_features,):
        raise NoiseArgumentError(
            f"`score` gave shape {tuple(found.shape)} for {name}, which has {layer.num_features} features"
        )
    return torch.where(found.isnan(), math.inf, found).tolist()


def _fit(costs: NetworkCosts, order: _Order, fits: Callable[[dict[str, Tensor]], bool], text: str) -> Fit:
    """Bisect for the most units that fit, and switch the others off."""
    low, high = order.fewest, len(order.units)
    if not fits(order.best(high)):
        if not fits(order.best(low)):
            left = costs.macs(order.best(low))
            raise NoiseArgumentError(
                f"the budget of {text} cannot be met: the {low} best units, which always stay, need more "
                f"({left:,} MACs): allow more, or lower `least`"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(order.best(middle)) else (low, middle)
        high = low
    masks = order.best(high)
    for name, layer in costs.layers.items():
        layer.switch_off(~masks[name].to(layer.mu.device))
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    return Fit(kept, costs.macs(masks), costs.dense_macs)


def _limit(budget: float, costs: NetworkCosts) -> float:
    if isinstance(budget, bool) or not 0 < budget < math.inf:
        raise NoiseArgumentError(
            f"`budget` (={budget!r}) must be a number of multiply-adds or a share below 1"
        )
    return budget * costs.dense_macs if budget < 1 else budget
