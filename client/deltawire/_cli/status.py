"""Exit statuses, and the error that stands for wrong usage."""

from __future__ import annotations

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message is for whoever typed it."""
