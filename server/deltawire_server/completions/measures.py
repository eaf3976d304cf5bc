"""Counts completions in the gateway's metrics when they end."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from deltawire_server.metrics import table
from deltawire_server.tracing.tracer import CANCELED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltawire_server.completions.info import ActiveCompletion
    from deltawire_server.errors import DeltawireError
    from deltawire_server.sansio.events import FinishedChoice


class Gaps:
    """The gaps between the engine's events, on the monotonic clock. Events of one read have the same time."""

    __slots__ = ("_count", "_last", "_worst", "counts", "first")

    def __init__(self) -> None:
        self.first: float | None = None
        self.counts = [0] * (len(table.CHUNK_SECONDS) + 1)
        """The gaps by the buckets of their histogram."""
        self._last = 0.0
        self._worst = 0.0
        self._count = 0

    def receive(self, count: int, now: float) -> None:
        """Record that `count` events were received now."""
        if self.first is None:
            self.first = now
            self.counts[0] += count - 1
        else:
            gap = now - self._last
            self._worst = max(self._worst, gap)
            self.counts[0] += count - 1
            self.counts[bisect_left(table.CHUNK_SECONDS, gap)] += 1
        self._last = now
        self._count += count

    @property
    def total(self) -> float:
        """The sum of all gaps."""
        return 0.0 if self.first is None else self._last - self.first

    @property
    def mean(self) -> float | None:
        """The mean gap; `None` with fewer than two events."""
        return self.total / (self._count - 1) if self._count > 1 else None

    @property
    def worst(self) -> float | None:
        """The longest gap; `None` with fewer than two events."""
        return self._worst if self._count > 1 else None


def error_type(failure: DeltawireError | None, *, canceled: bool) -> str:
    """Why a completion failed: `CANCELED`, or the name of a reason; empty if it did not fail."""
    return CANCELED if canceled else failure.reason.name if failure is not None else ""


def ended(completion: ActiveCompletion, gaps: Gaps, choices: Iterable[FinishedChoice], error: str) -> None:
    """Count a completion that has ended after its request was sent. A refused one is only a failed call, as in usage records.

    Args:
        completion: The completion, with its failure if it has one.
        gaps: The gaps between its provider's events.
        choices: Its choices, if its answer has begun.
        error: From `error_type`.
    """
    operation = table.operation(completion.head.provider_id, completion.head.model)
    timings = completion.timings
    table.OPERATION_SECONDS.labels(*operation, error).observe(timings.total)
    if timings.first_event is not None:
        table.FIRST_CHUNK_SECONDS.labels(*operation).observe(timings.first_event)
        table.add_counted(table.CHUNK_GAP_SECONDS.labels(*operation), gaps.counts, gaps.total)
        usage = completion.usage
        if usage.prompt_tokens is not None:
            table.TOKENS.labels(*operation, "input").observe(usage.prompt_tokens)
        table.TOKENS.labels(*operation, "output").observe(usage.completion_tokens)
        table.USAGE.labels(usage.provenance.name.lower()).inc()
    table.JOINED_DELTAS.inc(completion.joined_deltas)
    for choice in choices:
        table.STOP_REASONS.labels(choice.stop_reason.name.lower()).inc()
        if choice.tool_calls:
            table.TOOL_CALLS.labels("succeeded").inc(len(choice.tool_calls))
        for call in choice.failed_tool_calls:
            table.TOOL_CALLS.labels(call.reason.name.lower()).inc()
