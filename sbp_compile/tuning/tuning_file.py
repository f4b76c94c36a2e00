"""Measured times of layers as a file: kept between runs, and carried to another machine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

from passes.targets import Layer
from sbp_compile.atomic import write_atomically
from sbp_compile.errors import ModelFileError, OutputError
from sbp_compile.json_file import read_json
from sbp_compile.tuning.layer_times import LayerTimes

FORMAT = 1
LAYER_FIELDS = tuple(field.name for field in fields(Layer))
MACHINE_FIELDS = ("processor", "onnxruntime", "provider", "threads", "batch")


def default_path() -> Path:
    """Where times are kept if no file is named: `$XDG_CACHE_HOME/sbp_compile/tuning.json`, else under ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(folder) / "sbp_compile" / "tuning.json"


def load_times(path: Path) -> list[LayerTimes]:
    """The times in a file, one entry for each machine; none if there is no file.

    Raises ModelFileError where the file cannot be read or holds something else.
    """
    try:
        held = read_json(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _damaged(path, type(error).__name__) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    try:
        if held["format"] != FORMAT:
            raise _damaged(path, f"format {held['format']!r}, not {FORMAT}")
        return [_times_of(entry) for entry in held["machines"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def save_times(path: Path, measured: LayerTimes) -> None:
    """Write the times of one machine into a file, beside those of the others there.

    Raises OutputError where it cannot be written, ModelFileError where it holds something else.
    """
    held = load_times(path)
    others = [times for times in held if times.machine != measured.machine]
    for times in held:  # another run may have written since this one has read
        if times.machine == measured.machine:
            measured = replace(measured, seconds={**times.seconds, **measured.seconds})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"cannot make the folder of {str(path)!r}: {reason}") from error
    content = {"format": FORMAT, "machines": [_entry_of(times) for times in (*others, measured)]}
    write_atomically(path, json.dumps(content, indent=0) + "\n")


def _entry_of(times: LayerTimes) -> dict[str, Any]:
    rows = [
        [*(int(value) for value in astuple(layer)), inputs, outputs, seconds]
        for (layer, inputs, outputs), seconds in times.seconds.items()
    ]
    machine = dict(zip(MACHINE_FIELDS, times.machine, strict=True))
    return {**machine, "columns": [*LAYER_FIELDS, "inputs", "outputs", "seconds"], "layers": sorted(rows)}


def _times_of(entry: dict[str, Any]) -> LayerTimes:
    if entry["columns"] != [*LAYER_FIELDS, "inputs", "outputs", "seconds"]:
        raise ValueError(f"columns {entry['columns']}")
    processor, onnxruntime, provider = (str(entry[name]) for name in MACHINE_FIELDS[:3])
    threads, batch = (_whole(entry[name]) for name in MACHINE_FIELDS[3:])
    times = LayerTimes(processor, onnxruntime, provider, threads, batch)
    for row in entry["layers"]:
        layer, inputs, outputs = _layer_of(row)
        if not (isinstance(row[-1], float) and 0 < row[-1] < math.inf):
            raise ValueError(f"{row[-1]!r} seconds")
        times.seconds[layer, inputs, outputs] = row[-1]
    return times


def _layer_of(row: Sequence[Any]) -> tuple[Layer, int, int]:
    rank, taps, positions, groups, depthwise, transposed, inputs, outputs = map(_whole, row[:-1])
    return Layer(rank, taps, positions, groups, bool(depthwise), bool(transposed)), inputs, outputs


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _damaged(path: Path, why: str) -> ModelFileError:
    return ModelFileError(
        f"{str(path)!r} is no tuning file ({why[:200]}): name another with --tuning-file, or delete it"
    )
