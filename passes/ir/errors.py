"""The exceptions of the passes; each message is one line a user can act on."""


class PassError(Exception):
    """Base class of every error that the passes raise on purpose."""


class LintError(PassError):
    """A Program broke one of its invariants; the message says what was had and what was wanted."""


class UnsupportedError(PassError):
    """The program contains something that no exact result can be given for."""
