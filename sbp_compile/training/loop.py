"""Dense pretraining, then a method that prunes: phases of steps that can be taken up at any step.

The loss of the noisy network is the variational lower bound, negated and per example (Neklyudov et al., NIPS 2017,
arXiv 1705.07283, section 2), with a weight on each layer's KL.

Nothing random carries over from step to step: the order of an epoch comes from (seed, phase, epoch), noise from
(seed, phase, step, rank). So a checkpoint needs no random state, and a run that goes on is bitwise the run that was
never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbp_compile.capture.export import map_tensors
from sbp_compile.errors import UsageError
from sbp_compile.training.checkpoint import State, write_state
from sbp_compile.training.distributed import World
from sbp_compile.training.learner import make_learner
from sbp_compile.training.methods import Method, Pretraining, make_method
from sbp_compile.training.networks import dense_network
from sbp_compile.training.recipes import Phase, Recipe
from sbp_compile.training.task import Task

_BETAS = (0.95, 0.999)  # the authors' beta1
_SETTLING = 2000  # training images that a method may look at before it is judged


@dataclass(frozen=True)
class Epoch:
    """One line of the log: the mean loss, then the state at the end; plain KL in nats, test error in %.

    With several processes the loss is that of the first one's examples.
    """

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
    """The networks and their errors in %: `model` is pruned in eval mode; `method` holds it and what was trained.

    `train_error` is on the training labels.
    """

    dense: nn.Module
    model: nn.Module
    method: Method
    dense_error: float
    masked_error: float
    train_error: float
    kept: tuple[int, ...]
    mac_ratio: float


@dataclass(frozen=True)
class Conditions:
    """How a run is carried out; only seed, precision and the number of processes change what comes out.

    `precision`: bfloat16 or float16 compute the network under autocast, float16 with a scaled loss. `checkpoint`: the
    file to write every `checkpoint_s` seconds and at the end of each phase.
    """

    seed: int = 0
    precision: str = "float32"
    world: World = field(default_factory=World)
    checkpoint: Path | None = None
    checkpoint_s: float = 30.0


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


def train(
    task: Task,
    recipe: Recipe,
    method: str,
    observer: Observer,
    conditions: Conditions | None = None,
    *,
    state: State | None = None,
) -> Result:
    """Train as `recipe` says; the same seed, data and thread count give the same result, bitwise.

    `method`: "dense" or one of the recipe's. `state`: where to begin, as read from a checkpoint, or a fresh one; with
    `state.dense` and phase 1 pretraining is left out. The global random state is left as it was.
    """
    conditions = conditions or Conditions()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _Training(task, recipe, method, observer, conditions, state or State({})).run()


class _Training:
    """One run, from its state on."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        method: str,
        observer: Observer,
        conditions: Conditions,
        state: State,
    ) -> None:
        self.task, self.recipe, self.name, self.observer = task, recipe, method, observer
        self.conditions, self.state = conditions, state
        self.saved = time.perf_counter()

    def run(self) -> Result:
        torch.manual_seed(self.conditions.seed)
        dense = dense_network(self.recipe.network, self.task.example).to(self.task.device)
        self._check_outputs(dense)
        if self.state.phase == 0:
            self._phase("dense", Pretraining(dense, self.task.example), self.recipe.dense)
            self.state.dense = dense.state_dict()
            if self.conditions.world.shards:
                self.state.dense = map_tensors(Tensor.cpu, dict(self.state.dense))
            self._next_phase()
        dense.load_state_dict(self.state.dense)
        self.conditions.world.seed(self.conditions.seed, 1, 0)
        method = self._pruned(dense) if self.name != "dense" else Pretraining(dense, self.task.example)
        return self._result(dense, method)

    def _check_outputs(self, dense: nn.Module) -> None:
        shape, classes = tuple(predict(dense, self.task.example).shape), self.task.classes
        if len(shape) != 2 or shape[1] < classes:
            raise UsageError(
                f"{self.recipe.network} gives {shape} for two images, the data set has {classes} classes: "
                "it must give one logit for each class"
            )

    def _pruned(self, dense: nn.Module) -> Method:
        settings = self.recipe.settings(self.name)
        method = make_method(dense, self.task.example, settings)
        if self.conditions.world.shards:  # the device is for what trains
            dense.to("cpu")
        self._phase(self.name, method, settings.phase)
        return method

    def _result(self, dense: nn.Module, method: Method) -> Result:
        method.settle(self.task.images[:_SETTLING])
        self.state.module, self.state.finished = method.module.state_dict(), True
        self._save()
        task, network = self.task, method.network()
        dense.to(task.device)
        kept, ratio = method.left()
        return Result(
            dense,
            network,
            method,
            evaluate(dense, task.test_images, task.test_labels),
            evaluate(network, task.test_images, task.test_labels),
            evaluate(network, task.images, task.labels),
            kept,
            ratio,
        )

    def _next_phase(self) -> None:
        self.state.phase, self.state.step, self.state.module, self.state.optimizer = 1, 0, {}, {}
        if self.name != "dense":
            self._save()

    def _phase(self, name: str, method: Method, phase: Phase) -> None:
        steps = _Steps(self, name, method, phase)
        if self.state.module:
            steps.restore(self.state)
        steps.run()
        steps.store(self.state)
        steps.learner.finish()

    def save_if_due(self, steps: _Steps) -> None:
        """Write a checkpoint where the last one is old enough."""
        if self.conditions.checkpoint is None:
            return
        due = time.perf_counter() - self.saved >= self.conditions.checkpoint_s
        if self.conditions.world.agree(due, self.task.device):
            steps.store(self.state)
            self._save()

    def _save(self) -> None:
        if self.conditions.checkpoint is not None and self.conditions.world.rank == 0:
            write_state(self.state, self.conditions.checkpoint)
            self.saved = time.perf_counter()


