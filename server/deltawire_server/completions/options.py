"""The validated stream options of the layers below gRPC. They do not change the content of the answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Options of a stream. Durations are in seconds.

    Attributes:
        usage_updates: Whether to send the usage while the answer is generated.
        max_coalesce_delay: How long a delta may be delayed to merge more of them, 0 to 10; 0 for no delay, `None` for a delay only
            while the gateway is busy.
        heartbeat_interval: Time without an event after which a heartbeat is sent, 0.1 to 3600; `None` for no heartbeats.
        early_heartbeats: Whether heartbeats are sent before `Started`; requires an interval.
        retention: How long the stream is retained for resuming without a reader; `None` for no retention.
    """

    usage_updates: bool = False
    max_coalesce_delay: float | None = None
    heartbeat_interval: float | None = None
    early_heartbeats: bool = False
    retention: float | None = None
