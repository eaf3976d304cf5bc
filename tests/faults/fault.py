"""One fault of an upstream, and the outcomes that the contract allows for it.

An outcome is "OK", or the status code and the reason, "ABORTED/UPSTREAM_INCOMPLETE". The allowed outcomes depend on the position
of the fault: before the engine's first event, during the answer, after the finish reason of the choice, or after the true end of
the answer (the usage chunk, `[DONE]`, or the end of the body), where a fault has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.faults.script import Phase, Said

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.script import Change

Outcomes = frozenset[str]

OK: Outcomes = frozenset({"OK"})
UNAVAILABLE: Outcomes = frozenset({"UNAVAILABLE/UPSTREAM_UNAVAILABLE"})
MALFORMED: Outcomes = frozenset({"INTERNAL/UPSTREAM_MALFORMED"})
TIMEOUT: Outcomes = frozenset({"DEADLINE_EXCEEDED/UPSTREAM_TIMEOUT"})
FAILED: Outcomes = frozenset({"INTERNAL/UPSTREAM_ERROR"})
REJECTED: Outcomes = frozenset({"INVALID_ARGUMENT/UPSTREAM_REJECTED"})
MISCONFIGURED: Outcomes = frozenset({"FAILED_PRECONDITION/PROVIDER_MISCONFIGURED"})
OVERLOADED: Outcomes = frozenset({"RESOURCE_EXHAUSTED/UPSTREAM_OVERLOADED"})
ABORTED_INCOMPLETE: Outcomes = frozenset({"ABORTED/UPSTREAM_INCOMPLETE"})
ABORTED_MALFORMED: Outcomes = frozenset({"ABORTED/UPSTREAM_MALFORMED"})
ABORTED_TIMEOUT: Outcomes = frozenset({"ABORTED/UPSTREAM_TIMEOUT"})
ABORTED_ERROR: Outcomes = frozenset({"ABORTED/UPSTREAM_ERROR"})
TOO_LARGE: Outcomes = frozenset({"RESOURCE_EXHAUSTED/ANSWER_TOO_LARGE"})

BEFORE = (Phase.HEAD, Phase.FIRST)
DURING = (Phase.REASONING, Phase.TEXT, Phase.TOOL)
AFTER = (Phase.USAGE, Phase.DONE)
IN_BODY = (Phase.FIRST, *DURING, Phase.FINISHED, *AFTER)
ANYWHERE = (Phase.HEAD, *IN_BODY)


@dataclass(frozen=True)
class Allowed:
    """The outcomes that the contract allows, by the position of the fault; by default only OK.

    `create` has those of CreateChatCompletion if they differ: its one response is smaller than a stream.
    """

    before: Outcomes = OK
    during: Outcomes = OK
    finished: Outcomes = OK
    whole: Outcomes = OK
    create: Outcomes | None = None

    def at(self, phase: Phase, *, create: bool = False) -> Outcomes:
        """The outcomes that are allowed for a fault at this position."""
        if create and self.create is not None:
            return self.create
        if phase in BEFORE:
            return self.before
        if phase in DURING:
            return self.during
        return self.finished if phase is Phase.FINISHED else self.whole


BROKEN_OFF = Allowed(UNAVAILABLE, ABORTED_INCOMPLETE)
"""The connection ends; after the finish reason that is the answer's true end."""
INVALID = Allowed(MALFORMED, ABORTED_MALFORMED, ABORTED_MALFORMED)
ENDLESS = Allowed(MALFORMED, ABORTED_MALFORMED, OK | ABORTED_MALFORMED)
"""An event that does not end. After the finish reason the wait for the true end may be over before the event is too large."""
SILENT = Allowed(TIMEOUT, ABORTED_TIMEOUT)
"""After the finish reason a short wait for the true end replaces it."""
UNFRAMED = Allowed(MALFORMED, ABORTED_MALFORMED | ABORTED_INCOMPLETE, OK | ABORTED_MALFORMED | ABORTED_INCOMPLETE)
"""HTTP framing breaks. After the finish reason it may count as the end of the body, or as invalid."""
HARMLESS = Allowed()


@dataclass(frozen=True)
class Fault:
    """One violation of an upstream, or a harmless deviation.

    Attributes:
        name: Unique.
        phases: Where it can be.
        change: What it does to the answer.
        allowed: The ends that the contract allows.
        says: The text of the upstream that the failure's message must have; empty for none.
        said: The possible answers if the call ends with OK; empty if the answer is not certain.
        provider: The provider that is called: "short" has short time limits, "gone" refuses connections.
        most_bytes: The most that the gateway may let the upstream send.
        alone: Whether it may do harm to calls beside it, so that it needs a gateway of its own. Then a second call follows,
            which must receive its own answer.
    """

    name: str
    phases: Sequence[Phase]
    change: Change
    allowed: Allowed
    says: str = ""
    said: Sequence[Said] = (Said(),)
    provider: str = "lab"
    most_bytes: int = 1_000_000
    alone: bool = False
