"""Each fault really is on the wire, and nothing else is changed by it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import httpx
import pytest

from deltawire_server.fake_vllm import Chunks, FakeVllm, Script, error_body
from tests.fake_vllm.raw import ASK, TRANSCRIPTS, connect, events, http

if TYPE_CHECKING:
    from pathlib import Path

RECORDINGS = sorted(path.name for kind in ("sse", "body") for path in TRANSCRIPTS.glob(f"*.{kind}"))
GREEDY = TRANSCRIPTS / "text-greedy.sse"
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("recording", RECORDINGS)
async def test_a_recording_plays_bit_for_bit(recording: str) -> None:
    """Body, status and content type of every recording, through an ordinary HTTP client."""
    path = TRANSCRIPTS / recording
    expected, meta = path.read_bytes(), json.loads(path.with_suffix(".meta.json").read_bytes())
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.recording(path))
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.content == expected
    assert answer.status_code == meta["status"]
    headers = dict(line.split(": ", 1) for line in meta["headers"])
    assert answer.headers["content-type"] == headers.get("content-type", "application/json")


async def test_the_recorded_chunks() -> None:
    """HTTP chunks are cut where the real server cut them."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.recording(GREEDY))
        raw.ask()
        await raw.head()
        sizes = [len(chunk) for chunk in await raw.chunks()]
    assert sizes == json.loads(GREEDY.with_suffix(".meta.json").read_bytes())["http_chunk_sizes"]


async def test_chunks_cut_otherwise(tmp_path: Path) -> None:
    """`chop` cuts anywhere; a file without a description is cut at its events."""
    copy = tmp_path / "copy.sse"
    copy.write_bytes(GREEDY.read_bytes())
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(
            Script.recording(GREEDY, chop=lambda body: [body[at : at + 7] for at in range(0, len(body), 7)]),
            Script.recording(copy),
        )
        raw.ask()
        await raw.head()
        by_seven = await raw.chunks()
        raw.ask()
        await raw.head()
        by_event = await raw.chunks()
    assert {len(chunk) for chunk in by_seven[:-1]} == {7}
    assert len(by_event) == 39
    assert b"".join(by_seven) == b"".join(by_event) == GREEDY.read_bytes()


async def test_eof_between_chunks() -> None:
    """Five chunks, then the end of the connection instead of a chunk."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.recording(GREEDY, end="eof", after=5))
        raw.ask()
        await raw.head()
        chunks = [await raw.chunk() for _ in range(5)]
        assert await raw.reader.read() == b""
    assert GREEDY.read_bytes().startswith(b"".join(chunks))
    assert not vllm.requests[0].closed_early.is_set()


async def test_eof_inside_a_chunk() -> None:
    """A chunk is announced longer than what comes of it."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.recording(GREEDY, end="cut", after=5))
        raw.ask()
        await raw.head()
        for _ in range(5):
            await raw.chunk()
        rest = await raw.reader.read()
    size, _, begun = rest.partition(b"\r\n")
    assert 0 < len(begun) < int(size, 16)


async def test_a_client_library_sees_eof() -> None:
    """It is a protocol error to an ordinary client."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.generated(end="eof", after=3))
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            await client.post("/v1/chat/completions", json=ASK)


async def test_reset() -> None:
    """What was sent arrives; then the connection is reset, not ended."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        gate = asyncio.Event()
        vllm.play(Script.chunks([b"one", gate, b"two"], end="reset", after=1))
        raw.ask()
        await raw.head()
        assert await raw.chunk() == b"one"
        gate.set()
        with pytest.raises(ConnectionResetError):
            await raw.reader.read()


async def test_hang_until_the_client_goes() -> None:
    """Nothing more is sent; a disconnect of the client is detected."""
    async with FakeVllm() as vllm:
        vllm.play(Script.generated(end="hang", after=2, keep_alive=0.01))
        async with connect(vllm) as raw:
            raw.ask()
            await raw.head()
            for _ in range(2):
                await raw.chunk()
            assert await raw.chunk() == b": keep-alive\n\n"
            assert vllm.running == 1
        await (await vllm.received()).closed_early.wait()
        assert vllm.running == 0


