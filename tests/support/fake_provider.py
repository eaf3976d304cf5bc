"""A provider in memory with scripted models and failures."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from deltawire_server.errors import ProviderError, Reason
from deltawire_server.upstream.base import (
    Health,
    HealthStatus,
    OpenStream,
    ReplicaStatus,
    ServedModel,
    Timeouts,
    TokenCount,
)
from deltawire_server.upstream.engine import Engine, EngineKind
from deltawire_server.upstream.replicas import State
from tests.support.pushed import PushedBody

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from deltawire_server.errors import DeltawireError
    from deltawire_server.sansio.events import Notice
    from deltawire_server.upstream.base import Attempts, CallContext
    from deltawire_server.upstream.request import ChatRequest


class FakeProvider:
    """Fulfils `upstream.base.Provider`.

    Args:
        provider_id: Its id.
        served: What it lists: names, or whole entries.

    Attributes:
        served: What it lists now; assign to change it.
        failure: The exception of each call; `None` while it is healthy.
        gate: If set, a listing waits for it.
        asked: Set as soon as it has been asked for a listing.
        tokens: The token of each listing, in order: its length is how often it was listed.
        refresh_interval: Seconds between two listings; an hour, since tests refresh when they want to.
        has_token: Whether its operator gave it a token, so that every caller sees the same listing.
        accepts_caller_tokens: Whether its operator lets it have tokens of calls that do not name it.
        chunks: What `stream_chat` yields.
        notices: What `stream_chat` has the caller know.
        token_count: What `count_tokens` gives.
        engine_known: What is known of what answers; a vLLM itself.
        requests: What `stream_chat` and `count_tokens` were asked, in order.
    """

    def __init__(self, provider_id: str = "vllm", served: Iterable[str | ServedModel] = ()) -> None:
        self._id = provider_id
        self.served: list[str | ServedModel] = list(served)
        self.failure: DeltawireError | None = None
        self.gate: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.tokens: list[str | None] = []
        self.refresh_interval = 3600.0
        self.has_token = False
        self.accepts_caller_tokens = False
        self.chunks: list[bytes] = []
        self.notices: tuple[Notice, ...] = ()
        self.token_count = TokenCount(7, 4096)
        self.engine_known = Engine(EngineKind.VLLM, "0.32.0")
        self.requests: list[tuple[ChatRequest, str, CallContext]] = []
        self.closed = False

    @property
    def id(self) -> str:
        """Its id."""
        return self._id

    @property
    def kind(self) -> str:
        """What it is."""
        return "fake"

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Where it would be."""
        return (f"http://{self._id}.localhost/v1",)

    @property
    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """What it would be like."""
        return tuple(ReplicaStatus(each, State.AVAILABLE, self.engine_known) for each in self.base_urls)

    @property
    def default_max_tokens(self) -> int | None:
        """None."""
        return None

    @property
    def engine(self) -> Engine:
        """What it says that it is."""
        return self.engine_known

    @property
    def timeouts(self) -> Timeouts:
        """The defaults."""
        return Timeouts()

    def go_down(self) -> None:
        """Be unreachable from now on, as a refused connection is reported."""
        self.failure = ProviderError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"provider {self._id!r} cannot be reached",
            metadata={"provider": self._id},
            retry_after=1.0,
        )

    @asynccontextmanager
    async def stream_chat(
        self,
        request: ChatRequest,
        model: str,
        call: CallContext,
        attempts: Attempts | None = None,  # noqa: ARG002 (the interface has it)
    ) -> AsyncIterator[OpenStream]:
        """Yield the chunks."""
        self.requests.append((request, model, call))
        if self.failure is not None:
            raise self.failure
        body = PushedBody(self._body())
        try:
            yield OpenStream(body, self.notices)
        finally:
            body.close()

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """The scripted token count."""
        self.requests.append((request, model, call))
        if self.failure is not None:
            raise self.failure
        return self.token_count

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves."""
        self.tokens.append(token)
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return tuple(model if isinstance(model, ServedModel) else ServedModel(model) for model in self.served)

    async def check_health(self) -> Health:
        """OK without a scripted failure."""
        if self.failure is not None:
            return Health(HealthStatus.ERROR, f"Health check failed: {self.failure.message}")
        return Health(HealthStatus.OK)

    async def close(self) -> None:
        """Note it."""
        self.closed = True

    async def _body(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
