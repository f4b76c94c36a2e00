"""Which units go: criteria that decide for one noise layer, and `prune`, which applies one to a model.

A criterion is a function of a noise layer that gives a bool mask of shape (num_features,): True for what stays.
It prunes only what it is sure of: a unit whose parameters are not numbers stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real

import torch
from torch import Tensor, nn

from sbp_compile.nn.bmrs import CODES_OFFSET, evidence_gain_n, evidence_gain_u
from sbp_compile.nn.noise import LogNormalNoise, NoiseArgumentError, named_noise_layers, set_threshold

Criterion = Callable[[LogNormalNoise], Tensor]


def snr_above(threshold: float = 1.0) -> Criterion:
    """Units stay whose E[theta] / sqrt(Var[theta]) is above `threshold` (Neklyudov et al. 2017, section 3.3).

    The layers' own `threshold` does this in eval mode already; this decides it once and for all. For a threshold
    per layer, `set_threshold(module, {...})`. Raises NoiseArgumentError unless it is a number >= 0.
    """
    _check_number("threshold", threshold, least=0.0)
    return lambda layer: ~(layer.snr() <= threshold)


def bmrs_n(*, spread: float = 1e-6, offset: float = CODES_OFFSET) -> Criterion:
    """BMRS_N (Wright, Igel, Selvan 2024, arXiv 2406.01345): pruned where dF >= 0 under a narrow prior at zero.

    dF is `evidence_gain_n` + `offset`. The default offset, log(2 pi)/2, is what the authors' released code adds to
    the definition by leaving the constant of a normal density out; with offset 0 no unit with mu in the upper half
    of the log range is ever pruned. `spread` is the reduced prior's width in log theta (the code's 1e-6).
    """
    _check_number("spread", spread, above=0.0)
    return lambda layer: ~(evidence_gain_n(*_detached(layer), *layer.log_range, spread=spread) + offset >= 0)


def bmrs_u(bits: float = 8.0) -> Criterion:
    """BMRS_U (the same paper): pruned where dF >= 0 under a log-uniform prior on [2^-23, 2^-bits].

    dF is `evidence_gain_u`. Fewer bits prune more: the paper takes 8 and 4. Raises NoiseArgumentError unless 0 < bits
    < 23.
    """
    _check_number("bits", bits, above=0.0)
    if bits >= 23:
        raise NoiseArgumentError(f"`bits` (={bits}) must be below 23, the bits of a float32 number")
    high = -bits * math.log(2)
    return lambda layer: ~(evidence_gain_u(*_detached(layer), *layer.log_range, high=high) >= 0)


def prune(
    module: nn.Module,
    criterion: Criterion,
    *,
    layers: Iterable[str] | None = None,
    threshold: float = 0.0,
) -> dict[str, int]:
    """Switch off the units that `criterion` does not keep; returns how many are left in each noise layer, by name.

    `layers`: names of the noise layers to look at (default: all). `threshold` becomes their SNR threshold: 0
    leaves the decision to the criterion alone. Units that are off already stay off. What is off is part of the state
    dict; the threshold is not. Raises NoiseArgumentError, having changed nothing, for a name that no layer has, and for
    a criterion that gives no masks.
    """
    found = named_noise_layers(module)
    wanted = list(found) if layers is None else list(layers)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise NoiseArgumentError(f"`layers` ({unknown[0]!r}) is no noise layer; there are {', '.join(found)}")
    kept = {name: decision(criterion, found[name]) for name in wanted}
    for name, mask in kept.items():
        found[name].switch_off(~mask)
        set_threshold(found[name], threshold)
    return {name: int(found[name].mask().sum()) for name in wanted}


def decision(criterion: Criterion, layer: LogNormalNoise) -> Tensor:
    """Return what a criterion keeps of a layer; NoiseArgumentError where that is no mask of its units."""
    with torch.no_grad():
        kept = criterion(layer)
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != (layer.num_features,):
        shown = (
            f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        )
        raise NoiseArgumentError(
            f"the criterion gives {shown}; it must give a bool mask of shape ({layer.num_features},), True for what "
            "stays"
        )
    return kept


def _detached(layer: LogNormalNoise) -> tuple[Tensor, Tensor]:
    mu, log_sigma = layer.whole_parameters()
    return mu.detach(), log_sigma.detach()


def _check_number(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not (value >= least and value > above):
        wanted = f">= {least:g}" if least > above else f"> {above:g}"
        raise NoiseArgumentError(f"`{name}` (={value!r}) must be a number {wanted}")
