"""Masks in networks of other packages, put there from outside, and the helpers that describe such networks."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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

    `absent`: a package that it imports and does not need for its networks (torchvision, which has no build without a
    GPU that could be had): if it is not there, an empty one takes its place meanwhile.
    """
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    if not absent or importlib.util.find_spec(absent) is not None:
        return importlib.import_module(name)
    finder = _Absent(absent)
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for found in [key for key in sys.modules if key.partition(".")[0] == absent]:
            del sys.modules[found]


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


class _Absent:
    """Finds a package that is not there, as modules whose every name is a class that does nothing."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Names(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(types.ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {"__init__": lambda *_, **__: None})
