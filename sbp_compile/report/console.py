"""Where the report is printed: a reader that goes away, or cannot take it, does not undo what was written."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

from sbp_compile.errors import OutputError


class ReportConsole(Console):
    """A console that falls silent when nobody reads on (`| head -1`), for files may still have to be written.

    Where the output cannot be written for another reason, a full disk for example, `print` raises `OutputError`.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.quiet = True
            reason = (error.strerror or str(error)).lower()
            raise OutputError(
                f"the network has been written, but its report cannot be printed: {reason}"
            ) from error

    def on_broken_pipe(self) -> None:
        """Fall silent; what Python flushes at exit goes nowhere as well."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
