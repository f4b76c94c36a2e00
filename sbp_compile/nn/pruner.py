"""Pruning while training: units that stay dead are frozen at what they are in eval mode, and removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.nn.criteria import Criterion, decision
from sbp_compile.nn.noise import LogNormalNoise, NoiseArgumentError, named_noise_layers
from sbp_compile.nn.removal import Removal, refuse_optimizer, refuse_shards, remove_off_units


class TrainingPruner:
    """Looks at the noise at the end of every `every`-th epoch; what was dead `patience` times in a row goes.

        pruner = TrainingPruner(model, example, optimizer=optimizer, every=2)
        for epoch in range(epochs):
            ...
            pruner.epoch_end()

    Dead is what `criterion` does not keep (default: each layer's SNR threshold). At least one unit of each layer
    stays. Arguments otherwise, and errors, as for `remove_off_units`. Later epochs are as much faster as the module is
    smaller. The counts are a state dict of their own, for checkpoints.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        kwargs: Mapping[str, Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        every: int = 1,
        patience: int = 2,
        criterion: Criterion = LogNormalNoise.mask,
        remove: bool = True,
    ) -> None:
        for name, value in (("every", every), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise NoiseArgumentError(f"`{name}` (={value!r}) must be an integer >= 1")
        refuse_shards(module)
        if optimizer is not None and remove:
            refuse_optimizer(optimizer)
        self.module, self.example_inputs, self.kwargs = module, example_inputs, kwargs
        self.optimizer, self.every, self.patience = optimizer, every, patience
        self.criterion, self.remove = criterion, remove
        self.epochs = 0
        self._counts: dict[str, Tensor] = {}

    def epoch_end(self) -> Removal | None:
        """Count an epoch; returns what was removed, None where nothing was."""
        refuse_shards(self.module)
        self.epochs += 1
        if self.epochs % self.every:
            return None
        found = False
        for name, layer in named_noise_layers(self.module).items():
            fresh = self._ripe(name, layer)
            found |= bool(fresh.any())
            layer.switch_off(fresh)
        if not found:
            return None
        widths = {name: layer.survivors for name, layer in named_noise_layers(self.module).items()}
        removal = remove_off_units(
            self.module, self.example_inputs, kwargs=self.kwargs, optimizer=self.optimizer, remove=self.remove
        )
        self._follow(widths)
        return removal

    def state_dict(self) -> dict[str, Any]:
        """Return epochs and counts, as tensors and numbers."""
        return {
            "epochs": self.epochs,
            "counts": {name: count.clone() for name, count in self._counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; NoiseArgumentError where the model has other widths than the counts."""
        layers = named_noise_layers(self.module)
        for name, count in state["counts"].items():
            units = layers[name].num_features if name in layers else 0
            if count.shape != (units,):
                raise NoiseArgumentError(
                    f"the counts of {name!r} are of {len(count)} units, the model has {units}: give it the widths of "
                    "its own state dict first (match_widths, load_state_dict)"
                )
        self.epochs = int(state["epochs"])
        self._counts = {name: count.clone() for name, count in state["counts"].items()}

    def _ripe(self, name: str, layer: LogNormalNoise) -> Tensor:
        """Units that have been dead often enough and are not off yet, but for the best one if none else is left."""
        with torch.no_grad():
            dead = ~decision(self.criterion, layer).cpu()
            counts = self._counts.get(name, torch.zeros(layer.num_features, dtype=torch.int64))
            self._counts[name] = torch.where(dead, counts + 1, 0)
            ripe = self._counts[name] >= self.patience
            if bool(ripe.all()):
                ripe[int(layer.snr().argmax())] = False
        off = torch.zeros_like(ripe) if layer.off is None else layer.off.cpu()
        return (ripe & ~off).to(layer.mu.device)

    def _follow(self, before: Mapping[str, Tensor | None]) -> None:
        """Keep the counts of the units that are left."""
        for name, layer in named_noise_layers(self.module).items():
            if layer.survivors is not None and name in self._counts:
                held = before[name]
                alive = layer.survivors if held is None else layer.survivors[held]
                self._counts[name] = self._counts[name][alive.cpu()]
