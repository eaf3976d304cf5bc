"""How many completions one process runs at once, counted in one place.

A call takes its place before its request is received, so that `max_streams` also bounds what is received, parsed and
validated. The place then goes to the completion, which may outlive the call.
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
        limit: How many there are, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.active = 0
        """How many are taken."""

    def place(self) -> Place:
        """A place that is not taken yet; call `take`, and `release` at the end."""
        return Place(self)

    def enter(self) -> None:
        """Take one place.

        Raises:
            GatewayError: TOO_MANY_STREAMS: all are taken. The caller retries after the time that the error names.
        """
        if self.active >= self._limit:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway serves {self._limit} completions at once and no more",
                metadata={"limit": str(self._limit)},
                retry_after=RETRY_SECONDS,
            )
        self.active += 1

    def leave(self) -> None:
        """Give one place back."""
        self.active -= 1


class Place:
    """One place, taken or not. Leaving its `with` block releases it.

    Args:
        admission: Where it is.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._taken = False

    def take(self) -> None:
        """Take it; no effect if it is taken.

        Raises:
            GatewayError: TOO_MANY_STREAMS, as `Admission.enter`.
        """
        if not self._taken:
            self._admission.enter()
            self._taken = True

    def release(self) -> None:
        """Give it back; no effect if it is not taken."""
        if self._taken:
            self._taken = False
            self._admission.leave()

    def hand_over(self) -> Place:
        """Take it, if it is not taken, for another owner, who releases what this returns. Releasing this has no effect then.

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
