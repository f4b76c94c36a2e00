"""The JSON of a recipe file. Whatever it holds is checked on reading: types, keys, and how many numbers it stands for.

docs/recipes.md describes the file.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, TypeVar

from sbp_compile.recipe_layers import LayerRecipe
from sbp_compile.recipe_masks import Mask

FORMAT, VERSION = "sbp_compile recipe", 1
# In a file together: a run of a few characters may stand for any number of numbers.
MOST_RUNS, MOST_NUMBERS = 2**22, 2**24

Content = tuple[tuple[str, ...], tuple[LayerRecipe, ...], tuple[Mask, ...]]
_T = TypeVar("_T")


def to_json(structure: Sequence[str], layers: Sequence[LayerRecipe], masks: Sequence[Mask]) -> str:
    """Return a recipe as text."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "layers": [_layer_entry(layer) for layer in layers],
        "masks": [_mask_entry(mask) for mask in masks],
        "structure": list(structure),
    }
    return json.dumps(content, indent=1) + "\n"


def from_json(content: Any) -> Content:
    """Return (structure, layers, masks) from the JSON that `to_json` wrote; `ValueError` for anything else."""
    form, version = _taken(content, "format", str), _taken(content, "version", int)
    if (form, version) != (FORMAT, VERSION):
        raise ValueError(f"format {reprlib.repr(form)} version {version} is not known here")
    runs = _Runs()
    layers = tuple(_read_layer(entry, runs) for entry in _taken(content, "layers", list))
    masks = tuple(_read_mask(entry, runs) for entry in _taken(content, "masks", list))
    structure = tuple(_of(line, str, "a line") for line in _taken(content, "structure", list))
    return structure, layers, masks


def ranges(values: Sequence[int]) -> str:
    """Return numbers as text, runs of neighbours as `first-last`: `0-3,5`; their order is kept."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def numbers(text: str, size: int) -> tuple[int, ...]:
    """Return the numbers below `size` that `ranges` wrote; `ValueError` for anything else."""
    return _Runs().numbers(text, size)


class _Runs:
    """Reads runs of numbers, and counts the runs and how many numbers they stand for together."""

    def __init__(self) -> None:
        self._runs_left, self._numbers_left = MOST_RUNS, MOST_NUMBERS

    def numbers(self, text: str, size: int) -> tuple[int, ...]:
        self._runs_left -= text.count(",") + 1
        if self._runs_left < 0:
            raise ValueError(f"it has more than {MOST_RUNS} runs of numbers")
        runs = [_run(part, size) for part in text.split(",")] if text else []
        in_order = sorted(runs, key=lambda run: run.start)
        if any(first.stop > second.start for first, second in pairwise(in_order)):
            raise ValueError("a number is listed twice")
        self._numbers_left -= sum(map(len, runs))
        if self._numbers_left < 0:
            raise ValueError(f"its runs stand for more than {MOST_NUMBERS} numbers")
        return tuple(chain.from_iterable(runs))


def _run(part: str, size: int) -> range:
    match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (size, size)
    if not first <= last < size:
        raise ValueError(f"{part[:40]!r} is no run of numbers below {size}")
    return range(first, last + 1)


def _layer_entry(layer: LayerRecipe) -> dict[str, Any]:
    return {
        "name": layer.name,
        "value": layer.value,
        "operator": layer.operator,
        "channels": layer.channels,
        "kept_number": layer.kept_number,
        "kept": None if layer.kept is None else ranges(layer.kept),
        "constant": ranges(layer.constant),
        "dead": ranges(layer.dead),
        "kept_for": {why: ranges(those) for why, those in layer.kept_for},
    }


def _read_layer(entry: Any, runs: _Runs) -> LayerRecipe:
    channels = _taken(entry, "channels", int)

    def read(key: str) -> tuple[int, ...]:
        return runs.numbers(_taken(entry, key, str), channels)

    return LayerRecipe(
        _taken(entry, "name", str),
        _taken(entry, "value", str),
        _taken(entry, "operator", str),
        channels,
        None if _given(entry, "kept") is None else read("kept"),
        _taken(entry, "kept_number", int),
        read("constant"),
        read("dead"),
        tuple(
            (why, runs.numbers(_of(text, str, why), channels))
            for why, text in _taken(entry, "kept_for", dict).items()
        ),
    )


def _mask_entry(mask: Mask) -> dict[str, Any]:
    return {
        "value": mask.value,
        "argument": list(mask.argument),
        "shape": list(mask.shape),
        "axis": mask.axis,
        "zeros": ranges(mask.zeros),
    }


def _read_mask(entry: Any, runs: _Runs) -> Mask:
    argument = _taken(entry, "argument", list)
    if len(argument) != 2:
        raise ValueError(f"argument is {reprlib.repr(argument)}; expected a name and a position or null")
    name, position = argument
    shape = tuple(_of(size, int, "a size of shape") for size in _taken(entry, "shape", list))
    axis = None if _given(entry, "axis") is None else _taken(entry, "axis", int)
    if min(shape, default=0) < 0 or (axis is not None and not 0 <= axis < len(shape)):
        raise ValueError(f"a mask has shape {reprlib.repr(list(shape))} and axis {reprlib.repr(axis)}")
    return Mask(
        _taken(entry, "value", str),
        (_of(name, str, "argument"), None if position is None else _of(position, int, "argument")),
        shape,
        axis,
        runs.numbers(_taken(entry, "zeros", str), math.prod(shape) if axis is None else shape[axis]),
    )


def _given(entry: Any, key: str) -> Any:
    if key not in _of(entry, dict, "an entry"):
        raise ValueError(f"{key!r} is missing")
    return entry[key]


def _taken(entry: Any, key: str, kind: type[_T]) -> _T:
    return _of(_given(entry, key), kind, repr(key))


def _of(value: Any, kind: type[_T], what: str) -> _T:
    """Return a value of exactly that type: to Python a truth is an integer, too."""
    if type(value) is not kind:
        raise ValueError(f"{what[:80]} is {reprlib.repr(value)}; expected {kind.__name__}")
    return value
