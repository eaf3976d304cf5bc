"""Logs: one line per event, as JSON for machines or as text for people, to standard error.

Everything goes through the standard library's logging, ours by structlog and other libraries' as they are, so one setting
rules all. Values of keys that name secrets are masked whatever logs them.
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
"""Keys that hold a secret's word and are none."""


def configure_logging(level: str, form: str, *, stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    Args:
        level: The lowest level to log: debug, info, warning or error.
        form: "json", "text", or "auto": text on a terminal, else JSON.
        stream: Where to; standard error by default.
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
        # Where rich is installed, structlog's own choice prints the values of local variables: tokens, keys, prompts.
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
    # At INFO, httpx logs a line per request, where the call's own line says more; at DEBUG, aiosqlite what callers write.
    for name in ("httpx", "aiosqlite"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _holds_no_header(record: logging.LogRecord) -> bool:
    """Drop what grpc logs of a header that is not UTF-8: its value, which may be a token. The call's own line remains."""
    return not (record.name.startswith("grpc") and str(record.msg).startswith("Invalid encoding on"))


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what a secret-sounding key holds: a last line of defence, nothing should log one."""
    for key in event:
        if key not in _COUNTS and any(word in key.lower() for word in _SECRET_WORDS):
            event[key] = "***"
    return event


def escape_unprintable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape what moves a terminal's cursor or hides text: values come from callers and providers."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = repr(value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for a module; call it with an event's name and its values as keywords."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
