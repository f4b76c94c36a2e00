"""What is left of a network of `models`: units kept, multiply-adds, and masks with given counts.

Flattened values and the channels they come from decide together: a flattened value whose channel is masked is
a constant, and a channel all of whose flattened values are masked is read by nobody. Both count as removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sbp_compile.errors import UsageError
from sbp_compile.nn import noise_layers
from sbp_compile.training.models import Network

_LIVE_LOG_SIGMA = -5.0
# (mu, log_sigma) where pruned units settle in training; their signal-to-noise ratio is about 1/3
_DEAD = (-1.0, 3.4)


def live_masks(model: Network) -> list[Tensor]:
    """Bool masks of shape (width,), one per noise layer: the units that carry information to the output."""
    masks = [layer.mask().detach() for layer in noise_layers(model)]
    if masks and model.positions:
        masks[-3:-1] = _joined(masks[-3], masks[-2], model.positions)
    return masks


def _joined(channels: Tensor, flat: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    flat = flat & channels.repeat_interleave(positions)[: len(flat)]
    read = torch.zeros(len(channels) * positions, dtype=torch.bool)
    read[: len(flat)] = flat
    return channels & read.view(-1, positions).any(1), flat


def kept_units(model: Network) -> tuple[int, ...]:
    """How many units of each noise layer are left; all of them in a network without noise."""
    masks = live_masks(model)
    return tuple(int(mask.sum()) for mask in masks) if masks else model.units


def mac_ratio(model: Network) -> float:
    """Multiply-adds of the dense network over those of what is left; infinite when nothing is left."""
    left = sum(model.macs(kept_units(model)))
    return sum(model.macs(model.units)) / left if left else math.inf


def keep_random(model: Network, counts: Sequence[int], *, seed: int = 0) -> None:
    """Set the noise parameters so that random units remain, `counts` of each noise layer in order.

    Builds a given structure, such as the paper's 3-18-284-283 LeNet-5, without training. Flattened values are
    drawn from the kept channels, at least one from each. Raises UsageError for counts that cannot be.
    """
    layers = noise_layers(model)
    if len(counts) != len(layers):
        raise UsageError(f"`counts` (={tuple(counts)}) must have {len(layers)} entries, one per noise layer")
    generator = torch.Generator().manual_seed(seed)
    masks = [
        _random_mask(layer.num_features, count, generator)
        for layer, count in zip(layers, counts, strict=True)
    ]
    if model.positions:
        masks[-2] = _flat_mask(masks[-3], len(masks[-2]), counts[-2], model.positions, generator)
    for layer, mask in zip(layers, masks, strict=True):
        mu = -0.1 - 0.9 * torch.rand(len(mask), generator=generator)
        layer.mu.data.copy_(torch.where(mask, mu, _DEAD[0]))
        layer.log_sigma.data.copy_(torch.where(mask, _LIVE_LOG_SIGMA, _DEAD[1]))


def _random_mask(width: int, count: int, generator: torch.Generator) -> Tensor:
    if not 0 <= count <= width:
        raise UsageError(f"a count (={count}) must be between 0 and the width (={width})")
    mask = torch.zeros(width, dtype=torch.bool)
    mask[torch.randperm(width, generator=generator)[:count]] = True
    return mask


def _flat_mask(
    channels: Tensor, width: int, count: int, positions: int, generator: torch.Generator
) -> Tensor:
    """Keep `count` of the kept channels' values: one of each channel, then any others, in random order."""
    order = torch.randperm(width, generator=generator)
    order = order[channels[order // positions]]
    if not int(channels.sum()) <= count <= len(order):
        limits = f"{int(channels.sum())} and {len(order)}"
        raise UsageError(
            f"the count of flattened values (={count}) must be between {limits} for these channels"
        )
    owners = (order // positions).tolist()
    first = [index for index, owner in enumerate(owners) if owner not in owners[:index]]
    rest = [index for index in range(len(owners)) if index not in set(first)]
    mask = torch.zeros(width, dtype=torch.bool)
    mask[order[(first + rest)[:count]]] = True
    return mask
