"""Exit statuses, and the errors that stand for them."""

from __future__ import annotations

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """The command cannot be executed as given; the message is for the user who typed it."""


class FailedError(Exception):
    """The command is valid and failed, although every call succeeded."""
