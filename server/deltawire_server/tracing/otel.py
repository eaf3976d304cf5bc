"""Records spans with OpenTelemetry's SDK, and exports them in the background.

The names of attributes are those of OpenTelemetry's semantic conventions for RPC and for generative AI; those that begin with
`deltawire.` have no convention. The SDK reads the sampler, the limits of its queue and the exporter's options from the environment.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deltawire_server.telemetry import get_logger
from deltawire_server.tracing.tracer import CANCELED, AttemptSpan, CallSpan, TraceContext, Tracer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Span

FLUSH_SECONDS = 2.0
"""How long the process waits at its end until the last spans are exported."""

QUIET_SECONDS = 60.0
"""The library reports each failed export; of its reports, one in this time is logged."""

SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""The status codes that make a server's span an error, by the conventions for gRPC."""

_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
"""The exporters of OTLP by protocol."""

_OF_CALLS = ("completion_id", "request_id", "caller", "model", "provider", "attempts", "passed_to")
"""The values of a call's log line that become attributes of its span."""

_log = get_logger(__name__)
_propagator = TraceContextTextMapPropagator()


class RecordingTracer(Tracer):
    """Records spans and exports them in the background. `close` it in the end.

    Args:
        exporters: Names of exporters, as in OTEL_TRACES_EXPORTER; "otlp" is the one of the configured protocol.
        version: The version of the gateway.
        worker: The number of the worker; `None` if the process is the only one.

    Raises:
        ValueError: A variable has an invalid value.
        Exception: Whatever an exporter raises because of its variables.
    """

    def __init__(self, exporters: Sequence[str], version: str, worker: int | None = None) -> None:
        logger = logging.getLogger("opentelemetry")
        logger.handlers[:] = [_Reports()]
        logger.propagate = False
        defaults: dict[str, Any] = {
            "service.name": "deltawire",
            "service.version": version,
            "service.instance.id": str(uuid.uuid4()),
        }
        if worker is not None:
            defaults["deltawire.worker"] = worker
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have precedence.
        resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in [_exporter(name) for name in exporters]:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("deltawire", version)

    def close(self) -> bool:
        """Export the last spans within `FLUSH_SECONDS`; return whether that was enough. Record nothing afterwards."""
        # In a thread of its own, because the library may wait much longer, and a daemon, so that the process ends all the same.
        closing = threading.Thread(target=self._provider.shutdown, name="export the last spans", daemon=True)
        closing.start()
        closing.join(FLUSH_SECONDS)
        return not closing.is_alive()

    def start_call(self, method: str, traceparent: str | None, tracestate: str | None) -> CallSpan:
        """Start the span of a call; see `Tracer.start_call`."""
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        parent = _parent(traceparent, tracestate)
        return _RecordedCall(self._tracer.start_span(method, parent, SpanKind.SERVER, attributes))

    def start_attempt(
        self,
        operation: str,
        model: str,
        *,
        base_url: str,
        provider_id: str,
        completion_id: str,
        traceparent: str | None,
        tracestate: str | None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> AttemptSpan:
        """Start the span of an attempt; see `Tracer.start_attempt`."""
        address = urlsplit(base_url)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": max_tokens,
            "gen_ai.request.temperature": temperature,
            "gen_ai.request.top_p": top_p,
            "server.address": address.hostname,
            "server.port": address.port or (443 if address.scheme == "https" else 80),
            "deltawire.provider": provider_id,
            "deltawire.replica": base_url,
            "deltawire.completion_id": completion_id,
        }
        parent = _parent(traceparent, tracestate)
        span = self._tracer.start_span(f"{operation} {model}", parent, SpanKind.CLIENT, _given(attributes))
        return _RecordedAttempt(span)


class _RecordedCall(CallSpan):
    def __init__(self, span: Span) -> None:
        self._span = span
        self.context = _context(span)

    def link(self, traceparent: str | None) -> None:
        other = get_current_span(_parent(traceparent, None)).get_span_context()
        if other.is_valid and other.span_id != self._span.get_span_context().span_id:
            self._span.add_link(other)

    def end(self, code: str, reason: str, values: Mapping[str, object]) -> None:
        if not self._span.is_recording():
            return
        attributes = {f"deltawire.{name}": values.get(name) for name in _OF_CALLS}
        attributes["rpc.response.status_code"] = code
        if code != "OK":
            attributes["error.type"] = reason or code
        self._span.set_attributes(_given(attributes))
        if code in SERVER_FAULTS:
            self._span.set_status(StatusCode.ERROR, reason or code)
        self._span.end()


class _RecordedAttempt(AttemptSpan):
    def __init__(self, span: Span) -> None:
        self._span = span
        self._start = time.monotonic()
        self.context = _context(span)

    def receive_first_chunk(self) -> None:
        self._span.add_event("first chunk")
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - self._start)

    def end(
        self,
        error_type: str = "",
        *,
        response_id: str = "",
        finish_reasons: Sequence[str] = (),
        input_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        if not self._span.is_recording():  # it is not sampled, or has ended
            return
        attributes = {
            "error.type": error_type,
            "gen_ai.response.id": response_id,
            "gen_ai.response.finish_reasons": finish_reasons,
            "gen_ai.usage.input_tokens": input_tokens,
            "gen_ai.usage.output_tokens": output_tokens,
        }
        self._span.set_attributes(_given(attributes))
        if error_type not in ("", CANCELED):
            self._span.set_status(StatusCode.ERROR, error_type)
        self._span.end()


class _Reports(logging.Handler):
    """Logs the library's reports, at most one in `QUIET_SECONDS`, because a dead collector causes one for each export."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._quiet_until = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            _log.warning("OpenTelemetry reports a problem", problem=record.getMessage())


def _exporter(name: str) -> Any:  # noqa: ANN401 (exporters ship no types)
    """The exporter of this name, which packages register."""
    if name == "otlp":
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(os.environ.get, variables)), "grpc")
        if protocol not in _OTLP:
            raise ValueError(f"the protocol {protocol!r} is unknown; use one of {', '.join(_OTLP)}")
        name = _OTLP[protocol]
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        package = f"opentelemetry-exporter-{name.replace('_', '-')}"
        raise ValueError(f"there is no exporter {name!r}; if {package} provides it, install that")
    return next(iter(found)).load()()


def _parent(traceparent: str | None, tracestate: str | None) -> Context:
    """The context of the span that the headers identify; empty without one, which begins a trace."""
    headers = {"traceparent": traceparent, "tracestate": tracestate}
    return _propagator.extract({name: value for name, value in headers.items() if value})


def _context(span: Span) -> TraceContext:
    headers: dict[str, str] = {}
    _propagator.inject(headers, set_span_in_context(span))
    return headers["traceparent"], headers.get("tracestate")


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that have a value."""
    return {name: value for name, value in attributes.items() if value not in (None, "", ())}
