"""Where a run of training stands, in a file that is replaced in one step: killed at any moment, it can go on."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sbp_compile.atomic import atomic_path
from sbp_compile.errors import ModelFileError, UsageError

FORMAT = 1


@dataclass
class State:
    """After `step` steps of phase `phase` (0: dense pretraining, 1: the method).

    `about`: what was asked for, in plain values; `losses`, `seconds`: of the epoch so far; `module`, `optimizer`,
    `scaler`: state dicts; `dense`: the pretrained network's, once there is one; `epochs`: the log.
    """

    about: dict[str, Any]
    phase: int = 0
    step: int = 0
    losses: float = 0.0
    seconds: float = 0.0
    module: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def write_state(state: State, path: Path) -> None:
    """Write `state` to `path`, readable by `torch.load(..., weights_only=True)`."""
    content = {"format": FORMAT} | {name: getattr(state, name) for name in State.__dataclass_fields__}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def read_state(path: Path, device: str = "cpu") -> State:
    """Read a file of `write_state`; raises ModelFileError where it is none."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ModelFileError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): remove it to begin anew"
        ) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ModelFileError(f"{path} is no checkpoint of this program: remove it, or give another output")
    return State(**content)


def refuse_other_run(state: State, about: dict[str, Any], path: Path) -> None:
    """Raise UsageError unless the checkpoint is of the run that is asked for, naming what differs."""
    for name in sorted(state.about.keys() | about.keys()):
        before, now = state.about.get(name), about.get(name)
        if before != now:
            raise UsageError(
                f"{path} is of another run: {name} was {before!r} and is {now!r}; give what was given then, "
                "or another output"
            )


def plain(settings: object) -> dict[str, Any]:
    """Return a dataclass as values that a checkpoint and JSON hold alike: lists for tuples."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(item) for key, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value

    found: dict[str, Any] = listed(asdict(settings))  # type: ignore[call-overload]
    return found
