"""Every metric of the gateway; `server/README.md` lists the same.

Names: those of gRPC's own dashboards (`grpc_server_…`), those of OpenTelemetry's conventions for generative AI in Prometheus' form
(`gen_ai_client_…`), those of Prometheus' client libraries for a process (`process_…`), and `deltawire_…` for the rest. The number
of series is bounded: labels have the values of enumerations, of the settings, or of the API's methods, and models have at most
`MAX_MODELS` values, versions of engines `MAX_VERSIONS`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from deltawire_server.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, with its time of creation, which several processes cannot have

REGISTRY = CollectorRegistry()
"""The metrics of this process."""

MAX_MODELS = 100
"""Models that are distinguished, of which there may be tens of thousands; the others share the label `OTHER`."""

OTHER = "other"

MAX_VERSIONS = 100
"""Versions of engines that are distinguished: a replica may name any, and a series lasts as long as the process."""

CHUNK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The buckets between two chunks of an answer: from a small model at full speed to a stalled engine."""

_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_TOKENS = tuple(4**power for power in range(10))
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_OPERATION = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_CHAT = "chat"
_REPLICA = ("provider", "replica")

_Merge = Literal["livesum", "livemax", "livemin"]


class Row(NamedTuple):
    """A metric as the documentation has it: its name in a scrape, its kind, its labels, and a description."""

    name: str
    kind: str
    labels: tuple[str, ...]
    description: str


TABLE: list[Row] = []
"""Every metric, in the order of this module."""


def _counter(name: str, description: str, *labels: str, known: Iterable[str] = ()) -> Counter:
    """A counter. Its series for the known values of its label begin at 0: otherwise `increase` does not see the first count."""
    TABLE.append(Row(name, "counter", labels, description))
    counter = Counter(name, description, labels, registry=REGISTRY)
    for value in known:
        counter.labels(value)
    return counter


def _gauge(name: str, description: str, *labels: str, merge: _Merge = "livesum") -> Gauge:
    """A gauge; several workers are summed, or show the highest or lowest value."""
    TABLE.append(Row(name, "gauge", labels, description))
    return Gauge(name, description, labels, registry=REGISTRY, multiprocess_mode=merge)


def _histogram(name: str, description: str, buckets: Sequence[float], *labels: str) -> Histogram:
    TABLE.append(Row(name, "histogram", labels, description))
    return Histogram(name, description, labels, registry=REGISTRY, buckets=buckets)


RPC_STARTED = _counter("grpc_server_started_total", "Calls that were received.", *_METHOD)
RPC_HANDLED = _counter("grpc_server_handled_total", "Calls that have ended, by status code.", *_METHOD, "grpc_code")
RPC_SECONDS = _histogram("grpc_server_handling_seconds", "Duration of calls.", _CALL_SECONDS, *_METHOD)

OPERATION_SECONDS = _histogram(
    "gen_ai_client_operation_duration_seconds",
    "Duration of completions, from their acceptance to their end; error_type is the reason of a failure.",
    _CALL_SECONDS,
    *_OPERATION,
    "error_type",
)
FIRST_CHUNK_SECONDS = _histogram(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    "Time from the acceptance of a completion to the provider's first chunk.",
    _CALL_SECONDS,
    *_OPERATION,
)
CHUNK_GAP_SECONDS = _histogram(
    "gen_ai_client_operation_time_per_output_chunk_seconds",
    "Time between two chunks of a provider.",
    CHUNK_SECONDS,
    *_OPERATION,
)
TOKENS = _histogram(
    "gen_ai_client_token_usage",
    "Tokens of completions: of the prompt (input) and generated (output), as far as the provider reported them.",
    _TOKENS,
    *_OPERATION,
    "gen_ai_token_type",
)

