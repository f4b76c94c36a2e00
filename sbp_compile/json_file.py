"""JSON from files that anyone may have written: bounded, each key once, numbers that are numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

LARGEST_FILE = 2**25
MOST_BRACKETS = (
    2**20
)  # lists and objects take 20 times the memory of their text, and the time of the garbage collector


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    `OSError` where it cannot be read; `ValueError` or `RecursionError` where it is too large, no JSON, or has a key
    twice, NaN or infinity.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    if content.count(b"[") + content.count(b"{") > MOST_BRACKETS:
        raise ValueError(f"it has more than {MOST_BRACKETS} lists and objects")
    return json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_no_number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} is there twice")
        found[key] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
