"""What trains, and what of it counts as pruned: dense, Structured Bayesian Pruning, and what the paper compares with.

A method holds the module that learns. It says what is added to the loss and what follows a step of the optimiser;
`network()` is what is left in the end, as the compiler takes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sbp_compile.nn import (
    Anneal,
    NetworkCosts,
    elbo_loss,
    kl_divergence,
    mac_kl_weights,
    named_noise_layers,
    parameter_groups,
    recalibrate_norms,
)
from sbp_compile.training import recipes
from sbp_compile.training.group_lasso import ZeroGroups, clear_groups, shrink_groups, zero_groups
from sbp_compile.training.models import Network
from sbp_compile.training.networks import OF_THE_PAPER, noisy_network
from sbp_compile.training.sparse_vd import insert_sparse_layers, remove_sparse_layers, sparse_layers
from sbp_compile.training.sparsity import kept_units, mac_ratio
from sbp_compile.training.structure import StructureCounter

Left = tuple[tuple[int, ...], float]
"""Units kept of each layer, and multiply-adds of the dense network over those that are left."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RECALIBRATION_BATCH = 100


class Method(Protocol):
    """One phase's way of training `module`."""

    module: nn.Module

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, the weights learning at `rate`."""

    def train(self) -> None:
        """Put the module into train mode."""

    def loss(self, nll: Tensor, examples: int, step: int, steps: int) -> Tensor:
        """Return what is minimised, per example, at a step of so many: `nll` and what the method adds to it.

        `examples`: how many the training set has.
        """

    def divergence(self) -> float:
        """Return the KL in nats, unweighted; 0 where the method has none."""

    def after_step(self, rate: float) -> None:
        """Follow a step of the optimiser at that rate."""

    def settle(self, images: Tensor) -> None:
        """Make the module ready to be judged or written, by what it makes of some training images."""

    def network(self) -> nn.Module:
        """Return the network that is left, in eval mode: the module itself, or a copy."""

    def left(self) -> Left:
        """Return what is left now."""


class Dense:
    """A network trained as it is; what it has of zeros counts."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module, self.example = module, example
        self._counter: StructureCounter | None = None

    def groups(self, rate: float) -> list[dict[str, Any]]:
        return parameter_groups(self.module, rate, noise_factor=1.0)

    def train(self) -> None:
        self.module.train()

    def loss(self, nll: Tensor, examples: int, step: int, steps: int) -> Tensor:
        return nll

    def divergence(self) -> float:
        return 0.0

    def after_step(self, rate: float) -> None:
        pass

    def settle(self, images: Tensor) -> None:
        pass

    def network(self) -> nn.Module:
        return self.module.eval()

    def left(self) -> Left:
        network = self.network()
        if self._counter is None:
            self._counter = StructureCounter(network, self.example)
        found = self._counter.count(network)
        return found.kept, _ratio(found.dense_macs, found.macs)


class Pretraining(Dense):
    """The same where everything is known to stay, so that nothing is counted."""

    def left(self) -> Left:
        if isinstance(self.module, OF_THE_PAPER):
            return kept_units(self.module), 1.0
        return (), 1.0


class Noisy(Dense):
    """Structured Bayesian Pruning (Neklyudov et al. 2017, arXiv 1705.07283)."""

    def __init__(self, dense: nn.Module, example: Tensor, settings: recipes.Noise) -> None:
        super().__init__(noisy_network(dense, example, settings.init_log_sigma), example)
        self.settings = settings
        self.weights = self._layer_weights()
        own = isinstance(self.module, OF_THE_PAPER)
        self._costs = None if own else NetworkCosts(self.module, example)
        for norm in self._frozen():
            norm.requires_grad_(False)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        return parameter_groups(self.module, rate, noise_factor=self.settings.noise_factor)

    def train(self) -> None:
        self.module.train()
        for norm in self._frozen():
            norm.eval()

    def loss(self, nll: Tensor, examples: int, step: int, steps: int) -> Tensor:
        weight = self.settings.pressure * _warmed(self.settings.warm_up, step, steps)
        return elbo_loss(nll, self.module, examples, weight, layer_weights=self.weights)

    def divergence(self) -> float:
        return float(kl_divergence(self.module).detach())

    def settle(self, images: Tensor) -> None:
        _settle(self, images)

    def left(self) -> Left:
        if self._costs is None:
            model = cast(Network, self.module)
            return kept_units(model), mac_ratio(model)
        masks = self._costs.current()
        kept = tuple(int(mask.sum()) for mask in masks.values())
        return kept, _ratio(self._costs.dense_macs, self._costs.macs(masks))

    def _layer_weights(self) -> dict[str, float]:
        names, given = list(named_noise_layers(self.module)), self.settings.kl_weights
        if given == "macs":
            return mac_kl_weights(self.module, self.example)
        values: Sequence[float] = given or [1.0] * len(names)
        return dict(zip(names, values, strict=True))

    def _frozen(self) -> list[nn.Module]:
        frozen = self.settings.freeze_norms
        return [part for part in self.module.modules() if frozen and isinstance(part, _NORMS)]


