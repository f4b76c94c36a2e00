"""Weights without a network: state dicts, checkpoints that hold one, safetensors; whole modules on request."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sbp_compile.capture.architecture import importing_from_here
from sbp_compile.capture.file_archive import Archive
from sbp_compile.capture.pickle_screen import check_old_tensors, check_tensors, foreign_classes
from sbp_compile.errors import (
    InputError,
    ModelFileError,
    NarrowedWeightsWarning,
    PickleTrustWarning,
    UsageError,
)

State = dict[str, Tensor]
_SHOWN = 3
_IGNORED_WHEN_MISSING = (
    "num_batches_tracked"  # checkpoints from before torch 0.4.1 lack it, and eval mode never reads it
)


def read_pickled(path: Path, *, trust: bool) -> Any:
    """Return what a file of torch.save holds, unpickled with weights_only=True.

    `trust`: unpickle whatever is in it, which may run any code, after a `PickleTrustWarning`. Raises `ModelFileError`
    for damaged files, and for objects other than tensors in plain containers unless `trust`.
    """
    with path.open("rb") as file:
        foreign = _screen(file)
    if foreign and not trust:
        raise ModelFileError(_needs_trust(path, foreign))
    if foreign:
        warnings.warn(
            f"unpickling {str(path)!r} runs whatever code its author put there, with your rights; it asks for "
            f"{', '.join(foreign[:_SHOWN])}",
            PickleTrustWarning,
            stacklevel=2,
        )
    with _unpickling(path), importing_from_here():
        return torch.load(path, map_location="cpu", weights_only=not foreign)


def read_safetensors(path: Path) -> State:
    """Return the tensors of a safetensors file; `ModelFileError` where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library documents no closed list
        raise ModelFileError(
            f"cannot load {str(path)!r}: its safetensors header is damaged ({error})"
        ) from error


def find_module(loaded: Any, key: str | None) -> nn.Module | None:
    """Return the module that a file holds, or that is in its checkpoint dictionary; None for weights alone."""
    if isinstance(loaded, nn.Module):
        return loaded
    if not isinstance(loaded, Mapping):
        return None
    modules = {name: value for name, value in loaded.items() if isinstance(value, nn.Module)}
    if key is not None:
        return modules.get(key)
    return _only(modules, "modules") if modules else None


def find_state(loaded: Any, key: str | None) -> State:
    """Return the state dict in what a file holds: the whole of it, or one entry of a checkpoint dictionary.

    `key`: which entry. Raises `UsageError` where several could be meant, `ModelFileError` where there is none.
    """
    if not isinstance(loaded, Mapping):
        raise ModelFileError(f"it holds a {type(loaded).__name__}; expected a state dict or a module")
    if key is not None:
        if key not in loaded:
            raise UsageError(f"--checkpoint-key {key!r}: the file has {_shown(loaded)}")
        return find_state(loaded[key], None)
    if _is_state(loaded):
        return dict(loaded)
    states = {
        name: value for name, value in loaded.items() if isinstance(value, Mapping) and _is_state(value)
    }
    if not states:
        raise ModelFileError(f"it holds a dictionary of {_shown(loaded)}, and no state dict among them")
    return dict(_only(states, "state dicts"))


def load_state(module: nn.Module, state: State, name: str) -> None:
    """Give a network the weights of a state dict, strictly; prefixes of DDP and torch.compile are taken off.

    `name`: what messages call the factory. Raises `InputError` with the first keys that are missing, left over or of
    another shape; warns with `NarrowedWeightsWarning` where the network's dtype is narrower than the weights'.
    """
    wanted = module.state_dict()
    state = _without_prefixes(state, wanted)
    _check_keys(wanted, state, name)
    _check_shapes(wanted, state, name)
    _check_dtypes(wanted, state, name)
    try:
        module.load_state_dict(state, strict=False)
    except Exception as error:  # a module's own hooks may refuse
        raise InputError(
            f"{name} does not take the weights: {str(error).strip().splitlines()[-1].strip()}"
        ) from error


def _screen(file: IO[bytes]) -> list[str]:
    """Return the names of classes that a file of torch.save asks for; refuse tensors outside of its records.

    Every record is read once for its checksum, which torch does not look at: one flipped bit is another weight.
    """
    if file.read(2) != b"PK":
        file.seek(0)
        foreign = foreign_classes(file)
        if not foreign:
            check_old_tensors(file)
        return foreign
    archive = Archive(file)
    content = archive.read("data.pkl")
    foreign = foreign_classes(io.BytesIO(content))
    check_tensors(content, lambda key: archive.size(f"data/{key}"))
    for name in archive.names:
        archive.read(name)
    return foreign


def _needs_trust(path: Path, foreign: list[str]) -> str:
    others = ", ".join(foreign[:_SHOWN])
    return (
        f"{str(path)!r} holds pickled objects ({others}), and unpickling them can run any code; if you trust whoever "
        "made the file, add --trust-pickle (trust_pickle=True), or better: save the weights alone with "
        "torch.save(model.state_dict(), path) and give --arch package.module:factory"
    )


