"""Training recipes as data: which network, how long, how fast, how hard the KL term presses.

What counts is steps times the noise learning rate: a dying unit walks log_sigma from its start to about 3.4,
at most the learning rate per Adam step. The KL weights press on the convolutions, which die last, as the
paper's SBPa does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sbp_compile.errors import UsageError


@dataclass(frozen=True)
class Phase:
    """Adam at `learning_rate`, constant for the first `hold` of all epochs, then linear to 0."""

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    hold: float = 0.5


@dataclass(frozen=True)
class Noise:
    """Structured Bayesian Pruning: noise parameters learn `noise_factor` times faster and start at `init_log_sigma`.

    `kl_weights` multiply each noise layer's KL in order; empty: 1 for all; "macs": by measured multiply-adds. The
    KL comes in over the first `warm_up` of all steps. `pressure` multiplies all weights. `freeze_norms`: batch norms
    stay as pretraining left them; `recalibrate`: they learn, and their statistics are taken anew under the expected
    noise before the network is judged or written.
    """

    phase: Phase
    kl_weights: tuple[float, ...] | Literal["macs"] = ()
    noise_factor: float = 30.0
    init_log_sigma: float = -2.0
    warm_up: float = 0.0
    pressure: float = 1.0
    freeze_norms: bool = False
    recalibrate: bool = False


@dataclass(frozen=True)
class SparseVD:
    """Sparse variational dropout: log_sigma2 starts at `init_log_sigma2` and learns `factor` times faster.

    `recalibrate`: as for `Noise`.
    """

    phase: Phase
    kl_weight: float = 1.0
    factor: float = 10.0
    init_log_sigma2: float = -10.0
    warm_up: float = 0.3
    recalibrate: bool = False


@dataclass(frozen=True)
class GroupLasso:
    """Structured sparsity learning with `strength` times the norm of every row and column.

    In the last `release` of all steps nothing shrinks any more and what is zero stays so: the network recovers from
    the bias of the lasso, as in the authors' fine-tuning.
    """

    phase: Phase
    strength: float
    release: float = 0.5


@dataclass(frozen=True)
class Dropout:
    """Binary dropout with probability `p` where the noise would be: for comparison, nothing is pruned."""

    phase: Phase
    p: float = 0.5


Settings = Noise | SparseVD | GroupLasso | Dropout


@dataclass(frozen=True)
class Recipe:
    """Dense pretraining, then what each method does with the result; `augment`: random flips and shifts."""

    network: str
    dense: Phase
    methods: Mapping[str, Settings] = field(default_factory=dict)
    augment: bool = False

    def settings(self, method: str) -> Settings:
        """Look up a method's; raises UsageError where the recipe has none."""
        if method not in self.methods:
            raise UsageError(
                f"--method {method} has no recipe for {self.network}: give dense or one of {', '.join(self.methods)}"
            )
        return self.methods[method]


def _methods(
    phase: Phase, sbp: Noise, sbpa: Noise, sparse_vd: SparseVD, ssl: GroupLasso
) -> dict[str, Settings]:
    return {"sbp": sbp, "sbpa": sbpa, "sparse-vd": sparse_vd, "ssl": ssl, "dropout": Dropout(phase)}


_DIGITS = Phase(40, batch=32)
_IMAGES = Phase(8, batch=64)
_IMAGES_FC = Phase(20, batch=64)
_CIFAR = Phase(300, learning_rate=1e-5, hold=250 / 300)
_CIFAR_SHORT = Phase(12, batch=32, learning_rate=5e-4)
# The authors' weights for the VGG-like network: 10 on the first two convolutions, 5 on the next two.
_VGG_SBPA = (10.0, 10.0, 5.0, 5.0, *[1.0] * 11)

