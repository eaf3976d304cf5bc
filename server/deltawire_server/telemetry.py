"""Logging: one line per event, as JSON or text, to standard error.

The gateway's own records are rendered by structlog and those of libraries by the standard library's logging, in the same form and
at the same level. The values of keys that name secrets are masked in every record.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import queue
import sys
import threading
from typing import TYPE_CHECKING, TextIO

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

MAX_WAITING = 4 * 1024 * 1024
"""Characters of the lines that may wait for standard error; further lines are dropped and counted. If the reader of standard error
stops, calls go on."""

FLUSH_SECONDS = 2.0
"""How long the process waits at its end until the last lines are written."""

_SECRET_WORDS = ("token", "authorization", "password", "secret", "api_key")
_COUNTS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_prompt_tokens", "max_tokens")
"""Keys that contain one of these words and are not secret."""


class _Output:
    """Writes lines to a stream: at once, or in a thread so that the event loop never waits for the reader of standard error."""

    def __init__(self) -> None:
        self.stream: TextIO = sys.stderr
        self._waiting: queue.SimpleQueue[str | None] | None = None
        self._lock = threading.Lock()  # of the two counts; libraries log in threads of their own
        self._size = 0
        self._dropped = 0

    def write(self, line: str) -> None:
        """Write a line."""
        waiting = self._waiting
        if waiting is None:
            self._write(line)
            return
        with self._lock:
            if self._size >= MAX_WAITING:
                self._dropped += 1
                return
            self._size += len(line)
        waiting.put(line)

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Write in a thread until the end of the context, which waits for the last lines."""
        waiting = self._waiting = queue.SimpleQueue[str | None]()
        thread = threading.Thread(target=self._write_for_ever, args=(waiting,), name="log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._waiting = None
            waiting.put(None)
            thread.join(FLUSH_SECONDS)

    def _write_for_ever(self, waiting: queue.SimpleQueue[str | None]) -> None:
        while (line := waiting.get()) is not None:
            with self._lock:
                self._size -= len(line)
                dropped, self._dropped = self._dropped, 0
            if dropped:
                get_logger(__name__).warning("log lines dropped: standard error is not read", lines=dropped)
            self._write(line)

    def _write(self, line: str) -> None:
        # In one call, because several processes may write to the same stream.
        with contextlib.suppress(OSError, ValueError):  # closed: the line is lost
            self.stream.write(line + "\n")
            self.stream.flush()


_output = _Output()

in_background = _output.in_background


class _Logger:
    """The end of structlog's chain: writes what the processors rendered."""

    def __init__(self, name: str) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        """Write a line."""
        _output.write(line)

    debug = info = warning = error = critical = exception = msg


class _Handler(logging.Handler):
    """Writes the records of libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        _output.write(self.format(record))


def configure_logging(level: str, form: str, *, stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    Args:
        level: The lowest level to log: debug, info, warning or error.
        form: "json", "text", or "auto": text to a terminal, JSON to anything else.
        stream: The output; standard error by default.
    """
    output = _output.stream = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        mask_secrets,
    ]
    renderer: Processor
    if form == "json" or (form == "auto" and not output.isatty()):
        renderer = _as_json
        shared.append(structlog.processors.format_exc_info)
    else:
        shared.append(escape_unprintable)
        # If rich is installed, structlog's default formatter prints local variables, which may be tokens, keys and prompts.
        renderer = structlog.dev.ConsoleRenderer(
            colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Logger,
        cache_logger_on_first_use=False,
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    handler.addFilter(_holds_no_header)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # At INFO, httpx logs a line per request, which the call's own line makes redundant. At DEBUG, aiosqlite logs callers' data.
    for name in ("httpx", "aiosqlite"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except UnicodeEncodeError:  # half of a surrogate pair, for example in the name of a file
        return json.dumps(event, default=repr)


def _holds_no_header(record: logging.LogRecord) -> bool:
    """Drop grpc's log records of headers that are not UTF-8, because they contain the value, which may be a token."""
    return not (record.name.startswith("grpc") and str(record.msg).startswith("Invalid encoding on"))


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Mask the values of keys that name secrets. This is a safeguard: no code should log a secret."""
    for key in event:
        if _is_secret(key):
            event[key] = "***"
    return event


@functools.lru_cache(maxsize=1024)
def _is_secret(key: str) -> bool:
    return key not in _COUNTS and any(word in key.lower() for word in _SECRET_WORDS)


def escape_unprintable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, which could manipulate a terminal: values come from callers and providers."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = repr(value)
    return event


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger for a module. Call it with the name of an event, and its values as keyword arguments."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger
