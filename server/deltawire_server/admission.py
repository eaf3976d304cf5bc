"""Admission control: limits the number of completions that the process runs at once.

A call takes a place before its request is received, so that `max_streams` also limits how many requests are received, parsed
and validated at once. The call then hands its place over to the completion, which may outlive the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from types import TracebackType


class Admission:
    """The places of one process.

    Args:
        limit: The number of places, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.active = 0
        """The number of places that are taken."""

    def place(self) -> Place:
        """A place that is not taken yet. Call `take`, and `release` at the end."""
        return Place(self)

    def enter(self) -> None:
        """Take one place.

        Raises:
            GatewayError: TOO_MANY_STREAMS: all places are taken. The caller may retry after the error's `retry_after`.
        """
        if self.active >= self._limit:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway already serves {self._limit} completions, which is its limit: retry later",
                metadata={"limit": str(self._limit)},
                retry_after=RETRY_SECONDS,
            )
        self.active += 1

    def leave(self) -> None:
        """Release one place."""
        self.active -= 1


class Place:
    """One place, taken or not. Leaving its `with` block releases it.

    Args:
        admission: The limit that it counts against.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._taken = False

    def take(self) -> None:
        """Take the place; no effect if it is taken.

        Raises:
            GatewayError: TOO_MANY_STREAMS, as `Admission.enter`.
        """
        if not self._taken:
            self._admission.enter()
            self._taken = True

    def release(self) -> None:
        """Release the place; no effect if it is not taken."""
        if self._taken:
            self._taken = False
            self._admission.leave()

    def hand_over(self) -> Place:
        """Take the place if it is not taken, and move it to another owner. The new owner must release the returned `Place`.

        Raises:
            GatewayError: TOO_MANY_STREAMS, as `Admission.enter`.
        """
        self.take()
        other = Place(self._admission)
        self._taken, other._taken = False, True
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