STREAMS = _gauge("deltawire_streams", "Completions that run now.")
STREAMS_LIMIT = _gauge("deltawire_streams_limit", "Completions that may run at once: server.max_streams.")
QUEUED = _gauge("deltawire_queued_calls", "Calls that wait for a place, because server.max_streams completions run.")
QUEUE_SECONDS = _histogram(
    "deltawire_queue_seconds", "How long calls waited for a place, successfully or not.", _CALL_SECONDS
)
FAILED_CALLS = _counter(
    "deltawire_failed_calls_total",
    "Calls that have failed, by reason.",
    "reason",
    known=(reason.name for reason in Reason),
)
STOP_REASONS = _counter("deltawire_stop_reasons_total", "Choices that have ended, by stop reason.", "stop_reason")
TOOL_CALLS = _counter(
    "deltawire_tool_calls_total",
    "Tool calls of models, by verdict: succeeded, or why one cannot be executed.",
    "verdict",
)
USAGE = _counter(
    "deltawire_usage_total",
    "Completions that have ended after the engine began to answer, by the provenance of their usage.",
    "provenance",
)
USAGE_RECORDS = _counter(
    "deltawire_usage_records_total",
    "Lines of usage records, by outcome: written, lost.",
    "outcome",
    known=("written", "lost"),
)
JOINED_DELTAS = _counter("deltawire_joined_deltas_total", "Deltas that shared the message of an earlier one.")
ADAPTIVE_DELAY = _gauge(
    "deltawire_adaptive_delay_seconds",
    "For how long deltas are delayed now, because the process is busy.",
    merge="livemax",
)

ATTEMPTS = _counter("deltawire_attempts_total", "Requests that were sent to a replica.", *_REPLICA)
ATTEMPT_FAILURES = _counter(
    "deltawire_attempt_failures_total", "Requests that failed at a replica, by reason.", *_REPLICA, "reason"
)
EJECTIONS = _counter("deltawire_ejections_total", "Ejections of a replica after a failure.", *_REPLICA)
REPLICA_STATE = _gauge(
    "deltawire_replica_state",
    "Workers for which a replica is in a state: available, returning, probation, ejected.",
    *_REPLICA,
    "state",
)
ENGINE_INFO = _gauge(
    "deltawire_engine_info",
    "1 for the engine that a replica was found to be, and its version.",
    *_REPLICA,
    "engine",
    "version",
    merge="livemax",
)
PROVIDER_MODELS = _gauge(
    "deltawire_provider_models", "Models in the last listing of a provider.", "provider", merge="livemax"
)
IMAGES = _counter(
    "deltawire_images_total",
    "Images that were fetched, by outcome: ok, refused, unavailable.",
    "outcome",
    known=("ok", "refused", "unavailable"),
)

HELD_BYTES = _gauge(
    "deltawire_held_bytes",
    "Memory in use: of calls (all below server.max_memory_bytes, retained streams included), of retained streams, and of"
    " remembered completions.",
    "kind",
)
HELD_LIMIT = _gauge("deltawire_held_limit_bytes", "Limit for the memory of calls: server.max_memory_bytes.")
RETAINED_STREAMS = _gauge(
    "deltawire_retained_streams",
    "Streams kept for readers: retained ones, and those with an id of the caller's.",
)
LOOP_LAG_SECONDS = _histogram(
    "deltawire_event_loop_lag_seconds", "How late the event loop runs, measured ten times a second.", _LAG_SECONDS
)

