"""What a noisy network would cost after compilation, for any masks: captured once, asked often."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes import CostModel, FewestMacs, Program, default_pipeline
from passes.ir.cost import count
from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export
from sbp_compile.nn.noise import LogNormalNoise, NoiseArgumentError, named_noise_layers

Masks = Mapping[str, Tensor]
"""For each noise layer, by name, which units stay: bool (num_features,)."""


class NetworkCosts:
    """A model with noise layers, captured as it is now, to be asked what masks would leave of it.

    `example_inputs`, `kwargs`: one call's arguments, as for `sbp_compile.compile`; the model is left as it was.
    Raises NoiseArgumentError for a model without noise layers, and the errors of capture. A model whose widths have
    changed since needs a new one, and is told so; changed weights and noise do not matter.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.layers = named_noise_layers(module)
        if not self.layers:
            raise NoiseArgumentError("the model has no noise layers: put some in with insert_noise")
        args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        with _masks_alone_decide(self.layers):
            self._program = program_from_export(export_module(module, args, kwargs))
        self._uncalled = [name for name in self.layers if _buffer(name) not in self._program.constants]

    def current(self) -> dict[str, Tensor]:
        """The masks as the layers have them now."""
        with torch.no_grad():
            return {name: layer.mask() for name, layer in self.layers.items()}

    def whole(self) -> dict[str, Tensor]:
        """Masks under which everything stays."""
        return {name: torch.ones(layer.num_features, dtype=torch.bool) for name, layer in self.layers.items()}

    def macs(self, masks: Masks | None = None) -> int:
        """Multiply-adds of one example in the network that the compiler leaves (default: of the current masks)."""
        return count(self.compiled(self.current() if masks is None else masks)).macs

    @cached_property
    def dense_macs(self) -> int:
        """Multiply-adds of one example in the network with every unit."""
        return self.macs(self.whole())

    def compiled(self, masks: Masks, cost: CostModel | None = None) -> Program:
        """The small network under these masks, unverified; `cost` as for `passes.default_pipeline`."""
        constants = dict(self._program.constants)
        for name, mask in masks.items():
            if name not in self._uncalled:
                self._check_width(name, mask)
                constants[_buffer(name)] = ~mask.cpu()
        return default_pipeline(cost)(self._program.replace(constants=constants)).program

    def _check_width(self, name: str, mask: Tensor) -> None:
        captured = self._program.constants[_buffer(name)].shape
        if mask.shape != captured:
            raise NoiseArgumentError(
                f"the noise layer {name!r} has {mask.numel()} units, and had {captured.numel()} when its costs were "
                "captured: make new NetworkCosts after units have been removed"
            )

    def seconds(self, masks: Masks, *, batch: int = 1, threads: int = 1, budget_s: float = 3.0) -> float:
        """Median latency of the small network in onnxruntime on the CPU, measured for `budget_s` seconds."""
        from sbp_compile.emit.onnx_file import onnx_model, save_onnx
        from sbp_compile.timing import compare

        program = self.compiled(masks)
        names = [None if dtype is None else f"output_{i}" for i, dtype in enumerate(program.output_dtypes)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.onnx"
            save_onnx(onnx_model(program, tuple(names), {}), path)
            result = compare({"small": path}, batch=batch, threads=threads, budget_s=budget_s)
        return result.models[0].median_s

    def macs_per_unit(self) -> dict[str, float]:
        """For each noise layer, the multiply-adds that go with one of its units, others being whole.

        Measured by removing the first half of the layer's units: rows of the layers that make them and columns of
        those that read them, as far as nothing else needs them. 0 for a layer that the model does not call.
        """
        whole = self.whole()
        dense = count(self.compiled(whole, FewestMacs())).macs
        found = {}
        for name, layer in self.layers.items():
            gone = max(layer.num_features // 2, 1)
            masks = {**whole, name: torch.arange(layer.num_features) >= gone}
            found[name] = (dense - count(self.compiled(masks, FewestMacs())).macs) / gone
        return found


def mac_kl_weights(
    module: nn.Module, example_inputs: Tensor | tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """A weight for each noise layer's KL, in proportion to the multiply-adds that one of its units costs.

    The paper's SBPa scales the KL of each layer by its computational cost (Neklyudov et al. 2017, section 5; its
    code sets 10 for the first two convolutions of the VGG-like network, 5 for the next two and 1 elsewhere by hand).
    Here the cost is measured (`NetworkCosts.macs_per_unit`), and the weights are scaled such that their mean over
    all units is 1: the KL as a whole weighs what it weighed.

    Arguments and errors are those of `NetworkCosts`. Where no unit costs anything all weights are 1.
    """
    costs = NetworkCosts(module, example_inputs, kwargs)
    per_unit = costs.macs_per_unit()
    units = sum(layer.num_features for layer in costs.layers.values())
    mean = sum(per_unit[name] * layer.num_features for name, layer in costs.layers.items()) / units
    return {name: value / mean if mean else 1.0 for name, value in per_unit.items()}


def _buffer(name: str) -> str:
    return f"{name}.off" if name else "off"


@contextmanager
def _masks_alone_decide(layers: Mapping[str, LogNormalNoise]) -> Iterator[None]:
    """For a while, give each layer a buffer of units that are off, empty, and no threshold."""
    saved = [(layer, layer.off, layer.threshold) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.off, layer.threshold = torch.zeros_like(layer.mu, dtype=torch.bool), 0.0
        yield
    finally:
        for layer, off, threshold in saved:
            layer.off, layer.threshold = off, threshold
