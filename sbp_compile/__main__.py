"""`python -m sbp_compile`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line on the process's arguments; returns the exit code."""
    from sbp_compile.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
