"""The endpoints, the recorded requests, and the detection of disconnected clients."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.fake_vllm.connection import UNSENT_LIMIT
from tests.fake_vllm.raw import ASK, TRANSCRIPTS, connect, http, shape

ENDLESS = ASK | {"ignore_eos": True, "max_tokens": 10_000_000}


def recorded(name: str) -> dict[str, Any]:
    """Decode a recorded body."""
    body: dict[str, Any] = json.loads((TRANSCRIPTS / f"{name}.body").read_bytes())
    return body


async def running(vllm: FakeVllm) -> float:
    """Read the gauge."""
    async with http(vllm.base_url) as client:
        text = (await client.get("/metrics")).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))


@pytest.mark.parametrize("half", [False, True])
async def test_the_gauge_falls_when_the_client_goes(half: bool) -> None:
    """A stream that would never end counts as running until its client closes, or half closes, its connection."""
    async with FakeVllm(Script.generated(tokens_per_second=1000)) as vllm:
        async with connect(vllm) as raw:
            raw.ask(ENDLESS)
            await raw.head()
            await raw.chunk()
            assert await running(vllm) == 1
            request = await vllm.received()
            assert not request.closed_early.is_set()
            if half:
                raw.half_close()
                await request.closed_early.wait()
        await request.closed_early.wait()
        assert await running(vllm) == 0


async def test_the_gauge_falls_when_the_client_goes_before_an_answer_that_is_not_streamed() -> None:
    """It is noticed as with a stream."""
    async with FakeVllm(Script.generated(headers_delay=3600)) as vllm:
        async with connect(vllm) as raw:
            raw.ask(ASK | {"stream": False})
            request = await vllm.received()
            assert vllm.running == 1
        await request.closed_early.wait()
        assert vllm.running == 0


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    """An endless stream flat out stops at full buffers, others are served meanwhile, and it goes on when read."""
    async with FakeVllm(Script.generated(chunks_per_write=64)) as vllm, http(vllm.base_url) as client:
        async with connect(vllm) as raw:
            raw.ask(ENDLESS)
            await raw.head()
            (connection,) = vllm._connections
            while connection.writable.is_set():  # noqa: ASYNC110 - there is no event for what is being filled
                await asyncio.sleep(0)
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
            assert not connection.writable.is_set()
            assert connection.transport.get_write_buffer_size() < 2 * UNSENT_LIMIT
            while not connection.writable.is_set():
                await raw.chunk()
            raw.writer.transport.abort()
        await vllm.chats[0].closed_early.wait()
        assert vllm.running == 0


async def test_what_was_asked_is_told() -> None:
    """Method, path, query, headers and body of every request; a finished one did not close early."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        await client.get("/health?a=1", headers={"X-Some": "Thing"})
        await client.post("/v1/chat/completions", json=ASK)
        chat = await vllm.received(1)
    health = vllm.requests[0]
    assert (health.method, health.path, health.query, health.headers["x-some"]) == (
        "GET",
        "/health",
        {"a": "1"},
        "Thing",
    )
    assert (health.body, health.raw) == (None, b"")
    assert chat.body == ASK
    assert not chat.closed_early.is_set()


async def test_the_key_guards_v1_alone() -> None:
    """None and a wrong one are refused as vLLM refuses them; `/health` asks for none."""
    async with FakeVllm(api_key="right") as vllm, http(vllm.base_url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            for answer in (
                await client.get("/v1/models", headers=headers),
                await client.post("/v1/chat/completions", json=ASK, headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.content == (TRANSCRIPTS / "auth-chat-none.body").read_bytes()
        assert (await client.get("/v1/models", headers={"authorization": "Bearer right"})).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_models() -> None:
    """A card per name, of the recorded shape; any name is answered with the first."""
    async with FakeVllm(models=("one", "two")) as vllm, http(vllm.base_url) as client:
        cards = (await client.get("/v1/models")).json()
        answer = await client.post("/v1/chat/completions", json=ASK | {"model": "two", "stream": False})
        unnamed = {name: value for name, value in ASK.items() if name != "model"} | {"stream": False}
        by_default = await client.post("/v1/chat/completions", json=unnamed)
    assert shape(cards) == shape(recorded("get-models"))
    assert [card["id"] for card in cards["data"]] == ["one", "two"]
    assert answer.json()["model"] == by_default.json()["model"] == "one"


async def test_adapters() -> None:
    """Each has a card that names its base; it answers in its own name, and comes and goes while the server runs."""
    async with FakeVllm(models=("base", "alias"), adapters=("sql",)) as vllm, http(vllm.base_url) as client:
        cards = (await client.get("/v1/models")).json()["data"]
        answer = await client.post("/v1/chat/completions", json=ASK | {"model": "sql", "stream": False})
        vllm.load_adapter("poems")
        more = (await client.get("/v1/models")).json()["data"]
        vllm.unload_adapter("sql")
        refused = await client.post("/v1/chat/completions", json=ASK | {"model": "sql"})
    assert [(card["id"], card["parent"], card["root"], card["max_model_len"]) for card in cards] == [
        ("base", None, "/models/base", 4096),
        ("alias", None, "/models/base", 4096),
        ("sql", "base", "/adapters/sql", None),
    ]
    assert answer.json()["model"] == "sql"
    assert [card["id"] for card in more] == ["base", "alias", "sql", "poems"]
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    ("recording", "changes"),
    [
        ("err-unknown-model", {"model": "nope"}),
        ("err-required-no-tools", {"tool_choice": "required"}),
        ("err-named-missing", {"tool_choice": {"type": "function", "function": {"name": "x"}}}),
    ],
)
async def test_refusals_as_recorded(recording: str, changes: dict[str, Any]) -> None:
    """What is refused gets the recorded answer, and takes nothing from the queue."""
    names = ("smollm2", "smollm2-alias")
    async with FakeVllm(models=names) as vllm, http(vllm.base_url) as client:
        vllm.play(Script.answer(b"queued"))
        refused = await client.post("/v1/chat/completions", json=ASK | {"model": "smollm2"} | changes)
        queued = await client.post("/v1/chat/completions", json=ASK | {"model": "smollm2"})
    assert refused.json() == recorded(recording)
    assert refused.status_code == recorded(recording)["error"]["code"]
    assert queued.content == b"queued"


@pytest.mark.parametrize(("recording", "body"), [("err-bad-json", b'{"model":'), ("err-missing-messages", b"{}")])
async def test_bodies_that_cannot_be_used(recording: str, body: bytes) -> None:
    """They are vLLM's 400 with its shape."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        answer = await client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert shape(answer.json()) == shape(recorded(recording))
    assert answer.json()["error"]["type"] == recorded(recording)["error"]["type"]


async def test_unknown_paths_and_methods() -> None:
    """The router's own errors have another shape."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        unknown = await client.get("/v1/nope")
        wrong = await client.get("/v1/chat/completions")
    assert (unknown.status_code, unknown.json()) == (404, recorded("err-not-found"))
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})


