"""The generated module's signature and results: the original's, in Python text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from sbp_compile.capture.call import Call
from sbp_compile.emit.source_text import literal


class _Leaf(str):
    """The text of one tensor or number in a nested structure."""


@dataclass(frozen=True)
class Interface:
    """The signature after `def forward`, what each input is in terms of its parameters, and how results are nested.

    `inputs`: the text of each placeholder's value, by name: the parameter itself, or an item of it.
    """

    signature: str
    parameters: tuple[str, ...]
    inputs: dict[str, str]
    call: Call

    @classmethod
    def of(cls, call: Call, graph: fx.Graph) -> Interface:
        """Return the interface for a call; `TypeError` where an argument's name or a container has no text."""
        names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        args, kwargs = call.nest_arguments(_Leaf(name) for name in names)
        trees = [*zip(call.positional, args, strict=True), *kwargs.items()]
        inputs: dict[str, str] = {}
        for name, tree in trees:
            if not name.isidentifier() or name in {"torch", "F", "nn", "self"}:
                raise TypeError(f"an argument called {name!r}")
            inputs |= dict(_paths(tree, name))
        parameters = [_parameter(name, tree) for name, tree in trees]
        if kwargs:
            parameters.insert(len(args), "*")
        signature = ", ".join(["self", *_without_gaps(parameters)])
        return cls(signature, tuple(name for name, _ in trees), inputs, call)

    def results(self, values: Sequence[Any], texts: Sequence[str]) -> str:
        """Return the text of the results; `texts`: of each flat one."""
        return _nested_text(self.call.nest_results(map(_Leaf, texts)))


def _paths(tree: Any, text: str) -> Iterator[tuple[str, str]]:
    """Yield (input, text) for the tensors in an argument."""
    if isinstance(tree, _Leaf):
        yield str(tree), text
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _paths(item, f"{text}[{literal(key)}]")
    elif isinstance(tree, (list, tuple)):
        for position, item in enumerate(tree):
            yield from _paths(item, f"{text}[{position}]")


def _parameter(name: str, tree: Any) -> str:
    """Return a parameter, with a default where it was fixed at capture."""
    if isinstance(tree, (_Leaf, dict, list, tuple)):
        return name
    return f"{name}={literal(tree)}"


def _without_gaps(parameters: Sequence[str]) -> list[str]:
    """Drop the default of a parameter that one without follows: Python does not take it."""
    found: list[str] = []
    keywords = parameters.index("*") if "*" in parameters else len(parameters)
    for position, text in enumerate(parameters):
        later = parameters[position + 1 : keywords]
        followed = position < keywords and any("=" not in other for other in later)
        found.append(text.partition("=")[0] if followed else text)
    return found


def _nested_text(tree: Any) -> str:
    if isinstance(tree, _Leaf):
        return str(tree)
    if type(tree) is dict:
        return f"{{{', '.join(f'{literal(key)}: {_nested_text(item)}' for key, item in tree.items())}}}"
    if type(tree) is list:
        return f"[{', '.join(map(_nested_text, tree))}]"
    if type(tree) is tuple:
        return f"({', '.join(map(_nested_text, tree))}{',' if len(tree) == 1 else ''})"
    raise TypeError(f"a result of type {type(tree).__name__}")
