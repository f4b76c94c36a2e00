"""The call that was captured: how its arguments and results are nested, and which of them are tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from sbp_compile.errors import InputError


@dataclass(frozen=True)
class Call:
    """One call's structure.

    `in_spec`, `out_spec`: the nesting of arguments and results; `positional`: the names of the positional
    arguments, which may be given as keywords too; `keywords`: the keyword arguments in their order; `fixed`:
    the flat arguments that are no tensors, by position; `tensor_positions`: those that are.
    """

    in_spec: Any
    out_spec: Any
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    fixed: Mapping[int, Any]
    tensor_positions: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        """Return the call itself: nothing in it changes, and torch's leaf specs warn when they are copied."""
        return self

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the tensors of another call, in the order of the network's inputs.

        Raises `InputError` where it is structured otherwise, or where an argument that is no tensor differs.
        """
        leaves = self._leaves(args, dict(kwargs))
        for position, wanted in self.fixed.items():
            if type(leaves[position]) is not type(wanted) or leaves[position] != wanted:
                raise InputError(
                    f"argument {position} (={leaves[position]!r}) was fixed to {wanted!r} at capture; "
                    "compile again for another value"
                )
        return [leaves[position] for position in self.tensor_positions]

    def nest_arguments(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of a call with other tensors."""
        given = dict(zip(self.tensor_positions, tensors, strict=True)) | dict(self.fixed)
        args, kwargs = self.in_spec.unflatten([given[position] for position in range(len(given))])
        return args, kwargs

    def signature(self) -> inspect.Signature:
        """Return the signature of a method that takes this call: exporters read names from it."""
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [
            *(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.positional),
            *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in self.keywords),
        ]
        return inspect.Signature([first, *parameters])

    def nest_results(self, results: Iterable[Any]) -> Any:
        """Return flat results nested as the original's."""
        return self.out_spec.unflatten(list(results))

    def flat_results(self, tree: Any) -> list[Any]:
        """Return nested results flat."""
        return list(self.out_spec.flatten_up_to(tree))

    def output_names(self, results: Sequence[bool], taken: Iterable[str]) -> tuple[str | None, ...]:
        """Return a name for each flat result: its dict keys joined by dots, else `output_<position>`.

        `results`: whether each is a tensor; the others get None. A name among `taken` (those of the inputs),
        or given before, is lengthened.
        """
        names: list[str | None] = [None] * len(results)
        used = set(taken)
        paths = {position: path for path, position in _paths(self.nest_results(range(len(results))), ())}
        for position, is_tensor in enumerate(results):
            if is_tensor:
                path = paths.get(position, ())
                keyed = bool(path) and all(isinstance(part, str) for part in path)
                name = ".".join(path) if keyed else f"output_{position}"
                while name in used:
                    name += "_output"
                names[position] = name
                used.add(name)
        return tuple(names)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        args = (*args, *(kwargs.pop(name) for name in self.positional[len(args) :] if name in kwargs))
        if kwargs.keys() != set(self.keywords):
            raise InputError(
                f"keyword arguments {sorted(kwargs)} were given, expected {sorted(self.keywords)}"
            )
        try:
            return list(self.in_spec.flatten_up_to((args, {name: kwargs[name] for name in self.keywords})))
        except (ValueError, TypeError) as error:
            raise InputError(f"the arguments are not nested as in the captured call: {error}") from error


def captured_call(exported: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return the structure of the call (with these arguments) that `exported` was captured with."""
    user = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    tensors = tuple(position for position, spec in enumerate(user) if isinstance(spec.arg, TensorArgument))
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    leaves = in_spec.flatten_up_to((args, dict(kwargs)))
    fixed = {position: leaf for position, leaf in enumerate(leaves) if position not in tensors}
    return Call(in_spec, out_spec, _positional_names(exported, len(args)), tuple(kwargs), fixed, tensors)


def _positional_names(exported: ExportedProgram, count: int) -> tuple[str, ...]:
    signature = exported.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature else None) or []
    return tuple(names[:count]) if len(names) >= count else tuple(f"args_{index}" for index in range(count))


def _paths(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield (keys and indices on the way, leaf) for the numbered leaves of nested results."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _paths(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _paths(value, (*path, index))
    elif isinstance(tree, int):
        yield path, tree
