"""A collector of OpenTelemetry: takes traces over OTLP, and keeps their spans."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Exported:
    """A span as it was exported.

    Attributes:
        span: The whole message.
        resource: The attributes of its resource.
    """

    span: Span
    resource: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Its name."""
        return self.span.name

    @property
    def trace_id(self) -> str:
        """As in `traceparent`."""
        return self.span.trace_id.hex()

    @property
    def span_id(self) -> str:
        """As in `traceparent`."""
        return self.span.span_id.hex()

    @property
    def parent_id(self) -> str:
        """The id of its parent; empty without one."""
        return self.span.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes."""
        return _values(self.span.attributes)

    @property
    def is_error(self) -> bool:
        """Whether its status is ERROR."""
        return self.span.status.code == self.span.status.STATUS_CODE_ERROR


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector on a free port, while it is entered. It answers in threads: the event loop may wait for it.

    Attributes:
        endpoint: For OTEL_EXPORTER_OTLP_ENDPOINT.
        requests: What was exported.
    """

    def __init__(self) -> None:
        self.requests: list[pb.ExportTraceServiceRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(  # noqa: N802 (the RPC's name)
        self,
        request: pb.ExportTraceServiceRequest,
        context: object,  # noqa: ARG002
    ) -> pb.ExportTraceServiceResponse:
        """Keep the spans."""
        self.requests.append(request)
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Exported]:
        """All spans, by their start."""
        found = [
            Exported(span, _values(resource.resource.attributes))
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda exported: exported.span.start_time_unix_nano)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()


def _values(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:  # noqa: ANN401 (of any type)
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind or "string_value")