REGISTRY_CHANGES = _counter(
    "deltawire_registry_changes_total",
    "Changes of registered models, by this and other gateways, that each worker applied, by kind.",
    "kind",
)
REGISTRY_MODELS = _gauge("deltawire_registry_models", "Registered models.", merge="livemax")
REGISTRY_BEHIND = _gauge(
    "deltawire_registry_behind_seconds",
    "For how long changes in the registry's database could not be read; 0 while the gateway follows it.",
    merge="livemax",
)
RELOADS = _counter(
    "deltawire_settings_reloads_total",
    "Reloads of the settings by each worker, by outcome: ok, refused.",
    "outcome",
    known=("ok", "refused"),
)
RELOAD_SUCCESSFUL = _gauge(
    "deltawire_settings_last_reload_successful",
    "0 if the last reload of the settings was refused, and older ones are in effect; otherwise 1.",
    merge="livemin",
)
CERTIFICATES_SUCCESSFUL = _gauge(
    "deltawire_certificates_last_load_successful",
    "0 if the current files of certificates were refused, and older ones are used: those of the server, or the authorities of"
    " providers; otherwise 1.",
    "used_by",
    merge="livemin",
)
CERTIFICATE_EXPIRY = _gauge(
    "deltawire_certificate_expiry_timestamp_seconds",
    "When the first certificate of the server's chain expires; 0 without TLS.",
    merge="livemin",
)
WORKER_ENDS = Row(
    "deltawire_worker_ends_total",
    "counter",
    (),
    "Ends of workers, and failed attempts to start one again; only with several workers.",
)
TABLE.append(WORKER_ENDS)  # counted by their parent, and by no worker
INFO = _gauge("deltawire_info", "1, with the version of the gateway.", "version", merge="livemax")

PROCESS = {
    "process_resident_memory_bytes": _gauge("process_resident_memory_bytes", "Resident memory of all workers."),
    "process_open_fds": _gauge("process_open_fds", "File descriptors that are open, of all workers."),
    "process_max_fds": _gauge("process_max_fds", "Limit for open file descriptors, of all workers together."),
    "process_start_time_seconds": _gauge(
        "process_start_time_seconds", "When the process was started, or its newest worker.", merge="livemax"
    ),
}
"""The gauges that `process` sets, by their names."""
PROCESS_CPU = _counter("process_cpu_seconds_total", "CPU time of all workers.")


_TYPES = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
"""By whether requests and responses are streamed."""


class Rpc:
    """The metrics of one method.

    Args:
        method: Its path, one that the gateway serves: "/package.Service/Method".
        request_streams: Whether it has many requests.
        response_streams: Whether it has many responses.
    """

    def __init__(self, method: str, *, request_streams: bool, response_streams: bool) -> None:
        _, service, name = method.split("/")
        self._labels = (_TYPES[request_streams, response_streams], service, name)
        self._started = RPC_STARTED.labels(*self._labels)
        self._seconds = RPC_SECONDS.labels(*self._labels)

    def start(self) -> None:
        """Count a call."""
        self._started.inc()

    def end(self, code: str, seconds: float) -> None:
        """Count the end of a call; `code` is the name of its status code, such as NOT_FOUND."""
        RPC_HANDLED.labels(*self._labels, code_label(code)).inc()
        self._seconds.observe(seconds)


@functools.cache
def code_label(code: str) -> str:
    """The name of a status code as gRPC's dashboards have it, which is that of Go: NOT_FOUND is NotFound."""
    if code == "OK":
        return code
    return "".join(word.capitalize() for word in code.replace("CANCELLED", "CANCELED").split("_"))


_models: set[str] = set()
_versions: set[str] = set()


def operation(provider: str, model: str) -> tuple[str, str, str]:
    """The labels of a completion; a model beyond `MAX_MODELS` is among the others."""
    return (_CHAT, provider, _one_of(_models, MAX_MODELS, model))


def engine_version(version: str) -> str:
    """The label of an engine's version; one beyond `MAX_VERSIONS` is among the others."""
    return _one_of(_versions, MAX_VERSIONS, version)


def _one_of(known: set[str], limit: int, value: str) -> str:
    if len(known) < limit:
        known.add(value)
    return value if value in known else OTHER


def add_counted(histogram: Any, counts: Sequence[int], total: float) -> None:  # noqa: ANN401 (a child has no public type)
    """Add many observations that were counted by bucket before: one call of the library for each takes too long for tokens.

    Args:
        histogram: A histogram with its labels.
        counts: Observations by bucket; the last one is for those above all bounds.
        total: Their sum.
    """
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
    histogram._sum.inc(total)
