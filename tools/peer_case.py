"""A masked network as the tools of tools/compare.py get it, and how what they return is measured."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_cost
import torch
from fold_noise import fold_noise, with_factors
from networks import NETWORKS, Places, as_trained
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.capture.export import quiet_export
from sbp_compile.verify import NOISE_FACTOR, TOLERANCES, relative_error

INPUTS = 6
PROBES = 3
SCALES = (
    1.0,
    30.0,
    1000.0,
)  # units that fire rarely must fire on some input, or a tool that drops them looks exact
OPSET = 20


@dataclass(frozen=True)
class Spec:
    """Which network: one of tools/networks.py or of the zoo; where its noise is, and the share of it that is off.

    Or one of tools/bench_networks.py, which are masked as they are.
    """

    source: str
    network: str
    placement: str
    share: float
    seed: int = 0

    def title(self) -> str:
        return f"{self.network}, {self.placement}"


@dataclass(frozen=True)
class Outcome:
    """What a tool returns: a float64 module, an ONNX model or both; or a measured row of its own runtime."""

    module: nn.Module | None = None
    model: onnx.ModelProto | None = None
    row: dict[str, Any] | None = None
    note: str = ""


@dataclass
class Case:
    """One network in float64 with example arguments of batch 2, and a folder for files."""

    spec: Spec
    network: nn.Module
    example: tuple[Tensor, ...]
    folder: Path
    note: str = field(default="", init=False)

    @cached_property
    def inputs(self) -> list[tuple[Tensor, ...]]:
        """Inputs of batch 1: the first of the example, and random ones, small and large."""
        return [tuple(value[:1] for value in self.example), *self._random(INPUTS - 1, self.spec.seed + 1)]

    @cached_property
    def probes(self) -> list[tuple[Tensor, ...]]:
        """Other random inputs, for tools that look at values."""
        return self._random(PROBES, self.spec.seed + 2)

    def _random(self, count: int, seed: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            tuple(_like(value[:1], generator, SCALES[position % len(SCALES)]) for value in self.example)
            for position in range(count)
        ]

    @cached_property
    def inputs32(self) -> list[tuple[Tensor, ...]]:
        return [
            tuple(value.float() if value.is_floating_point() else value for value in entry)
            for entry in self.inputs
        ]

    @cached_property
    def references(self) -> list[list[Tensor]]:
        return [results(self.network, entry) for entry in self.inputs]

    @cached_property
    def bound32(self) -> float:
        """What float32 may differ by: 1e-5, or three times what the network itself does in float32."""
        own = [results(self.network32(), entry) for entry in self.inputs32]
        return max(TOLERANCES[torch.float32], NOISE_FACTOR * worst(self.references, own))

    def network32(self) -> nn.Module:
        return copy.deepcopy(self.network).float()

    def folded(self) -> nn.Module:
        """The network with its noise folded into its layers; proven to be the same function."""
        try:
            module: nn.Module = fold_noise(self.network, self.inputs[0])
        except Exception as error:  # whatever torch.fx raises
            self.note = f"noise is not folded ({type(error).__name__})"
            module = with_factors(self.network, self.inputs[0])
        changed = self.error_of_module(module)
        if not changed <= TOLERANCES[torch.float64]:
            raise AssertionError(f"folding the noise changed the network by {changed:.1e}")
        return module

    def folded_onnx(self) -> onnx.ModelProto:
        """The same as an ONNX file, exported once for all tools of a network."""
        path = self.folder.parent / "folded.onnx"
        if not path.exists():
            model = export(self.folded(), self.inputs32[0])
            model.doc_string = self.note
            onnx.save_model(model, str(path))
        model = onnx.load(str(path))
        self.note = model.doc_string
        return model

    def error_of_module(self, module: nn.Module) -> float:
        return worst(self.references, [results(module, entry) for entry in self.inputs])

    def error_of_file(self, model: onnx.ModelProto) -> float:
        return worst(self.references, [onnx_cost.run(model, entry) for entry in self.inputs32])

    def row_of_file(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Return the error in onnxruntime, with its bound, and what the model costs."""
        pinned = onnx_cost.pin_batch(model, self.inputs32[0])
        cost = onnx_cost.cost(pinned, self.inputs32[0])
        return {
            "error": self.error_of_file(pinned),
            "bound": self.bound32,
            "measured": "float32",
            "macs": cost.macs,
            "parameters": cost.parameters,
        }


def build(spec: Spec, folder: Path) -> Case:
    """Build the network that `spec` names, the same in every process."""
    if spec.source == "zoo":
        from tests.zoo import ZOO, masked_network

        architecture = ZOO[spec.network]
        network = masked_network(architecture, spec.placement, spec.share, spec.seed)
        example = architecture.example()
    elif spec.source == "bench":
        from bench_networks import CASES

        case = next(case for case in CASES if case.name == spec.network)
        torch.manual_seed(spec.seed)
        network = case.make()
        example = (torch.rand(2, *case.shape),)
    else:
        torch.manual_seed(spec.seed)
        network = as_trained(NETWORKS[spec.network](Places(spec.placement)), spec.share, spec.seed)
        example = (torch.randn(2, *network.shape),)  # type: ignore[misc]
    double = tuple(value.double() if value.is_floating_point() else value for value in example)
    return Case(spec, network.double().eval(), double, folder)


def export(module: nn.Module, inputs: Sequence[Tensor]) -> onnx.ModelProto:
    """Return a module, rounded to float32, as ONNX for exactly these inputs."""
    module = module.float().eval()
    with quiet_export():
        converted = torch.onnx.export(
            module,
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=onnx_cost.input_names(len(inputs)),
            verbose=False,
        )
    assert converted is not None
    model: onnx.ModelProto = converted.model_proto
    return model


def results(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a module in eval mode; its tensors, however they are nested, in order."""
    with torch.no_grad():
        return _flat(module.eval()(*inputs))


def worst(wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest max|a - b| / max|a| of any output on any input; infinite where they do not match."""
    errors = [0.0]
    for left, right in zip(wanted, found, strict=True):
        if len(left) != len(right):
            return float("inf")
        errors += [relative_error(a, b) for a, b in zip(left, right, strict=True)]
    return max(errors)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [tensor for entry in entries for tensor in _flat(entry)]


def _like(value: Tensor, generator: torch.Generator, scale: float) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order].view(value.shape)
