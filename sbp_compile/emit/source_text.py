"""Python text of literals, names and expressions, for the generated module."""

from __future__ import annotations

import keyword
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch

LONGEST_LINE = 100


# How tightly an expression holds together: what may stand beside an operator without parentheses.
LOOSE, SUM, PRODUCT, ATOM = range(4)


@dataclass(frozen=True)
class Text:
    """The text of an expression, and how tightly it holds together."""

    text: str
    level: int = ATOM

    def at(self, level: int) -> str:
        """Return the text, in parentheses if it is looser than `level`."""
        return self.text if self.level >= level else f"({self.text})"


def literal(value: Any) -> str:
    """Return the Python text of an argument that is no tensor; exact for numbers. `TypeError` for anything unknown."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if abs(value) < float("inf") else f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    raise TypeError(f"{type(value).__name__} {value!r}")


def identifier(wanted: str, taken: Container[str], prefix: str = "layer") -> str:
    """Return a name like `wanted` that Python accepts (ASCII) and that is not taken; `prefix` before a digit."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", wanted).strip("_") or prefix
    if name[0].isdigit():
        name = f"{prefix}_{name}"
    if keyword.iskeyword(name):
        name += "_"
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def call_text(function: str, *args: str, **kwargs: str) -> Text:
    """Return the text of a call."""
    given = [*args, *(f"{name}={value}" for name, value in kwargs.items())]
    return Text(f"{function}({', '.join(given)})")


def is_long(line: str, indent: str) -> bool:
    """Whether a statement is longer than a line should be."""
    return len(indent) + len(line) > LONGEST_LINE


def wrapped(line: str, indent: str) -> list[str]:
    """Return a statement as lines of bearable length: the arguments of its outermost call on lines of their own."""
    start = _opening(line) if is_long(line, indent) and line.endswith(")") else -1
    if start < 0 or not re.fullmatch(r"(return |[^=]+ = )?[\w.]*", line[:start]):
        return [indent + line]
    parts = _split_arguments(line[start + 1 : -1])
    inner = [*line_groups(parts, LONGEST_LINE - len(indent) - 5)]
    return [indent + line[: start + 1], *(f"{indent}    {part}" for part in inner), f"{indent})"]


def line_groups(parts: list[str], width: int) -> list[str]:
    """Return comma-separated parts, as many to a line as fit; each line ends with a comma."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f" {part},"
        else:
            lines.append(f"{part},")
    return lines


def _opening(line: str) -> int:
    """Return the position of the parenthesis that the last character closes."""
    depth = 0
    for position in range(len(line) - 1, -1, -1):
        depth += {")": 1, "]": 1, "}": 1, "(": -1, "[": -1, "{": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced: {line}")


def _split_arguments(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += {")": -1, "]": -1, "}": -1, "(": 1, "[": 1, "{": 1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [part for part in (*parts, text[start:].strip()) if part]
