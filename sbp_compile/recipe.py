"""A recipe: what was removed from a network and why, and how to do the same to another checkpoint of it.

docs/recipes.md describes the file and says what applying one means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import fx

from passes.ir.pipeline import Note
from passes.ir.program import Program
from sbp_compile.atomic import write_atomically
from sbp_compile.errors import UsageError
from sbp_compile.recipe_layers import LayerRecipe
from sbp_compile.recipe_masks import Mask, constant_values, factors, find_masks, masked

FORMAT, VERSION = "sbp_compile recipe", 1
LARGEST_FILE = 1 << 28


@dataclass(frozen=True)
class Recipe:
    """What a recipe file holds: the network's operations in order, its layers, and the masks.

    `structure`: one line for each input and operation, with the shapes of constants and every plain argument; a network
    with the same lines is of the same architecture.
    """

    structure: tuple[str, ...]
    layers: tuple[LayerRecipe, ...]
    masks: tuple[Mask, ...]

    @classmethod
    def of(cls, original: Program, layers: Sequence[LayerRecipe], applied: Recipe | None = None) -> Recipe:
        """Return the recipe of a captured network, whose layers were followed through the passes.

        `applied`: the recipe whose masks were put into it; the structure is that of the network without them.
        """
        structure = structure_of(original) if applied is None else applied.structure
        return cls(structure, tuple(layers), find_masks(original))

    def apply(self, program: Program) -> Program:
        """Return a captured network with the masks put into it; `UsageError` names the first mismatch."""
        for mine, other in zip_longest(self.structure, structure_of(program)):
            if mine != other:
                raise UsageError(
                    f"the recipe is of another architecture: it has {mine or 'no more operations'!r} where the "
                    f"model has {other or 'no more operations'!r}; apply it to a checkpoint of the network that it "
                    "was made from"
                )
        self._refuse_unless_fitting(program)
        return masked(program, self.masks)

    def notes(self, layers: Sequence[LayerRecipe]) -> list[Note]:
        """Return what to say about a network that the recipe was applied to: layers of another width than its own."""
        own = {layer.value: layer for layer in self.layers}
        found = [Note("recipe", f"{len(self.masks)} masks of the recipe were applied")]
        for layer in layers:
            wanted = own.get(layer.value)
            if wanted is not None and wanted.kept_number != layer.kept_number:
                text = f"{layer.kept_number} channels are kept here, {wanted.kept_number} in the recipe"
                found.append(Note(layer.name, text))
        return found

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON; `OutputError` where the path cannot be written."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "layers": [_layer_entry(layer) for layer in self.layers],
            "masks": [_mask_entry(mask) for mask in self.masks],
            "structure": list(self.structure),
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def _refuse_unless_fitting(self, program: Program) -> None:
        values = constant_values(program)
        shapes = {
            (node.name, argument): tuple(values[operand].shape)
            for node in program.calls()
            for argument, _, operand in factors(node)
            if operand in values
        }
        for mask in self.masks:
            found = shapes.get((mask.value, mask.argument))
            if found != mask.shape:
                raise UsageError(
                    f"the recipe masks operand {mask.argument[0]!r} of {mask.value!r} with shape {list(mask.shape)}, "
                    f"the model's is {'no constant' if found is None else list(found)}"
                )


def structure_of(program: Program) -> tuple[str, ...]:
    """Return one line for each input and each operation of a captured network."""

    def shown(node: fx.Node) -> str:
        value = program.held(node)
        return node.name if value is None else f"{node.target}{list(value.shape)}"

    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            entry = next(entry for entry in program.inputs if entry.name == node.target)
            sizes = [
                size if size == other else "any"
                for size, other in zip(entry.sizes, entry.other_sizes, strict=True)
            ]
            lines.append(f"{node.name}: {entry.dtype} {sizes}")
        elif node.op == "call_function":
            args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda operand: _Shown(shown(operand)))
            lines.append(f"{node.name} = {node.target}{args}")
    return tuple(lines)


class _Shown(str):
    """A node's text that stands in a list of arguments without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; `UsageError` where it is missing or not one."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"format {content['format']!r} version {content['version']!r} is not known here")
        layers = tuple(_read_layer(entry) for entry in content["layers"])
        masks = tuple(_read_mask(entry) for entry in content["masks"])
        return Recipe(tuple(map(str, content["structure"])), layers, masks)
    except OSError as error:
        raise UsageError(
            f"cannot read recipe {str(path)!r}: {(error.strerror or str(error)).lower()}"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{str(path)!r} is no recipe of sbp_compile ({reason}); --recipe FILE writes one"
        ) from error


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


def _read_layer(entry: dict[str, Any]) -> LayerRecipe:
    channels = int(entry["channels"])

    def read(text: str) -> tuple[int, ...]:
        return numbers(text, channels)

    return LayerRecipe(
        str(entry["name"]),
        str(entry["value"]),
        str(entry["operator"]),
        channels,
        None if entry["kept"] is None else read(entry["kept"]),
        int(entry["kept_number"]),
        read(entry["constant"]),
        read(entry["dead"]),
        tuple((str(why), read(text)) for why, text in entry["kept_for"].items()),
    )


def _mask_entry(mask: Mask) -> dict[str, Any]:
    return {
        "value": mask.value,
        "argument": list(mask.argument),
        "shape": list(mask.shape),
        "axis": mask.axis,
        "zeros": ranges(mask.zeros),
    }


def _read_mask(entry: dict[str, Any]) -> Mask:
    name, position = entry["argument"]
    axis = None if entry["axis"] is None else int(entry["axis"])
    shape = tuple(int(size) for size in entry["shape"])
    mask = Mask(
        str(entry["value"]), (str(name), None if position is None else int(position)), shape, axis, ()
    )
    return Mask(mask.value, mask.argument, shape, axis, numbers(entry["zeros"], mask.size))


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
    found: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (size, size)
        if not first <= last < size:
            raise ValueError(f"{part[:40]!r} is no run of numbers below {size}")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError("a number is listed twice")
    return tuple(found)
