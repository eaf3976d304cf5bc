"""What both kinds of watch share: everything but the waiting."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from deltawire._channel import checked_timeout
from deltawire._errors import CallError, DeadlineExceededError, error_for
from deltawire._failure import FailedCall, Failure

if TYPE_CHECKING:
    from deltawire._channel import CallOptions, Defaults, Outgoing
    from deltawire._watch.state import WatchEvent, WatchState
    from deltawire.v1.model_registry_pb2 import WatchModelsRequest, WatchModelsResponse

# A watch goes on whatever happens, so a wrong address would otherwise be waited for in silence.
logger = logging.getLogger("deltawire")


class WatchCalls:
    """What both kinds of watch share: everything but the waiting."""

    def __init__(self, defaults: Defaults, state: WatchState, revision: str, options: CallOptions) -> None:
        self._defaults = defaults
        self._state = state
        self._revision = revision
        self._options = options
        timeout = checked_timeout(options.get("timeout"))
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._events: deque[WatchEvent] = deque()
        self._error: CallError | None = None
        self._outgoing: Outgoing
        self._begun = False

    @property
    def revision(self) -> str:
        """From where another watch can continue after the last event that was read; "" until a snapshot is complete.

        Store it together with the models, and pass both to `watch` after a restart.
        """
        return self._revision

    @property
    def request_id(self) -> str:
        """The latest call's id in the gateway's log; each reconnection is a call of its own."""
        return self._outgoing.info.request_id

    def _begin(self) -> WatchModelsRequest:
        """Begin a call, whose arguments are in `_outgoing` then."""
        self._outgoing = self._defaults.outgoing(self._options)
        self._outgoing.arguments["timeout"] = self._remaining()
        self._begun = False
        return self._state.begin()

    def _receive(self, message: WatchModelsResponse) -> None:
        """Take a message."""
        self._events.extend(self._state.receive(message))

    def _end(self, failed: FailedCall | None) -> float | None:
        """Take the end of a call: its exception, or None if its status was OK.

        Returns the seconds to wait before the next call; None if the watch is over.
        """
        if self._error is not None:
            return None
        failure = Failure(grpc.StatusCode.OK, "the call ended") if failed is None else self._outgoing.failure(failed)
        error = error_for(failure)
        pause = self._state.broke(None if failed is None else error)
        remaining = self._remaining()
        if remaining is not None and remaining <= 0 and pause is not None:
            pause = None
            if failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"the watch's timeout passed; its last call ended with {error}"
                error = DeadlineExceededError(
                    replace(failure, code=grpc.StatusCode.DEADLINE_EXCEEDED, message=message, reason="")
                )
        if isinstance(failed, Exception):
            error.__cause__ = failed
        if pause is None:
            self._error = error
            return None
        logger.warning("the watch broke off and goes on in %.1f s: %s", pause, error)
        return pause if remaining is None else min(pause, remaining)

    def _cancelled(self, *, is_closed: bool = False) -> None:
        """Record that this program canceled the watch, or closed its client, unless the watch has ended already."""
        if self._error is None:
            self._error = error_for(self._outgoing.cancelled(is_closed=is_closed))

    def _event(self) -> WatchEvent:
        """The next event that waits.

        Raises:
            CallError: The watch is over; the same error each time.
        """
        if self._error is not None:
            raise self._error
        event = self._events.popleft()
        self._revision = event.revision
        return event

    def _remaining(self) -> float | None:
        """Seconds until the caller's timeout; None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
