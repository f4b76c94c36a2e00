"""One call of an ONNX graph: its operator, attributes and operands' names; and the table of translations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sbp_compile.errors import UnsupportedModelError

ONNX_DOMAINS = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    `inputs`, `outputs`: names, empty where one is left out; `attributes`: Python values, graphs as `Graph`;
    `opset`: of the operator's domain; `constant`: which operands depend on the file alone; `wanted`: which outputs
    something reads; `captured`: what the graphs among its attributes read from outside.
    """

    op: str
    name: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constant: tuple[bool, ...]
    wanted: tuple[bool, ...] = ()
    captured: frozenset[str] = frozenset()

    def wanting(self, wanted: tuple[bool, ...]) -> Node:
        """Return the node with other outputs read."""
        return dataclasses.replace(self, wanted=wanted)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def is_constant(self, position: int) -> bool:
        """Whether an operand depends on the file alone."""
        return position < len(self.constant) and self.constant[position]

    def wants(self, position: int) -> bool:
        """Whether something reads that output."""
        return position < len(self.wanted) and self.wanted[position]

    @property
    def place(self) -> str:
        """The node in words, for messages."""
        made = next(filter(None, self.outputs), "")
        shown = f"node {self.name!r}" if self.name else f"the node that gives {made!r}"
        return f"{self.op} ({shown}, domain {self.domain or 'ai.onnx'}, opset {self.opset})"

    def refusal(self, reason: str) -> UnsupportedModelError:
        """Return the refusal of this node, to be raised."""
        return UnsupportedModelError(f"ONNX operator {self.place}: {reason}")


Translation = Callable[..., Any]
TRANSLATIONS: dict[str, Translation] = {}


def translates(*operators: str) -> Callable[[Translation], Translation]:
    """Put a function into the table: it takes the node and its operands, and gives one result or a tuple of them."""

    def register(function: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(operators, function))
        return function

    return register
