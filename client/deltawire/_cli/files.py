"""Reads what was named on the command line: a file, or "-" for standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from deltawire._cli.status import UsageError


def read_text(path: str) -> str:
    """A file's text; "-" is standard input."""
    try:
        if path != "-":
            return Path(path).read_text(encoding="utf-8")
        text = sys.stdin.read()
        # Python lets bytes that are no text through, as lone surrogates.
        text.encode()
    except (OSError, UnicodeError) as error:
        refuse_file(path, error)
    return text


def refuse_file(path: str, error: Exception) -> NoReturn:
    """Say which file cannot be read, and why."""
    why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
    message = f"{name_of(path)}: {why}"
    raise UsageError(message) from error


def name_of(path: str) -> str:
    """What to call a file in a message."""
    return "standard input" if path == "-" else path
