"""Structured sparsity learning (Wen et al. 2016, arXiv 1608.03665): a baseline, group lasso on rows and columns.

The penalty of their equation 4 is strength * (sum over filters of |W[o]| + sum over channels of |W[:, i]|) in
Euclidean norms, over all linear layers and convolutions. Here each norm counts sqrt(size) times (Yuan and Lin 2006,
equation 2.1): without that the last layers, whose groups are the smallest, vanish before the first ones shrink.
It is applied as a proximal step behind each step of the optimiser, W_g <- W_g max(0, 1 - lr strength sqrt(size) /
|W_g|), rows first and then columns: its gradient alone, which is what their code follows, makes groups small and never
zero. The step is not scaled by what an adaptive optimiser knows of the gradients, as the decay of AdamW is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sbp_compile.sharding import part_of, whole

ZeroGroups = Mapping[str, tuple[Tensor, ...]]
_LASSOED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lassoed_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of all linear layers and convolutions by layer name, each once, in order."""
    return {name: part.weight for name, part in module.named_modules() if isinstance(part, _LASSOED)}


def group_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the rows W[o] and of the columns W[:, i]."""
    return weight.flatten(1).norm(dim=1), weight.transpose(0, 1).flatten(1).norm(dim=1)


def penalty(module: nn.Module) -> Tensor:
    """Sum of the norms of all groups, each times the root of its size: a scalar, without the strength."""
    sums = [
        norms.sum() * _root(weight, axis)
        for weight in lassoed_weights(module).values()
        for axis, norms in enumerate(group_norms(weight))
    ]
    return torch.stack(sums).sum() if sums else torch.zeros(())


@torch.no_grad()
def shrink_groups(module: nn.Module, amount: float) -> None:
    """Take `amount` times the root of its size off the norm of every group, in place; groups with less become zero."""
    for weight in lassoed_weights(module).values():
        held = whole(weight)
        for axis in (0, 1):
            _shrink(held, group_norms(held)[axis], axis, amount * _root(held, axis))
        _put_back(held, weight)


@torch.no_grad()
def zero_groups(module: nn.Module) -> ZeroGroups:
    """Tell for each layer which rows and which columns are zero: bool (outputs,) and (inputs,)."""
    return {
        name: tuple(norms == 0 for norms in group_norms(whole(weight)))
        for name, weight in lassoed_weights(module).items()
    }


@torch.no_grad()
def clear_groups(module: nn.Module, zero: ZeroGroups) -> None:
    """Make those groups zero again, in place."""
    for name, weight in lassoed_weights(module).items():
        held = whole(weight)
        for axis, gone in enumerate(zero[name]):
            held.masked_fill_(_along(gone, axis, held), 0.0)
        _put_back(held, weight)


def _put_back(held: Tensor, weight: Tensor) -> None:
    if held is not weight:
        weight.copy_(part_of(held, weight))


def _along(values: Tensor, axis: int, weight: Tensor) -> Tensor:
    return values.view([-1 if i == axis else 1 for i in range(weight.ndim)])


def _root(weight: Tensor, axis: int) -> float:
    """Root of the number of weights in a group along that axis."""
    return math.sqrt(weight.numel() / max(weight.shape[axis], 1))


def _shrink(weight: Tensor, norms: Tensor, axis: int, amount: float) -> None:
    factors = torch.where(norms > amount, 1 - amount / norms, 0.0)
    weight.mul_(_along(factors, axis, weight))
