"""What both kinds of stream share: everything but the waiting."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from deltawire._completion.accumulator import Accumulator
from deltawire._completion.elsewhere import log_search
from deltawire._errors import CallError, DeltawireError, ProtocolError, error_for
from deltawire._failure import FailedCall, Failure
from deltawire.v1.chat_completion_pb2 import CancelChatCompletionRequest

if TYPE_CHECKING:
    from deltawire._answer import Answer
    from deltawire._channel import CallOptions, Defaults, Outgoing
    from deltawire._completion.resumption import Resumption
    from deltawire._metadata import Metadata
    from deltawire.v1.chat_completion_pb2 import (
        Notice,
        StreamChatCompletionRequest,
        StreamChatCompletionResponse,
        Usage,
    )

# A stream that resumes automatically would otherwise do so in silence.
logger = logging.getLogger("deltawire")


class StreamCalls:
    """What both kinds of stream share: everything but the waiting."""

    def __init__(self, defaults: Defaults, resumption: Resumption, options: CallOptions) -> None:
        self._resumption = resumption
        self._outgoing = defaults.outgoing(options)
        timeout: float | None = self._outgoing.arguments["timeout"]
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._accumulator = Accumulator(resumption.completion_id, resumption.last_sequence)
        self._outcome: Answer | DeltawireError | None = None
        self._begun = False
        # Whether the log has it that another gateway process has the completion; until the next new event.
        self._logged_search = False

    @property
    def completion_id(self) -> str:
        """The completion's id, for `Chat.get`, `cancel` and `resume`; "" until `started`, unless the request has one."""
        return self._accumulator.completion_id

    @property
    def last_sequence(self) -> int | None:
        """The `sequence` of the last event that was read; None if none was. `Chat.resume` continues after it."""
        return self._resumption.last_sequence

    @property
    def request_id(self) -> str:
        """The call's id in the gateway's log; after the first event, as the gateway sent it."""
        return self._outgoing.info.request_id

    @property
    def initial_metadata(self) -> Metadata:
        """The headers; empty until the first event."""
        return self._outgoing.info.initial_metadata

    @property
    def trailing_metadata(self) -> Metadata:
        """The trailers; empty until the stream has ended."""
        return self._outgoing.info.trailing_metadata

    @property
    def usage(self) -> Usage:
        """The latest usage: complete at the end of the answer, and earlier with `usage_updates`."""
        return self._accumulator.usage

    @property
    def notices(self) -> tuple[Notice, ...]:
        """The gateway's notices so far, such as a field that has no effect; each has `kind`, `message` and `field`."""
        return tuple(self._accumulator.notices)

    @property
    def resumed(self) -> int:
        """How often the stream was resumed automatically after its connection was lost."""
        return max(0, self._resumption.calls - 1)

    @property
    def _is_only_sought(self) -> bool:
        """Whether nothing has been received, because the process that has the completion has not been reached."""
        return self._resumption.moves and not self._accumulator.has_begun

    def _begin(self) -> StreamChatCompletionRequest:
        """Begin a call, whose arguments are in `_outgoing` then."""
        self._outgoing.arguments["timeout"] = self._remaining()
        self._begun = False
        request = self._resumption.begin(time.monotonic())
        begins = request.WhichOneof("start") == "chat"
        self._outgoing.about(self.completion_id, self._resumption.moved, begins=begins)
        if begins:
            # Only heartbeats can have come before.
            self._accumulator = Accumulator(self._resumption.completion_id)
        return request

    def _receive(self, event: StreamChatCompletionResponse) -> bool:
        """Take an event. False if it is not to be returned to the caller.

        That is an event that was replayed after a lost connection, and one that breaks the rules of `Accumulator.receive`:
        then the outcome is a ProtocolError.
        """
        if self.resumed and event.sequence < self._accumulator.expected:
            return False
        try:
            self._accumulator.receive(event)
        except ProtocolError as error:
            error.request_id = self.request_id
            self._outcome = error.with_traceback(None)
            return False
        if event.HasField("started"):
            self._outgoing.found(self.completion_id)
        self._resumption.received(event.sequence, time.monotonic())
        self._logged_search = False
        return True

    def _end(self, failed: FailedCall | None) -> float | None:
        """Take the end of a call: its exception, or None if its status was OK.

        Returns the seconds to wait before the next call; None if the stream is over.
        """
        failure = None if failed is None else self._outgoing.failure(failed)
        if self._outcome is not None:
            return None
        whole = self._accumulator.is_complete or (failed is None and self._accumulator.is_only_the_end)
        if not whole:
            has_begun = self._accumulator.has_begun
            pause = self._resumption.ended(failure, has_begun=has_begun, now=time.monotonic())
            remaining = self._remaining()
            if pause is not None and (remaining is None or remaining > 0):
                self._log("the call ended" if failure is None else error_for(failure), pause)
                return pause if remaining is None else min(pause, remaining)
            if pause is not None:
                failure = self._timed_out(failure)
        self._settle(failure)
        if isinstance(self._outcome, DeltawireError) and isinstance(failed, Exception):
            self._outcome.__cause__ = failed
        return None

    def _log(self, why: object, pause: float) -> None:
        """Log why there is another call, in `pause` seconds; once for all connections of a search."""
        if not self._resumption.moves:
            what = "broke off and goes on" if self._accumulator.has_begun else "has not begun and is requested again"
            logger.warning("stream %s %s in %.1f s: %s", self.completion_id, what, pause, why)
        elif not self._logged_search:
            self._logged_search = True
            log_search(why)

    def _timed_out(self, failure: Failure | None) -> Failure:
        """The end of a stream whose timeout passed while its connection was lost."""
        code = grpc.StatusCode.DEADLINE_EXCEEDED
        if failure is None:
            return Failure(code, "the stream's timeout passed", request_id=self.request_id)
        if failure.code is code:
            return failure
        message = f"the stream's timeout passed; its last call ended with {error_for(failure)}"
        return replace(failure, code=code, message=message, reason="")

    def _cancelled(self, *, is_closed: bool = False) -> None:
        """Record that this program canceled the stream, or closed its client, unless the stream has ended already."""
        if self._outcome is None:
            self._settle(self._outgoing.cancelled(is_closed=is_closed))

    def _softly(self) -> tuple[CancelChatCompletionRequest, Outgoing]:
        """A soft cancel of this completion, and the call for it.

        Raises:
            RuntimeError: The completion's id is not known yet.
        """
        if not self.completion_id:
            message = "the completion's id is not known before `started`: ask with a completion_id, or cancel()"
            raise RuntimeError(message)
        outgoing = self._outgoing.aside(self._remaining()).about(self.completion_id)
        return CancelChatCompletionRequest(completion_id=self.completion_id), outgoing

    def _settle(self, failure: Failure | None) -> None:
        """Decide the outcome of the stream, once."""
        try:
            self._outcome = self._accumulator.finish(failure, self._outgoing.info)
        except CallError as error:
            self._outcome = error

    def _result(self) -> Answer:
        """The answer of a stream that is over.

        Raises:
            DeltawireError: It ended otherwise; the same error each time.
        """
        if isinstance(self._outcome, DeltawireError):
            raise self._outcome
        if self._outcome is None:  # pragma: no cover -- both clients settle before they ask
            message = "the stream has not ended"
            raise RuntimeError(message)
        return self._outcome

    def _remaining(self) -> float | None:
        """Seconds until the caller's timeout; None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


def text_of_event(event: StreamChatCompletionResponse) -> str:
    """The text that an event adds to choice 0; "" if it adds none."""
    if event.WhichOneof("event") != "text_delta" or event.choice_index != 0:
        return ""
    return event.text_delta.text