class _Steps:
    """One phase: a module, its optimiser, and the steps that are left."""

    def __init__(self, owner: _Training, name: str, method: Method, phase: Phase) -> None:
        self.owner, self.name, self.phase = owner, name, phase
        self.task, self.state = owner.task, owner.state
        self.world, self.seed = owner.conditions.world, owner.conditions.seed
        self.learner = make_learner(method, self.world, self.task.example)
        self.method = self.learner.method
        groups = self.method.groups(phase.learning_rate)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)
        precision = owner.conditions.precision
        self.dtype = getattr(torch, precision) if precision != "float32" else None
        self.scaler = torch.amp.GradScaler(self.task.device.type, enabled=precision == "float16")
        self.per_epoch = math.ceil(len(self.task.images) / phase.batch)

    def store(self, state: State) -> None:
        state.module, state.optimizer = self.learner.state(self.optimizer)
        state.scaler = self.scaler.state_dict()

    def restore(self, state: State) -> None:
        self.learner.load(self.optimizer, state.module, state.optimizer)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)

    def run(self) -> None:
        total = self.per_epoch * self.phase.epochs
        while self.state.step < total:
            epoch, first = divmod(self.state.step, self.per_epoch)
            self._epoch(epoch, first, total)

    def _epoch(self, epoch: int, first: int, total: int) -> None:
        start = time.perf_counter()
        begun = start - self.state.seconds
        self.method.train()
        order = self._order(epoch)
        for batch in range(first, self.per_epoch):
            self.world.seed(self.seed, self.state.phase, self.state.step)
            index = order[batch * self.phase.batch : (batch + 1) * self.phase.batch]
            loss = self._step(index, self.state.step, total)
            self.state.step += 1
            self.state.losses += loss / self.per_epoch
            self.state.seconds = time.perf_counter() - begun
            self.owner.observer.step(self.name, self.state.step, total, loss)
            if batch + 1 < self.per_epoch:
                self.owner.save_if_due(self)
        self._end(epoch + 1)
        self.owner.save_if_due(self)

    def _order(self, epoch: int) -> Tensor:
        sequence = np.random.SeedSequence((self.seed, self.state.phase, epoch, 1 << 32))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return torch.randperm(len(self.task.images), generator=generator).to(self.task.device)

    def _step(self, index: Tensor, step: int, total: int) -> float:
        share = min(1.0, (1 - step / total) / (1 - self.phase.hold))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        mine, factor = self.world.share(index)
        images, labels = self.task.batch(mine)
        with torch.autocast(self.task.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.learner.called(images)
        nll = F.cross_entropy(logits.float(), labels) * factor
        loss = self.method.loss(nll, len(self.task.images), step, total)
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(share * self.phase.learning_rate)
        value = loss.item()
        if not math.isfinite(value):
            raise UsageError(
                f"the loss is {value} at step {step + 1} of {self.name}: give a lower --learning-rate, or --precision "
                "float32"
            )
        return value

    def _end(self, epoch: int) -> None:
        with self.learner.whole() as method:
            if self.world.rank == 0:
                self._record(method, epoch)
        self.state.losses = self.state.seconds = 0.0

    def _record(self, method: Method, epoch: int) -> None:
        state = self.state
        method.settle(self.task.images[:_SETTLING])
        error = evaluate(method.network(), self.task.test_images, self.task.test_labels)
        kept, ratio = method.left()
        record = Epoch(self.name, epoch, state.losses, method.divergence(), kept, ratio, error, state.seconds)
        self.owner.observer.epoch(record)
        state.epochs.append(asdict(record))
