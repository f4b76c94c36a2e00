"""Imports of packages that import another one which is not there, and whose networks do without it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


def import_without(name: str, absent: str) -> types.ModuleType:
    """Import a module; if the package `absent` is not installed, an empty one takes its place meanwhile.

    It is gone afterwards, for other packages look whether there is one. (Torchvision has no build without a GPU that
    could be had.)
    """
    if importlib.util.find_spec(absent) is not None:
        return importlib.import_module(name)
    finder = _Absent(absent)
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for found in [key for key in sys.modules if key.partition(".")[0] == absent]:
            del sys.modules[found]


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
