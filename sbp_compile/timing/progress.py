"""A progress bar that does not disturb what it watches: drawn between rounds, never from a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Progress = Callable[[float, str], None]

_REDRAW_S = 0.2


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a bar on `console`, set by (fraction done, what is being done); silent if it is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = RichProgress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    )
    task = bar.add_task("", total=1.0)
    drawn = 0.0

    def update(fraction: float, description: str) -> None:
        nonlocal drawn
        bar.update(task, completed=fraction, description=description)
        if time.monotonic() - drawn >= _REDRAW_S:
            bar.refresh()
            drawn = time.monotonic()

    with bar:
        yield update