@pytest.mark.parametrize("size", [None, 1, 50])
async def test_no_done(size: int | None) -> None:
    """HTTP ends as it should, the stream does not, however its end is cut."""
    chop = (lambda body: [body[at : at + size] for at in range(0, len(body), size)]) if size else None
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.recording(GREEDY, chop=chop, end="no_done"))
        answer = await client.post("/v1/chat/completions", json=ASK)
        vllm.play(Script.generated(end="no_done"))
        generated = await client.post("/v1/chat/completions", json=ASK)
    assert answer.content + DONE == GREEDY.read_bytes()
    assert events(generated.content + DONE)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_clean_after() -> None:
    """A stream that just stops, cleanly."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.recording(GREEDY).but(after=4))
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.content.count(b"\n\n") == 4


async def test_half_a_head() -> None:
    """The head breaks off."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.generated(header_bytes=20))
        raw.ask()
        head = await raw.reader.read()
    assert head == b"HTTP/1.1 200 OK\r\ndat"


@pytest.mark.parametrize("end", ["clean", "no_done", "eof", "cut"])
async def test_no_byte_at_all(end: str) -> None:
    """The request is taken, and the connection closed."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.generated(header_bytes=0, end=end))  # type: ignore[arg-type] # a literal, from a list
        raw.ask()
        assert await raw.reader.read() == b""
        assert len(vllm.chats) == 1


async def test_reset_before_any_byte() -> None:
    """The request is taken, and the connection reset."""
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(Script.generated(header_bytes=0, end="reset"))
        raw.ask()
        with pytest.raises(ConnectionResetError):
            await raw.reader.read()


async def test_a_body_cut_short() -> None:
    """A `content-length` that is not kept."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.answer({"some": "thing"}, end="cut", after=0), Script.answer({"a": 1}, after=0))
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/v1/chat/completions", json=ASK)


async def test_slow_head_and_delays() -> None:
    """Delays change when, not what."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(
            Script.recording(GREEDY, header_pause=0.001, headers_delay=0.001, first_delay=0.001, chunk_delay=0.0001)
        )
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.content == GREEDY.read_bytes()


async def test_a_gate_with_comments_while_waiting() -> None:
    """The head comes at once, then comments, and the rest when the test says so."""
    gate, chunk = asyncio.Event(), Chunks()
    async with FakeVllm() as vllm, connect(vllm) as raw:
        vllm.play(
            Script.chunks([gate, chunk.role(), chunk.text("Hi"), chunk.finish()], keep_alive=0.005, chunk_delay=0.001)
        )
        raw.ask()
        assert "text/event-stream" in await raw.head()
        for _ in range(3):
            assert await raw.chunk() == b": keep-alive\n\n"
        gate.set()
        body = b"".join(part for part in await raw.chunks() if not part.startswith(b":"))
    assert [event["choices"][0]["delta"].get("content") for event in events(body)] == ["", "Hi", None]


async def test_garbage_and_a_wrong_content_type() -> None:
    """Bytes are sent as they are, and nothing is added to them."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(Script.chunks([b"\x00\xff", b"", b"<html>"], content_type="text/html", headers={"x-more": "1"}))
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.content == b"\x00\xff<html>"
    assert answer.headers["content-type"] == "text/html"
    assert answer.headers["x-more"] == "1"


async def test_errors_before_and_within_a_stream() -> None:
    """An error is the answer, or an event in vLLM's spaced style, with `[DONE]` after it."""
    chunk = Chunks()
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        vllm.play(
            Script.error(503, "busy", "Service Unavailable"),
            Script.chunks([chunk.role(), chunk.reasoning("hm"), error_body(500, "boom", "InternalServerError")]),
        )
        refused = await client.post("/v1/chat/completions", json=ASK)
        broken = await client.post("/v1/chat/completions", json=ASK)
    assert refused.status_code == 503
    assert refused.json() == {"error": {"message": "busy", "type": "Service Unavailable", "param": None, "code": 503}}
    error = b'{"error": {"message": "boom", "type": "InternalServerError", "param": null, "code": 500}}'
    assert broken.content.endswith(
        b'"delta":{"reasoning":"hm"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        b"data: " + error + b"\n\n" + DONE
    )


async def test_connection_refused_and_back() -> None:
    """Open connections stay, new ones are refused, and the port is the same afterwards."""
    async with FakeVllm() as vllm:
        async with http(vllm.base_url) as client:
            assert (await client.get("/health")).status_code == 200
            await vllm.stop_listening()
            assert (await client.get("/health")).status_code == 200
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", vllm.port)
        await vllm.start_listening()
        async with http(vllm.base_url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_crash_cuts_everything() -> None:
    """As after `kill -9`, streams break off, and the port is closed."""
    async with FakeVllm(Script.generated(end="hang", after=1)) as vllm, connect(vllm) as raw:
        raw.ask()
        await raw.head()
        await raw.chunk()
        await vllm.crash()
        assert await raw.reader.read() == b""
        assert (vllm.running, vllm.connections) == (0, 0)
        assert not vllm.chats[0].closed_early.is_set()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", vllm.port)
