"""For each alert, series with which it must fire, and the same with other values, with which it must not."""

from __future__ import annotations

from dataclasses import dataclass

MINUTES = 40
"""How long the series are, with a value for each minute. Alerts are looked at in the end."""

JOB = "JOB"
"""Stands for a job of its own for each case, so that all are in one run of promtool, which takes a second for each."""

ALONE = ("DeltawireDown", "DeltawireNoMetrics")
"""Alerts about the job "deltawire", each case of which needs a run."""

_IDENTITY = f'job="{JOB}", instance="g"'


@dataclass(frozen=True)
class Case:
    """One alert.

    Attributes:
        fires: Series, as promtool writes them.
        quiet: Those that have other values when it must not fire.
    """

    fires: dict[str, str]
    quiet: dict[str, str]


def series(name: str, labels: str = "") -> str:
    """A series of a gateway."""
    return f"{name}{{{', '.join(filter(None, (_IDENTITY, labels)))}}}"


def steady(value: float) -> str:
    """A gauge that does not change."""
    return f"{value}+0x{MINUTES}"


def growing(a_minute: float, begin: float = 0.0) -> str:
    """A counter."""
    return f"{begin}+{a_minute}x{MINUTES}"


def once() -> str:
    """A counter that was increased once, two minutes ago."""
    return f"0+0x{MINUTES - 3} 1+0x2"


def lately(value: float, before: float) -> str:
    """A gauge that has changed a moment ago: less than any alert waits, except those that do not wait."""
    return f"{before}+0x{MINUTES - 1} {value}+0x0"


INFO = {series("deltawire_info", 'version="1"'): steady(1)}
CALLS = {series("grpc_server_handled_total", 'grpc_service="deltawire.v1.ChatCompletion"'): growing(600)}


def _failing(reason: str, ratio: float) -> Case:
    """A share of all calls, or a little less."""
    failed = series("deltawire_failed_calls_total", f'reason="{reason}"')
    return Case({**CALLS, failed: growing(600 * ratio * 1.05)}, {failed: growing(600 * ratio * 0.95)})


def _scarce(reason: str) -> list[Case]:
    """Many failures; or all calls fail, but less than one a minute, or were not seen before the gateway started."""
    failed = series("deltawire_failed_calls_total", f'reason="{reason}"')
    (calls,) = CALLS
    fires = {**CALLS, failed: growing(600)}
    return [Case(fires, {calls: growing(0.9), failed: growing(0.9)}), Case(fires, {calls: steady(600)})]


def _gauge(name: str, value: float, quiet: float, labels: str = "", **others: str) -> Case:
    gauge = series(name, labels)
    return Case({gauge: steady(value), **{series(name): each for name, each in others.items()}}, {gauge: steady(quiet)})


def _histogram(name: str, labels: str, slow: str, fast: str) -> Case:
    """Observations of which nearly all are above a bucket, or within it."""

    def with_le(bound: str) -> str:
        return series(f"{name}_bucket", ", ".join(filter(None, (labels, f'le="{bound}"'))))

    count = {series(f"{name}_count", labels): growing(600)}
    return Case(
        {with_le(fast): growing(0), with_le(slow): growing(600), with_le("+Inf"): growing(600), **count},
        {with_le(fast): growing(600)},
    )


_UP = series("up")
_RESTARTS = series("process_start_time_seconds")
_REPLICA = 'provider="p", replica="r"'
_EJECTED = series("deltawire_replica_state", f'{_REPLICA}, state="ejected"')
_PROBATION = _EJECTED.replace("ejected", "probation")
_ATTEMPTS = {series("deltawire_attempts_total", _REPLICA): growing(60)}
_FAILED_ATTEMPTS = series("deltawire_attempt_failures_total", f'{_REPLICA}, reason="UPSTREAM_UNAVAILABLE"')
_LISTED = series("deltawire_provider_models", 'provider="p"')
_TOOL_CALLS = {series("deltawire_tool_calls_total", 'verdict="succeeded"'): growing(75)}
_INVALID_TOOL_CALLS = series("deltawire_tool_calls_total", 'verdict="malformed_json"')
_MODEL = 'gen_ai_operation_name="chat", gen_ai_provider_name="p", gen_ai_request_model="m"'
_LOST = series("deltawire_usage_records_total", 'outcome="lost"')
_WRONG_KEY = series("deltawire_failed_calls_total", 'reason="UNAUTHENTICATED"')
_INTERNAL = series("deltawire_failed_calls_total", 'reason="INTERNAL"')
_WORKERS = series("deltawire_worker_ends_total")
_NOW = 60 * MINUTES
_WEEK = 7 * 86400

