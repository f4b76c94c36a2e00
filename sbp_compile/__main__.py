"""`python -m sbp_compile`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run the command line on the process's arguments; returns the exit code.

    SIGTERM ends it as Ctrl-C does, with what was begun removed, and exit code 143.
    """
    try:
        signal.signal(signal.SIGTERM, _terminate)
        from sbp_compile.cli import main as run

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # before the command line itself was there to handle it
        print("sbp_compile: error: interrupted; nothing was written", file=sys.stderr)
        return 130


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
