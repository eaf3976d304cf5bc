"""The interface of a provider, and the values that it exchanges with the layers above.

`vllm` implements it over HTTP; tests implement it in memory. A provider raises only `ProviderError` and `CallerError`. They do
not depend on whether the answer had begun; the reader of the answer adds that.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from deltawire_server.secret import Secret
from deltawire_server.tracing.tracer import NO_ATTEMPT, AttemptSpan

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from deltawire_server.errors import Reason
    from deltawire_server.sansio.events import Fault, Notice
    from deltawire_server.tracing.tracer import TraceContext
    from deltawire_server.upstream.engine import Engine
    from deltawire_server.upstream.replicas import State
    from deltawire_server.upstream.request import ChatRequest


@dataclass(frozen=True, slots=True)
class CallContext:
    """The parts of a caller's metadata that are sent to the provider.

    Attributes:
        request_id: Printable ASCII, at most 128 characters.
        token: The caller's own token for the provider (`x-vllm-api-token`), valid in a header. It has precedence over the
            operator's. `None` if there is none, or if it must not be sent to this provider.
        traceparent: A valid W3C Trace Context header: that of the call's own span if traces are exported, else that of the caller;
            `None` if the call had no valid one.
        tracestate: The same; `None` without a `traceparent`.
        token_withheld: Whether the caller sent a token that must not be sent to this provider; errors then explain it.
    """

    request_id: str
    token: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    token_withheld: bool = False

    def __post_init__(self) -> None:
        """Wrap the token in a `Secret`."""
        if self.token is not None:
            object.__setattr__(self, "token", Secret(self.token))

    @property
    def trace_id(self) -> str | None:
        """The id of the trace that the call belongs to."""
        return None if self.traceparent is None else self.traceparent[3:35]

    def within(self, span: TraceContext | None) -> Self:
        """A copy for what is done within a span; this one if the span has no context."""
        return self if span is None else replace(self, traceparent=span[0], tracestate=span[1])

    def without_token(self) -> Self:
        """A copy for a provider that must not receive the caller's token."""
        return self if self.token is None else replace(self, token=None, token_withheld=True)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in a provider's listing.

    Attributes:
        id: The provider's name of the model.
        engine_root: The path or repository that it was loaded from; empty if the provider does not report it.
        base_model: The base model of a LoRA adapter; empty for other models.
        max_context_tokens: Limit of prompt and answer together; `None` if the provider does not report it.
    """

    id: str
    engine_root: str = ""
    base_model: str = ""
    max_context_tokens: int | None = None


class HealthStatus(enum.Enum):
    """The health of a provider; the values are those of `deltawire.v1.HealthStatus`."""

    OK = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a provider; for ERROR, `message` has the cause in one sentence."""

    status: HealthStatus
    message: str = ""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts for a provider's answers, in seconds.

    Attributes:
        first_event: From sending the request to the first event; vLLM sends none during a long prefill or queue.
        silence: Between two events. Comments and headers do not count: an engine that hangs may go on sending them.
    """

    first_event: float = 600.0
    silence: float = 300.0


class Body(Protocol):
    """The body of an event stream, pushed as it arrives."""

    def follow(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        """Push the body from now on; call this once. Some of it may be pushed before this returns.

        Args:
            receive: Called with each piece, of any size up to 16 KiB.
            end: Called once, after the last piece: with `None` at the end of the body or if the connection is lost, or with the
                fault to report, unless the answer was already complete, if the provider violates HTTP.
        """

    def pause(self) -> None:
        """Push nothing until `resume`. The provider is slowed down when a bounded number of bytes has arrived."""

    def resume(self) -> None:
        """Go on. Some of the body may be pushed before this returns."""


@dataclass(slots=True)
class Attempts:
    """The attempts of one request, each at another replica, which the provider records as it makes them.

    Attributes:
        completion_id: The completion's id; empty for a token count.
        count: The number of attempts so far.
        base_url: The address of the last attempt's replica, without credentials; empty before the first one.
        span: The span of the last attempt. The provider ends those of failed attempts, and the caller ends the last one.
    """

    completion_id: str = ""
    count: int = 0
    base_url: str = ""
    span: AttemptSpan = NO_ATTEMPT


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A provider's open answer to a chat request.

    Attributes:
        body: The body of the event stream.
        notices: Notices for the caller about this attempt.
        failed: Call this with the reason if the answer ends with a fault of the provider. For some reasons, such as
            UPSTREAM_TIMEOUT, it ejects the replica. Never raises.
    """

    body: Body
    notices: tuple[Notice, ...] = ()
    failed: Callable[[Reason], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as this process sees it.

    Attributes:
        base_url: Its address, without credentials.
        state: Whether it gets calls.
        engine: What it was found to be.
        streams: Number of calls that it processes now.
        ejected_for: Seconds until its ejection expires; `None` if it is not ejected.
        last_failure: The reason of its last failure that counts against it; `None` without one.
        last_failure_time: When that happened, as Unix time in seconds; `None` without one.
    """

    base_url: str
    state: State
    engine: Engine
    streams: int = 0
    ejected_for: float | None = None
    last_failure: Reason | None = None
    last_failure_time: float | None = None


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The token count of a prompt.

    Attributes:
        prompt_tokens: The same number as in the usage of a completion.
        max_context_tokens: Limit of prompt and answer together; `None` if the provider does not report it.
    """

    prompt_tokens: int
    max_context_tokens: int | None = None


class Provider(Protocol):
    """A configured backend. Safe for concurrent calls; `close` it at the end."""

    @property
    def id(self) -> str:
        """The operator's name for it."""

    @property
    def kind(self) -> str:
        """The kind of provider: "vllm"."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The address of each replica, without credentials, at least one, in the operator's order."""

    @property
    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """The current state of each replica, in the same order."""

    @property
    def default_max_tokens(self) -> int | None:
        """The operator's `max_tokens` for requests that set none; `None` leaves the limit to the model's context."""

    @property
    def has_token(self) -> bool:
        """Whether the operator configured a token; if so, the listing is the same for every caller."""

    @property
    def accepts_caller_tokens(self) -> bool:
        """Whether it may receive the tokens of callers that do not name it; see `Providers.token_for`."""

    @property
    def engine(self) -> Engine:
        """What was detected at its addresses: vLLM, a proxy, or unknown."""

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts for its answers. `stream_chat` applies `first_event`; the reader of an answer applies `silence`."""

    @property
    def refresh_interval(self) -> float:
        """Seconds between two listings by the registry."""

    def stream_chat(
        self, request: ChatRequest, model: str, call: CallContext, attempts: Attempts | None = None
    ) -> AbstractAsyncContextManager[OpenStream]:
        """Request a completion; entering the context yields the answer after its first event is received.

        If a replica fails before that, the request may be sent to one other; see `policy`. `timeouts.first_event` limits both
        attempts together.

        Leaving the context closes the connection unless the body was read to its end, so that the provider stops generating.

        Args:
            request: The request.
            model: The provider's own name of the model.
            call: The caller's metadata.
            attempts: Takes the attempts, including the one that a failure or a cancellation ends.

        Raises:
            CallerError: The provider rejects the request, with an HTTP status or with an error event that comes first;
                FIELD_NOT_SUPPORTED for fields that its version does not support; INVALID_REQUEST for extra fields that the
                operator does not allow. The caller must change the request.
            ProviderError: Every attempt failed; UPSTREAM_TIMEOUT if no event was received in time; MODEL_NOT_SERVED for a
                model that the operator does not allow.
        """

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """Count the tokens of a request's prompt. Nothing is generated.

        Args:
            request: The request.
            model: The provider's own name of the model.
            call: The caller's metadata.

        Raises:
            CallerError: The request has images, which cannot be counted; or as for `stream_chat`.
            ProviderError: ENDPOINT_NOT_SUPPORTED if the provider has no such endpoint; or as for `list_models`.
        """

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """List the models that it serves now and the operator allows, in the provider's order.

        Args:
            token: The caller's token, used if the operator configured none.

        Raises:
            ProviderError: It cannot be reached, answers with an error, or sends a malformed response.
        """

    async def check_health(self) -> Health:
        """Check every replica: OK if all are healthy, else the problem of each unhealthy one with its address. Never raises."""

    async def close(self) -> None:
        """Close all connections; calls in progress fail."""