CASES = {
    "DeltawireDown": [Case({_UP: steady(0)}, {_UP: lately(0, 1)})],
    "DeltawireNoMetrics": [
        Case({}, INFO),
        Case({_UP: steady(1), f'deltawire_info{{job="{JOB}", instance="other"}}': steady(1)}, INFO),
    ],
    "DeltawireRestarts": [
        Case({**INFO, _RESTARTS: f"1+0x{MINUTES - 6} 2 3 4 4 4"}, {_RESTARTS: f"1+0x{MINUTES - 6} 2 3 3 3 3"})
    ],
    "DeltawireWorkerEnds": [Case({_WORKERS: once()}, {_WORKERS: steady(1)})],
    "DeltawireInternalErrors": [Case({_INTERNAL: once()}, {_INTERNAL: steady(1)})],
    "DeltawireGatewayFailures": [
        _failing("TOO_MANY_STREAMS", 0.01),
        _failing("STORE_UNAVAILABLE", 0.01),
        *_scarce("INTERNAL"),
    ],
    "DeltawireUpstreamFailures": [
        _failing("UPSTREAM_TIMEOUT", 0.05),
        _failing("PROVIDER_MISCONFIGURED", 0.05),
        *_scarce("UPSTREAM_ERROR"),
    ],
    "DeltawireCallerFailures": [
        _failing("INVALID_REQUEST", 0.2),
        _failing("UPSTREAM_REJECTED", 0.2),
        *_scarce("UNAUTHENTICATED"),
    ],
    "DeltawireCallerLimits": [_failing("CALLER_LIMIT_EXCEEDED", 0.1), *_scarce("CALLER_LIMIT_EXCEEDED")],
    "DeltawireWrongKeys": [
        Case({_WRONG_KEY: growing(13)}, {_WRONG_KEY: growing(11)}),
        Case({_WRONG_KEY: growing(13)}, {_WRONG_KEY: f"0+0x{MINUTES - 6} 100+100x5"}),
    ],
    "DeltawireFirstEventSlow": [
        _histogram("gen_ai_client_operation_time_to_first_chunk_seconds", _MODEL, "30.0", "10.0")
    ],
    "DeltawireEventLoopLag": [_histogram("deltawire_event_loop_lag_seconds", "", "0.25", "0.1")],
    "DeltawirePlacesNearlyFull": [_gauge("deltawire_streams", 91, 89, deltawire_streams_limit=steady(100))],
    "DeltawireCallsQueue": [
        _gauge("deltawire_queued_calls", 1, 0),
        Case({series("deltawire_queued_calls"): steady(1)}, {series("deltawire_queued_calls"): lately(9, 0)}),
    ],
    "DeltawireMemoryNearLimit": [
        _gauge("deltawire_held_bytes", 76, 74, 'kind="calls"', deltawire_held_limit_bytes=steady(100))
    ],
    "DeltawireFileDescriptorsNearLimit": [
        _gauge("process_open_fds", 81, 79, process_max_fds=steady(100), deltawire_info=steady(1)),
    ],
    "DeltawireProviderFailing": [
        Case({**_ATTEMPTS, _FAILED_ATTEMPTS: growing(31)}, {_FAILED_ATTEMPTS: growing(29)}),
    ],
    "DeltawireReplicaEjected": [
        Case({_EJECTED: steady(1)}, {_EJECTED: steady(0)}),
        Case({_PROBATION: steady(1)}, {_PROBATION: lately(1, 0)}),
    ],
    "DeltawireProviderListsNoModels": [
        # Also quiet for a provider that was removed.
        Case({_LISTED: steady(0), _EJECTED: steady(1)}, {_LISTED: steady(1)}),
        Case({_LISTED: steady(0), _EJECTED: steady(1)}, {_EJECTED: steady(0)}),
    ],
    "DeltawireToolCallsFail": [
        Case({**_TOOL_CALLS, _INVALID_TOOL_CALLS: growing(20)}, {_INVALID_TOOL_CALLS: growing(18)}),
    ],
    "DeltawireRegistryBehind": [_gauge("deltawire_registry_behind_seconds", 31, 29)],
    "DeltawireUsageRecordsLost": [Case({_LOST: once()}, {_LOST: steady(1)})],
    "DeltawireSettingsRefused": [_gauge("deltawire_settings_last_reload_successful", 0, 1)],
    "DeltawireCertificatesRefused": [
        _gauge("deltawire_certificates_last_load_successful", 0, 1, 'used_by="server"'),
        Case(
            {series("deltawire_certificates_last_load_successful"): steady(0)},
            {series("deltawire_certificates_last_load_successful"): lately(0, 1)},
        ),
    ],
    "DeltawireCertificateExpires": [
        _gauge("deltawire_certificate_expiry_timestamp_seconds", _NOW + _WEEK - 1, _NOW + _WEEK + 1),
        # Without TLS.
        _gauge("deltawire_certificate_expiry_timestamp_seconds", 1, 0),
    ],
}
