"""Completions by their ids on a real vLLM: canceled softly, looked up, retained and resumed.

What would go on for a minute or more is ended here, each time, and the engine must stop then.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import MessageToJson

from deltawire import (
    CallCancelledError,
    CompletionAlreadyExistsError,
    CompletionGoneError,
    CompletionNotFoundError,
    DeadlineExceededError,
    ErrorReason,
    StopReason,
)
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_COMPLETED,
    COMPLETION_STATE_FAILED,
    COMPLETION_STATE_RUNNING,
    USAGE_PROVENANCE_ESTIMATED,
    USAGE_PROVENANCE_EXACT,
    USAGE_PROVENANCE_LOWER_BOUND,
)
from tests.e2e.support import (
    CALL_SECONDS,
    DELTAWIRE,
    MODEL,
    SEA,
    delta_text,
    kinds,
    looked_up,
    run,
    suspended,
)

if TYPE_CHECKING:
    from asyncio import StreamReader
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

    from deltawire import AsyncChatStream, AsyncClient, GetChatCompletionResponse, StreamChatCompletionResponse
    from tests.e2e.support import Engine
    from tests.support.gateway_process import GatewayProcess
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e

ENDLESS: dict[str, Any] = {"model": MODEL, "max_tokens": 3500, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "ignore_eos": True, "temperature": 0.0}
KEPT = 300.0
"""Seconds for `retention`: more than any test takes."""
MOMENTS = 5
KILLED_TOKENS = 200


def new_id(name: str) -> str:
    """An unused id."""
    return f"{name}-{secrets.token_hex(4)}"


async def read_until_text(stream: AsyncChatStream, pieces: int = 1) -> list[StreamChatCompletionResponse]:
    """The first events of a stream, up to a number of text deltas."""
    events: list[StreamChatCompletionResponse] = []
    while sum(event.HasField("text_delta") for event in events) < pieces:
        events.append(await anext(stream))
    return events


def running(found: GetChatCompletionResponse) -> bool:
    """Whether a completion is running."""
    return found.state == COMPLETION_STATE_RUNNING


def ended(found: GetChatCompletionResponse) -> bool:
    """Whether a completion has ended."""
    return found.state != COMPLETION_STATE_RUNNING


# --- Soft ends


async def test_a_soft_cancel(client: AsyncClient, engine: Engine) -> None:
    """A soft cancel ends the stream normally with the text so far, the engine stops, and a second cancel has no effect."""
    completion_id = new_id("cancelled")
    async with client.chat.stream(SEA, completion_id=completion_id, **ENDLESS) as stream:
        events = await read_until_text(stream, 3)
        assert events[0].started.completion_id == completion_id
        assert engine.running() == 1
        met = await client.chat.cancel(completion_id)
        events += [event async for event in stream]
        answer = await stream.final()
    assert met.state == COMPLETION_STATE_RUNNING
    assert kinds(events) == ["started", "text_delta", "choice_finished", "completed"]
    assert answer.stop_reason == events[-2].choice_finished.stop_reason == StopReason.STOP_REASON_CANCELLED
    assert answer.choices[0].engine_finish_reason == ""
    assert answer.text == delta_text(events) != ""
    assert not answer.completed.HasField("error")
    assert answer.usage.provenance == USAGE_PROVENANCE_LOWER_BOUND
    assert answer.usage.prompt_tokens == engine.prompt_tokens(SEA)
    assert 3 <= met.usage.completion_tokens <= answer.usage.completion_tokens < 3500
    await engine.becomes_idle()
    again = await client.chat.cancel(completion_id)
    assert (again.state, again.usage) == (COMPLETION_STATE_COMPLETED, answer.usage)


async def test_a_soft_cancel_of_a_unary_call(client: AsyncClient, engine: Engine) -> None:
    """A soft cancel returns the text so far to the unary call."""
    completion_id = new_id("whole")
    creating = asyncio.create_task(client.chat.create(SEA, completion_id=completion_id, **ENDLESS))
    await looked_up(client, completion_id, lambda found: found.usage.completion_tokens >= 3)
    await client.chat.cancel(completion_id)
    answer = await creating
    assert answer.completion_id == completion_id
    assert answer.stop_reason == StopReason.STOP_REASON_CANCELLED
    assert answer.text
    assert answer.usage.completion_tokens >= 3
    await engine.becomes_idle()


async def test_a_soft_cancel_during_prefill(client: AsyncClient, engine: Engine) -> None:
    """A soft cancel before the first token ends the completion at once, and the engine generates nothing."""
    completion_id = new_id("reading")
    salt = secrets.token_hex(8)
    prompt = "word " * 3000  # for seconds
    arguments = {**ENDLESS, "max_tokens": 900}
    before = engine.generated()
    async with client.chat.stream(prompt, completion_id=completion_id, cache_salt=salt, **arguments) as stream:
        reader = asyncio.create_task(stream.final())
        await looked_up(client, completion_id, running)
        met = await client.chat.cancel(completion_id)
        answer = await reader
    assert (met.state, met.usage.completion_tokens) == (COMPLETION_STATE_RUNNING, 0)
    assert (answer.text, answer.stop_reason) == ("", StopReason.STOP_REASON_CANCELLED)
    assert answer.completion_id == completion_id
    # A request that ends before its first token is never counted as running: another one shows that the engine is past it.
    await client.chat.create(SEA, **SHORT)
    await engine.becomes_idle()
    assert engine.generated() - before < 900


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
async def test_a_soft_cancel_of_a_suspended_engine(
    client: AsyncClient, vllm: VllmServer, engine: Engine, *, whole: bool
) -> None:
    """The end does not wait for the engine, and every requested choice ends."""
    completion_id = new_id("still")
    arguments = {**ENDLESS, "completion_id": completion_id, "choice_count": 2, "temperature": 1.0}
    with suspended(vllm):
        asked = client.chat.create(SEA, **arguments) if whole else client.chat.stream(SEA, **arguments).final()
        asking = asyncio.create_task(asked)
        await looked_up(client, completion_id, running)
        await client.chat.cancel(completion_id)
        answer = await asking
    cancelled = (StopReason.STOP_REASON_CANCELLED, "")
    assert [(choice.stop_reason, choice.text) for choice in answer.choices] == [cancelled] * 2
    # The engine has said nothing yet, not even how long the prompt is.
    assert answer.usage.provenance == USAGE_PROVENANCE_ESTIMATED
    assert not answer.usage.HasField("prompt_tokens")
    await engine.becomes_idle()


async def test_the_soft_time_limit(client: AsyncClient, engine: Engine) -> None:
    """The soft time limit ends the stream normally with the text so far, and the engine stops."""
    async with client.chat.stream(SEA, soft_time_limit=3, **ENDLESS) as stream:
        events = [event async for event in stream]
        answer = await stream.final()
    assert kinds(events)[-2:] == ["choice_finished", "completed"]
    assert answer.stop_reason == StopReason.STOP_REASON_TIME_LIMIT
    assert answer.text == delta_text(events)
    assert not answer.completed.HasField("error")
    assert answer.usage.completion_tokens < 3500
    await engine.becomes_idle()


# --- Look-up


async def test_states_of_a_completion(client: AsyncClient) -> None:
    """A completion that is not retained can be looked up with its state and usage, without a result."""
    completion_id = new_id("known")
    with pytest.raises(CompletionNotFoundError):
        await client.chat.get(completion_id)
    async with client.chat.stream(SEA, completion_id=completion_id, **SHORT) as stream:
        first = await anext(stream)
        under_way = await client.chat.get(completion_id)
        answer = await stream.final()
    assert under_way.started == first.started == answer.started
    found = await client.chat.get(completion_id)
    assert (found.completion_id, found.state) == (completion_id, COMPLETION_STATE_COMPLETED)
    assert found.started == answer.started
    assert found.usage == answer.usage
    assert found.usage.provenance == USAGE_PROVENANCE_EXACT
    for message in (under_way, found):
        assert not any(message.HasField(name) for name in ("completed", "error", "last_sequence", "expire_time"))
    with pytest.raises(CompletionGoneError):
        await client.chat.resume(completion_id).final()


async def test_an_id_is_free_again_after_the_end(client: AsyncClient, engine: Engine) -> None:
    """A running completion's id cannot be used again, and a refused request does not reach the engine."""
    completion_id = new_id("twice")
    async with client.chat.stream(SEA, completion_id=completion_id, **ENDLESS) as stream:
        await read_until_text(stream)
        with pytest.raises(CompletionAlreadyExistsError) as caught:
            await client.chat.create(SEA, completion_id=completion_id, **SHORT)
        assert caught.value.metadata["completion_id"] == completion_id
        assert engine.running() == 1
        await stream.cancel_softly()
        await stream.final()
    answer = await client.chat.create(SEA, completion_id=completion_id, **SHORT)
    assert answer.completion_id == completion_id


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_the_record_of_a_cancelled_call(client: AsyncClient, engine: Engine, end: str) -> None:
    """The record has the outcome and the usage, which its caller did not receive."""
    completion_id = new_id(end)
    timeout = CALL_SECONDS if end == "cancel" else 5.0
    expected = CallCancelledError if end == "cancel" else DeadlineExceededError
    async with client.chat.stream(SEA, completion_id=completion_id, timeout=timeout, **ENDLESS) as stream:
        if end == "cancel":
            await read_until_text(stream, 3)
            stream.cancel()
        with pytest.raises(expected):
            await stream.final()
    found = await looked_up(client, completion_id, ended)
    assert found.state == COMPLETION_STATE_FAILED
    # The caller's own clock may be the first to strike; then its cancel is what arrives.
    codes = {grpc.StatusCode.CANCELLED.value[0]}
    codes |= {grpc.StatusCode.DEADLINE_EXCEEDED.value[0]} if end == "deadline" else set()
    assert found.error.code in codes
    assert found.error.reason == ErrorReason.ERROR_REASON_UNSPECIFIED
    assert found.usage.provenance == USAGE_PROVENANCE_LOWER_BOUND
    assert found.usage.prompt_tokens == engine.prompt_tokens(SEA)
    assert found.usage.completion_tokens > 0
    assert not found.HasField("completed")
    await engine.becomes_idle()


