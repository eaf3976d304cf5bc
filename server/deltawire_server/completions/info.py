"""The data of a completion that its record, its retained stream and its messages share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deltawire_server.sansio.events import Provenance, StopReason, Usage

if TYPE_CHECKING:
    from deltawire_server.errors import Code, DeltawireError, Reason
    from deltawire_server.sansio.events import Fault
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
    def attempts(self) -> int:
        """Number of replicas that the request was sent to."""

    @property
    def joined_deltas(self) -> int:
        """How many deltas shared the message of an earlier one."""

    @property
    def usage(self) -> Usage:
        """The usage so far."""

    @property
    def replica(self) -> str:
        """The address of the replica that answers; empty before its answer has begun."""

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
