"""A recipe: what was removed from a network and why, and how to do the same to another checkpoint of it.

docs/recipes.md describes the file and says what applying one means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from torch import fx

from passes.ir.pipeline import Note
from passes.ir.program import Program
from sbp_compile.atomic import write_atomically
from sbp_compile.errors import UsageError
from sbp_compile.json_file import read_json
from sbp_compile.recipe_file import from_json, to_json
from sbp_compile.recipe_layers import LayerRecipe
from sbp_compile.recipe_masks import Mask, constant_values, factors, find_masks, masked

_SHOWN = 300  # characters of a line in a message


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
                has, wanted = (repr((line or "no more operations")[:_SHOWN]) for line in (mine, other))
                raise UsageError(
                    f"the recipe is of another architecture: it has {has} where the model has {wanted}; apply it to a "
                    "checkpoint of the network that it was made from"
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
        write_atomically(path, to_json(self.structure, self.layers, self.masks))

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
        return Recipe(*from_json(read_json(path)))
    except OSError as error:
        raise UsageError(
            f"cannot read recipe {str(path)!r}: {(error.strerror or str(error)).lower()}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{str(path)!r} is no recipe of sbp_compile ({str(error).splitlines()[0][:300]}); --recipe FILE writes one"
        ) from error