# --- Retained streams


async def test_a_retained_stream_continues_without_its_caller(client: AsyncClient, engine: Engine) -> None:
    """Another call resumes the stream; a soft cancel ends it for every reader."""
    completion_id = new_id("left")
    async with client.chat.stream(SEA, completion_id=completion_id, retention=KEPT, **ENDLESS) as stream:
        first = await read_until_text(stream, 3)
        assert not (await client.chat.get(completion_id)).HasField("expire_time")
    left = await looked_up(client, completion_id, lambda found: found.HasField("expire_time"))
    assert running(left)
    grown = await looked_up(client, completion_id, lambda found: found.last_sequence > left.last_sequence)
    assert grown.usage.completion_tokens > left.usage.completion_tokens
    assert engine.running() == 1
    async with client.chat.resume(completion_id, first[-1].sequence) as stream:
        rest = await read_until_text(stream, 3)
        await client.chat.cancel(completion_id)
        rest += [event async for event in stream]
    events = first + rest
    assert [event.sequence for event in events] == list(range(len(events)))
    assert kinds(events) == ["started", "text_delta", "choice_finished", "completed"]
    assert events[-1].completed.choices[0].stop_reason == StopReason.STOP_REASON_CANCELLED
    assert delta_text(events) == events[-1].completed.choices[0].message.text
    await engine.becomes_idle()


