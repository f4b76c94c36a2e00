"""The body of the generated `forward`: short names that are used again, small expressions put into larger ones."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from sbp_compile.emit.source_call import Interface
from sbp_compile.emit.source_calls import spelled
from sbp_compile.emit.source_layers import Layer
from sbp_compile.emit.source_text import Text, call_text, is_long, literal, wrapped

INDENT = " " * 8
DEEPEST = 3
MOST_OPERANDS = 2
_NAMES = ("x", "y", "z", "u", "v", "w")
_OWN = ("self", "torch", "F", "nn")


def body_lines(
    graph: fx.Graph,
    names: Mapping[fx.Node, str],
    layers: Mapping[fx.Node, tuple[str, Layer]],
    modules: Mapping[str, str],
    interface: Interface,
) -> list[str]:
    """Return the indented lines of the body; arguments as of `_Body`. What makes a line too long gets its own."""
    apart: frozenset[fx.Node] = frozenset()
    while True:
        body = _Body(graph, names, layers, modules, interface, apart)
        lines = body.lines()
        if not body.long:
            return lines
        apart |= body.long


class _Body:
    """Writes the statements of a graph in order.

    `names`: attributes of the constants outside layers; `layers`: attribute and layer of each call that is one;
    `modules`: the original module of each value, shown as a comment where it changes. `apart`: values that get a line
    of their own in any case.
    """

    def __init__(
        self,
        graph: fx.Graph,
        names: Mapping[fx.Node, str],
        layers: Mapping[fx.Node, tuple[str, Layer]],
        modules: Mapping[str, str],
        interface: Interface,
        apart: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self._graph = graph
        self._names = names
        self._layers = layers
        self._modules = modules
        self._interface = interface
        self._apart = apart
        self.long: set[fx.Node] = set()
        self._variables: dict[fx.Node, str] = {}
        self._inlined = self._find_inlined()
        self._statements = [
            node
            for node in graph.nodes
            if node.op in {"call_function", "output"}
            and node not in self._inlined
            and not self._is_piece(node)
        ]
        self._last_uses = {
            operand: position
            for position, node in enumerate(self._statements)
            for operand in self._operands(node)
        }

    def lines(self) -> list[str]:
        """Return the indented lines of the body."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._variables[node] = self._interface.inputs[str(node.target)]
        found: list[str] = []
        section = ""
        for position, node in enumerate(self._statements):
            here = self._section(node)
            if here != section and re.fullmatch(
                r"[\w.-]+", here
            ):  # a name may hold anything, a line's end included
                found.append(f"{INDENT}# {here}")
            section = here or section
            found += self._returned(node) if node.op == "output" else self._statement(node, position)
        return found

    def _section(self, node: fx.Node) -> str:
        """Return the block of the original that a statement belongs to: that of its first layer, else its own."""
        layer = next((part for part in self._parts(node) if part in self._layers), node)
        return ".".join(self._modules.get(layer.name, "").split(".")[:-1][:2])

    def _parts(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a statement's call and those that are put into it."""
        for operand in node.all_input_nodes:
            if operand in self._inlined:
                yield from self._parts(operand)
        yield node

    def _is_piece(self, node: fx.Node) -> bool:
        """Whether a value is one of several results of a layer: it gets its name together with the others."""
        return node.target is operator.getitem and node.args[0] in self._layers

    def _find_inlined(self) -> set[fx.Node]:
        """Return the calls whose text goes into that of their only reader."""
        found: set[fx.Node] = set()
        depths: dict[fx.Node, int] = {}
        for node in self._graph.nodes:
            inner = [depths[operand] for operand in node.all_input_nodes if operand in found]
            depths[node] = 1 + max(inner, default=0)
            if node.op == "call_function" and depths[node] < DEEPEST and self._suits_its_reader(node):
                found.add(node)
        return found

    def _suits_its_reader(self, node: fx.Node) -> bool:
        """Whether a call and its only reader are one step: an activation of a layer, a sum of two branches."""
        reader = next(iter(node.users), None)
        if reader is None or len(node.users) > 1 or node in self._apart or self._is_piece(node):
            return False
        mentions: list[fx.Node] = []
        fx.node.map_arg((reader.args, dict(reader.kwargs)), mentions.append)
        several = node in self._layers and self._layers[node][1].pieces
        if several or mentions.count(node) > 1 or len(mentions) > MOST_OPERANDS:
            return False
        return (reader.op == "output" and len(mentions) == 1) or (
            reader.op != "output" and reader not in self._layers
        )

    def _operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the values with a name that a statement reads, those of what is put into it included."""
        for operand in node.all_input_nodes:
            if operand in self._inlined:
                yield from self._operands(operand)
            elif operand.op != "get_attr":
                yield operand

    def _statement(self, node: fx.Node, position: int) -> list[str]:
        text = self._text(node, whole=True).text
        live = {
            _root(name)
            for value, name in self._variables.items()
            if self._last_uses.get(value, -1) > position
        }
        own = {_root(self._variables[operand]): None for operand in self._operands(node)}
        names = _free_names([name for name in own if name in _NAMES], live | set(_OWN))
        pieces = self._layers[node][1].pieces if node in self._layers else ""
        if not pieces:
            self._variables[node] = target = next(names)
            if is_long(f"{target} = {text}", INDENT):
                self.long |= self._inlined.intersection(node.all_input_nodes)
            return wrapped(f"{target} = {text}", INDENT)
        read = {piece.args[1]: piece for piece in node.users}
        for number, piece in read.items():
            self._variables[piece] = next(names)
            pieces = pieces.replace(str(number), f"{{{number}}}")
        shown = {str(number): self._variables[piece] for number, piece in read.items()}
        target = re.sub(r"\{(\d)\}|\d", lambda found: shown.get(found[1] or "", "_"), pieces)
        return wrapped(f"{target} = {text}", INDENT)

    def _text(self, node: fx.Node, *, whole: bool = False) -> Text:
        """Return the text that stands for a value: its name, or its expression if it has none (yet: `whole`)."""
        if node.op == "get_attr":
            return Text(f"self.{self._names[node]}")
        if node in self._variables:
            return Text(self._variables[node])
        assert whole or node in self._inlined, node
        if node not in self._layers:
            return spelled(node, self._text)
        name, layer = self._layers[node]
        return call_text(f"self.{name}", *(self._argument(value) for value in layer.inputs))

    def _argument(self, value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(self._argument(item) for item in value)})"
        return self._text(value).text

    def _returned(self, node: fx.Node) -> list[str]:
        values: Any = node.args[0]
        texts = [self._text(value).text if isinstance(value, fx.Node) else literal(value) for value in values]
        return wrapped(f"return {self._interface.results(values, texts)}", INDENT)


def _free_names(own: list[str], taken: set[str]) -> Iterator[str]:
    """Yield names that are not taken: those of the operands first, then letters, then numbered ones."""
    given = set(taken)
    for name in itertools.chain(own, _NAMES, (f"t{number}" for number in itertools.count(1))):
        if name not in given:
            given.add(name)
            yield name


def _root(text: str) -> str:
    """Return the name in front of `name[0]["key"]`."""
    return text.partition("[")[0]
