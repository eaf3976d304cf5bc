"""Several vLLM servers that serve the same: which are asked, which are ejected, and what the caller sees of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.errors import CallerError, ProviderError, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.upstream.base import Health, HealthStatus, Timeouts
from deltawire_server.upstream.opening import MAX_OPENING_BYTES
from deltawire_server.upstream.policy import ACTIONS
from deltawire_server.upstream.replicas import State
from tests.support.pushed import pulled
from tests.upstream.plain import plain
from tests.upstream.support import CALL, CALLERS, CHUNK, HI, MODELS, answer_of, provider, refusal_of

if TYPE_CHECKING:
    from tests.support.gateway import Lines


async def test_calls_spread_over_the_replicas(vllm: FakeVllm, other: FakeVllm) -> None:
    """Each goes where fewer are under way."""
    never = asyncio.Event()
    vllm.play(Script.chunks([CHUNK, never]))
    async with provider(vllm.base_url, other.base_url) as p, p.stream_chat(HI, "fake", CALL) as answering:
        await anext(pulled(answering.body))
        for _ in range(3):
            await answer_of(p)
    assert (len(vllm.chats), len(other.chats)) == (1, 3)


REPEATED: dict[str, Script | None] = {
    "refused": None,
    "reset": Script.generated(header_bytes=0, end="reset"),
    "closed": Script.generated(header_bytes=0, end="eof"),
    "in the status line": Script.generated(header_bytes=20, end="eof"),
    "429": Script.error(429, "full"),
    "502": Script.error(502, "bad gateway"),
    "503": Script.error(503, "no room"),
    "504": Script.error(504, "too late"),
    "401": Script.error(401, "no"),
    "404": Script.answer({"detail": "Not Found"}, status=404),
    "503 in band": Script.chunks([b'data: {"error": {"message": "busy", "code": 503}}\n\n', b"data: [DONE]\n\n"]),
    "no event": Script.chunks([]),
    "comments only": Script.chunks([b": keep-alive\n\n", b"data:\n\n"]),
    "cut in the first event": Script.chunks([CHUNK[:20]]),
    "usage, then no event": Script.chunks([b'data: {"choices":[],"usage":{}}\n\n']),
    "[DONE]": Script.chunks([b"data: [DONE]\n\n"]),
    "no JSON": Script.chunks([b"data: <html>\n\n"]),
    "no event stream": Script.answer(b"<html><title>Welcome</title>", content_type="text/html"),
}
"""How a replica fails so that another is asked; `None` for one that is not there."""

STANDS: dict[str, tuple[Script, Reason]] = {
    "400": (Script.error(400, "no"), Reason.UPSTREAM_REJECTED),
    "422": (Script.error(422, "no"), Reason.UPSTREAM_REJECTED),
    "500": (Script.error(500, "broken"), Reason.UPSTREAM_ERROR),
    "501": (Script.error(501, "broken"), Reason.UPSTREAM_ERROR),
    "model": (Script.error(404, "no such model", "NotFoundError", "model"), Reason.MODEL_NOT_FOUND),
    "400 in band": (
        Script.chunks([b'data: {"error": {"message": "no", "code": 400}}\n\n']),
        Reason.UPSTREAM_REJECTED,
    ),
    "500 in band": (
        Script.chunks([b'data: {"error": {"message": "broken", "code": 500}}\n\n']),
        Reason.UPSTREAM_ERROR,
    ),
    "error without a code": (Script.chunks([b'data: {"detail": "broken"}\n\n']), Reason.UPSTREAM_ERROR),
}
"""How a replica fails so that no other is asked, and the reason."""


@pytest.mark.parametrize("failure", REPEATED.values(), ids=REPEATED)
async def test_another_replica_is_asked(vllm: FakeVllm, other: FakeVllm, failure: Script | None) -> None:
    """Once, if the first one failed before its first event; and that one gets no calls for a while."""
    if failure is None:
        await vllm.crash()
    else:
        vllm.play(failure)
    async with provider(vllm.base_url, other.base_url) as p:
        for replica in p._replicas.all:
            replica.clock = lambda: 0.0  # the while does not end
        for _ in range(3):
            assert (await answer_of(p)).endswith(b"data: [DONE]\n\n")
    assert len(vllm.chats) == (0 if failure is None else 1)
    assert len(other.chats) == 3
    ids = [chat.headers["x-request-id"] for chat in (*vllm.chats, *other.chats)]
    assert len({*ids}) == len(ids)


@pytest.mark.parametrize(("failure", "reason"), STANDS.values(), ids=STANDS)
async def test_what_one_replica_answers_is_the_answer(
    vllm: FakeVllm, other: FakeVllm, failure: Script, reason: Reason
) -> None:
    """Another would say the same, or the request is what breaks it: no other is asked. One that broke gets no calls."""
    vllm.play(failure)
    async with provider(vllm.base_url, other.base_url) as p:
        assert (await refusal_of(p)).reason is reason
        assert (len(vllm.chats), len(other.chats)) == (1, 0)
        for _ in range(4):
            await answer_of(p)
    ejected = reason is Reason.UPSTREAM_ERROR
    assert (len(vllm.chats), len(other.chats)) == ((1, 4) if ejected else (3, 2))


async def test_a_silent_replica_is_ejected_and_no_other_is_asked(vllm: FakeVllm, other: FakeVllm) -> None:
    """It may still generate; and the caller has waited for as long as the settings say."""
    vllm.play(Script.chunks([b": keep-alive\n\n", asyncio.Event()]))
    async with provider(vllm.base_url, other.base_url, timeouts=Timeouts(first_event=0.2)) as p:
        error = await refusal_of(p)
        await vllm.chats[0].closed_early.wait()
        assert (error.reason, error.retry_after) == (Reason.UPSTREAM_TIMEOUT, None)
        assert error.metadata == {"provider": "p", "limit_seconds": "0.2"}
        assert not other.chats
        for _ in range(3):
            await answer_of(p)
    assert (len(vllm.chats), len(other.chats)) == (1, 3)


async def test_both_attempts_have_the_time_of_one(vllm: FakeVllm, other: FakeVllm) -> None:
    """What the first one has used is not there for the second."""
    vllm.play(Script.error(503, "no room", headers_delay=0.25))
    other.play(Script.generated(headers_delay=3600))
    async with provider(vllm.base_url, other.base_url, timeouts=Timeouts(first_event=0.5)) as p:
        began = asyncio.get_running_loop().time()
        assert (await refusal_of(p)).reason is Reason.UPSTREAM_TIMEOUT
        assert asyncio.get_running_loop().time() - began < 0.7


async def test_no_third_replica_is_asked(vllm: FakeVllm, other: FakeVllm) -> None:
    """A fault that all have must not multiply their load."""
    for each in (vllm, other):
        each.play(*[Script.error(503, "no room")] * 3)
    async with FakeVllm() as third, provider(vllm.base_url, other.base_url, third.base_url) as p:
        error = await refusal_of(p)
        assert (error.reason, error.retry_after) == (Reason.UPSTREAM_UNAVAILABLE, 1.0)
    assert (len(vllm.chats), len(other.chats), len(third.chats)) == (1, 1, 0)


@pytest.mark.parametrize(
    ("first", "second", "reason", "wait"),
    [
        (
            Script.error(429, "full", headers={"retry-after": "7"}),
            Script.error(503, "x"),
            Reason.UPSTREAM_UNAVAILABLE,
            1.0,
        ),
        (
            Script.error(429, "full", headers={"retry-after": "7"}),
            Script.error(429, "full", headers={"retry-after": "5"}),
            Reason.UPSTREAM_OVERLOADED,
            5.0,
        ),
        (Script.error(429, "full"), Script.error(401, "no"), Reason.UPSTREAM_OVERLOADED, 1.0),
        (Script.error(401, "no"), Script.chunks([b"data: x\n\n"]), Reason.UPSTREAM_MALFORMED, None),
        (Script.error(503, "x"), Script.error(500, "broken"), Reason.UPSTREAM_ERROR, None),
        (Script.error(503, "x"), Script.error(400, "no"), Reason.UPSTREAM_REJECTED, None),
    ],
)
async def test_the_failure_of_two(
    vllm: FakeVllm, other: FakeVllm, first: Script, second: Script, reason: Reason, wait: float | None
) -> None:
    """What stands stands; of two that pass by themselves it is the one that passes sooner."""
    vllm.play(first)
    other.play(second)
    async with provider(vllm.base_url, other.base_url) as p:
        error = await refusal_of(p)
    assert (error.reason, error.retry_after) == (reason, wait)
    assert len(other.chats) == 1


@pytest.mark.parametrize(
    ("reason", "ejected"),
    [(reason, ACTIONS[reason].eject_after_start) for reason in (Reason.UPSTREAM_TIMEOUT, Reason.UPSTREAM_ABORTED)],
)
async def test_an_answer_that_fails_later(vllm: FakeVllm, other: FakeVllm, reason: Reason, ejected: bool) -> None:
    """Its reader reports it, for the calls that follow."""
    async with provider(vllm.base_url, other.base_url) as p:
        async with p.stream_chat(HI, "fake", CALL) as answering:
            answering.failed(reason)
        assert (p._replicas.all[0].state is State.EJECTED) is ejected


async def test_a_long_opening_is_handed_over(vllm: FakeVllm) -> None:
    """Comments without end are not kept: after a megabyte the reader gets what came, and has limits of its own."""
    vllm.play(Script.chunks([b":" * 65536 + b"\n\n"] * 20 + [CHUNK, asyncio.Event()]))
    async with provider(vllm.base_url) as p, p.stream_chat(HI, "fake", CALL) as answering:
        size = 0
        async for piece in pulled(answering.body):
            size += len(piece)
            if CHUNK in piece:
                break
    assert size > MAX_OPENING_BYTES


async def test_the_opening_is_part_of_the_body(vllm: FakeVllm) -> None:
    """However it was cut, and also if its last event lacks the blank line."""
    for pieces in ([b": x\n", b"\nda", CHUNK[2:], b"data: [DONE]\n\n"], [b"data:\n\n", CHUNK[:-2]]):
        vllm.play(Script.chunks(pieces))
        async with provider(vllm.base_url) as p:
            assert await answer_of(p) == b"".join(pieces)


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
    vllm.play(Script.chunks([CHUNK, never]))
    async with provider(vllm.base_url, other.base_url) as p:
        with pytest.raises(ProviderError, match="mine"):
            async with p.stream_chat(HI, "fake", CALL):
                raise ProviderError(Reason.UPSTREAM_UNAVAILABLE, "mine")
        await vllm.chats[0].closed_early.wait()
        assert [replica.streams for replica in p._replicas.all] == [0, 0]
    assert not other.chats


async def test_a_replica_that_is_ejected_is_logged(vllm: FakeVllm, other: FakeVllm, lines: Lines) -> None:
    """The call succeeded, so that nothing else would show it; of an only replica the call itself does."""
    vllm.play(Script.error(503, "no room"), Script.error(503, "no room"))
    async with provider(vllm.base_url, other.base_url) as p, provider(vllm.base_url) as alone:
        await answer_of(p)
        entry = await lines.find("replica ejected")
        assert (entry["provider"], entry["base_url"], entry["level"]) == ("p", f"{vllm.base_url}/v1", "warning")
        assert (entry["seconds"], entry["reason"]) == (5.0, "UPSTREAM_UNAVAILABLE")
        assert "no room" in entry["error"]
        await refusal_of(alone)
    assert [entry["event"] for entry in lines.entries].count("replica ejected") == 1


async def test_no_replica_answers(vllm: FakeVllm, other: FakeVllm) -> None:
    """The failure has the words of each, and when to try again."""
    await vllm.crash()
    other.play(Script.error(503, "no room", headers={"retry-after": "7"}))
    async with provider(vllm.base_url, other.base_url) as p:
        error = await refusal_of(p)
        assert len(other.chats) == 1
        assert (type(error), error.reason, error.retry_after) == (ProviderError, Reason.UPSTREAM_UNAVAILABLE, 1.0)
        assert error.metadata == {"provider": "p", "http_status": "503"}
        assert error.message.startswith("all 2 replicas that the request was sent to failed: provider 'p' cannot")
        assert vllm.base_url not in error.message
        assert "no room" in error.message
        assert await answer_of(p)  # ejected or not, there is no other


@pytest.mark.parametrize("name", ["refused", "429", "502", "503 in band", "no event", "no JSON", "500", "500 in band"])
async def test_one_of_three_that_fails_fast_over_sockets(vllm: FakeVllm, other: FakeVllm, name: str) -> None:
    """Of 150 calls, 15 at a time: none fails if another replica may be asked, else few; the others share the load."""
    failure = REPEATED[name] if name in REPEATED else STANDS[name][0]
    async with FakeVllm() as third, provider(vllm.base_url, other.base_url, third.base_url) as p:
        if failure is None:
            await vllm.crash()
        else:
            vllm.play(*[failure] * 200)
        for each in (other, third):
            each.play(*[Script.generated(tokens=3, first_delay=0.01)] * 200)
        failed = 0

        async def calls() -> None:
            nonlocal failed
            for _ in range(10):
                try:
                    await answer_of(p)
                except ProviderError:
                    failed += 1

        await asyncio.gather(*(calls() for _ in range(15)))
    assert failed <= (0 if name in REPEATED else 5)
    assert len(vllm.chats) <= 5
    assert min(len(other.chats), len(third.chats)) > 60


def listings(vllm: FakeVllm) -> int:
    """How often it was listed."""
    return sum(request.path == MODELS for request in vllm.requests)


async def test_a_listing_is_one_replicas(vllm: FakeVllm, other: FakeVllm) -> None:
    """Always the first one's, with one request; the next one's while the first fails, in whatever way."""
    async with provider(vllm.base_url, other.base_url) as p:
        await p.list_models()
        await p.list_models()
        assert (listings(vllm), listings(other)) == (2, 0)
        await vllm.crash()
        assert [model.id for model in await p.list_models()] == ["fake"]
        assert listings(other) == 1
        await other.crash()
        with pytest.raises(ProviderError, match="all 2 replicas"):
            await p.list_models()
    async with plain({MODELS: ("200 OK", b"\x1f\x8b gzip")}) as odd:
        await other.start_listening()
        async with provider(f"http://127.0.0.1:{odd.port}", other.base_url) as p:
            assert [model.id for model in await p.list_models()] == ["fake"]


async def test_a_listing_says_nothing_of_chats(vllm: FakeVllm, other: FakeVllm) -> None:
    """An engine that is dead behind its API server still lists its models: that ends no ejection, nor does it eject."""
    vllm.play(Script.error(500, "EngineCore died"))
    async with provider(vllm.base_url, other.base_url) as p:
        await refusal_of(p)
        await p.list_models()
        assert p._replicas.all[0].state is State.EJECTED
        await other.crash()
        await p.list_models()
        assert p._replicas.all[1].state is State.AVAILABLE


async def test_a_listing_that_refuses_the_callers_token(other: FakeVllm) -> None:
    """The other replicas share the key: they are not asked."""
    async with FakeVllm(api_key="right") as vllm, provider(vllm.base_url, other.base_url) as p:
        with pytest.raises(CallerError) as caught:
            await p.list_models(CALLERS)
    assert caught.value.reason is Reason.UPSTREAM_UNAUTHENTICATED
    assert not listings(other)


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