async def test_a_replay_is_identical(client: AsyncClient) -> None:
    """Resuming after any event returns the same events; the result can be looked up too."""
    completion_id = new_id("again")
    async with client.chat.stream(
        SEA, completion_id=completion_id, retention=KEPT, logprobs=2, usage_updates=True, **SHORT
    ) as stream:
        events = [event.SerializeToString() async for event in stream]
        answer = await stream.final()
    for after in (None, *range(len(events))):
        async with client.chat.resume(completion_id, after) as stream:
            again = [event.SerializeToString() async for event in stream]
        assert again == events[0 if after is None else after + 1 :]
    found = await client.chat.get(completion_id)
    assert found.state == COMPLETION_STATE_COMPLETED
    assert found.completed == answer.completed
    assert found.started == answer.started
    assert found.last_sequence == len(events) - 1
    assert found.expire_time.ToSeconds() > answer.started.create_time.ToSeconds()
    with pytest.raises(CompletionAlreadyExistsError):
        await client.chat.create(SEA, completion_id=completion_id, **SHORT)


async def test_a_retained_stream_without_a_reader_expires(client: AsyncClient, engine: Engine) -> None:
    """After the retention time the engine stops; the record keeps the usage, but not the text."""
    completion_id = new_id("lost")
    async with client.chat.stream(SEA, completion_id=completion_id, retention=1, **ENDLESS) as stream:
        await read_until_text(stream, 3)
    found = await looked_up(client, completion_id, ended)
    await engine.becomes_idle()
    assert found.state == COMPLETION_STATE_COMPLETED
    assert found.usage.provenance == USAGE_PROVENANCE_LOWER_BOUND
    assert 3 <= found.usage.completion_tokens < 3500
    with pytest.raises(CompletionGoneError):
        await client.chat.resume(completion_id, stream.last_sequence).final()