RECIPES = {
    ("lenet5", "small"): Recipe(
        "lenet5",
        Phase(30, batch=64),
        _methods(
            _DIGITS,
            Noise(_DIGITS, (20.0, 5.0, 1.0, 1.0)),
            Noise(_DIGITS, "macs"),
            SparseVD(_DIGITS, 0.3),
            GroupLasso(_DIGITS, 0.06),
        ),
    ),
    ("lenet5", "large"): Recipe(
        "lenet5",
        Phase(8),
        _methods(
            _IMAGES,
            Noise(_IMAGES, (100.0, 30.0, 3.0, 3.0)),
            Noise(_IMAGES, "macs"),
            SparseVD(_IMAGES),
            GroupLasso(_IMAGES, 0.06),
        ),
    ),
    ("lenet500300", "small"): Recipe(
        "lenet500300",
        Phase(30, batch=64),
        _methods(
            _DIGITS,
            Noise(_DIGITS, (0.7, 0.7, 0.7), noise_factor=20.0),
            Noise(_DIGITS, "macs"),
            SparseVD(_DIGITS, 0.3),
            GroupLasso(_DIGITS, 0.06),
        ),
    ),
    ("lenet500300", "large"): Recipe(
        "lenet500300",
        Phase(10),
        _methods(
            _IMAGES_FC,
            Noise(_IMAGES_FC, (3.0, 3.0, 3.0)),
            Noise(_IMAGES_FC, "macs"),
            SparseVD(_IMAGES_FC),
            GroupLasso(_IMAGES_FC, 0.06),
        ),
    ),
    ("vgg-like", "small"): Recipe(
        "vgg-like",
        Phase(6, batch=32),
        _methods(
            _CIFAR_SHORT,
            Noise(_CIFAR_SHORT, noise_factor=60.0, pressure=0.3, recalibrate=True),
            Noise(_CIFAR_SHORT, _VGG_SBPA, noise_factor=60.0, pressure=0.3, recalibrate=True),
            SparseVD(_CIFAR_SHORT, 0.02, recalibrate=True),
            GroupLasso(_CIFAR_SHORT, 3.0),
        ),
    ),
    ("vgg-like", "large"): Recipe(
        "vgg-like",
        Phase(200),
        _methods(
            _CIFAR,
            Noise(_CIFAR, noise_factor=10.0, init_log_sigma=-5.0, freeze_norms=True),
            Noise(_CIFAR, _VGG_SBPA, noise_factor=10.0, init_log_sigma=-5.0, freeze_norms=True),
            SparseVD(_CIFAR),
            GroupLasso(_CIFAR, 3.0),
        ),
        augment=True,
    ),
    ("resnet20", "large"): Recipe(
        "resnet20",
        Phase(160, hold=0.6),
        _methods(
            Phase(100),
            Noise(Phase(100), noise_factor=10.0, warm_up=0.1),
            Noise(Phase(100), "macs", noise_factor=10.0, warm_up=0.1),
            SparseVD(Phase(100)),
            GroupLasso(Phase(100), 0.06),
        ),
        augment=True,
    ),
}
_OWN = Phase(40)
# For networks that nobody has tuned: the paper's weight of the KL, brought in slowly.
OWN_METHODS = _methods(
    _OWN,
    Noise(_OWN, noise_factor=10.0, warm_up=0.1),
    Noise(_OWN, "macs", noise_factor=10.0, warm_up=0.1),
    SparseVD(_OWN),
    GroupLasso(_OWN, 0.06),
)
NETWORKS = tuple(sorted({name for name, _ in RECIPES}))
METHODS = ("dense", *OWN_METHODS)
SMALL = 10_000  # data size sets the pressure (KL / N): below this many images the small recipe fits


def recipe_for(network: str, examples: int) -> Recipe:
    """Look up the recipe of `network` for that many images; `package.module:factory` gets a general one.

    Raises UsageError for an unknown network.
    """
    if ":" in network:
        return Recipe(network, Phase(30), OWN_METHODS)
    if network not in NETWORKS:
        raise UsageError(
            f"network '{network}' is unknown: give one of {', '.join(NETWORKS)}, or --model package.module:factory"
        )
    size = "small" if examples < SMALL and (network, "small") in RECIPES else "large"
    return RECIPES[network, size]


def pressed(settings: Settings, factor: float) -> Settings:
    """Multiply whatever presses towards zero, weights of the KL or the lasso's strength, by `factor`."""
    if isinstance(settings, Noise):
        return replace(settings, pressure=settings.pressure * factor)
    if isinstance(settings, SparseVD):
        return replace(settings, kl_weight=settings.kl_weight * factor)
    if isinstance(settings, GroupLasso):
        return replace(settings, strength=settings.strength * factor)
    return settings


def changed(phase: Phase, epochs: int | None, batch: int | None, rate: float | None) -> Phase:
    """Return another phase; None leaves a field as it is."""
    return Phase(epochs or phase.epochs, batch or phase.batch, rate or phase.learning_rate, phase.hold)
