"""A provider as these tests make it, and what it answers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.errors import DeltawireError
from deltawire_server.upstream.base import CallContext
from deltawire_server.upstream.request import ChatMessage, ChatRequest, Role
from deltawire_server.upstream.vllm import VllmProvider
from tests.support.pushed import pulled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


HI = ChatRequest("asked", (ChatMessage(Role.USER, ("hi",)),))
CALL = CallContext("request-1")
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
CHUNK = b'data: {"choices":[{"index":0,"delta":{}}]}\n\n'
"""A first event, as vLLM's role chunk."""
OPERATORS = "operators-secret"
CALLERS = "callers-secret"


@asynccontextmanager
async def provider(*base_urls: str, **fields: Any) -> AsyncIterator[VllmProvider]:  # noqa: ANN401 (whatever it takes)
    """A provider named p, closed in the end."""
    if base_urls[0].startswith("http:"):
        fields["tls"] = False  # not used, and the system's authorities take long to load
    provider = VllmProvider("p", *base_urls, **fields)
    try:
        yield provider
    finally:
        await provider.close()


async def answer_of(provider: VllmProvider, call: CallContext = CALL, model: str = "fake") -> bytes:
    """A whole answer's bytes."""
    async with provider.stream_chat(HI, model, call) as answering:
        return b"".join([data async for data in pulled(answering.body)])


async def refusal_of(provider: VllmProvider, call: CallContext = CALL, model: str = "fake") -> DeltawireError:
    """The failure of a request that is refused."""
    with pytest.raises(DeltawireError) as caught:
        await answer_of(provider, call, model)
    return caught.value
