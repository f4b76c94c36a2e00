"""Names for new values of an ONNX graph."""

from __future__ import annotations


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Return a name that no value has yet, `wanted` if it may be, and take it."""
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted
