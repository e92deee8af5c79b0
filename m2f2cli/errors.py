"""The errors a user may see: one sentence saying what is wrong, one hint saying what to do."""

from __future__ import annotations


class M2F2Error(Exception):
    """An expected failure: printed without a traceback, then the program exits with ``exit_code``.

    Args:
        message: One sentence that names the thing at fault.
        hint: What to type or change to get past it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(M2F2Error):
    """The command was called wrongly: a flag, a value or a combination of them."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or option has an unknown name or an impossible value."""


class InputError(M2F2Error):
    """A picture, video or data set cannot be read.

    Args:
        message: One sentence that names the thing at fault.
        status: The word written to a record's ``status`` (see ``records.STATUSES``).
        hint: What to type or change to get past it.
    """

    def __init__(self, message: str, status: str = "unreadable", hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.status = status


class CheckpointError(M2F2Error):
    """A checkpoint folder or file is incomplete, malformed or of another kind than needed."""


class MissingExtraError(M2F2Error):
    """An optional dependency is not installed.

    Args:
        package: The module that could not be imported.
        extra: The extra of ``m2f2cli`` that brings it.
        purpose: What needs it, as a noun phrase.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed.",
            f"pip install 'm2f2cli[{extra}]'",
        )
