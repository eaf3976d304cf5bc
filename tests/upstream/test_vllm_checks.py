"""What is asked of a vLLM before a request goes to it, over HTTP, and what its caller is told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, Code, ProviderError, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.fake_vllm.described import openapi
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.upstream.base import Attempts
from deltawire_server.upstream.engine import EngineKind
from deltawire_server.upstream.request import ToolSpec
from deltawire_server.upstream.vllm_api import MAX_DOCUMENT_BYTES
from tests.support.pushed import pulled
from tests.upstream.plain import plain
from tests.upstream.support import CALL, CHAT, CHUNK, HI, OPERATORS, provider, refusal_of

if TYPE_CHECKING:
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.upstream.vllm import VllmProvider
    from tests.support.gateway import Lines

SALTED = replace(HI, cache_salt="s")
FIRST = ["/version", "/openapi.json", "/health"]
SERVER = "\r\nserver: uvicorn"
VLLM = {
    "/version": (f"200 OK{SERVER}", b'{"version":"1"}'),
    "/health": (f"200 OK{SERVER}", b""),
    CHAT: ("200 OK\r\ncontent-type: text/event-stream", CHUNK + b"data: [DONE]\n\n"),
}
"""What a vLLM answers whose `/openapi.json` does not say anything."""


async def notices_of(p: VllmProvider, request: ChatRequest = SALTED) -> tuple[tuple[Notice, ...], int]:
    """What the caller of a request is to know, and how many replicas it took."""
    attempts = Attempts()
    async with p.stream_chat(request, "fake", CALL, attempts) as answering:
        assert b"".join([data async for data in pulled(answering.body)]).endswith(b"data: [DONE]\n\n")
        return answering.notices, attempts.count


def paths(vllm: FakeVllm) -> list[str]:
    """What was asked for, in order."""
    return [request.path for request in vllm.requests]


async def test_a_plain_request_needs_no_look_at_the_version(vllm: FakeVllm) -> None:
    """What every vLLM knows is not asked about."""
    async with provider(vllm.base_url) as p:
        assert await notices_of(p, HI) == ((), 1)
    assert paths(vllm) == [CHAT]


async def test_the_fields_that_a_vllm_knows_are_read_once(vllm: FakeVllm) -> None:
    """With the first requests that need it, however many come at once; without a caller's token."""
    async with provider(vllm.base_url, api_token=OPERATORS) as p:
        for notices, tried in await asyncio.gather(*(notices_of(p) for _ in range(5))):
            assert (notices, tried) == ((), 1)
        await notices_of(p)
    assert paths(vllm) == [*FIRST, *[CHAT] * 6]
    assert vllm.requests[1].headers["authorization"] == f"Bearer {OPERATORS}"


async def test_a_field_that_a_vllm_does_not_know_is_refused(vllm: FakeVllm) -> None:
    """VLLM would ignore it: nothing is asked, and the caller learns which field, and of which version."""
    vllm.without_fields, vllm.version = ("cache_salt",), "0.8.5"
    async with provider(vllm.base_url) as p:
        with pytest.raises(CallerError) as caught:
            await notices_of(p)
        await notices_of(p, replace(HI, priority=1))
    assert (caught.value.reason, caught.value.code) == (Reason.FIELD_NOT_SUPPORTED, Code.INVALID_ARGUMENT)
    assert caught.value.metadata == {"field": "chat.cache_salt", "provider": "p", "version": "0.8.5"}
    assert len(vllm.chats) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((f"404 Not Found{SERVER}", b'{"detail":"Not Found"}'), "HTTP 404"),
        ((f"200 OK{SERVER}", b"{}"), "has the title ''"),
        ((f"200 OK{SERVER}", b"<html>"), "has the title ''"),
        ((f"200 OK{SERVER}", b"[" * 100_000), "has the title ''"),
        ((f"200 OK{SERVER}", b'{"x":"\xff"}'), "has the title ''"),
        (("", b""), "cannot be reached"),
        ((f"200 OK{SERVER}\r\ncontent-length: 99", b"{"), "cannot be reached"),
        ((f"200 OK{SERVER}", b" " * (MAX_DOCUMENT_BYTES + 1)), f"more than {MAX_DOCUMENT_BYTES} bytes"),
    ],
    ids=["not there", "of something else", "no JSON", "nested", "no UTF-8", "breaks off", "cut", "endless"],
)
async def test_fields_that_cannot_be_checked_are_told(answer: tuple[str, bytes], why: str, lines: Lines) -> None:
    """The request is sent, the caller knows which field may be ignored, and the log says why, once."""
    async with plain({**VLLM, "/openapi.json": answer}) as server, provider(f"http://127.0.0.1:{server.port}") as p:
        for _ in range(2):
            (notice,), tried = await notices_of(p)
            assert (notice.kind, notice.field, tried) == (NoticeKind.FIELDS_NOT_CHECKED, "chat.cache_salt", 1)
            assert "cache_salt" in notice.message
        assert await notices_of(p, HI) == ((), 1)
        assert why in p.engine.detail
    assert sorted(server.paths[:3]) == sorted(FIRST)
    assert server.paths[-3:] == [CHAT] * 3
    (entry,) = [entry for entry in lines.entries if entry["event"] == "request fields are not checked"]
    assert (entry["level"], entry["provider"], entry["base_url"]) == ("warning", "p", p.base_urls[0])


