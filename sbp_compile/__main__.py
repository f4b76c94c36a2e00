"""`python -m sbp_compile`."""

from __future__ import annotations

import io
import sys

from sbp_compile.interruption import INTERRUPTIONS, interrupted_exit_code, interruptible


def main() -> int:
    """Run the command line on the process's arguments; returns the exit code.

    SIGTERM ends it as Ctrl-C does, with what was begun removed, and exit code 143.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in a report may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    with interruptible():
        try:
            from sbp_compile.cli import main as run

            return run(sys.argv[1:])
        except INTERRUPTIONS:  # before the command line itself was there to handle it
            print("sbp_compile: error: interrupted; nothing was written", file=sys.stderr)
            return interrupted_exit_code() or 130


if __name__ == "__main__":
    sys.exit(main())
