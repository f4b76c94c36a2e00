"""Passes and pipelines: frozen dataclasses from Program to Program, with one contract checked around each.

A pipeline is a tuple of passes and itself a pass. After each pass the Program is linted, the time is taken and the
callback is called: printing, dumping and verifying every step are all that callback. Where constants are large, what
was dropped is collected at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from passes.ir.errors import PassError
from passes.ir.program import Program


@dataclass(frozen=True)
class Note:
    """Something a user may want to know: which value, and what happened there."""

    where: str
    text: str


@dataclass(frozen=True)
class Result:
    """What a pass returns: the new Program, whether anything changed, and notes for the report."""

    program: Program
    changed: bool
    notes: tuple[Note, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """A pure function from Program to Result; its dataclass fields are its options."""

    @property
    def name(self) -> str: ...

    def __call__(self, program: Program) -> Result: ...


@dataclass(frozen=True)
class Step:
    """One executed pass: its name, the Programs around it, its seconds and its notes."""

    name: str
    before: Program
    after: Program
    seconds: float
    notes: tuple[Note, ...]


Callback = Callable[[Step], None]
Noted = Callable[[Step], Step]
"""What is kept of a step that the callback does not see at once."""


@dataclass(frozen=True)
class Pipeline:
    """Passes run in order; with `repeat`, again until none of them changes anything (at most `limit` rounds)."""

    passes: tuple[Pass, ...]
    name: str = "pipeline"
    repeat: bool = False
    limit: int = 10
    callback: Callback | None = field(default=None, compare=False)

    def __call__(self, program: Program) -> Result:
        notes: list[Note] = []
        any_change = False
        for _ in range(self.limit if self.repeat else 1):
            round_changed = False
            for entry in self.passes:
                result = self._run(entry, program)
                notes += [note for note in result.notes if note not in notes]
                round_changed |= result.changed
                is_new = result.program is not program
                program = result.program
                if is_new:
                    program.constants.free_dropped()
            any_change |= round_changed
            if not round_changed:
                break
        return Result(program, any_change, tuple(notes))

    def _run(self, entry: Pass, program: Program) -> Result:
        start = time.perf_counter()
        try:
            result = entry(program)
            if not isinstance(entry, Pipeline):
                result.program.lint()
        except PassError as error:
            raise type(error)(f"{self.name}/{entry.name}: {error}") from error
        if self.callback is not None and not isinstance(entry, Pipeline):
            seconds = time.perf_counter() - start
            self.callback(Step(entry.name, program, result.program, seconds, result.notes))
        return result

    def with_callback(self, callback: Callback, noted: Noted | None = None) -> Pipeline:
        """The same pipeline, nested ones included, reporting every step to `callback`.

        `noted`: what the callback is to see of a step (default: the step itself), made as soon as the step is over; a
        pipeline that chooses between runs holds that of every step until it has chosen.
        """
        if noted is not None:
            made = noted
            return self.with_callback(lambda step: callback(made(step)))
        entries = tuple(
            entry.with_callback(callback) if isinstance(entry, Pipeline) else entry for entry in self.passes
        )
        return Pipeline(entries, self.name, self.repeat, self.limit, callback)
