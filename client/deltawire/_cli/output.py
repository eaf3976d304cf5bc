"""What the commands print alike: messages as JSON lines, tables, names of enum values, notes, errors."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToJson

from deltawire._cli.terminal import one_line
from deltawire._errors import CallError, ProtocolError, UnauthenticatedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from google.protobuf.message import Message as ProtoMessage

    from deltawire._errors import DeltawireError


def say(text: str) -> None:
    """Print a line about the answer to standard error; its text may come from anywhere."""
    print(one_line(text), file=sys.stderr)


def print_line(text: str) -> None:
    """Print a line of the result to standard output; its text may come from anywhere."""
    print(one_line(text))


def print_json(message: ProtoMessage) -> None:
    """A message as one line of protobuf JSON, at once."""
    print_json_text(MessageToJson(message, indent=None))


def print_json_text(text: str) -> None:
    """A line of JSON, at once. JSON escapes all but ASCII, and every control character but DEL."""
    print(text.replace("\x7f", "\\u007f"), flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under a head, columns aligned; the last column is not padded."""
    lines = [[one_line(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        print_row(line, widths)


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """A line of a table, at once: every cell but the last is padded to its column's width."""
    cells = [one_line(cell) for cell in cells]
    padded = [cell.ljust(width) for cell, width in zip(cells[:-1], widths, strict=True)]
    print("  ".join([*padded, cells[-1]]).rstrip(), flush=True)


def word(enum: Any, value: int, prefix: str) -> str:  # noqa: ANN401 -- any enum of the API
    """An enum value's name without its prefix; the number of one that this version does not know."""
    return str(enum.Name(value)).removeprefix(prefix) if value in enum.values() else str(value)


def note_unreachable(provider_ids: Sequence[str]) -> None:
    """Say that what is listed is not all news."""
    if provider_ids:
        providers = ", ".join(provider_ids)
        say(f"note: no answer from {providers}: models are shown as they were, and new ones not at all")


def print_error(error: DeltawireError) -> None:
    """An error as it can be acted upon: what failed, which fields, and the request id for the operator."""
    say(f"error: {error}")
    if isinstance(error, CallError):
        for violation in error.violations:
            detail = f"{violation.field}: {violation.description}"
            # The gateway's message mostly lists the violations already.
            if violation.description == error.message:
                say(f"  field: {violation.field}")
            elif detail not in error.message:
                say(f"  {detail}")
        if error.retry_after is not None:
            say(f"  try again in {error.retry_after:g} s")
    if isinstance(error, UnauthenticatedError):
        say("  set --token or $DELTAWIRE_TOKEN to your key for the gateway")
    if isinstance(error, CallError | ProtocolError) and error.request_id:
        say(f"  request id: {error.request_id}")


class _OneLine(logging.Formatter):
    """The client's log lines repeat text from the server."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line."""
        return one_line(super().format(record))


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Let what the client logs be seen: that a connection was lost, and why."""
    logger = logging.getLogger("deltawire")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("note: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
