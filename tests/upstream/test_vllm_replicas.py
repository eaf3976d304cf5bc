"""Several vLLM servers that serve the same: who is asked, who is passed over, and what is said of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.errors import ProviderError, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.upstream.base import Health, HealthStatus
from tests.upstream.support import CALL, HI, answer_of, provider, refusal_of

if TYPE_CHECKING:
    from tests.support.gateway import Lines


async def test_calls_spread_over_the_replicas(vllm: FakeVllm, other: FakeVllm) -> None:
    """Each goes where fewer are under way."""
    never = asyncio.Event()
    vllm.play(Script.chunks([b"data: {}\n\n", never]))
    async with provider(vllm.base_url, other.base_url) as p, p.stream_chat(HI, "fake", CALL) as answering:
        await anext(answering.body)
        for _ in range(3):
            await answer_of(p)
    assert (len(vllm.chats), len(other.chats)) == (1, 3)


@pytest.mark.parametrize(
    "failure",
    [
        None,
        Script.generated(header_bytes=0, end="reset"),
        Script.generated(header_bytes=20, end="eof"),
        Script.error(503, "no room"),
    ],
    ids=["refused", "reset", "in the status line", "503"],
)
async def test_the_next_replica_is_tried(vllm: FakeVllm, other: FakeVllm, failure: Script | None) -> None:
    """When one is away before it answered, or has no room; and the one that failed is left alone for a while."""
    if failure is None:
        await vllm.crash()
    else:
        vllm.play(failure)
    async with provider(vllm.base_url, other.base_url) as p:
        p._replicas._clock = lambda: 0.0  # the while does not end
        for _ in range(3):
            assert (await answer_of(p)).endswith(b"data: [DONE]\n\n")
    assert len(vllm.chats) == (0 if failure is None else 1)
    assert len(other.chats) == 3
    ids = [chat.headers["x-request-id"] for chat in (*vllm.chats, *other.chats)]
    assert len({*ids}) == len(ids)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 502, 504])
async def test_what_one_replica_answers_is_the_answer(vllm: FakeVllm, other: FakeVllm, status: int) -> None:
    """Another would say the same, or the request is what breaks it: nobody else is asked."""
    vllm.play(Script.error(status, "no"))
    async with provider(vllm.base_url, other.base_url) as p:
        assert (await refusal_of(p)).metadata.keys() & {"http_status", "upstream_code"}
    assert (len(vllm.chats), len(other.chats)) == (1, 0)


@pytest.mark.parametrize("end", ["eof", "reset"])
async def test_an_answer_that_has_begun_is_not_asked_for_again(vllm: FakeVllm, other: FakeVllm, end: Any) -> None:  # noqa: ANN401 (a fault's name)
    """What came is not to come twice: from the head on, a broken connection is the end of the body."""
    vllm.play(Script.generated(tokens=20, after=5, end=end))
    async with provider(vllm.base_url, other.base_url) as p:
        assert b"[DONE]" not in await answer_of(p)
    assert not other.chats


async def test_a_caller_that_leaves_leaves_no_stream_behind(vllm: FakeVllm, other: FakeVllm) -> None:
    """Neither its own failure nor its leaving is the replica's: the connection closes, and nobody else is asked."""
    never = asyncio.Event()
    vllm.play(Script.chunks([b"data: {}\n\n", never]))
    async with provider(vllm.base_url, other.base_url) as p:
        with pytest.raises(ProviderError, match="mine"):
            async with p.stream_chat(HI, "fake", CALL):
                raise ProviderError(Reason.UPSTREAM_UNAVAILABLE, "mine")
        await vllm.chats[0].closed_early.wait()
        assert [replica.streams for replica in p._replicas.all] == [0, 0]
    assert not other.chats


async def test_a_replica_that_is_set_aside_is_logged(vllm: FakeVllm, other: FakeVllm, lines: Lines) -> None:
    """The call went well, so that nothing else would tell; of an only replica the call itself tells."""
    vllm.play(Script.error(503, "no room"), Script.error(503, "no room"))
    async with provider(vllm.base_url, other.base_url) as p, provider(vllm.base_url) as alone:
        await answer_of(p)
        entry = await lines.find("replica set aside")
        assert (entry["provider"], entry["base_url"], entry["level"]) == ("p", f"{vllm.base_url}/v1", "warning")
        assert "no room" in entry["error"]
        await refusal_of(alone)
    assert [entry["event"] for entry in lines.entries].count("replica set aside") == 1


async def test_no_replica_answers(vllm: FakeVllm, other: FakeVllm) -> None:
    """Each was tried once; the failure tells all of it, and when to try again."""
    await vllm.crash()
    other.play(Script.error(503, "no room", headers={"retry-after": "7"}))
    async with provider(vllm.base_url, other.base_url) as p:
        error = await refusal_of(p)
        assert len(other.chats) == 1
        assert (type(error), error.reason, error.retry_after) == (ProviderError, Reason.UPSTREAM_UNAVAILABLE, 1.0)
        assert error.metadata == {"provider": "p", "http_status": "503"}
        assert error.message.startswith("none of the 2 replicas took the request: provider 'p' at ")
        assert vllm.base_url in error.message
        assert "no room" in error.message
        assert await answer_of(p)  # set aside or not, there is nobody else


async def test_a_listing_is_one_replicas(vllm: FakeVllm, other: FakeVllm) -> None:
    """Always the first one's, with one request; the next one's while the first is away."""
    async with provider(vllm.base_url, other.base_url) as p:
        await p.list_models()
        await p.list_models()
        assert (len(vllm.requests), len(other.requests)) == (2, 0)
        await vllm.crash()
        assert [model.id for model in await p.list_models()] == ["fake"]
        assert len(other.requests) == 1
        await other.crash()
        with pytest.raises(ProviderError, match="none of the 2 replicas"):
            await p.list_models()


async def test_a_listing_that_is_refused_is_refused(other: FakeVllm) -> None:
    """Nobody else is asked."""
    async with FakeVllm(api_key="right") as vllm, provider(vllm.base_url, other.base_url, api_token="wrong") as p:
        with pytest.raises(ProviderError) as caught:
            await p.list_models()
    assert caught.value.reason is Reason.PROVIDER_MISCONFIGURED
    assert not other.requests


async def test_health_of_replicas(vllm: FakeVllm, other: FakeVllm) -> None:
    """OK if all are well; else each that is not is named with its reason."""
    async with provider(vllm.base_url, other.base_url) as p:
        assert await p.check_health() == Health(HealthStatus.OK)
        other.healthy = False
        assert await p.check_health() == Health(
            HealthStatus.ERROR, f"Health check failed at 1 of 2 addresses: {other.base_url}/v1: HTTP 503"
        )
        vllm.sleep()
        assert (await p.check_health()).message == (
            f"Health check failed at 2 of 2 addresses: {vllm.base_url}/v1: the engine is asleep; "
            f"{other.base_url}/v1: HTTP 503"
        )
