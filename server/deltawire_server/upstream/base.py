"""What a provider must be able to do, and the values that pass between it and the layers above.

`vllm` fulfils it over HTTP; tests fulfil it in memory. Everything a provider raises is a `ProviderError` or a
`CallerError`, and says nothing yet about whether the answer had begun: that is for whoever read it to know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from deltawire_server.secret import Secret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from deltawire_server.errors import Reason
    from deltawire_server.sansio.events import Fault, Notice
    from deltawire_server.upstream.engine import Engine
    from deltawire_server.upstream.request import ChatRequest


@dataclass(frozen=True, slots=True)
class CallContext:
    """What of a caller's metadata goes on to the provider.

    Attributes:
        request_id: Printable ASCII, at most 128 characters.
        token: The caller's own token for the provider (`x-vllm-api-token`), fit for a header; it comes before the operator's.
            `None` if it has none, or if it must not be sent to this provider.
        traceparent: Valid by W3C Trace Context; `None` if there was none, or none that is.
        tracestate: The same; `None` without a `traceparent`.
        token_withheld: Whether the caller sent a token that this provider must not get: failures then explain it.
    """

    request_id: str
    token: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    token_withheld: bool = False

    def __post_init__(self) -> None:
        """Keep the token as a `Secret`, also if a plain text was given."""
        if self.token is not None:
            object.__setattr__(self, "token", Secret(self.token))

    def without_token(self) -> Self:
        """The same for a provider that must not get the caller's token."""
        return self if self.token is None else replace(self, token=None, token_withheld=True)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its provider lists it.

    Attributes:
        id: The name the provider calls it by.
        engine_root: What it was loaded from; empty if the provider does not say.
        base_model: The base model of a LoRA adapter; empty for others.
        max_context_tokens: Longest prompt and answer together; `None` if the provider does not say.
    """

    id: str
    engine_root: str = ""
    base_model: str = ""
    max_context_tokens: int | None = None


class HealthStatus(enum.Enum):
    """How a provider is; the values are those of `deltawire.v1.HealthStatus`."""

    OK = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class Health:
    """How a provider is, and if it is not well, why: one sentence for people."""

    status: HealthStatus
    message: str = ""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a provider, in seconds.

    Attributes:
        first_event: From sending the request to the first event of the answer; a long prompt or queue is silent.
        silence: Between two events. Comments and headers are no events: an engine that sleeps may send them for ever.
    """

    first_event: float = 600.0
    silence: float = 300.0


class BrokenBodyError(Exception):
    """The body of an answer is broken: what arrived before was yielded, and more cannot be read.

    Attributes:
        fault: What is wrong with it, unless the answer was whole before.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A provider that answers a chat request.

    Attributes:
        body: The body of its event stream as it arrives, cut anywhere; it ends where the body ends or the connection breaks,
            and raises `BrokenBodyError` where the provider violates HTTP.
        notices: What the caller should know of how it came about.
        replicas_tried: How many were asked: those that failed, and the one that answers.
        failed: Call it if the answer ends with a fault of the provider's, with its reason: for UPSTREAM_TIMEOUT and others, the
            replica gets no calls for a while. Never raises.
    """

    body: AsyncIterator[bytes]
    notices: tuple[Notice, ...] = ()
    replicas_tried: int = 1
    failed: Callable[[Reason], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How many tokens a prompt has.

    Attributes:
        prompt_tokens: The figure that a completion's usage would give.
        max_context_tokens: Longest prompt and answer together; `None` if the provider does not say.
    """

    prompt_tokens: int
    max_context_tokens: int | None = None


class Provider(Protocol):
    """A server of models. Safe for any number of calls at once; `close` ends it."""

    @property
    def id(self) -> str:
        """The operator's name for it."""

    @property
    def kind(self) -> str:
        """What it is: "vllm"."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Where it is, without credentials: the address of each of its replicas, at least one, in the operator's order."""

    @property
    def default_max_tokens(self) -> int | None:
        """The operator's `max_tokens` for requests that name none; `None` leaves it to the model's context."""

    @property
    def has_token(self) -> bool:
        """Whether the operator configured a token; then what it lists is the same for every caller."""

    @property
    def accepts_caller_tokens(self) -> bool:
        """Whether the operator lets it have the tokens of callers that do not name it; see `Providers.token_for`."""

    @property
    def engine(self) -> Engine:
        """What answers at its addresses, as far as it is known: a vLLM itself, or a proxy."""

    @property
    def timeouts(self) -> Timeouts:
        """How long its answers may take. `stream_chat` applies `first_event`; the reader of an answer applies `silence`."""

    @property
    def refresh_interval(self) -> float:
        """Seconds between two listings, for whoever keeps them up to date."""

    def stream_chat(
        self, request: ChatRequest, model: str, call: CallContext
    ) -> AbstractAsyncContextManager[OpenStream]:
        """Ask for a completion; entering yields the answer as it arrives, once its first event has come.

        If a replica fails before that, one other may be asked; see `policy`. Both together have `timeouts.first_event` seconds.

        Iterating the body ends where the body ends or the connection breaks; what is missing shows in the events. Leaving closes
        the connection unless the body was read to its end, so that the provider stops generating.

        Args:
            request: What to ask.
            model: The provider's own name of the model.
            call: The caller's metadata.

        Raises:
            CallerError: The provider refuses the request, by an HTTP status or by an error event that comes first;
                FIELD_NOT_SUPPORTED for fields that its version does not know; INVALID_REQUEST for extra fields that the
                operator does not allow. The request has to change.
            ProviderError: No replica that was asked answers; UPSTREAM_TIMEOUT if no event came in time; MODEL_NOT_SERVED for a
                model that the operator does not allow.
        """

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """How many tokens the prompt of a request would have. Nothing is generated.

        Args:
            request: What would be asked.
            model: The provider's own name of the model.
            call: The caller's metadata.

        Raises:
            CallerError: Images, which cannot be counted; or as for `stream_chat`.
            ProviderError: ENDPOINT_NOT_SUPPORTED if it does not offer that; it is away, refuses, or answers nonsense.
        """

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves now and the operator allows, in its order.

        Args:
            token: The caller's token, used if the operator configured none.

        Raises:
            ProviderError: It is away, refuses, or answers nonsense.
        """

    async def check_health(self) -> Health:
        """How it is: well if every replica is, else with the address of each that is not. Never raises."""

    async def close(self) -> None:
        """End it: its connections are closed, calls under way fail."""
