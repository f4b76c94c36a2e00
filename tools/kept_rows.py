"""Rows that a program keeps in a JSON file as they come, to go on where an earlier run stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sbp_compile.atomic import write_atomically

Row = TypeVar("Row")


def kept_rows(path: Path | None, make: Callable[..., Row]) -> list[Row]:
    """Read what `keep` wrote; `make` takes a row's fields by name. None where there is no file yet."""
    if path is None or not path.exists():
        return []
    return [make(**entry) for entry in json.loads(path.read_text())]


def keep(path: Path | None, rows: Sequence[Any]) -> None:
    """Write dataclass instances, if a file was asked for."""
    if path is not None:
        write_atomically(path, json.dumps([asdict(row) for row in rows], indent=1))


def first_line(error: BaseException) -> str:
    """Return the first line of a message that is not empty, else the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]
