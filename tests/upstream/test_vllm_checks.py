"""What is asked of a vLLM before a request goes to it, over HTTP, and what its caller is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, Code, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.upstream.request import ToolSpec
from deltawire_server.upstream.vllm import MAX_DOCUMENT_BYTES, VllmProvider
from tests.upstream.plain import plain
from tests.upstream.support import CALL, CHAT, HI, OPERATORS, provider, refusal_of

if TYPE_CHECKING:
    from deltawire_server.upstream.request import ChatRequest

SALTED = replace(HI, cache_salt="s")


async def notices_of(p: VllmProvider, request: ChatRequest = SALTED) -> tuple[tuple[Notice, ...], int]:
    """What the caller of a request is to know, and how many replicas it took."""
    async with p.stream_chat(request, "fake", CALL) as answering:
        assert b"".join([data async for data in answering.body]).endswith(b"data: [DONE]\n\n")
        return answering.notices, answering.replicas_tried


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
    assert paths(vllm) == ["/version", "/openapi.json", *[CHAT] * 6]
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
    "answers",
    [
        {},
        {"/openapi.json": ("200 OK", b"{}")},
        {"/openapi.json": ("200 OK", b"<html>")},
        {"/openapi.json": ("", b"")},
        {"/openapi.json": ("200 OK\r\ncontent-length: 99", b"{")},
        {"/openapi.json": ("200 OK", b" " * (MAX_DOCUMENT_BYTES + 1))},
    ],
    ids=["not there", "of something else", "no JSON", "breaks off", "cut", "endless"],
)
async def test_fields_that_cannot_be_checked_are_told(answers: dict[str, tuple[str, bytes]]) -> None:
    """The request is sent, the caller knows which field may be ignored, and nothing is read again for a while."""
    answers = {**answers, CHAT: ("200 OK\r\ncontent-type: text/event-stream", b"data: [DONE]\n\n")}
    async with plain(answers) as server, provider(f"http://127.0.0.1:{server.port}") as p:
        for _ in range(2):
            (notice,), tried = await notices_of(p)
            assert (notice.kind, notice.field, tried) == (NoticeKind.FIELDS_NOT_CHECKED, "chat.cache_salt", 1)
            assert "cache_salt" in notice.message
        assert await notices_of(p, HI) == ((), 1)
    # The transport asks once more by itself where a connection that it used before breaks.
    assert [*dict.fromkeys(server.paths)] == ["/version", "/openapi.json", CHAT]
    assert server.paths[-3:] == [CHAT] * 3


async def test_a_replica_that_was_away_may_be_another_version(vllm: FakeVllm) -> None:
    """After it was set aside its version is asked for again, and if it is another one, its fields."""
    async with provider(vllm.base_url) as p:
        await notices_of(p)
        await vllm.crash()
        assert (await refusal_of(p)).reason is Reason.UPSTREAM_UNAVAILABLE
        vllm.without_fields, vllm.version = ("cache_salt",), "0.8.5"
        await vllm.start_listening()
        with pytest.raises(CallerError, match="does not know cache_salt"):
            await notices_of(p)
    assert paths(vllm) == ["/version", "/openapi.json", CHAT, "/version", "/openapi.json"]


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
