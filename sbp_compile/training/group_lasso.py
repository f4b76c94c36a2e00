"""Structured sparsity learning (Wen et al. 2016, arXiv 1608.03665): a baseline, group lasso on rows and columns.

The penalty of their equation 4 is strength * (sum over filters of |W[o]| + sum over channels of |W[:, i]|) in
Euclidean norms, over all linear layers and convolutions. It is applied as a proximal step behind each step of the
optimiser, W_g <- W_g max(0, 1 - lr strength / |W_g|), rows first and then columns: its gradient alone, which is what
their code follows, makes groups small and never zero. The step is not scaled by what an adaptive optimiser knows of
the gradients, as the decay of AdamW is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LASSOED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lassoed_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of all linear layers and convolutions by layer name, each once, in order."""
    return {name: part.weight for name, part in module.named_modules() if isinstance(part, _LASSOED)}


def group_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the rows W[o] and of the columns W[:, i]."""
    flat = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
    return flat.flatten(1).norm(dim=1), flat.transpose(0, 1).flatten(1).norm(dim=1)


def penalty(module: nn.Module) -> Tensor:
    """Sum of the norms of all groups (equation 4 there, without the strength): a scalar."""
    norms = [norm.sum() for weight in lassoed_weights(module).values() for norm in group_norms(weight)]
    return torch.stack(norms).sum() if norms else torch.zeros(())


@torch.no_grad()
def shrink_groups(module: nn.Module, amount: float) -> None:
    """Take `amount` off the norm of every group, in place; groups that have less become zero."""
    for weight in lassoed_weights(module).values():
        for axis in (0, 1):
            _shrink(weight, group_norms(weight)[axis], axis, amount)


def _shrink(weight: Tensor, norms: Tensor, axis: int, amount: float) -> None:
    shape = [1] * weight.ndim
    shape[axis] = -1
    factors = (1 - amount / norms.clamp_min(amount or 1.0)).clamp_min(0.0)
    weight.mul_(factors.view(shape))
