"""Logging: one line per event, as JSON or text, to standard error.

All records go through the standard library's logging, those of the gateway by structlog, so one setting applies to all. The values
of keys that name secrets are masked in every record.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET_WORDS = ("token", "authorization", "password", "secret", "api_key")
_COUNTS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_prompt_tokens", "max_tokens")
"""Keys that contain one of these words and are not secret."""


def configure_logging(level: str, form: str, *, stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    Args:
        level: The lowest level to log: debug, info, warning or error.
        form: "json", "text", or "auto": text to a terminal, JSON to anything else.
        stream: The output; standard error by default.
    """
    output = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        mask_secrets,
    ]
    renderer: Processor
    if form == "json" or (form == "auto" and not output.isatty()):
        renderer = structlog.processors.JSONRenderer()
        shared.append(structlog.processors.format_exc_info)
    else:
        shared.append(escape_unprintable)
        # If rich is installed, structlog's default formatter prints local variables, which may be tokens, keys and prompts.
        renderer = structlog.dev.ConsoleRenderer(
            colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
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


def _holds_no_header(record: logging.LogRecord) -> bool:
    """Drop grpc's log records of headers that are not UTF-8, because they contain the value, which may be a token."""
    return not (record.name.startswith("grpc") and str(record.msg).startswith("Invalid encoding on"))


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Mask the values of keys that name secrets. This is a safeguard: no code should log a secret."""
    for key in event:
        if key not in _COUNTS and any(word in key.lower() for word in _SECRET_WORDS):
            event[key] = "***"
    return event


def escape_unprintable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, which could manipulate a terminal: values come from callers and providers."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = repr(value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for a module. Call it with the name of an event, and its values as keyword arguments."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
