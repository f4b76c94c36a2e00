"""Dense pretraining, then training with noise: mean cross-entropy + KL / N, the loss of the paper's authors.

It is the variational lower bound, negated and per example (Neklyudov et al., NIPS 2017, arXiv 1705.07283,
section 2), with a weight on each layer's KL.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbp_compile.nn import elbo_loss, kl_divergence, noise_layers, parameter_groups
from sbp_compile.training.data import ImageData, to_tensor
from sbp_compile.training.models import Network
from sbp_compile.training.recipes import Phase, Recipe
from sbp_compile.training.sparsity import kept_units, mac_ratio


@dataclass(frozen=True)
class Epoch:
    """One line of the log: the mean loss, then the state at the end; plain KL in nats, test error in %."""

    phase: str
    epoch: int
    loss: float
    kl: float
    kept: tuple[int, ...]
    mac_ratio: float
    error: float
    seconds: float


class Observer(Protocol):
    """Hears of the training as it goes on."""

    def step(self, phase: str, done: int, total: int, loss: float) -> None:
        """Take note of one optimiser step."""

    def epoch(self, record: Epoch) -> None:
        """Take note of one epoch; the test error is measured in eval mode."""


@dataclass(frozen=True)
class Result:
    """The trained pair of networks and their test errors in %; `model` is masked in eval mode."""

    dense: Network
    model: Network
    dense_error: float
    masked_error: float
    kept: tuple[int, ...]
    mac_ratio: float


def predict(model: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 500) -> Tensor:
    """Logits (N, classes) of `images` in eval mode, without gradients; a module's own mode is put back."""
    # The flags are set directly: the module of an exported program refuses eval().
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return torch.cat([model(part) for part in torch.split(images, batch)])
    finally:
        for module in training:
            module.training = True


def evaluate(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Classification error in % of `model` on images (N, C, H, W) with labels (N,)."""
    wrong = predict(model, images).argmax(1) != labels
    return 100.0 * float(wrong.double().mean())


def train(data: ImageData, recipe: Recipe, observer: Observer, *, seed: int = 0) -> Result:
    """Train as `recipe` says; the same seed, data and thread count give the same result.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(data, recipe, observer)


def _train(data: ImageData, recipe: Recipe, observer: Observer) -> Result:
    task = _Task(data)
    dense = recipe.network(noise=False)
    _Run("dense", dense, recipe.dense, _adam(dense, recipe.dense)).over(task, observer)
    model = with_noise(dense, recipe)
    optimizer = _adam(model, recipe.sbp, recipe.noise_factor)
    _Run("sbp", model, recipe.sbp, optimizer, recipe.kl_weights).over(task, observer)
    errors = [evaluate(m, task.test_images, task.test_labels) for m in (dense, model)]
    return Result(dense, model, errors[0], errors[1], kept_units(model), mac_ratio(model))


def with_noise(dense: Network, recipe: Recipe) -> Network:
    """Build the network with noise layers at the recipe's start and the weights of `dense`."""
    model = recipe.network(noise=True)
    model.load_state_dict(model.state_dict() | dense.state_dict())
    for layer in noise_layers(model):
        nn.init.constant_(layer.log_sigma, recipe.init_log_sigma)
    return model


def _adam(model: nn.Module, phase: Phase, noise_factor: float = 1.0) -> torch.optim.Adam:
    groups = parameter_groups(model, phase.learning_rate, noise_factor=noise_factor)
    for group in groups:
        group["full_lr"] = group["lr"]
    return torch.optim.Adam(groups, betas=(0.95, 0.999))  # the authors' beta1


class _Task:
    """The data as tensors."""

    def __init__(self, data: ImageData):
        self.images, self.labels = to_tensor(data.train_images), torch.from_numpy(data.train_labels)
        self.test_images, self.test_labels = to_tensor(data.test_images), torch.from_numpy(data.test_labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.split(torch.randperm(len(self.images)), size):
            yield self.images[index], self.labels[index]


@dataclass
class _Run:
    """One phase of training of one model."""

    name: str
    model: Network
    phase: Phase
    optimizer: torch.optim.Optimizer
    kl_weights: Sequence[float] = ()

    def over(self, task: _Task, observer: Observer) -> None:
        per_epoch = math.ceil(len(task.images) / self.phase.batch)
        total, done = per_epoch * self.phase.epochs, 0
        for epoch in range(1, self.phase.epochs + 1):
            start, losses = time.perf_counter(), 0.0
            self.model.train()
            for images, labels in task.batches(self.phase.batch):
                self._set_rate(done / total)
                loss = self._step(images, labels, len(task.images))
                done, losses = done + 1, losses + loss / per_epoch
                observer.step(self.name, done, total, loss)
            observer.epoch(self._record(epoch, losses, task, time.perf_counter() - start))

    def _set_rate(self, progress: float) -> None:
        share = min(1.0, (1 - progress) / (1 - self.phase.hold))
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["full_lr"]

    def _step(self, images: Tensor, labels: Tensor, examples: int) -> float:
        nll = F.cross_entropy(self.model(images), labels)
        loss = elbo_loss(nll, self.model, examples, layer_weights=self.kl_weights)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item()

    def _record(self, epoch: int, loss: float, task: _Task, seconds: float) -> Epoch:
        kl = float(kl_divergence(self.model).detach())
        error = evaluate(self.model, task.test_images, task.test_labels)
        kept, ratio = kept_units(self.model), mac_ratio(self.model)
        return Epoch(self.name, epoch, loss, kl, kept, ratio, error, seconds)
