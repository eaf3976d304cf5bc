"""What next after a call has ended: whether an answer goes on over a lost connection, and how.

Two verbs: `Resumption.begin()` for each call's request, `ended(failure)` when a call has ended without the stream's last
event. What was asked with `retention` goes on:

    how the call ended                        after                    what next
    the connection was lost, or this call     any call                 resume, after the last event that came
    was cut and not the completion
    it was refused for now                    a resuming call          resume, after the last event that came
                                              a starting call          give up: there is nothing to resume
    another gateway process has it            a resuming call          resume on a new connection, which may reach that
                                                                       process, if fewer than MAX_CONNECTIONS were made
                                                                       since the last event
                                              a starting call          give up: there is nothing to resume
    there is no such completion               a resuming call, before  start again with the same id, if there is a request,
                                              the answer has begun     and it was not started MAX_STARTS times
                                              a resuming call, after   as if another process has it: an id that a caller
                                              the answer has begun     made does not say which process that is
                                              a starting call          give up
    there is such a completion already        a starting call, if the  resume: it is our own, whose beginning was lost
                                              id was made here, or it
                                              was started before
                                              any other                give up: another call began it
    anything else                             any call                 give up: a retry would fail again

Between two calls there is a pause, longer each time until something new comes. What was not asked with `retention`, and
what has brought nothing new for that long, is given up in any case. Whether the caller's own deadline has passed is seen
to before `ended` is asked.
"""

from __future__ import annotations

import enum
import os
import random
from types import MappingProxyType
from typing import TYPE_CHECKING, assert_never

import grpc

from deltawire._completion.elsewhere import MAX_CONNECTIONS, Pauses
from deltawire.v1.chat_completion_pb2 import ResumePoint, StreamChatCompletionRequest
from deltawire.v1.error_reason_pb2 import ErrorReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from deltawire._failure import Failure

# How often a completion is started in all, as gRPC's own retries do.
MAX_STARTS = 4


class End(enum.Enum):
    """What the end of a call says about its completion."""

    # The completion is probably still there: the connection was lost, or the gateway cut this call and nothing else.
    LOST = "lost"
    # The gateway cannot take this call now.
    REFUSED = "refused"
    # Another gateway process has the completion.
    ELSEWHERE = "elsewhere"
    # There is no such completion.
    MISSING = "missing"
    # There is a completion of this id already.
    EXISTS = "exists"
    # A retry would fail again.
    OVER = "over"


# A test checks that every value of the enum but the unspecified one is here.
REASONS: Mapping[ErrorReason.ValueType, End] = MappingProxyType(
    {
        # Another process may have taken over, or this one keeps the stream for a while.
        ErrorReason.ERROR_REASON_DRAINING: End.LOST,
        # The reader was too slow for the call; what is retained waits for it.
        ErrorReason.ERROR_REASON_SLOW_CALLER: End.LOST,
        ErrorReason.ERROR_REASON_TOO_MANY_STREAMS: End.REFUSED,
        ErrorReason.ERROR_REASON_CALLER_LIMIT_EXCEEDED: End.REFUSED,
        ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: End.REFUSED,
        ErrorReason.ERROR_REASON_COMPLETION_NOT_FOUND: End.MISSING,
        ErrorReason.ERROR_REASON_COMPLETION_ALREADY_EXISTS: End.EXISTS,
        ErrorReason.ERROR_REASON_WRONG_REPLICA: End.ELSEWHERE,
        # What is needed to go on is no longer kept.
        ErrorReason.ERROR_REASON_COMPLETION_GONE: End.OVER,
        # The completion itself has failed, and would have to be generated anew.
        ErrorReason.ERROR_REASON_UPSTREAM_UNAVAILABLE: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_OVERLOADED: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_TIMEOUT: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_ERROR: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_MALFORMED: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_ABORTED: End.OVER,
        ErrorReason.ERROR_REASON_DURATION_LIMIT_EXCEEDED: End.OVER,
        ErrorReason.ERROR_REASON_ANSWER_TOO_LARGE: End.OVER,
        ErrorReason.ERROR_REASON_MEMORY_LIMIT_EXCEEDED: End.OVER,
        ErrorReason.ERROR_REASON_INTERNAL: End.OVER,
        # The request has to change, or the operator has to act.
        ErrorReason.ERROR_REASON_INVALID_REQUEST: End.OVER,
        ErrorReason.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_REJECTED: End.OVER,
        ErrorReason.ERROR_REASON_UPSTREAM_UNAUTHENTICATED: End.OVER,
        ErrorReason.ERROR_REASON_FIELD_NOT_SUPPORTED: End.OVER,
        ErrorReason.ERROR_REASON_ENDPOINT_NOT_SUPPORTED: End.OVER,
        ErrorReason.ERROR_REASON_IMAGE_UNAVAILABLE: End.OVER,
        ErrorReason.ERROR_REASON_MODEL_NOT_FOUND: End.OVER,
        ErrorReason.ERROR_REASON_MODEL_WRONG_TYPE: End.OVER,
        ErrorReason.ERROR_REASON_MODEL_AMBIGUOUS: End.OVER,
        ErrorReason.ERROR_REASON_MODEL_NOT_SERVED: End.OVER,
        ErrorReason.ERROR_REASON_PROVIDER_MISCONFIGURED: End.OVER,
        ErrorReason.ERROR_REASON_UNAUTHENTICATED: End.OVER,
        ErrorReason.ERROR_REASON_PERMISSION_DENIED: End.OVER,
        # These are about models and watches, and end no completion.
        ErrorReason.ERROR_REASON_MODEL_ALREADY_EXISTS: End.OVER,
        ErrorReason.ERROR_REASON_MODEL_DISCOVERED: End.OVER,
        ErrorReason.ERROR_REASON_PROVIDER_NOT_FOUND: End.OVER,
        ErrorReason.ERROR_REASON_ETAG_MISMATCH: End.OVER,
        ErrorReason.ERROR_REASON_REVISION_GONE: End.OVER,
        ErrorReason.ERROR_REASON_SLOW_WATCHER: End.OVER,
        ErrorReason.ERROR_REASON_REGISTRY_FULL: End.OVER,
        ErrorReason.ERROR_REASON_ACCESS_CHANGED: End.OVER,
    }
)

