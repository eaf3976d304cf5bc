"""Reads what was named on the command line: a file, or "-" for standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn, TextIO

from deltawire._cli.status import UsageError

# Three times the largest request that a gateway takes by default. Devices such as /dev/zero have no end.
MAX_CHARACTERS = 64 * 1024 * 1024


def read_text(path: str) -> str:
    """A file's text; "-" is standard input."""
    try:
        if path != "-":
            with Path(path).open(encoding="utf-8") as file:
                return _bounded(file, path)
        text = _bounded(sys.stdin, path)
        # Python lets bytes that are no text through, as lone surrogates.
        text.encode()
    except (OSError, UnicodeError) as error:
        refuse_file(path, error)
    return text


def _bounded(file: TextIO, path: str) -> str:
    # Some editors begin a file with a byte order mark.
    text = file.read(MAX_CHARACTERS + 1).removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        message = f"{name_of(path)}: has more than {MAX_CHARACTERS} characters"
        raise UsageError(message)
    return text


def refuse_file(path: str, error: Exception) -> NoReturn:
    """Say which file cannot be read, and why."""
    why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
    message = f"{name_of(path)}: {why}"
    raise UsageError(message) from error


def name_of(path: str) -> str:
    """What to call a file in a message."""
    return "standard input" if path == "-" else path