async def test_a_document_that_drips_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not extend the time of the whole document, of whichever kind."""
    monkeypatch.setattr("deltawire_server.upstream.vllm_api.CONTROL_SECONDS", 0.3)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            status = "500 Oops" if CHAT in head else "200 OK"
            writer.write(f"HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-length: 10000\r\n\r\n".encode())
            while not writer.is_closing():
                writer.write(b"[")
                await writer.drain()
                await asyncio.sleep(0.02)
        except ConnectionError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with listener, provider(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as p:
        began = asyncio.get_running_loop().time()
        error = await refusal_of(p)
        assert (error.reason, error.message[:25]) == (Reason.UPSTREAM_ERROR, "provider 'p' failed: [[[[["[:25])
        with pytest.raises(ProviderError, match=r"did not answer within 0\.3 seconds"):
            await p.list_models()
        assert "did not answer within" in (await p.check_health()).message
        assert (await p._engines[p._replicas.all[0]].known()).kind is EngineKind.UNKNOWN
        assert asyncio.get_running_loop().time() - began < 2.0


async def test_fields_are_read_when_a_provider_is_listed(vllm: FakeVllm, lines: Lines) -> None:
    """So at the start of the gateway, before any call needs them; a slow start is not the last word."""
    vllm.without_fields, vllm.version = ("cache_salt",), "0.8.5"
    async with provider(vllm.base_url) as p:
        await p.list_models()
        entry = await lines.find("request fields are checked")
        assert (entry["engine"], entry["version"], entry["level"]) == ("vllm", "0.8.5", "info")
        with pytest.raises(CallerError):
            await notices_of(p)
    assert {*paths(vllm)} == {*FIRST, "/v1/models"}
    assert (p.engine.kind, p.engine.version, p.engine.detail) == (EngineKind.VLLM, "0.8.5", "")


@pytest.mark.parametrize(
    ("engine", "refused"), [(None, False), (EngineKind.PROXY, False), (EngineKind.VLLM, True)], ids=repr
)
async def test_behind_a_proxy_no_field_is_refused(engine: EngineKind | None, refused: bool) -> None:
    """What its document says may be another's; only an operator can know that it drops nothing."""
    document = json.dumps(openapi("1", ("cache_salt",))).encode()
    answers = {
        "/version": ("200 OK\r\nserver: nginx", b'{"version":"1"}'),
        "/openapi.json": ("200 OK\r\nserver: nginx", document),
        "/health": ("200 OK\r\nserver: nginx", b""),
        CHAT: VLLM[CHAT],
    }
    async with plain(answers) as server, provider(f"http://127.0.0.1:{server.port}", engine=engine) as p:
        for request in (SALTED, replace(HI, priority=1)):
            if refused and request is SALTED:
                with pytest.raises(CallerError):
                    await notices_of(p, request)
                continue
            notices, _ = await notices_of(p, request)
            assert [notice.kind for notice in notices] == ([] if refused else [NoticeKind.FIELDS_NOT_CHECKED])
        assert p.engine.strict_is_enforced is refused


async def test_a_replica_that_was_away_may_be_another_version(vllm: FakeVllm) -> None:
    """After it failed its version is read again, and if it is another one, its fields."""
    async with provider(vllm.base_url) as p:
        await notices_of(p)
        await vllm.crash()
        assert (await refusal_of(p)).reason is Reason.UPSTREAM_UNAVAILABLE
        vllm.without_fields, vllm.version = ("cache_salt",), "0.8.5"
        await vllm.start_listening()
        with pytest.raises(CallerError, match="does not support cache_salt"):
            await notices_of(p)
    assert paths(vllm) == [*FIRST, CHAT, "/version", "/health", "/openapi.json"]


async def test_another_replica_is_told(vllm: FakeVllm) -> None:
    """With what was wrong with the first; each has a version of its own."""
    vllm.play(Script.error(503, "no room"))
    async with (
        FakeVllm(without_endpoints=("/openapi.json",)) as other,
        provider(vllm.base_url, other.base_url) as p,
    ):
        (first, second), tried = await notices_of(p)
    assert tried == 2
    assert (first.kind, first.field) == (NoticeKind.ANOTHER_REPLICA, "")
    assert "no room" in first.message
    assert second.kind is NoticeKind.FIELDS_NOT_CHECKED


async def test_extra_fields(vllm: FakeVllm) -> None:
    """Those that the operator allows are sent to the letter and checked like any; others are refused unsent."""
    async with provider(vllm.base_url, allowed_extra_fields=("echo", "x_*")) as p:
        await notices_of(p, replace(HI, extra_body='{"echo": 1.50}'))
        assert b'"echo":1.50' in vllm.chats[0].raw
        for text, reason, field in (
            ('{"x_new":1}', Reason.FIELD_NOT_SUPPORTED, "chat.extra_body.x_new"),
            ('{"other":1}', Reason.INVALID_REQUEST, "chat.extra_body.other"),
        ):
            with pytest.raises(CallerError) as caught:
                await notices_of(p, replace(HI, extra_body=text))
            assert (caught.value.reason, caught.value.violations[0].field) == (reason, field)
    assert len(vllm.chats) == 1


async def test_a_tool_is_strict_only_where_that_is_known(vllm: FakeVllm) -> None:
    """A vLLM that does not know it lets the arguments run free."""
    vllm.without_fields = ("strict",)
    tools = (ToolSpec("t", strict=True), ToolSpec("u"))
    async with provider(vllm.base_url) as p:
        await notices_of(p, replace(HI, tools=tools, allowed_tools=frozenset({"u"})))
        with pytest.raises(CallerError) as caught:
            await notices_of(p, replace(HI, tools=tools))
    assert [violation.field for violation in caught.value.violations] == ["chat.tools[0].strict"]
