"""How an answer is told, and how its calls are judged: what StreamOptions and ToolCallPolicy change, and what they do not."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any

import pytest

from deltawire import AsyncClient, ChatMessage, InvalidRequestError, StopReason, tool, tool_definition, user
from deltawire.v1.chat_completion_pb2 import COMPLETION_STATE_RUNNING, UsageProvenance
from deltawire.v1.tool_pb2 import ToolCallFailureReason, ToolCallParseStatus
from deltawire_server import settings
from deltawire_server.app import Gateway
from tests.e2e.support import (
    CALL_SECONDS,
    LIGHT,
    MODEL,
    SEA,
    WEATHER,
    call_text,
    forced,
    kinds,
    looked_up,
    standstill,
    told_calls,
    told_text,
)

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire import Answer, StreamChatCompletionResponse
    from deltawire.v1.tool_pb2 import ToolCallDelta
    from tests.e2e.support import Engine
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e

TOKENS = 48
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
LONG = "word " * 3000
"""A prompt that takes this engine seconds to read. With a salt of its own, always: nothing of it is in the cache then."""

STARTED, IN_PROGRESS, SUCCEEDED, FAILED = (
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_STARTED,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_IN_PROGRESS,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_SUCCEEDED,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED,
)


async def told(
    client: AsyncClient,
    prompt: Any = SEA,  # noqa: ANN401 (whatever can be asked)
    **arguments: Any,  # noqa: ANN401 (whatever a stream takes)
) -> tuple[list[StreamChatCompletionResponse], Answer]:
    """All events of a stream, and the answer that they make."""
    async with client.chat.stream(prompt, **arguments) as stream:
        events = [event async for event in stream]
        return events, await stream.final()


# --- StreamOptions


async def test_the_usage_grows_to_the_account(client: AsyncClient) -> None:
    """Each figure is more than the one before and at least that much was used; the last one says no more than the account."""
    events, answer = await told(client, usage_updates=True, **GREEDY)
    updates = [event.usage_update.usage for event in events if event.HasField("usage_update")]
    figures = [update.completion_tokens for update in updates]
    assert len(figures) > 3
    assert figures == sorted(set(figures))
    assert {update.provenance for update in updates} == {UsageProvenance.USAGE_PROVENANCE_LOWER_BOUND}
    assert {update.prompt_tokens for update in updates} == {answer.usage.prompt_tokens}
    assert answer.usage.provenance == UsageProvenance.USAGE_PROVENANCE_EXACT
    assert figures[-1] <= answer.usage.completion_tokens == TOKENS
    plain, _ = await told(client, **GREEDY)
    assert "usage_update" not in kinds(plain)
    assert told_text(events) == told_text(plain)


async def test_deltas_are_held_back_to_be_joined(client: AsyncClient) -> None:
    """The same text in fewer messages, and nothing else is different."""
    plain, _ = await told(client, **GREEDY)
    joined, answer = await told(client, max_coalesce_delay=10, **GREEDY)
    assert kinds(joined) == kinds(plain) == ["started", "text_delta", "choice_finished", "completed"]
    assert told_text(joined) == told_text(plain) == answer.text
    assert len(joined) < len(plain)
    assert [event.sequence for event in joined] == list(range(len(joined)))


async def test_heartbeats_while_the_engine_stands_still(client: AsyncClient, vllm: VllmServer) -> None:
    """They come when nothing else does, for as long as that is; the text is what it would have been."""
    plain, _ = await told(client, **GREEDY)
    events: list[StreamChatCompletionResponse] = []
    async with client.chat.stream(SEA, heartbeat_interval=0.1, **GREEDY) as stream:
        async for event in stream:
            events.append(event)
            if event.HasField("text_delta"):
                break
        with standstill(vllm):
            beats = 0
            while beats < 3:
                events.append(await anext(stream))
                beats += events[-1].HasField("heartbeat")
        events += [event async for event in stream]
    assert kinds(events)[0] == "started"
    assert told_text(events) == told_text(plain)
    assert [event.sequence for event in events] == list(range(len(events)))


@pytest.mark.parametrize("before", [False, True])
async def test_heartbeats_while_a_prompt_is_read(client: AsyncClient, before: bool) -> None:
    """Before the answer begins they come only if that is asked for: with them, nobody can try the call again."""
    options = {"heartbeat_interval": 0.1, "early_heartbeats": before}
    arguments = {**GREEDY, "max_tokens": 2, "cache_salt": secrets.token_hex(8)}
    events, answer = await told(client, LONG, **options, **arguments)
    named = [event.WhichOneof("event") for event in events]
    assert ("heartbeat" in named[: named.index("started")]) is before
    assert named[-1] == "completed"
    assert answer.usage.completion_tokens == 2


async def test_nothing_comes_before_the_start_unless_asked(client: AsyncClient, vllm: VllmServer) -> None:
    """However long the engine is silent: no heartbeat, and no initial metadata."""
    async with client.chat.stream(SEA, heartbeat_interval=0.1, completion_id="silent", **GREEDY) as stream:
        with standstill(vllm):
            first = asyncio.ensure_future(anext(stream))
            await looked_up(client, "silent", lambda found: found.state == COMPLETION_STATE_RUNNING)
            await asyncio.sleep(0.5)
            assert not first.done()
            assert stream.initial_metadata == ()
        assert (await first).HasField("started")
        await stream.final()


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
async def test_times_fit_together(client: AsyncClient, *, whole: bool) -> None:
    """All five are told; each is part of what it is said to be part of, and all of them of what the caller waited."""
    before = time.monotonic()
    answer = await client.chat.create(SEA, **GREEDY) if whole else (await told(client, **GREEDY))[1]
    waited = time.monotonic() - before
    timings = answer.completed.timings
    times = {field.name: value.ToNanoseconds() / 1e9 for field, value in timings.ListFields()}
    assert times.keys() == {field.name for field in timings.DESCRIPTOR.fields}
    assert 0 < times["queue"] < times["first_event_latency"] < times["total"] < waited
    assert 0 < times["mean_gap"] <= times["worst_gap"]
    assert times["worst_gap"] < times["total"] - times["first_event_latency"] + 1e-6  # they are told in nanoseconds


async def test_messages_beyond_the_operators_limit_are_left_out(
    vllm: VllmServer, engine: Engine, tmp_path: Path
) -> None:
    """Of a stream, whose deltas have said it all; never of a whole answer."""
    flags = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{tmp_path / 'registry.db'}"]
    flags += ["--set", "server.max_completed_bytes=1024"]
    variables = {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key}
    [token] = engine.tokens(" something")
    arguments = {**GREEDY, "max_tokens": 120, "logit_bias": {token: 100.0}}
    async with (
        Gateway(settings.parse(flags, variables).settings) as gateway,
        AsyncClient(gateway.addresses[0], timeout=CALL_SECONDS) as client,
    ):
        events, answer = await told(client, **arguments)
        whole = await client.chat.create(SEA, **arguments)
    completed = events[-1].completed
    assert completed.messages_omitted
    assert not completed.choices[0].HasField("message")
    assert completed.choices[0].stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert told_text(events) == answer.text == whole.text == " something" * 120
    assert not whole.completed.messages_omitted


# --- ToolCallPolicy


def calls_of(text: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 (whatever a stream takes)
    """A request whose answer can only be this text, with one tool."""
    return {"model": MODEL, "tools": [WEATHER], "response_format": forced(text), "temperature": 0.0, **arguments}


def adds_up(deltas: list[ToolCallDelta]) -> None:
    """Hold what was told of one call to it: STARTED, its pieces, and the verdict on what they add up to."""
    first, *pieces, verdict = deltas
    assert first.parse_status == STARTED
    assert first.WhichOneof("outcome") is None
    assert first.call_id
    assert first.tool_name == verdict.tool_name
    assert {piece.parse_status for piece in pieces} == {IN_PROGRESS}
    assert all(piece.arguments_fragment and not piece.tool_name for piece in pieces)
    assert {(delta.index, delta.call_id) for delta in deltas} == {(verdict.index, verdict.call_id)}
    said = verdict.tool_call.arguments if verdict.parse_status == SUCCEEDED else verdict.failure.raw_arguments
    assert "".join(piece.arguments_fragment for piece in pieces) == said


async def test_calls_are_told_while_they_are_written(client: AsyncClient) -> None:
    """Two calls, the second of them broken: piece by piece, and then the same verdicts as without the pieces."""
    city = "a town whose name is long enough to come in several pieces"
    text = "\n".join([call_text(f'{{"city": "{city}"}}'), call_text('{"city": Rome,,}')])
    events, answer = await told(client, **calls_of(f"Two.\n{text}", tool_choice="auto", incremental_tool_calls=True))
    deltas = told_calls(events)
    for index in (0, 1):
        adds_up([delta for delta in deltas if delta.index == index])
    assert [delta.parse_status for delta in deltas].count(IN_PROGRESS) > 2
    # The verdicts come with the end of the choice, all together.
    assert [delta.parse_status for delta in deltas][-2:] == [SUCCEEDED, FAILED]
    assert [event.WhichOneof("event") for event in events][-4:] == [
        "tool_call_delta",
        "tool_call_delta",
        "choice_finished",
        "completed",
    ]
    assert told_text(events) == answer.text == "Two.\n"
    assembled, _ = await told(client, **calls_of(f"Two.\n{text}", incremental_tool_calls=False))
    verdicts = told_calls(assembled)
    assert [delta.parse_status for delta in verdicts] == [SUCCEEDED, FAILED]
    for delta in (*verdicts, *deltas):  # the engine makes ids anew for each answer
        for call in (delta, delta.tool_call):
            call.ClearField("call_id")
    assert verdicts == deltas[-2:]


async def test_a_required_call_is_told_while_it_is_written(client: AsyncClient) -> None:
    """The engine writes these in its own form, and not in that of the model's parser."""
    events, answer = await told(
        client,
        "Set the kitchen light to 40 percent.",
        model=MODEL,
        tools=[LIGHT],
        tool_choice="required",
        temperature=0.0,
        max_tokens=512,
        incremental_tool_calls=True,
    )
    assert answer.tool_calls_executable
    for index in range(len(answer.tool_calls)):
        adds_up([delta for delta in told_calls(events) if delta.index == index])


