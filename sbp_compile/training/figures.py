"""Learning curves and what the units' fates were decided by, as pictures; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.atomic import atomic_path
from sbp_compile.errors import UsageError
from sbp_compile.nn import named_noise_layers
from sbp_compile.training.group_lasso import group_norms, lassoed_weights
from sbp_compile.training.sparse_vd import THRESHOLD, sparse_layers

_BINS = 40


def draw_curves(epochs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, test error and multiply-adds over all epochs of a log (records of `Epoch` as dicts).

    Raises UsageError without matplotlib, OutputError where `path` cannot be written.
    """
    figure = _new_figure(8.0, 7.0)
    axes = figure.subplots(3, 1, sharex=True)
    series = (("loss", "loss"), ("error", "test error, %"), ("mac_ratio", "MACs, dense / left"))
    for axis, (key, label) in zip(axes, series, strict=True):
        for phase in dict.fromkeys(epoch["phase"] for epoch in epochs):
            numbered = [(i, e[key]) for i, e in enumerate(epochs, 1) if e["phase"] == phase]
            points = [
                (number, value) for number, value in numbered if value is not None and math.isfinite(value)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=phase)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("epoch")
    axes[0].legend()
    _save(figure, path)


def draw_units(module: nn.Module, path: Path) -> bool:
    """Draw, for each layer, how its units lie to both sides of the threshold; False where there is nothing to draw.

    Signal-to-noise ratios of noise layers; log alpha of sparse variational layers; norms of rows and columns else.
    Errors as for `draw_curves`.
    """
    values, label, threshold = _histograms(module)
    if not values:
        return False
    figure = _new_figure(8.0, 1.6 * len(values) + 0.6)
    axes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for axis, (name, numbers) in zip(axes, values.items(), strict=True):
        axis.hist(numbers.tolist(), bins=_BINS)
        axis.set_ylabel(name, fontsize="small")
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--")
    axes[-1].set_xlabel(label)
    _save(figure, path)
    return True


def _histograms(module: nn.Module) -> tuple[dict[str, Tensor], str, float | None]:
    with torch.no_grad():
        if noise := named_noise_layers(module):
            return {name: _log10(layer.snr()) for name, layer in noise.items()}, "log10 of E/sqrt(Var)", 0.0
        if sparse := sparse_layers(module):
            found = {name: layer.log_alpha().flatten().cpu() for name, layer in sparse.items()}
            return found, "log alpha", THRESHOLD
        weights = lassoed_weights(module).items()
        norms = {name: torch.cat(group_norms(weight)).cpu() for name, weight in weights}
        return norms, "norms of rows and columns", None


def _log10(snr: Tensor) -> Tensor:
    return snr.double().clamp_min(1e-3).log10().nan_to_num().cpu()


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install matplotlib, or pass --no-figures") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})