# Without a reason that is known, the status code decides: it is a proxy's or gRPC's own. RESOURCE_EXHAUSTED is not here: it
# is a message above the size limit, which would be as large again.
LOST_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        # Neither is the caller's own doing, which is seen to before.
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)


class Resumption:
    """One completion's calls: what each asks for, and whether there is another.

    Args:
        request: What was asked: a chat with its options, or a `ResumePoint`. It is kept; one that is retained and has no
            `completion_id` gets an unguessable one, so that it can be resumed before it has begun.
        resume_for: For how many seconds without anything new to go on. None takes `retention` of the request's options;
            if that is absent too, nothing goes on.
        connections: How many new connections can be made to find the process that has the completion; 0 for a client on a
            channel that it was given.
        draw: Draws a number between two, for the pauses.

    `completion_id` is "" if none was given or generated; the stream cannot go on then.
    """

    def __init__(
        self,
        request: StreamChatCompletionRequest,
        resume_for: float | None = None,
        connections: int = MAX_CONNECTIONS,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if resume_for is None and request.options.HasField("retention"):
            resume_for = request.options.retention.ToTimedelta().total_seconds()
        self._resume_for = resume_for
        self._request = request
        self._pauses = Pauses(draw)
        self._connections = self._connections_left = connections
        self._moves = False
        self._starts = 0
        self._calls = 0
        self._since: float | None = None
        self._after: int | None = None
        self._resuming = request.WhichOneof("start") == "resume"
        self._made_id = False
        if self._resuming:
            self.completion_id = request.resume.completion_id
            self._after = request.resume.last_sequence if request.resume.HasField("last_sequence") else None
        else:
            if self.is_retained and not request.chat.completion_id:
                request.chat.completion_id = f"own-{os.urandom(16).hex()}"
                self._made_id = True
            self.completion_id = request.chat.completion_id

    @property
    def is_retained(self) -> bool:
        """Whether the stream goes on over a lost connection."""
        return self._resume_for is not None

    @property
    def last_sequence(self) -> int | None:
        """The last event that has been read; None if none has."""
        return self._after

    @property
    def moves(self) -> bool:
        """Whether the next call needs a new connection."""
        return self._moves

    @property
    def moved(self) -> int:
        """How many new connections were needed since the last event, with that of the next call."""
        return self._connections - max(0, self._connections_left) if self._moves else 0

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._calls

    def begin(self, now: float) -> StreamChatCompletionRequest:
        """The next call's request, at a time in seconds of any clock that only goes forward.

        A request with a chat in it starts the stream anew: its events count from 0 again.
        """
        if self._since is None:
            self._since = now
        self._calls += 1
        if self._resuming:
            resume = ResumePoint(completion_id=self.completion_id, last_sequence=self._after)
            return StreamChatCompletionRequest(resume=resume)
        self._starts += 1
        self._after = None
        return self._request

    def received(self, sequence: int, now: float) -> None:
        """Take note of an event that had not come before."""
        self._after = sequence
        self._since = now
        self._pauses.reset()
        self._connections_left = self._connections

    def ended(self, failure: Failure | None, *, has_begun: bool, now: float) -> float | None:
        """Decide what is next after a call has ended without the stream's last event.

        Args:
            failure: How the call failed; None if its status was OK.
            has_begun: Whether the answer has begun, in this call or before.
            now: The time, by the clock of `begin`.

        Returns seconds to wait before the next call, or None to give up: how the call ended is the outcome.
        """
        self._moves = False
        if self._resume_for is None or not self._goes_on(end_of(failure), has_begun=has_begun):
            return None
        pause = max(self._pauses.next(), (failure and failure.retry_after) or 0.0)
        waited = 0.0 if self._since is None else now - self._since
        return None if waited + pause > self._resume_for else pause

    def _goes_on(self, end: End, *, has_begun: bool) -> bool:
        """Whether there is another call, and whether it resumes; by the table at the top of this file."""
        match end:
            case End.LOST:
                self._resuming = True
                return True
            case End.REFUSED:
                return self._resuming
            case End.ELSEWHERE:
                return self._goes_elsewhere()
            case End.MISSING if has_begun:
                return self._goes_elsewhere()
            case End.MISSING:
                if not self._resuming or not 0 < self._starts < MAX_STARTS:
                    return False
                self._resuming = False
                return True
            case End.EXISTS:
                if self._resuming or not (self._made_id or self._starts > 1):
                    return False
                self._resuming = True
                return True
            case End.OVER:
                return False
            case _:
                assert_never(end)

    def _goes_elsewhere(self) -> bool:
        """Whether the next call resumes on a new connection."""
        self._moves = self._resuming and self._connections_left > 0
        self._connections_left -= 1
        return self._moves


def end_of(failure: Failure | None) -> End:
    """What the end of a call says about its completion; None is a status of OK, without the stream's last event."""
    if failure is None:
        return End.LOST
    if failure.is_closed:
        return End.OVER
    reason = f"ERROR_REASON_{failure.reason}"
    if reason in ErrorReason.keys():  # noqa: SIM118 -- the enum's wrapper is no mapping
        return REASONS.get(ErrorReason.Value(reason), End.OVER)
    return End.LOST if failure.code in LOST_CODES else End.OVER
