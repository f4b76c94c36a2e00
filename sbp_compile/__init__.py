"""Compiles networks trained with Structured Bayesian Pruning into small, exact, fast ONNX files.

    import sbp_compile

    small = sbp_compile.compile(model, example)
    small.save("small.onnx")

Names are resolved when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbp_compile.capture.load import load_model
    from sbp_compile.capture.model_file import LoadedModel, save_model
    from sbp_compile.compiler import Compiled, compile  # noqa: A004
    from sbp_compile.errors import CompileError

__all__ = ["CompileError", "Compiled", "LoadedModel", "compile", "load_model", "save_model"]

_HOMES = {
    "CompileError": "sbp_compile.errors",
    "Compiled": "sbp_compile.compiler",
    "LoadedModel": "sbp_compile.capture.model_file",
    "compile": "sbp_compile.compiler",
    "load_model": "sbp_compile.capture.load",
    "save_model": "sbp_compile.capture.model_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sbp_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