async def test_a_call_that_is_cut_while_it_is_told(client: AsyncClient) -> None:
    """Its pieces add up to what the verdict keeps: TRUNCATED, not executable."""
    text = call_text(
        '{"city": "a name much too long for any city that there is or ever was, on this earth or another"}'
    )
    events, answer = await told(client, **calls_of(text, incremental_tool_calls=True, max_tokens=35))
    deltas = told_calls(events)
    adds_up(deltas)
    assert deltas[-1].failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_TRUNCATED
    assert answer.stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert not answer.tool_calls_executable


CITIES = tool_definition(
    "get_weather",
    "Current weather for some cities",
    input_schema={
        "type": "object",
        "properties": {"cities": {"type": "array", "items": {"$ref": "#/$defs/city"}}},
        "required": ["cities"],
        "$defs": {"city": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
    },
)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ('{"cities": [{"name": "Oslo"}, {"name": "Rome"}]}', None),
        ('{"cities": [{"name": "Oslo"}, {"name": 7}]}', "/cities/1/name"),
        ('{"cities": [{}]}', "/cities/0"),
        ('{"towns": []}', ""),
    ],
)
async def test_arguments_are_held_to_the_schema_on_demand(
    client: AsyncClient, arguments: str, path: str | None
) -> None:
    """What does not fit is FAILED, with the place; without the check it would be executed."""
    request = calls_of(call_text(arguments), tools=[CITIES])
    unchecked = await client.chat.create(SEA, **request)
    assert [call.arguments for call in unchecked.tool_calls] == [arguments]
    assert unchecked.tool_calls_executable
    events, answer = await told(client, **request, validate_schema=True)
    [verdict] = told_calls(events)
    if path is None:
        assert verdict.parse_status == SUCCEEDED
        assert verdict.tool_call.arguments == arguments
        assert answer.tool_calls_executable
        return
    assert verdict.parse_status == FAILED
    assert verdict.failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_SCHEMA_MISMATCH
    assert verdict.failure.HasField("instance_path")
    assert verdict.failure.instance_path == path
    assert verdict.failure.message
    assert verdict.failure.raw_arguments == arguments
    assert list(answer.failed_tool_calls) == [verdict]
    assert not answer.tool_calls
    assert not answer.tool_calls_executable


