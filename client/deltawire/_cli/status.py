"""Exit statuses, and the errors that stand for them."""

from __future__ import annotations

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message is for whoever typed it."""


class FailedError(Exception):
    """What was asked for is right and could not be done now, though every call came back."""
