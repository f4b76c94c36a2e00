"""Masks in networks of other packages, put there from outside, and the helpers that describe such networks."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from absent_package import import_without
from torch import Tensor, nn

from sbp_compile.nn import CONVOLUTIONS, hidden_linears, insert_noise
from sbp_compile.nn.noise import NoiseArgumentError
from tests.zoo.architecture import Architecture, Example
from tests.zoo.places import Places

PACKAGES = Path(__file__).resolve().parents[1] / "out" / "packages"  # where `make foreign` puts them
PLACEMENTS = ("convolutions", "hidden")
# Linear maps that read hidden units which nothing but they see: where a projection is fused, the units have no layer
# of their own to stand behind.
READERS = ("*.down_proj", "*.c_proj", "*.Wo", "*.dense_4h_to_h", "*.fc2")


def from_packages(name: str, *, absent: str = "") -> types.ModuleType:
    """Import a module of the packages beside, which need not be installed.

    `absent`: a package that it imports and does not need for its networks, and that need not be there either.
    """
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    return import_without(name, absent) if absent else importlib.import_module(name)


def foreign(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    example: Example,
    names: Sequence[str] = (),
    *,
    dynamic_batch: bool = True,
) -> Architecture:
    """Describe a network of another package; `names`: of its arguments, where it is called by keyword."""

    def build(places: Places) -> nn.Module:
        network = Tensors(make(), names).eval()
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        _put_noise(network, places.placement, example())
        return network

    return Architecture(name, family, build, example, dynamic_batch)


class Tensors(nn.Module):
    """A network called with tensors that returns the tensors of its result, however they are nested."""

    def __init__(self, network: nn.Module, names: Sequence[str] = ()):
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=True)) if self.names else {}
        return tuple(_tensors(self.network(*(() if named else tensors), **named)))


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = result.values()
    elif not isinstance(result, (tuple, list)):
        return []
    return [tensor for part in result for tensor in _tensors(part)]


def _put_noise(network: nn.Module, placement: str, example: tuple[Tensor, ...]) -> None:
    """Noise behind every convolution, or on the units between two linear maps; none where there is no such place."""
    if placement == "convolutions":
        if any(isinstance(module, CONVOLUTIONS) for module in network.modules()):
            with suppress(NoiseArgumentError):  # all of them only lend their weights
                insert_noise(network, CONVOLUTIONS, example_inputs=example)
        return
    hidden = hidden_linears(network, example)
    if hidden:
        insert_noise(network, hidden, example_inputs=example)
        return
    names = [name for name, _ in network.named_modules()]
    for reader in READERS:
        if any(name.endswith(reader.removeprefix("*")) for name in names):
            insert_noise(network, reader, before=True, dim=-1, example_inputs=example)
