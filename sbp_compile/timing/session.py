"""onnxruntime sessions as timed things: opened alike, inputs already in place, run in a tight loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sbp_compile.errors import InputError, ModelFileError, UsageError
from sbp_compile.timing.inputs import Declared

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cuda-tf32": "CUDAExecutionProvider",
}

# TF32 rounds inputs to 10 bits: a comparison of exact networks leaves it off, unless it is asked for.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {"use_tf32": "0"},
    "cuda-tf32": {"use_tf32": "1"},
}

Model = str | Path | bytes


def require_provider(provider: str) -> None:
    """Raise UsageError if `provider` is unknown or this onnxruntime was built without it."""
    if provider not in PROVIDERS:
        raise UsageError(f"provider '{provider}' is unknown: use {', '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise _missing(provider, "this onnxruntime was built without it; install onnxruntime-gpu")


def open_session(name: str, model: Model, *, provider: str, threads: int, profile: Path | None = None) -> Any:
    """Open a session with `threads` intra-op threads, sequential execution, all graph optimisations.

    `profile`: the beginning of the name of a file that onnxruntime's profiler is to write.

    Raises ModelFileError if the model cannot be read, UsageError if the provider does not start.
    """
    if provider != "cpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    source, chosen = _source(model), [(PROVIDERS[provider], _PROVIDER_OPTIONS[provider])]
    try:
        session = onnxruntime.InferenceSession(source, _options(threads, profile), providers=chosen)
    except Exception as error:  # onnxruntime's own exceptions share no base class below Exception
        raise ModelFileError(f"{name} cannot be loaded as an ONNX model: {_one_line(error)}") from error
    if PROVIDERS[provider] not in session.get_providers():
        raise _missing(provider, "it did not start; check the driver and the CUDA libraries")
    return session


def declared_inputs(session: Any) -> list[Declared]:
    """List what the session's model declares as its inputs, in order."""
    return [Declared(item.name, item.type, tuple(item.shape)) for item in session.get_inputs()]


class Runner:
    """A session with inputs and outputs bound on its own device, so that a run copies nothing."""

    def __init__(
        self, name: str, session: Any, inputs: Mapping[str, NDArray[np.generic]], provider: str
    ) -> None:
        self.name = name
        self._feed = dict(inputs)
        self.takes = sorted((str(value.dtype), value.shape) for value in inputs.values())
        self._session = session
        device = "cpu" if provider == "cpu" else "cuda"
        self._binding = session.io_binding()
        for key, value in inputs.items():
            self._binding.bind_ortvalue_input(key, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
        for output in session.get_outputs():
            self._binding.bind_output(output.name, device, 0)

    def seconds_per_run(self, runs: int) -> float:
        """Mean wall time of a run, in seconds, over `runs` in a row; it ends when the outputs are there."""
        run, binding = self._session.run_with_iobinding, self._binding
        start = time.perf_counter_ns()
        for _ in itertools.repeat(None, runs):
            run(binding)
        binding.synchronize_outputs()
        return (time.perf_counter_ns() - start) / runs * 1e-9

    def seconds_with_copies(self) -> float:
        """Wall time of one run from arrays in the host's memory to arrays there, in seconds."""
        start = time.perf_counter_ns()
        self._session.run(None, self._feed)
        return (time.perf_counter_ns() - start) * 1e-9

    def first_run(self) -> None:
        """Run once, untimed. Raises InputError if the model does not accept the generated inputs."""
        try:
            self.seconds_per_run(1)
        except Exception as error:  # as in open_session
            raise InputError(f"{self.name} fails on generated inputs: {_one_line(error)}") from error


def _options(threads: int, profile: Path | None = None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    # Else one model's idle threads spin on into the other model's turn and take its cores: docs/latency.md.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _source(model: Model) -> str | bytes:
    if isinstance(model, bytes):
        return model
    path = Path(model)
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file: give the path of an ONNX model")
    return str(path)


def _missing(provider: str, reason: str) -> UsageError:
    available = ", ".join(onnxruntime.get_available_providers())
    return UsageError(
        f"provider '{provider}' is missing: {reason}, or use provider 'cpu' (available: {available})"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
