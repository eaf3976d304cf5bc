"""What both kinds of stream share: everything but the waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from deltawire._completion.accumulator import Accumulator
from deltawire._errors import CallError, DeltawireError, ProtocolError
from deltawire._failure import FailedCall, Failure, Metadata

if TYPE_CHECKING:
    from deltawire._channel import Outgoing
    from deltawire._completion.answer import Answer
    from deltawire.v1.chat_completion_pb2 import StreamChatCompletionResponse


class StreamOutcome:
    """What both kinds of stream share: everything but the waiting."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._accumulator = Accumulator()
        self._outcome: Answer | DeltawireError | None = None

    @property
    def request_id(self) -> str:
        """What the gateway's log knows this call by; the gateway's own word once the first event is there."""
        return self._outgoing.info.request_id

    @property
    def initial_metadata(self) -> Metadata:
        """The headers; empty until the first event is there."""
        return self._outgoing.info.initial_metadata

    @property
    def trailing_metadata(self) -> Metadata:
        """The trailers; empty until the stream has ended."""
        return self._outgoing.info.trailing_metadata

    def _receive(self, event: StreamChatCompletionResponse) -> None:
        """Take an event.

        Raises:
            ProtocolError: See `Accumulator.receive`; the stream is over then.
        """
        try:
            self._accumulator.receive(event)
        except ProtocolError as error:
            error.request_id = self.request_id
            self._outcome = error
            raise

    def _end(self, failed: FailedCall | None) -> None:
        """Take the end of the call: its exception, or None if its status was OK."""
        failure = None if failed is None else self._outgoing.failure(failed)
        self._settle(failure)
        if failed is not None and isinstance(self._outcome, DeltawireError) and isinstance(failed, Exception):
            self._outcome.__cause__ = failed

    def _cancelled(self) -> None:
        """Take note that the caller gave up, unless the stream had ended before."""
        if self._outcome is None:
            info = self._outgoing.info
            self._settle(
                Failure(
                    grpc.StatusCode.CANCELLED,
                    "cancelled by the caller",
                    request_id=info.request_id,
                    initial_metadata=info.initial_metadata,
                )
            )

    def _settle(self, failure: Failure | None) -> None:
        """Decide what the stream came to; it is decided once."""
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


def text_of_event(event: StreamChatCompletionResponse) -> str:
    """The text that an event adds to choice 0; "" if it adds none."""
    if event.WhichOneof("event") != "text_delta" or event.choice_index != 0:
        return ""
    return event.text_delta.text