class SparseWeights(Dense):
    """Sparse variational dropout (Molchanov et al. 2017): what is left are rows and columns that are not all zero."""

    def __init__(self, dense: nn.Module, example: Tensor, settings: recipes.SparseVD) -> None:
        super().__init__(copy.deepcopy(dense), example)
        self.settings = settings
        insert_sparse_layers(self.module, settings.init_log_sigma2)
        self.module.to(example.device)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        noise = [layer.log_sigma2 for layer in sparse_layers(self.module).values()]
        known = {id(parameter) for parameter in noise}
        weights = [parameter for parameter in self.module.parameters() if id(parameter) not in known]
        return [{"params": weights, "lr": rate}, {"params": noise, "lr": rate * self.settings.factor}]

    def loss(self, nll: Tensor, examples: int, step: int, steps: int) -> Tensor:
        weight = self.settings.kl_weight * _warmed(self.settings.warm_up, step, steps)
        return nll + self._kl() * (weight / examples)

    def divergence(self) -> float:
        return float(self._kl().detach())

    def settle(self, images: Tensor) -> None:
        _settle(self, images)

    def network(self) -> nn.Module:
        plain = copy.deepcopy(self.module)
        remove_sparse_layers(plain)
        return plain.eval()

    def _kl(self) -> Tensor:
        return torch.stack([layer.kl() for layer in sparse_layers(self.module).values()]).sum()


class Lassoed(Dense):
    """Structured sparsity learning (Wen et al. 2016): rows and columns that the group lasso made zero are gone."""

    def __init__(self, dense: nn.Module, example: Tensor, settings: recipes.GroupLasso) -> None:
        super().__init__(copy.deepcopy(dense), example)
        self.settings = settings
        self._released = False
        self._zero: ZeroGroups = {}

    def loss(self, nll: Tensor, examples: int, step: int, steps: int) -> Tensor:
        self._released = step >= (1 - self.settings.release) * steps
        # Found anew at each step: zero groups stay zero, so a run that goes on needs no memory of them.
        self._zero = zero_groups(self.module) if self._released else {}
        return nll

    def after_step(self, rate: float) -> None:
        if self._released:
            clear_groups(self.module, self._zero)
        else:
            shrink_groups(self.module, rate * self.settings.strength)


class Dropped(Dense):
    """Binary dropout where the noise would be; nothing is pruned."""

    def __init__(self, dense: nn.Module, example: Tensor, settings: recipes.Dropout) -> None:
        super().__init__(noisy_network(dense, example, -5.0), example)
        for name in named_noise_layers(self.module):
            self.module.set_submodule(name, nn.Dropout(settings.p))


def make_method(dense: nn.Module, example: Tensor, settings: recipes.Settings) -> Method:
    """Begin the method of `settings` from a dense network, which stays as it is."""
    if isinstance(settings, recipes.Noise):
        return Noisy(dense, example, settings)
    if isinstance(settings, recipes.SparseVD):
        return SparseWeights(dense, example, settings)
    if isinstance(settings, recipes.GroupLasso):
        return Lassoed(dense, example, settings)
    return Dropped(dense, example, settings)


def _settle(method: Noisy | SparseWeights, images: Tensor) -> None:
    if method.settings.recalibrate:
        recalibrate_norms(method.module, torch.split(images, _RECALIBRATION_BATCH))


def _warmed(warm_up: float, step: int, steps: int) -> float:
    return Anneal(math.ceil(warm_up * steps))(step) if warm_up else 1.0


def _ratio(before: int, after: int) -> float:
    return before / after if after else math.inf
