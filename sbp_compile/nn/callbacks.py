"""Sparsity in TensorBoard, and pruning inside Lightning; neither has to be installed.

writer = SummaryWriter()                      # torch.utils.tensorboard, or anything with its two methods
log_sparsity(writer, model, step, costs)

trainer = Trainer(callbacks=[lightning_callback(example, every=2)])
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sbp_compile.errors import UsageError
from sbp_compile.nn.costs import NetworkCosts
from sbp_compile.nn.noise import named_noise_layers
from sbp_compile.nn.pruner import TrainingPruner
from sbp_compile.nn.sparsity import Sparsity, sparsity


class Writer(Protocol):
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write a number."""

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> None:
        """Write a distribution."""


def log_sparsity(
    writer: Writer, module: nn.Module, step: int, costs: NetworkCosts | None = None, *, prefix: str = "sbp"
) -> Sparsity:
    """Write `sparsity(module, costs)` and a histogram of log10 SNR for each noise layer; returns the sparsity."""
    found = sparsity(module, costs)
    for name, value in found.scalars().items():
        writer.add_scalar(f"{prefix}/{name}", value, step)
    with torch.no_grad():
        for name, layer in named_noise_layers(module).items():
            snr = layer.snr().double().log10()
            snr = snr[snr.isfinite()]
            if snr.numel():
                writer.add_histogram(f"{prefix}/log10_snr/{name}", snr, step)
    return found


def lightning_callback(
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    every: int = 1,
    patience: int = 2,
    prune: bool = True,
    macs: bool = True,
    **options: Any,
) -> Any:
    """Make a callback for Lightning's Trainer: logs the sparsity after each training epoch, prunes while training.

    `example_inputs`: one call's arguments of the LightningModule; without them nothing is pruned and no
    multiply-adds are logged. `every`, `patience` and `options` are those of `TrainingPruner`; `prune=False` only logs,
    `macs=False` leaves the multiply-adds out (they need a capture after each removal). The pruner's counts go into
    Lightning's checkpoints; a checkpoint of a smaller model needs `match_widths` before it is loaded.

    Raises UsageError where neither `lightning` nor `pytorch_lightning` is installed.
    """
    base = _lightning().Callback

    class SparsityCallback(base):  # type: ignore[misc,valid-type]
        """Logs what is left of the network, and removes what stays dead."""

        def __init__(self) -> None:
            self.pruner: TrainingPruner | None = None
            self._costs: NetworkCosts | None = None
            self._dense_macs = 0
            self._resumed: dict[str, Any] = {}

        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if example_inputs is None or not prune:
                return
            optimizer = trainer.optimizers[0] if trainer.optimizers else None
            self.pruner = TrainingPruner(
                pl_module, example_inputs, optimizer=optimizer, every=every, patience=patience, **options
            )
            if self._resumed:
                self.pruner.load_state_dict(self._resumed)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if self.pruner is not None and self.pruner.epoch_end():
                self._costs = None
            if macs and example_inputs is not None and self._costs is None:
                self._costs = NetworkCosts(pl_module, example_inputs)
                self._dense_macs = self._dense_macs or self._costs.dense_macs
            scalars = sparsity(pl_module, self._costs).scalars()
            if self._costs is not None:  # of the network as it began, whatever was removed since
                scalars["macs_share"] = scalars["macs"] / max(self._dense_macs, 1)
            pl_module.log_dict({f"sbp/{name}": float(value) for name, value in scalars.items()})

        def state_dict(self) -> dict[str, Any]:
            return self._resumed if self.pruner is None else self.pruner.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._resumed = state_dict

    return SparsityCallback()


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(f"{name}.callbacks")
        except ModuleNotFoundError:
            continue
    raise UsageError("Lightning is not installed: pip install lightning")
