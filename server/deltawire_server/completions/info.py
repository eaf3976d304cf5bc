"""The data of a completion that its record, its retained stream and its messages share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deltawire_server.sansio.events import Provenance, StopReason, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.errors import Code, DeltawireError, Reason
    from deltawire_server.sansio.events import Fault
    from deltawire_server.upstream.base import Attempts
    from deltawire_server.upstream.request import Sampling

NOTHING_YET = Usage(0, Provenance.ESTIMATED)
"""The usage before the engine sends anything."""


@dataclass(frozen=True, slots=True)
class CompletionInfo:
    """The data of a completion that is fixed before the request is sent to the engine.

    Attributes:
        completion_id: The completion id of the caller, or a generated one.
        model: The model's id in the registry.
        alias: The alias in the request; empty if it has the model's id.
        provider_id: The provider's id.
        create_time: Unix time in seconds.
        sampling: The sampling parameters that are sent.
    """

    completion_id: str
    model: str
    alias: str
    provider_id: str
    create_time: float
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations in seconds; `None` for phases that were not reached. See `deltawire.v1.Timings`."""

    total: float
    queue: float | None = None
    first_event: float | None = None
    mean_gap: float | None = None
    worst_gap: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The error of a failed completion; `reason` is `None` if the caller's cancel or deadline was the cause."""

    code: Code
    reason: Reason | None
    message: str

    @classmethod
    def of(cls, error: DeltawireError) -> Outcome:
        """The outcome of an error, without its traceback, which would keep the whole call in memory."""
        return cls(error.code, error.reason, error.message)


class CompletionView(Protocol):
    """The parts of a running or retained completion that its messages have."""

    @property
    def head(self) -> CompletionInfo:
        """Its id, model, provider and sampling."""

    @property
    def timings(self) -> Timings:
        """The durations up to its end or to now."""

    @property
    def failure(self) -> DeltawireError | None:
        """The error that ended it, if any."""


class ActiveCompletion(CompletionView, Protocol):
    """The parts of a running completion that its record and its retained stream use."""

    @property
    def begun(self) -> bool:
        """Whether its answer has begun."""

    @property
    def attempts(self) -> Attempts:
        """The attempts at replicas."""

    @property
    def log_values(self) -> Mapping[str, object]:
        """The values of a log line about it."""

    @property
    def joined_deltas(self) -> int:
        """How many deltas shared the message of an earlier one."""

    @property
    def usage(self) -> Usage:
        """The usage so far."""

    @property
    def time_limit(self) -> float:
        """Seconds after its acceptance at which it is ended at the latest."""

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Those of its choices, after its end."""

    def stop(self, reason: StopReason) -> None:
        """End it now without a fault."""

    def end(self, fault: Fault) -> None:
        """End it now with a fault."""


def log_values(completion: ActiveCompletion) -> dict[str, object]:
    """The values of the log lines about a completion; server/README.md explains them."""
    head, usage, timings, attempts = completion.head, completion.usage, completion.timings, completion.attempts
    return {
        "completion_id": head.completion_id,
        "model": head.model,
        "alias": head.alias,
        "provider": head.provider_id,
        "replica": attempts.base_url,
        "attempts": attempts.count,
        "prompt_tokens": usage.prompt_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "usage": usage.provenance.name,
        "stop_reasons": [reason.name for reason in completion.stop_reasons],
        "queue_seconds": _rounded(timings.queue),
        "seconds_to_first_event": _rounded(timings.first_event),
        "mean_gap_seconds": _rounded(timings.mean_gap),
        "worst_gap_seconds": _rounded(timings.worst_gap),
        "joined_deltas": completion.joined_deltas,
    }


def _rounded(seconds: float | None) -> float | None:
    """To microseconds."""
    return None if seconds is None else round(seconds, 6)
