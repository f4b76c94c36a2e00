"""Printing the report: a reader that goes away ends the printing and nothing else."""

import io
import os

import pytest

from sbp_compile.errors import OutputError
from sbp_compile.report.console import ReportConsole


def test_a_reader_that_goes_away_makes_the_console_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        console = ReportConsole(file=stream)
        console.print("a line")
        assert console.quiet
        console.print("nobody reads this")


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    message = "the network has been written, but its report cannot be printed: no space left on device"
    with pytest.raises(OutputError, match=message):
        ReportConsole(file=FullDisk()).print("a line")
