"""Tokens that a vLLM counts, over HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason
from deltawire_server.upstream.base import CallContext, TokenCount
from deltawire_server.upstream.request import ChatMessage, ImageData, ImageUrl, Role
from deltawire_server.upstream.web_address import web_address
from tests.upstream.plain import plain
from tests.upstream.support import CALL, CALLERS, HI, provider

if TYPE_CHECKING:
    from deltawire_server.fake_vllm import FakeVllm

TOKENIZE = "/tokenize"


async def counted_by(body: bytes, said: str = "200 OK") -> TokenCount:
    """The count of a provider that answers this."""
    async with plain({TOKENIZE: (said, body)}) as server, provider(f"http://127.0.0.1:{server.port}/v1") as p:
        return await p.count_tokens(HI, "fake", CALL)


async def test_tokens_are_counted(vllm: FakeVllm) -> None:
    """Beside `/v1`, with the caller's token and trace, for the provider's own name of the model."""
    call = CallContext("request-1", token=CALLERS, traceparent="00-4bf9-00f0-01")
    async with provider(f"{vllm.base_url}/v1") as p:
        assert await p.count_tokens(HI, "fake", call) == TokenCount(vllm_count(), 4096)
    (request,) = vllm.requests
    assert (request.method, request.path) == ("POST", TOKENIZE)
    assert request.body == {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    assert (request.headers["authorization"], request.headers["traceparent"]) == (
        f"Bearer {CALLERS}",
        "00-4bf9-00f0-01",
    )


def vllm_count() -> int:
    """What the look-alike counts for `HI`."""
    return 8 + len(str({"role": "user", "content": "hi"}).split())


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"count":0}', TokenCount(0)),
        (b'{"count":5,"max_model_len":null,"tokens":["any"]}', TokenCount(5)),
        (b'{"count":5,"max_model_len":9}', TokenCount(5, 9)),
    ],
)
async def test_counts(body: bytes, count: TokenCount) -> None:
    """What is not said is not known."""
    assert await counted_by(body) == count


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"count":-1}', b'{"count":"5"}', b'{"count":4294967296}', b'"\xff"']
)
async def test_what_is_no_count(body: bytes) -> None:
    """Something else than vLLM may be there."""
    with pytest.raises(ProviderError) as caught:
        await counted_by(body)
    assert caught.value.reason is Reason.UPSTREAM_MALFORMED


@pytest.mark.parametrize("said", ["", "200 OK\r\ncontent-length: 99"])
async def test_a_count_that_breaks_off(said: str) -> None:
    """Before its head or within its body: a caller can ask again."""
    with pytest.raises(ProviderError) as caught:
        await counted_by(b"{", said)
    assert (caught.value.reason, caught.value.retry_after) == (Reason.UPSTREAM_UNAVAILABLE, 1.0)


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Not Found", "405 Method Not Allowed", "501 Not Implemented"])
async def test_a_provider_that_does_not_count(status: str) -> None:
    """The endpoint is beside `/v1`, and often kept from callers: the failure names it."""
    with pytest.raises(ProviderError) as caught:
        await counted_by(b'{"detail":"no"}', status)
    assert (caught.value.reason, caught.value.code) == (Reason.ENDPOINT_NOT_SUPPORTED, Code.UNIMPLEMENTED)
    assert caught.value.metadata == {"provider": "p", "endpoint": TOKENIZE}


@pytest.mark.parametrize(
    ("status", "reason"),
    [(400, Reason.UPSTREAM_REJECTED), (401, Reason.PROVIDER_MISCONFIGURED), (500, Reason.UPSTREAM_ERROR)],
)
async def test_a_count_that_is_refused(status: int, reason: Reason) -> None:
    """As a chat request would be."""
    with pytest.raises(DeltawireError) as caught:
        await counted_by(json.dumps({"error": {"message": "no", "param": "messages"}}).encode(), f"{status} No")
    assert caught.value.reason is reason


async def test_counts_of_models_that_are_not_there(vllm: FakeVllm) -> None:
    """A 404 that is about the model is not about the endpoint; one that the operator does not allow is not asked for."""
    async with provider(vllm.base_url, allowed_models=("n*", "fake")) as p:
        for model, reason in (("no", Reason.MODEL_NOT_FOUND), ("other", Reason.MODEL_NOT_SERVED)):
            with pytest.raises(DeltawireError) as caught:
                await p.count_tokens(HI, model, CALL)
            assert caught.value.reason is reason
    assert len(vllm.requests) == 1


async def test_images_cannot_be_counted(vllm: FakeVllm) -> None:
    """Each is named by its field."""
    images = (ImageUrl(web_address("https://h/a.png"), "f"), "text", ImageData(b"", "image/png"))
    request = replace(HI, messages=(ChatMessage(Role.USER, ("hi",)), ChatMessage(Role.TOOL, images, call_id="c")))
    async with provider(vllm.base_url) as p:
        with pytest.raises(CallerError) as caught:
            await p.count_tokens(request, "fake", CALL)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert [violation.field for violation in caught.value.violations] == [
        "chat.messages[1].tool.content[0].image",
        "chat.messages[1].tool.content[2].image",
    ]
    assert not vllm.requests


async def test_the_next_replica_counts(vllm: FakeVllm, other: FakeVllm) -> None:
    """While one is away; if all are, the call can be made again."""
    async with provider(vllm.base_url, other.base_url) as p:
        await vllm.crash()
        for _ in range(3):
            assert (await p.count_tokens(HI, "fake", CALL)).prompt_tokens == vllm_count()
        await other.crash()
        with pytest.raises(ProviderError, match="all 2 replicas"):
            await p.count_tokens(HI, "fake", CALL)


async def test_a_count_asks_for_extra_fields_that_are_allowed(vllm: FakeVllm) -> None:
    """As a completion would be, so that a caller that counts first learns it."""
    async with provider(vllm.base_url) as p:
        with pytest.raises(CallerError, match="allowed_extra_fields"):
            await p.count_tokens(replace(HI, extra_body='{"echo":true}'), "fake", CALL)
    assert not vllm.requests
