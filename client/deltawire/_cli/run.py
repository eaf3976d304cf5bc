"""Runs a command: errors in, exit status and messages out."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from deltawire._cli.arguments import check_text, make_parser
from deltawire._cli.connection import client_of
from deltawire._cli.output import log_on_stderr, print_error, say
from deltawire._cli.status import FAILED, OK, USAGE, FailedError, UsageError
from deltawire._errors import DeltawireError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from _typeshed import ReadableBuffer

    from deltawire._client import Client


def run(arguments: Sequence[str] | None) -> int:
    """Run a command and flush what it printed; see `deltawire._cli.main`.

    Raises:
        SystemExit: See `main`.
        KeyboardInterrupt: Ctrl-C; what came is printed.
    """
    _open_closed_files()
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Stderr(2, "w", closefd=False)), errors="backslashreplace", line_buffering=True
        )
    status = OK
    try:
        status = _run(arguments)
        # Here, and not at exit, so that a closed pipe can be handled.
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wants, for example `head -1`.
        _discard_output()
    except OSError as error:
        _discard_output()
        say(f"error: input or output failed: {error.strerror or error}")
        status = FAILED
    return status


def _run(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run the command's function, and report its errors."""
    try:
        options = make_parser().parse_args(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    function: Callable[[Client, argparse.Namespace], int] = options.run
    try:
        check_text(options)
        with client_of(options) as client, log_on_stderr():
            return function(client, options)
    except UsageError as error:
        say(f"error: {error}")
        return USAGE
    except FailedError as error:
        say(f"error: {error}")
        return FAILED
    except DeltawireError as error:
        print_error(error)
        return FAILED


class _Stderr(io.FileIO):
    """Standard error. If it cannot be written, the command continues, and its exit status has the result."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, and ignore a closed reader or a full disk."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _discard_output() -> None:
    """Let what is still in the buffer go to /dev/null, so that it does not fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_files() -> None:
    """Open /dev/null for each standard file that is closed, as after `<&-` or `>&-` in a shell.

    Python sets such a file to None. Its number is the lowest free one, which the next socket would get otherwise.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(null, "w" if number else "r", encoding="utf-8"))
