"""The original file in onnxruntime: what everything that is made of it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.file import OnnxFile
from sbp_compile.capture.from_onnx.network import OnnxNetwork
from sbp_compile.capture.from_onnx.values import Value, tensor
from sbp_compile.errors import ModelFileError, UnsupportedModelError

_PARTING = 1e-4
_LONGEST_REASON = 300


class OriginalRun:
    """An ONNX file as onnxruntime runs it on the CPU, without rewriting it first.

    Called with the inputs' tensors in the file's order; returns one tensor, or a tuple of them. Raises
    `ModelFileError` where onnxruntime cannot load the file, `UnsupportedModelError` where it lacks an operator.
    """

    def __init__(self, file: OnnxFile, network: OnnxNetwork) -> None:
        self._path, self._network = file.path, network
        try:
            self._session = _session(str(file.path))
        except Exception as error:  # onnxruntime documents no closed list
            reason = _reason(error)
            if type(error).__name__ == "NotImplemented":
                raise UnsupportedModelError(
                    f"onnxruntime cannot run the original, so nothing could be compared with it ({reason})"
                ) from error
            raise ModelFileError(f"onnxruntime cannot load it ({reason})") from error

    def __call__(self, *args: Tensor) -> Any:
        """Run the file."""
        results = [torch.as_tensor(value) for value in self._run(self._session, args)]
        return results[0] if len(results) == 1 else tuple(results)

    def parting(self, inputs: Sequence[Tensor]) -> str:
        """Name the first value that the network and onnxruntime compute differently, by more than 1e-4."""
        held: dict[str, Tensor] = {}

        def watch(name: str, value: Value) -> None:
            if isinstance(value, Tensor):
                held[name] = tensor(value)

        with torch.no_grad():
            self._network.calls(inputs, watch)
        try:
            session = _session(self._with_outputs(list(held)))
            values = dict(
                zip([entry.name for entry in session.get_outputs()], self._run(session, inputs), strict=True)
            )
        except Exception:  # a probe: what cannot be made an output is left out of the message
            return "the outputs, as far as can be told"
        for name, value in held.items():
            if name in values and _differs(value, torch.as_tensor(values[name])):
                return repr(name)
        return "the outputs alone"

    def _run(self, session: onnxruntime.InferenceSession, args: Sequence[Tensor]) -> list[Any]:
        taken = {entry.name for entry in session.get_inputs()}
        pairs = zip(self._network.input_names, args, strict=True)
        feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in pairs if name in taken}
        return list(session.run(None, feeds))

    def _with_outputs(self, names: Sequence[str]) -> bytes:
        model = onnx.load(str(self._path))
        present = {entry.name for entry in model.graph.output}
        made = {name for node in model.graph.node for name in node.output}
        for name in names:
            if name in made and name not in present:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        content: bytes = model.SerializeToString()
        return content


def _session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _differs(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    difference = (a.to(torch.float64) - b.to(torch.float64)).abs()
    largest = float(difference[torch.isfinite(difference)].max()) if difference.numel() else 0.0
    return largest > _PARTING * max(float(a.to(torch.float64).abs().max()), 1e-30)


def _reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
