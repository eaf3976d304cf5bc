"""The interface of spans, and its implementation while traces are not exported: it records nothing and takes no time.

tracer.current.start_call(…)     ──▶ CallSpan      one call of the gateway
tracer.current.start_attempt(…)  ──▶ AttemptSpan   one request to a replica
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CANCELED = "canceled"
"""The error type of an attempt whose call was canceled, or whose deadline passed."""

TraceContext = tuple[str, str | None]
"""The W3C headers `traceparent` and `tracestate`, both valid."""


class CallSpan:
    """The span of one call of the gateway.

    Attributes:
        context: The parent of what the call does; `None` if the caller's own context is to be forwarded.
    """

    context: TraceContext | None = None

    def link(self, traceparent: str | None) -> None:
        """Link to another call's span, unless it is this one: the call that began the completion that this one reads."""

    def end(self, code: str, reason: str, values: Mapping[str, object]) -> None:
        """End it. Call this once.

        Args:
            code: The name of the gRPC status code.
            reason: The reason of the failure; empty without one.
            values: The values of the call's log line, of which some become attributes.
        """


class AttemptSpan:
    """The span of one request to a replica. `end` it, whatever happens.

    Attributes:
        context: The headers for the replica; `None` if the caller's own are to be forwarded.
    """

    context: TraceContext | None = None

    def receive_first_chunk(self) -> None:
        """Record that the first chunk of the answer was received."""

    def end(
        self,
        error_type: str = "",
        *,
        response_id: str = "",
        finish_reasons: Sequence[str] = (),
        input_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        """End it. Has no effect after the first time.

        Args:
            error_type: The reason of the failure, or `CANCELED`; empty without one.
            response_id: The engine's id of the answer; empty if unknown.
            finish_reasons: The engine's finish reasons, one for each choice that has one.
            input_tokens: Tokens of the prompt, if they are known.
            output_tokens: Tokens that were generated, if they are known.
        """


NO_CALL = CallSpan()
NO_ATTEMPT = AttemptSpan()


class Tracer:
    """Starts spans."""

    def start_call(self, method: str, traceparent: str | None, tracestate: str | None) -> CallSpan:  # noqa: ARG002 (for those that record)
        """Start the span of a call.

        Args:
            method: Its full name, such as "deltawire.v1.ChatCompletion/StreamChatCompletion".
            traceparent: The caller's valid header; `None` without one.
            tracestate: The same.
        """
        return NO_CALL

    def start_attempt(
        self,
        operation: str,  # noqa: ARG002 (as above)
        model: str,  # noqa: ARG002
        *,
        base_url: str,  # noqa: ARG002
        provider_id: str,  # noqa: ARG002
        completion_id: str,  # noqa: ARG002
        traceparent: str | None,  # noqa: ARG002
        tracestate: str | None,  # noqa: ARG002
        max_tokens: int | None = None,  # noqa: ARG002
        temperature: float | None = None,  # noqa: ARG002
        top_p: float | None = None,  # noqa: ARG002
    ) -> AttemptSpan:
        """Start the span of an attempt.

        Args:
            operation: What is requested: "chat" or "count_tokens".
            model: The provider's name of the model.
            base_url: The replica's address, without credentials.
            provider_id: The provider's id.
            completion_id: The completion's id; empty if it is none.
            traceparent: The context of the call's span.
            tracestate: The same.
            max_tokens: As it is sent, like the following ones; `None` if it is not.
            temperature: See `max_tokens`.
            top_p: See `max_tokens`.
        """
        return NO_ATTEMPT


current = Tracer()
"""Starts the spans of this process. Only `exporting` replaces it."""
