"""Makes this process export traces, as the standard OTEL_ variables say."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from deltawire_server.telemetry import get_logger
from deltawire_server.tracing import tracer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_EXPORTERS = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_log = get_logger(__name__)


@contextlib.asynccontextmanager
async def exporting(variables: Mapping[str, str], version: str, worker: int | None = None) -> AsyncIterator[None]:
    """Export traces until the end of the context, which waits a limited time for the last ones.

    Without a variable that configures an exporter, nothing is imported. If traces cannot be exported, the log says why, and the
    gateway serves without them.

    Args:
        variables: The environment of this process, from which OpenTelemetry reads the details itself.
        version: The version of the gateway.
        worker: The number of the worker; `None` if this process is the only one.
    """
    names = _exporters(variables)
    if not names:
        yield
        return
    try:
        from deltawire_server.tracing import otel

        recording = otel.RecordingTracer(names, version, worker)
    except ModuleNotFoundError as error:
        _log.warning(
            "traces are not exported",
            problem=f"{error.name} is missing: pip install 'deltawire[otel]', or unset the OTEL_ variables",
        )
        yield
        return
    except Exception as error:  # noqa: BLE001 (whatever a library makes of the variables)
        _log.warning("traces are not exported", problem=f"{error}: correct the OTEL_ variables")
        yield
        return
    _log.info("traces are exported", exporters=list(names))
    before, tracer.current = tracer.current, recording
    try:
        yield
    finally:
        tracer.current = before
        # This blocks the event loop, on which nothing runs any more.
        if not recording.close():
            _log.warning("traces may be lost: the collector did not take the last ones in time")


def _exporters(variables: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the exporters that the variables configure. An empty variable is the same as none."""
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    default = "otlp" if any(variables.get(name) for name in _ENDPOINTS) else "none"
    names = (name.strip() for name in (variables.get(_EXPORTERS) or default).split(","))
    return tuple(name for name in names if name not in ("", "none"))
