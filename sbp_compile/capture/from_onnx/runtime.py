"""The original file in onnxruntime: what everything that is made of it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from sbp_compile.errors import ModelFileError, UnsupportedModelError


class OriginalRun:
    """An ONNX file as onnxruntime runs it on the CPU, without rewriting it first.

    Called with the inputs' tensors in the file's order; returns one tensor, or a tuple of them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Load the file; `names`: of the inputs. Raises `ModelFileError`, or `UnsupportedModelError` for operators
        that onnxruntime has not."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        self._names = list(names)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime documents no closed list
            reason = _reason(error)
            if type(error).__name__ == "NotImplemented":
                raise UnsupportedModelError(
                    f"onnxruntime cannot run the original, so nothing could be compared with it ({reason})"
                ) from error
            raise ModelFileError(f"onnxruntime cannot load it ({reason})") from error

    def __call__(self, *args: Tensor) -> Any:
        """Run the file."""
        taken = {entry.name for entry in self._session.get_inputs()}
        pairs = zip(self._names, args, strict=True)
        feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in pairs if name in taken}
        results = [torch.as_tensor(value) for value in self._session.run(None, feeds)]
        return results[0] if len(results) == 1 else tuple(results)


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
