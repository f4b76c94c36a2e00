"""The way in: whatever file the user has, recognised by content, as an exported program with example inputs.

docs/command-line.md lists the formats and what each needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sbp_compile.capture import example_inputs as examples
from sbp_compile.capture import from_onnx
from sbp_compile.capture.architecture import Factory, build
from sbp_compile.capture.checkpoint import find_module, find_state, load_state, read_pickled, read_safetensors
from sbp_compile.capture.example_inputs import Axes, Named
from sbp_compile.capture.export import DynamicBatch, evaluating, export_module
from sbp_compile.capture.file_kinds import Kind, recognise
from sbp_compile.capture.from_onnx import OnnxFile, OnnxNetwork
from sbp_compile.capture.model_file import LoadedModel, load_program
from sbp_compile.capture.pickle_screen import StoredTensor
from sbp_compile.capture.torchscript import load_torchscript, runs_on_the_cpu
from sbp_compile.errors import (
    BatchPinnedWarning,
    InputError,
    ModelFileError,
    UnsupportedModelError,
    UsageError,
)


@dataclass(frozen=True)
class _Wanted:
    """What the caller of `load_model` says beside the file."""

    example_inputs: Tensor | tuple[Any, ...] | Named | None
    fallback_inputs: Named | None
    kwargs: Mapping[str, Any]
    dynamic_batch: DynamicBatch
    dynamic_axes: Axes
    arch: Factory | None
    arch_args: Mapping[str, Any] | Sequence[Any]
    checkpoint_key: str | None
    trust_pickle: bool
    namespaces: Collection[str]


def load_model(
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | tuple[Any, ...] | Named | None = None,
    fallback_inputs: Named | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: DynamicBatch = True,
    dynamic_axes: Axes | None = None,
    arch: Factory | None = None,
    arch_args: Mapping[str, Any] | Sequence[Any] = (),
    checkpoint_key: str | None = None,
    trust_pickle: bool = False,
    namespaces: Collection[str] = (),
) -> LoadedModel:
    """Read a model file, recognised by its content: one call's captured network, ready to compile.

    Files of `save_model`; .pt2 files without pickled parts; TorchScript archives; ONNX files; state dicts, alone or in
    a checkpoint dictionary, and safetensors, which need `arch`; pickled modules, which need `trust_pickle`.

    `example_inputs`: a tensor, a tuple of positional arguments, or tensors by name; `kwargs`: keyword arguments.
    Needed where the file brings none; `fallback_inputs`: tensors by name that are used only then.
    `dynamic_batch`: see `export_module`. `dynamic_axes`: names of dynamic axes by input and axis,
    `{"x": {0: "batch", 2: "height"}}`; all other axes are fixed then. `arch`: makes the network that weights are
    for: a module, a class or function, or its name `package.module:factory`; `arch_args`: its keyword or positional
    arguments. `checkpoint_key`: the entry of a checkpoint dictionary. `trust_pickle`: unpickle, which may run any
    code in the file. `namespaces`: of custom operators that an exported program may call; the library that defines
    them must be imported.

    Raises `ModelFileError`, `UsageError`, `InputError` or `UnsupportedModelError`.
    """
    path = Path(path)
    wanted = _Wanted(
        example_inputs,
        fallback_inputs,
        kwargs or {},
        dynamic_batch,
        dynamic_axes or {},
        arch,
        arch_args,
        checkpoint_key,
        trust_pickle,
        namespaces,
    )
    kind = recognise(path)
    _refuse_idle(path, kind, wanted)
    try:
        return _LOADERS[kind](path, wanted)
    except ModelFileError as error:
        message = str(error) if repr(str(path)) in str(error) else f"cannot load {str(path)!r}: {error}"
        raise ModelFileError(message) from error
    except OSError as error:
        raise ModelFileError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _refuse_idle(path: Path, kind: Kind, wanted: _Wanted) -> None:
    """Raise `UsageError` for what says nothing about such a file: it would be ignored, and the user not know."""
    if wanted.arch is None and wanted.arch_args:
        raise UsageError("--arch-args are arguments of a factory: name it with --arch package.module:factory")
    idle = {"--arch": wanted.arch is not None and kind not in _WEIGHTS, "--checkpoint-key": False}
    idle["--checkpoint-key"] = wanted.checkpoint_key is not None and kind is not Kind.PICKLE
    for option in (option for option, is_idle in idle.items() if is_idle):
        raise UsageError(
            f"{option}: {str(path)!r} is {kind.value}, of which it says nothing; leave the option away"
        )


def _load_program(path: Path, wanted: _Wanted) -> LoadedModel:
    model = load_program(path, wanted.namespaces)
    if wanted.dynamic_axes:
        raise UsageError(
            f"--dynamic: {str(path)!r} is an exported program, whose axes were chosen when it was exported; export it "
            "again with dynamic_shapes"
        )
    given = wanted.example_inputs
    if given is None and model.example_inputs is None:
        given = wanted.fallback_inputs
    if isinstance(given, Mapping):
        args, kwargs = examples.bind_exported(model.exported_program, given, repr(str(path)))
        return dataclasses.replace(model, example_inputs=args, kwargs=kwargs)
    if given is not None:
        args = (given,) if isinstance(given, Tensor) else given
        return dataclasses.replace(model, example_inputs=args, kwargs=dict(wanted.kwargs))
    return model


def _load_torchscript(path: Path, wanted: _Wanted) -> LoadedModel:
    with path.open("rb") as file:
        loaded = load_torchscript(file)
    if wanted.example_inputs is None and wanted.fallback_inputs is None and loaded.traced is not None:
        wanted = dataclasses.replace(
            wanted, example_inputs=_traced_examples(path, loaded.traced, loaded.network)
        )

    def own(*args: Any, **kwargs: Any) -> Any:
        return loaded.script(*args, **kwargs)

    model = _capture(path, loaded.network, wanted, own if runs_on_the_cpu(loaded.script) else None)
    return dataclasses.replace(model, sha256=loaded.sha256)


def _load_pickle(path: Path, wanted: _Wanted) -> LoadedModel:
    module = _unpickled(path, wanted)
    return _capture(path, module, wanted, _as_given(module))


def _unpickled(path: Path, wanted: _Wanted) -> nn.Module:
    content = read_pickled(path, trust=wanted.trust_pickle)
    module = find_module(content, wanted.checkpoint_key)
    if module is None:
        return _with_weights(path, find_state(content, wanted.checkpoint_key), wanted)
    if wanted.arch is not None:
        raise UsageError(
            f"--arch: {str(path)!r} holds a whole module ({type(module).__name__}); leave the option away"
        )
    return module


def _load_safetensors(path: Path, wanted: _Wanted) -> LoadedModel:
    module = _with_weights(path, read_safetensors(path), wanted)
    return _capture(path, module, wanted, _as_given(module))


def _load_onnx(path: Path, wanted: _Wanted) -> LoadedModel:
    file = from_onnx.load_onnx(path)
    network = from_onnx.onnx_network(file)
    run = from_onnx.OriginalRun(file, network)
    wanted = dataclasses.replace(wanted, **_onnx_call(path, file, network, wanted))
    model = _capture_onnx(path, network, wanted, run)
    names = [str(name) for name in model.exported_program.graph_signature.user_inputs]
    interface = from_onnx.interface_of(file, dict(zip(names, network.input_names, strict=True)))
    return dataclasses.replace(model, sha256=file.sha256, interface=interface, parting=run.parting)


def _onnx_call(path: Path, file: OnnxFile, network: OnnxNetwork, wanted: _Wanted) -> dict[str, Any]:
    """Return example inputs and dynamic axes, as the caller or else the file says, by the names of arguments."""
    declared, source = from_onnx.declared_inputs(file), repr(path.name)
    arguments = dict(zip(network.input_names, inspect.signature(network.forward).parameters, strict=True))
    given = wanted.example_inputs
    if given is None:
        try:
            given = from_onnx.example_inputs(declared, source)
        except InputError:
            given = wanted.fallback_inputs
            if given is None:
                raise
    if isinstance(given, Mapping):
        given = {arguments.get(name, name): value for name, value in given.items()}
        given, _ = examples.bind(network.forward, given, source)
    given = (given,) if isinstance(given, Tensor) else tuple(given)
    from_onnx.check_shapes(declared, given)
    axes = {arguments.get(name, name): entries for name, entries in wanted.dynamic_axes.items()}
    from_onnx.check_axes(declared, list(arguments.values()), axes)
    if not axes:
        axes = {arguments[entry.name]: entry.open_axes for entry in declared if entry.open_axes}
    network.check(given)
    return {"example_inputs": given, "dynamic_axes": axes, "dynamic_batch": False, "kwargs": {}}


def _capture_onnx(path: Path, network: OnnxNetwork, wanted: _Wanted, own: Callable[..., Any]) -> LoadedModel:
    """Capture with all axes open that the file leaves open; where the graph fixes one all the same, with fewer."""
    leading = {name: {0: axes[0]} for name, axes in wanted.dynamic_axes.items() if 0 in axes}
    refusal: UnsupportedModelError | None = None
    for axes in (wanted.dynamic_axes, leading, {}):
        if refusal is not None and axes == wanted.dynamic_axes:
            continue
        try:
            model = _capture(path, network, dataclasses.replace(wanted, dynamic_axes=axes), own)
        except UnsupportedModelError as error:
            refusal = refusal or error
            continue
        if refusal is not None:
            kept = "the leading axes stay open" if axes else "all sizes are those of the example"
            warnings.warn(
                f"the graph fixes sizes that the file leaves open: {kept} ({refusal})",
                BatchPinnedWarning,
                stacklevel=4,
            )
        return model
    assert refusal is not None
    raise refusal


_LOADERS: Mapping[Kind, Callable[[Path, _Wanted], LoadedModel]] = {
    Kind.PROGRAM: _load_program,
    Kind.TORCHSCRIPT: _load_torchscript,
    Kind.PICKLE: _load_pickle,
    Kind.SAFETENSORS: _load_safetensors,
    Kind.ONNX: _load_onnx,
}


_WEIGHTS = frozenset({Kind.PICKLE, Kind.SAFETENSORS})


def _with_weights(path: Path, state: dict[str, Tensor], wanted: _Wanted) -> nn.Module:
    if wanted.arch is None:
        first = ", ".join(list(state)[:3])
        raise UsageError(
            f"{str(path)!r} is a state dict: weights without a network ({len(state)} tensors: {first}, ...); add "
            "--arch package.module:factory, which makes the network, and --arch-args if it takes any"
        )
    module = build(wanted.arch, wanted.arch_args)
    load_state(module, state, wanted.arch if isinstance(wanted.arch, str) else type(module).__name__)
    return module


def _as_given(module: nn.Module) -> Callable[..., Any]:
    def own(*args: Any, **kwargs: Any) -> Any:
        with evaluating(module):
            return module(*args, **kwargs)

    return own


def _capture(path: Path, module: nn.Module, wanted: _Wanted, own: Callable[..., Any] | None) -> LoadedModel:
    """Capture a network from a file with the example inputs that the caller gave."""
    source = f"{type(module).__name__} of {path.name!r}"
    args, kwargs = _arguments(module, wanted, source)
    shapes = None
    call_args, call_kwargs = args, kwargs
    if wanted.dynamic_axes:
        names = list(inspect.signature(module.forward).parameters)
        call_args, call_kwargs, shapes = examples.dynamic_shapes(
            wanted.dynamic_axes, args, kwargs, names, source
        )
    try:
        exported = export_module(
            module, call_args, call_kwargs, dynamic_batch=wanted.dynamic_batch, dynamic_shapes=shapes
        )
    except UnsupportedModelError as error:
        shown = ", ".join(
            str(list(value.shape)) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)
        )
        raise UnsupportedModelError(
            f"{error} (example inputs of shapes {shown}: do they fit the network?)"
        ) from error
    names = [*list(inspect.signature(module.forward).parameters)[: len(args)], *kwargs]
    axes = examples.captured_axes(exported, wanted.dynamic_axes, names, source)
    return LoadedModel(exported, call_args, call_kwargs, sha256=_digest(path), own=own, axis_names=axes)


def _arguments(module: nn.Module, wanted: _Wanted, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = wanted.fallback_inputs if wanted.example_inputs is None else wanted.example_inputs
    if isinstance(given, Mapping):
        return examples.bind(module.forward, given, source)
    if given is None:
        needed = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is inspect.Parameter.empty
        ]
        raise InputError(f"{source} brings no example inputs: {examples.example_flags(needed)}")
    return ((given,) if isinstance(given, Tensor) else given), dict(wanted.kwargs)


def _traced_examples(path: Path, traced: Sequence[StoredTensor], network: nn.Module) -> tuple[Tensor, ...]:
    """Return random inputs of the shapes that a trace was made with; integers have a range that only the user knows."""
    names = list(inspect.signature(network.forward).parameters)
    if not all(entry.dtype.is_floating_point for entry in traced):
        flags = [
            f"--input {name}={'x'.join(map(str, entry.shape)) or 'scalar'}:{str(entry.dtype).removeprefix('torch.')}"
            + ("" if entry.dtype.is_floating_point else ":0..HIGHEST")
            for name, entry in zip(names, traced, strict=False)
        ]
        raise InputError(
            f"{path.name!r} was traced with integers, and its file does not hold their values: add {' '.join(flags)}, "
            "or --inputs data.npz"
        )
    return tuple(
        examples.random_tensor(entry.shape, entry.dtype, seed=number) for number, entry in enumerate(traced)
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
