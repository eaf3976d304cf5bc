"""A worker before a vLLM look-alike, without a gRPC server around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from deltawire_server.upstream.base import CallContext
from deltawire_server.upstream.request import ChatMessage, ChatRequest, Role
from deltawire_server.worker import Caller

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from deltawire_server.sansio.events import StreamEvent
    from deltawire_server.upstream.base import Provider, Timeouts
    from deltawire_server.worker import Worker

CALLER = Caller(CallContext("r"))


class MakeWorker(Protocol):
    """Makes a worker before the test's `vllm`, or another provider."""

    def __call__(
        self,
        *,
        provider: Provider | None = None,
        timeouts: Timeouts | None = None,
        **limits: Any,  # noqa: ANN401 (max_streams, retention, and those of CompletionLimits)
    ) -> AbstractAsyncContextManager[Worker]: ...


def ask(**fields: Any) -> ChatRequest:  # noqa: ANN401 (whatever the request takes)
    """A request for the model that `FakeVllm` serves."""
    return ChatRequest("fake", (ChatMessage(Role.USER, ("hi",)),), **fields)


async def events_of(worker: Worker, request: ChatRequest | None = None) -> list[StreamEvent]:
    """All events of a completion that ends well."""
    async with worker.completion(request or ask(), CALLER) as completion:
        return [event async for batch in completion.batches() for event in batch]
