"""The exceptions of the compiler and the exit codes of the command line.

Every message is one line: the name and value at fault, what was expected, what to do.
"""

from __future__ import annotations


class CompileError(Exception):
    """Base class; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(CompileError):
    """An option or an argument has a value that cannot be used."""

    exit_code = 2


class ModelFileError(CompileError):
    """The model file is missing, damaged, of an unknown format, or unsafe to load."""

    exit_code = 3


class InputError(CompileError):
    """Example or verification inputs do not fit the model."""

    exit_code = 4


class UnsupportedModelError(CompileError):
    """The model was read, but cannot be captured or compiled exactly."""

    exit_code = 5


class VerificationError(CompileError):
    """The small network disagrees with the original; nothing was written."""

    exit_code = 6


class OutputError(CompileError):
    """The output cannot be written."""

    exit_code = 7


class BatchPinnedWarning(UserWarning):
    """A dynamic batch was asked for, but the model works with one batch size only."""


class PickleTrustWarning(UserWarning):
    """A pickle is about to be loaded that may run any code, because the user said that it is trusted."""


class NarrowedWeightsWarning(UserWarning):
    """Weights were rounded to the dtype of the network that they were loaded into."""


class TuningCacheWarning(UserWarning):
    """The times that were measured could not be kept in the user's cache."""


class OpsetWarning(UserWarning):
    """The ONNX file that was given has an opset in which the small network cannot be written."""
