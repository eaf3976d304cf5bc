"""Usage records of completions, as callers cause them: over gRPC, at both clients of a gateway, and of a process that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING

import grpc
import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.usage.lines import Line
from deltawire_server.usage.report import read
from tests.metrics.scrape import Page, scrape, until_scraped
from tests.support.gateway import WAIT, Lines, Running, ask, failure_of, read_badly, read_well, until
from tests.support.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import StartGateway

CHUNKS = Chunks()
KEY = "secret-of-ann-alone"
KEYS = {"keys": f"ann call {KEY}"}
ANN = (("authorization", f"Bearer {KEY}"), ("x-request-id", "r-1"))


def lines_in(folder: Path) -> list[Line]:
    """All lines of a folder."""
    paths = sorted(folder.glob("usage-*.jsonl"))
    return [msgspec.json.decode(line, type=Line) for path in paths for line in path.read_bytes().splitlines()]


@pytest.fixture
async def gateway(start_gateway: StartGateway, tmp_path: Path) -> AsyncIterator[Running]:
    """A gateway that writes usage records, with one caller."""
    async with start_gateway(access=KEYS, usage={"folder": str(tmp_path)}) as gateway:
        yield gateway


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001 (made before nothing can be written)
    """No line can be written."""

    def write(_: int, __: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deltawire_server.usage.log.os.write", write)


async def test_a_completion(gateway: Running, tmp_path: Path, vllm: FakeVllm) -> None:
    """Both lines are there when their event is: before the engine is asked, and before the caller has the end."""
    gate = asyncio.Event()
    vllm.play(
        Script.chunks([gate, CHUNKS.role(), CHUNKS.text("ab"), CHUNKS.finish(usage_follows=True), CHUNKS.usage(3, 2)])
    )
    reading = asyncio.create_task(read_well(gateway.stream(ask(completion_id="mine"), metadata=ANN)))
    await until(lambda: len(vllm.chats) == 1)
    [begun] = lines_in(tmp_path)
    assert (begun.event, begun.completion_id, begun.request_id) == ("begun", "mine", "r-1")
    assert (begun.caller, begun.model, begun.alias, begun.provider) == ("ann", "vllm/fake", "fake", "vllm")
    gate.set()
    events = await reading
    _, ended = lines_in(tmp_path)
    final = events[-1].completed.usage
    assert (ended.prompt_tokens, ended.completion_tokens) == (final.prompt_tokens, final.completion_tokens) == (3, 2)
    assert (ended.event, ended.run, ended.provenance, ended.error) == ("ended", begun.run, "EXACT", "")
    assert ended.stop_reasons == ("END_OF_TURN",)
    assert ended.seconds


async def test_ends(gateway: Running, tmp_path: Path, vllm: FakeVllm) -> None:
    """A fault, a cancellation by the caller, a soft cancel and a failure before the answer have their reasons."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a")], end="cut"))
    await read_badly(gateway.stream(metadata=ANN))
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    call = gateway.stream(metadata=ANN)
    await anext(aiter(call))
    call.cancel()
    await until(lambda: len(lines_in(tmp_path)) == 4)
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    stream = aiter(gateway.stream(ask(completion_id="soft"), metadata=ANN))
    await anext(stream)
    cancel = chat_pb.CancelChatCompletionRequest(completion_id="soft")
    await gateway.chat.CancelChatCompletion(cancel, metadata=ANN)
    assert [event async for event in stream]
    vllm.play(Script.error(400, "no"))
    await failure_of(gateway.create(metadata=ANN))
    ended = [line for line in lines_in(tmp_path) if line.event == "ended"]
    assert [(line.error, line.stop_reasons) for line in ended] == [
        ("UPSTREAM_INCOMPLETE", ("UPSTREAM_INCOMPLETE",)),
        ("canceled", ()),
        ("", ("CANCELLED",)),
        ("UPSTREAM_REJECTED", ()),
    ]


async def test_what_reaches_no_engine_has_no_record(gateway: Running, tmp_path: Path) -> None:
    """Invalid requests, unknown models, and counts of tokens."""
    await failure_of(gateway.create(ask(messages=[]), metadata=ANN))
    await failure_of(gateway.create(ask(model="absent"), metadata=ANN))
    await gateway.chat.CountTokens(chat_pb.CountTokensRequest(chat=ask()), metadata=ANN)
    assert lines_in(tmp_path) == []


async def test_a_generation_has_one_record(gateway: Running, tmp_path: Path) -> None:
    """However often it is read, and also if it is retained."""
    options = chat_pb.StreamOptions(retention=Duration(seconds=60))
    for _ in range(2):
        await read_well(gateway.stream(ask(completion_id="c"), options=options, metadata=ANN))
    await read_well(gateway.resume("c", metadata=ANN))
    assert [line.event for line in lines_in(tmp_path)] == ["begun", "ended"]


