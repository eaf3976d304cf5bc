"""What is known of a completion, as its record, its retained stream and its messages need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deltawire_server.sansio.events import Provenance, StopReason, Usage

if TYPE_CHECKING:
    from deltawire_server.errors import Code, DeltawireError, Reason
    from deltawire_server.sansio.events import Fault
    from deltawire_server.upstream.request import Sampling

NOTHING_YET = Usage(0, Provenance.ESTIMATED)
"""What a completion has cost before its engine said or sent anything."""


@dataclass(frozen=True, slots=True)
class CompletionInfo:
    """What is settled of a completion before its engine is asked.

    Attributes:
        completion_id: The caller's own, or generated.
        model: Its id in the registry.
        alias: The name that the caller used, if that was another.
        provider_id: Who answers.
        create_time: Unix time, in seconds.
        sampling: As it is sent.
    """

    completion_id: str
    model: str
    alias: str
    provider_id: str
    create_time: float
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Timings:
    """How long things took, in seconds; `None` for what did not happen. See `deltawire.v1.Timings`."""

    total: float
    queue: float | None = None
    first_event: float | None = None
    mean_gap: float | None = None
    worst_gap: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a completion failed; `reason` is `None` if the caller's own cancel or deadline was it."""

    code: Code
    reason: Reason | None
    message: str

    @classmethod
    def of(cls, error: DeltawireError) -> Outcome:
        """What is to be remembered of a failure: no trace, which would keep the whole call in memory."""
        return cls(error.code, error.reason, error.message)


class CompletionView(Protocol):
    """A completion, under way or retained, as far as its messages speak of it."""

    @property
    def head(self) -> CompletionInfo:
        """What is settled of it."""

    @property
    def timings(self) -> Timings:
        """How long things took, to its end or to now."""

    @property
    def failure(self) -> DeltawireError | None:
        """Why it did not end by itself, if it did not."""


class ActiveCompletion(CompletionView, Protocol):
    """A completion under way, as far as its record and its retained stream need it."""

    @property
    def begun(self) -> bool:
        """Whether its engine has begun."""

    @property
    def attempts(self) -> int:
        """How many replicas of the provider were asked."""

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""

    def stop(self, reason: StopReason) -> None:
        """End it now, as it is: its caller wants no more."""

    def end(self, fault: Fault) -> None:
        """End it now, with a fault that no event brought."""