async def test_a_strict_call_passes_the_check(client: AsyncClient) -> None:
    """What vLLM guides by a schema, the gateway finds to follow it."""
    answer = await client.chat.create(
        "Set the kitchen light to 40 percent.",
        model=MODEL,
        tools=[LIGHT],
        tool_choice="required",
        temperature=0.0,
        max_tokens=512,
        validate_schema=True,
    )
    assert answer.tool_calls
    assert answer.tool_calls_executable


async def test_a_schema_that_is_none_is_refused_before_the_engine_is_asked(
    client: AsyncClient, vllm: VllmServer
) -> None:
    """The refusal comes while the engine stands still."""
    broken = tool_definition("b", "", input_schema={"type": "no such type"})
    with standstill(vllm), pytest.raises(InvalidRequestError) as caught:
        await client.chat.create(SEA, model=MODEL, tools=[WEATHER, broken], validate_schema=True)
    assert [violation.field for violation in caught.value.violations] == ["chat.tools[1].input_schema"]


# --- The way back


async def test_several_turns_go_back_as_they_came(client: AsyncClient) -> None:
    """Call, result, answer, question, and again: each message as `completed` holds it; vLLM takes it every time, and reads it."""
    history = [user("Set the kitchen light to 40 percent.")]
    costs = []
    for percent in (40, 60, 80):
        calling, answer = await told(
            client, history, model=MODEL, tools=[LIGHT], tool_choice="required", temperature=0.0, max_tokens=512
        )
        costs.append(answer.usage.prompt_tokens)
        message = calling[-1].completed.choices[0].message
        assert message.tool_calls
        history.append(ChatMessage(assistant=message))
        history += [tool(call, f"It is at {percent} percent.") for call in message.tool_calls]
        saying, answer = await told(
            client, history, model=MODEL, tools=[LIGHT], tool_choice="none", temperature=0.0, max_tokens=16
        )
        message = saying[-1].completed.choices[0].message
        assert message.text == answer.text
        history += [ChatMessage(assistant=message), user("Make it brighter.")]
    assert costs == sorted(set(costs))


async def test_turns_of_every_kind_go_back(client: AsyncClient) -> None:
    """Text beside two calls; and a turn of which nothing is left, since its only call failed."""
    city = call_text('{"city": "Oslo"}')
    _, both = await told(client, **calls_of(f"I will look.\n{city}\n{city}"))
    assert both.text
    assert len(both.tool_calls) == 2
    _, failed = await told(client, **calls_of(call_text("{,}")))
    assert not failed.text
    assert not failed.tool_calls
    results = [tool(call, "Rain") for call in both.tool_calls]
    plain = await client.chat.create([user(SEA), user(SEA)], model=MODEL, max_tokens=1)
    for turns in ([both.message, *results], [failed.message]):
        answer = await client.chat.create([user(SEA), *turns, user(SEA)], model=MODEL, max_tokens=1)
        assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