@pytest.mark.usefixtures("no_room")
async def test_a_full_disk(gateway: Running, lines: Lines, vllm: FakeVllm) -> None:
    """By default calls go on."""
    await gateway.create(metadata=ANN)
    assert len(vllm.chats) == 1
    await lines.find("usage records cannot be written", level="error")


@pytest.mark.usefixtures("no_room")
async def test_a_full_disk_if_records_are_required(start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path) -> None:
    """Completions are refused before the engine is asked, and can be retried elsewhere."""
    async with start_gateway(usage={"folder": str(tmp_path), "required": True}) as gateway:
        failure = await failure_of(gateway.create())
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert failure.retry_seconds
        assert gateway.gateway._worker.active == 0
    assert vllm.chats == []


@pytest.mark.usefixtures("no_room")
async def test_a_refused_completion_is_a_failed_call_only(start_gateway: StartGateway, tmp_path: Path) -> None:
    """It has no duration, no tokens and no usage among the metrics, as it has no record."""
    usage, metrics = {"folder": str(tmp_path), "required": True}, {"listen": "127.0.0.1:0"}
    async with start_gateway(usage=usage, metrics=metrics) as gateway:
        address = gateway.gateway.metrics_address
        before = await scrape(address)
        failed = {"reason": "STORE_UNAVAILABLE"}
        await failure_of(gateway.create())

        def added(page: Page, name: str, **labels: str) -> float:
            return page.value(name, **labels) - before.value(name, **labels)

        page = await until_scraped(address, lambda page: added(page, "deltawire_failed_calls_total", **failed) == 1)
        for name in ("deltawire_usage_total", "gen_ai_client_token_usage_count"):
            assert added(page, name) == 0
        assert added(page, "gen_ai_client_operation_duration_seconds_count") == 0
        assert added(page, "deltawire_usage_records_total", outcome="lost") == 1


async def test_a_gateway_that_is_killed(vllm: FakeVllm, tmp_path: Path) -> None:
    """Under load: all that reached vLLM has begun, all whose end a caller has is ended with the same usage; the rest is lost."""
    folder = tmp_path / "usage"
    folder.mkdir()
    variables = {
        "VLLM_URL": vllm.base_url,
        "DELTAWIRE_USAGE_FOLDER": str(folder),
        "DELTAWIRE_REGISTRY_DATABASE_URL": f"sqlite:///{tmp_path}/registry.db",
    }
    arguments = ["--listen", "127.0.0.1:0", "--metrics-listen", "off"]
    process = GatewayProcess(arguments, variables, tmp_path / "log")
    ends: dict[str, chat_pb.Usage] = {}
    await asyncio.to_thread(process.start)
    try:
        async with aio.insecure_channel(process.address) as channel:
            stub = ChatCompletionStub(channel)

            async def call_for_ever(number: int) -> None:
                for turn in range(10_000):
                    chat = ask(completion_id=f"c-{number}-{turn}")
                    call = stub.StreamChatCompletion(chat_pb.StreamChatCompletionRequest(chat=chat))
                    async for event in call:
                        if event.HasField("completed"):
                            ends[chat.completion_id] = event.completed.usage

            async with asyncio.timeout(WAIT):
                # One is still running when the gateway is killed.
                vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
                calls = [asyncio.create_task(call_for_ever(99))]
                await vllm.received()
                calls += [asyncio.create_task(call_for_ever(number)) for number in range(16)]
                await until(lambda: len(ends) >= 64)
                process.kill()
                for call in calls:
                    with contextlib.suppress(aio.AioRpcError):
                        await call
    finally:
        process.stop()
    lines = lines_in(folder)
    begun = [line.completion_id for line in lines if line.event == "begun"]
    ended = {line.completion_id: line for line in lines if line.event == "ended"}
    assert len(vllm.chats) <= len(begun) == len(set(begun))
    assert ends.keys() <= ended.keys() <= set(begun)
    for completion_id, usage in ends.items():
        line = ended[completion_id]
        assert (line.prompt_tokens, line.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    report = read(folder)
    assert report.torn == []
    totals = report.groups[()]
    assert (totals.completions, totals.running, totals.lost) == (len(ended), 0, len(begun) - len(ended))
    assert totals.completion_tokens == sum(line.completion_tokens or 0 for line in ended.values())
    assert len(begun) > len(ended), "nothing was running when it was killed"
    # Another process writes another file.
    await asyncio.to_thread(process.start)
    try:
        async with aio.insecure_channel(process.address) as channel:
            await ChatCompletionStub(channel).CreateChatCompletion(chat_pb.CreateChatCompletionRequest(chat=ask()))
    finally:
        await asyncio.to_thread(process.stop)
    after = read(folder).groups[()]
    assert (after.completions, after.lost) == (len(ended) + 1, len(begun) - len(ended))
