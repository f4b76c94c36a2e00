"""Expressing constant maps in a few of them: a pivoted Gram-Schmidt in float64."""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-13
SMALLEST_PIVOT = 1e-2


def express(maps: Tensor, targets: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
    """Write maps[targets] as combinations of a basis taken from `available` (kept anyway) and `targets`.

    maps: (channels, positions) float64; targets, available: int64 indices. Returns (basis indices in ascending order,
    coefficients of shape (targets, basis)) with maps[targets] = coefficients @ maps[basis] to rounding. Available
    maps are preferred as long as they are not much smaller than what is left; the largest remainder comes first, which
    bounds the coefficients.
    """
    candidates = torch.cat([available, targets])
    chosen: list[int] = []
    rest = maps[candidates].clone()
    scale = rest[available.numel() :].norm(dim=1).max()
    while True:
        norms = rest.norm(dim=1)
        left = norms[available.numel() :]
        if float(left.max()) <= RANK_TOLERANCE * float(scale):
            break
        pivot = _pivot(norms, available.numel())
        direction = rest[pivot] / norms[pivot]
        rest = rest - (rest @ direction)[:, None] * direction
        rest = rest - (rest @ direction)[:, None] * direction
        rest[pivot] = 0.0
        chosen.append(int(candidates[pivot]))
    basis = torch.tensor(sorted(chosen), dtype=torch.int64)
    coefficients = torch.linalg.lstsq(maps[basis].T, maps[targets].T).solution.T
    exact = (targets[:, None] == basis[None, :]).to(maps.dtype)
    in_basis = exact.any(1, keepdim=True)
    return basis, torch.where(in_basis, exact, coefficients)


def _pivot(norms: Tensor, available: int) -> int:
    """The largest remainder among the maps that are kept anyway if it is large enough, else among all."""
    if available:
        best = int(norms[:available].argmax())
        if float(norms[best]) >= SMALLEST_PIVOT * float(norms.max()):
            return best
    return int(norms.argmax())