async def test_health_version_and_sleep() -> None:
    """An engine asleep is healthy, and answers chats with a head and nothing more until it wakes."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client, connect(vllm) as raw:
        assert (await client.get("/version")).json() == recorded("get-version")
        assert (await client.get("/is_sleeping")).json() == recorded("c-is-sleeping")
        vllm.sleep()
        raw.ask()
        assert "200 OK" in await raw.head()
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert (await client.get("/health")).status_code == 200
        vllm.wake()
        assert (await raw.chunks())[-1] == b"data: [DONE]\n\n"
        vllm.healthy = False
        dead = await client.get("/health")
        assert (dead.status_code, dead.content) == (503, b"")


async def test_requests_in_pieces_and_in_a_row() -> None:
    """A request may come byte by byte, two may come at once, and `connection: close` is honoured."""
    async with FakeVllm(Script.answer(b"ok")) as vllm, connect(vllm) as raw:
        data = json.dumps(ASK).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(data)}\r\nExpect: 100-continue\r\n\r\n"
        for byte in head.encode():
            raw.writer.write(bytes([byte]))
            await raw.writer.drain()
        assert "100 Continue" in await raw.head()
        raw.writer.write(data)
        await raw.head()
        assert await raw.reader.readexactly(2) == b"ok"
        raw.ask(ASK)
        raw.ask(ASK, "Connection: close")
        rest = await raw.reader.read()
    assert rest.count(b"ok") == 2
    assert len(vllm.chats) == 3


@pytest.mark.parametrize(
    ("request_head", "status"),
    [(b"nonsense\r\n\r\n", 400), (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411)],
)
async def test_what_is_not_read(request_head: bytes, status: int) -> None:
    """No HTTP, and bodies without a length, are refused and the connection closed."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        raw.writer.write(request_head)
        assert (await raw.reader.read()).startswith(f"HTTP/1.1 {status} ".encode())


async def test_a_prompt_is_counted_as_it_is_charged() -> None:
    """In the recorded shape, without a key, and with the figure that the answer's usage gives."""
    async with FakeVllm(api_key="k") as vllm, http(vllm.base_url) as client:
        counted = (await client.post("/tokenize", json={"model": "fake", "messages": ASK["messages"]})).json()
        text = (await client.post("/tokenize", json={"prompt": "some words"})).json()
        answer = await client.post(
            "/v1/chat/completions", json=ASK | {"stream": False}, headers={"authorization": "Bearer k"}
        )
    assert counted.keys() == recorded("get-tokenize").keys()
    assert counted["count"] == len(counted["tokens"]) == answer.json()["usage"]["prompt_tokens"]
    assert text["count"] == 10


@pytest.mark.parametrize(
    ("body", "status"), [({"messages": [], "model": "no"}, 404), ({"model": "fake"}, 400), ([], 400)]
)
async def test_a_prompt_that_cannot_be_counted(body: object, status: int) -> None:
    """A model that is not there, and what is no prompt."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        answer = await client.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


async def test_what_it_says_of_itself_can_change() -> None:
    """As by an upgrade; what it does not know it takes all the same."""
    async with FakeVllm(without_fields=("priority", "strict")) as vllm, http(vllm.base_url) as client:
        before = (await client.get("/openapi.json")).json()
        assert (await client.post("/v1/chat/completions", json=ASK | {"priority": 1})).status_code == 200
        vllm.without_fields, vllm.version = (), "0.33.0"
        after = (await client.get("/openapi.json")).json()
        assert (await client.get("/version")).json() == {"version": "0.33.0"}
    for name, member in (("ChatCompletionRequest", "priority"), ("FunctionDefinition", "strict")):
        assert member not in before["components"]["schemas"][name]["properties"]
        assert member in after["components"]["schemas"][name]["properties"]
    assert (before["info"]["version"], after["info"]["version"]) == ("0.32.0", "0.33.0")
