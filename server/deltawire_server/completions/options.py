"""How a stream is told, as the layers below gRPC see it: plain, checked already. None of it changes any text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream is told. Times are seconds.

    Attributes:
        usage_updates: Tell of the usage while the answer is generated.
        max_coalesce_delay: How long a delta may be held back so that more can be joined with it; 0 for not at all, at most 10.
        heartbeat_interval: Tell a heartbeat when nothing else was told for this long, 0.1 to 3600; `None` for none.
        early_heartbeats: Heartbeats begin before `Started`; then there is an interval.
        retention: Keep the stream, so that it can be resumed, for this long without a reader; `None` for not at all.
    """

    usage_updates: bool = False
    max_coalesce_delay: float = 0.0
    heartbeat_interval: float | None = None
    early_heartbeats: bool = False
    retention: float | None = None