@contextmanager
def _unpickling(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about its own storages and about changed source files
            yield
    except (AttributeError, ImportError) as error:
        raise ModelFileError(
            f"cannot unpickle {str(path)!r}: {_first_line(error)}; run from the folder with the model's code, or add "
            "that folder to PYTHONPATH"
        ) from error
    except Exception as error:  # neither pickle nor torch documents a closed list for damaged data
        raise ModelFileError(
            f"cannot load {str(path)!r}: it is damaged or unsafe ({_first_line(error)})"
        ) from error


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(
        isinstance(key, str) and (isinstance(item, Tensor) or key.endswith("_extra_state"))
        for key, item in value.items()
    )


def _only(found: Mapping[Any, Any], what: str) -> Any:
    if len(found) > 1:
        raise UsageError(
            f"the checkpoint holds several {what}: {_shown(found)}; say which with --checkpoint-key"
        )
    return next(iter(found.values()))


def _without_prefixes(state: State, wanted: Mapping[str, Any]) -> State:
    """Return the state with wrappers' prefixes off, if its keys come closer to those wanted that way."""
    best = _without_count(state, wanted)
    for strip in (_strip_wrappers, _strip_common):
        stripped = strip(best)
        if len(stripped) == len(best) and len(stripped.keys() & wanted.keys()) > len(
            best.keys() & wanted.keys()
        ):
            best = stripped
    return best


def _without_count(state: State, wanted: Mapping[str, Any]) -> State:
    """Return the state without what torch's AveragedModel counts, beside the module that it averages."""
    own = {key: value for key, value in state.items() if key != "n_averaged"}
    is_averaged = "n_averaged" not in wanted and all(key.startswith("module.") for key in own)
    return own if is_averaged else state


def _strip_wrappers(state: State) -> State:
    """Take off `module.` in front, and `_orig_mod.`, which torch.compile puts wherever a part was compiled."""

    def strip(key: str) -> str:
        key = ".".join(part for part in key.split(".") if part != "_orig_mod")
        return key.removeprefix("module.")

    return {strip(key): value for key, value in state.items()}


def _strip_common(state: State) -> State:
    """Take off the first part of all keys where it is the same (`model.`, as a wrapper of one's own has it)."""
    first = {key.partition(".")[0] for key in state}
    if len(first) != 1 or not all("." in key for key in state):
        return state
    return {key.partition(".")[2]: value for key, value in state.items()}


def _check_keys(wanted: Mapping[str, Any], state: State, name: str) -> None:
    missing = [key for key in wanted if key not in state and not key.endswith(_IGNORED_WHEN_MISSING)]
    unexpected = [key for key in state if key not in wanted]
    if not missing and not unexpected:
        return
    parts = [f"{_shown(missing)} missing from the file"] if missing else []
    parts += [f"{_shown(unexpected)} not in the network"] if unexpected else []
    raise InputError(
        f"the weights do not fit {name}: {'; '.join(parts)} (the file has {len(state)} tensors, the network "
        f"{len(wanted)}): is it the right factory, and are --arch-args those of the training?"
    )


def _check_shapes(wanted: Mapping[str, Any], state: State, name: str) -> None:
    pairs = [
        (key, state[key], value)
        for key, value in wanted.items()
        if key in state and isinstance(value, Tensor)
    ]
    wrong = [
        f"{key} {list(found.shape)} instead of {list(value.shape)}"
        for key, found, value in pairs
        if isinstance(found, Tensor) and found.shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(
            f"the weights do not fit {name}: shapes in the file are {', '.join(wrong[:_SHOWN])}{more}: give the sizes "
            "of the training with --arch-args"
        )


def _check_dtypes(wanted: Mapping[str, Any], state: State, name: str) -> None:
    pairs = [(key, state[key].dtype, value.dtype) for key, value in wanted.items() if key in state]
    pairs = [(key, found, kind) for key, found, kind in pairs if found != kind]
    for key, found, kind in pairs:
        if (found.is_complex and not kind.is_complex) or (
            found.is_floating_point and not _takes_fractions(kind)
        ):
            raise InputError(
                f"the weights do not fit {name}: {key} is {found} in the file and {kind} in the network"
            )
    narrowed = [key for key, found, kind in pairs if _is_narrower(kind, found)]
    if narrowed:
        warnings.warn(
            f"{_shown(narrowed)}: {state[narrowed[0]].dtype} in the file, rounded to the {wanted[narrowed[0]].dtype} "
            f"of {name}",
            NarrowedWeightsWarning,
            stacklevel=4,
        )


def _is_narrower(kind: torch.dtype, found: torch.dtype) -> bool:
    try:
        return torch.promote_types(found, kind) != kind
    except RuntimeError:  # torch promotes no float8
        return kind.itemsize <= found.itemsize


def _takes_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _shown(keys: Any) -> str:
    names = [repr(key) for key in keys]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
