"""Ctrl-C and SIGTERM: both end a run with what was begun removed, and each with its exit code.

Libraries turn an exception that they did not expect into one of their own, or drop it. So that a run ends as the signal
asked, whatever became of the exception, the signal itself is remembered.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

_received: list[int] = []


class Terminated(BaseException):
    """What SIGTERM becomes; not a KeyboardInterrupt, after some of which Python ends itself by SIGINT."""


INTERRUPTIONS = (KeyboardInterrupt, Terminated)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make both signals one of INTERRUPTIONS for a while; in the main thread only."""
    before = {number: signal.signal(number, _interrupt) for number in EXIT_CODES}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted_exit_code() -> int | None:
    """Return the exit code of the first signal that came since `interruptible` began, None if none did."""
    return EXIT_CODES[signal.Signals(_received[0])] if _received else None


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
