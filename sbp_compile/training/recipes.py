"""Training recipes as data: which network, how long, how fast, how hard the KL term presses.

What counts is steps times the noise learning rate: a dying unit walks log_sigma from its start to about 3.4,
at most the learning rate per Adam step. The KL weights press on the convolutions, which die last, as the
paper's SBPa does.
"""

from __future__ import annotations

from dataclasses import dataclass

from sbp_compile.errors import UsageError
from sbp_compile.training.models import LeNet5, LeNet500300, Network


@dataclass(frozen=True)
class Phase:
    """Adam at `learning_rate`, constant for the first `hold` of all epochs, then linear to 0."""

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    hold: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """Dense pretraining, then Structured Bayesian Pruning.

    `kl_weights` multiply each noise layer's KL in order; the noise parameters learn `noise_factor` times
    faster than the weights and start at `init_log_sigma`.
    """

    network: type[Network]
    dense: Phase
    sbp: Phase
    kl_weights: tuple[float, ...]
    noise_factor: float = 30.0
    init_log_sigma: float = -2.0


RECIPES = {
    ("lenet5", "small"): Recipe(
        LeNet5,
        dense=Phase(30, batch=64),
        sbp=Phase(40, batch=32),
        kl_weights=(20.0, 5.0, 1.0, 1.0),
    ),
    ("lenet5", "large"): Recipe(
        LeNet5,
        dense=Phase(8),
        sbp=Phase(8, batch=64),
        kl_weights=(100.0, 30.0, 3.0, 3.0),
    ),
    ("lenet500300", "small"): Recipe(
        LeNet500300,
        dense=Phase(30, batch=64),
        sbp=Phase(40, batch=32),
        kl_weights=(0.7, 0.7, 0.7),
        noise_factor=20.0,
    ),
    ("lenet500300", "large"): Recipe(
        LeNet500300,
        dense=Phase(10),
        sbp=Phase(20, batch=64),
        kl_weights=(3.0, 3.0, 3.0),
    ),
}
NETWORKS = tuple(sorted({name for name, _ in RECIPES}))
SMALL = 10_000  # data size sets the pressure (KL / N): below this many images the small recipe fits


def recipe_for(network: str, examples: int) -> Recipe:
    """Look up the recipe of `network` for that many images; raises UsageError for an unknown network."""
    if network not in NETWORKS:
        raise UsageError(f"network '{network}' is unknown: give one of {', '.join(NETWORKS)}")
    return RECIPES[network, "small" if examples < SMALL else "large"]