@asynccontextmanager
async def asking(gateway: GatewayProcess, completion_id: str) -> AsyncIterator[tuple[Process, StreamReader]]:
    """A `deltawire chat --json` with a retained stream, with its output; killed at the end of the block."""
    options = ["--model", MODEL, "--max-tokens", str(KILLED_TOKENS), "--ignore-eos", "--temperature", "1.5", "--json"]
    options += ["--retention", str(KEPT), "--completion-id", completion_id, "--target", gateway.address]
    process = await asyncio.create_subprocess_exec(
        DELTAWIRE, "chat", *options, SEA, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def resumed(gateway: GatewayProcess, completion_id: str, after: int | None = None) -> list[dict[str, Any]]:
    """The output of `deltawire resume`."""
    options = [] if after is None else ["--after", str(after)]
    status, out, errors = await run(DELTAWIRE, "resume", completion_id, "--json", "--target", gateway.address, *options)
    assert status == 0, errors
    return [json.loads(line) for line in out.splitlines()]


def every_character_once(whole: list[dict[str, Any]]) -> None:
    """Check the text deltas of a stream, as `--json` prints it, against the final text."""
    assert [int(event.get("sequence", 0)) for event in whole] == list(range(len(whole)))
    completed = whole[-1]["completed"]
    text = "".join(event.get("textDelta", {}).get("text", "") for event in whole)
    assert text == completed["choices"][0]["message"]["text"]
    assert completed["choices"][0]["stopReason"] == "STOP_REASON_OUT_OF_TOKENS"
    assert completed["usage"]["completionTokens"] == KILLED_TOKENS
    assert completed["usage"]["provenance"] == "USAGE_PROVENANCE_EXACT"


@pytest.mark.parametrize("moment", range(MOMENTS))
async def test_a_killed_client_process(
    client: AsyncClient, gateway: GatewayProcess, engine: Engine, moment: int
) -> None:
    """After a kill at any event, another process resumes: each character is received once, from one request to the engine."""
    lines = random.Random(moment).randrange(1, KILLED_TOKENS // 2)  # noqa: S311 (the same places in every run)
    completion_id = new_id("killed")
    before = engine.generated()
    async with asking(gateway, completion_id) as (process, out):
        said = [await out.readline() for _ in range(lines)]
        process.kill()
        said += (await out.read()).splitlines(keepends=True)
    # A line that was being written when the process was killed is incomplete and was not read.
    read = [json.loads(line) for line in said if line.endswith(b"\n")]
    assert not any("completed" in event for event in read)
    last = int(read[-1].get("sequence", 0))
    rest = await resumed(gateway, completion_id, last)
    whole = await resumed(gateway, completion_id)
    assert read + rest == whole
    every_character_once(whole)
    found = await client.chat.get(completion_id)
    assert json.loads(MessageToJson(found.completed)) == whole[-1]["completed"]
    assert engine.generated() - before < 2 * KILLED_TOKENS


async def test_a_client_process_that_is_killed_before_the_answer_begins(
    client: AsyncClient, gateway: GatewayProcess, vllm: VllmServer
) -> None:
    """The completion continues, and another process reads all of it."""
    completion_id = new_id("early")
    with suspended(vllm):
        async with asking(gateway, completion_id) as (process, out):
            await looked_up(client, completion_id, running)
            process.kill()
            assert await out.read() == b""
    every_character_once(await resumed(gateway, completion_id))
