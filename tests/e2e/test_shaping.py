"""StreamOptions and ToolCallPolicy: what they change in a stream and in the verdicts on calls, and what they do not."""

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
    call_deltas,
    call_text,
    delta_text,
    forced,
    kinds,
    looked_up,
    suspended,
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
"""A prompt whose prefill takes this engine seconds; always used with a new cache salt, so that no part is cached."""

STARTED, IN_PROGRESS, SUCCEEDED, FAILED = (
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_STARTED,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_IN_PROGRESS,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_SUCCEEDED,
    ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED,
)


async def streamed(
    client: AsyncClient,
    prompt: Any = SEA,  # noqa: ANN401 (whatever can be asked)
    **arguments: Any,  # noqa: ANN401 (whatever a stream takes)
) -> tuple[list[StreamChatCompletionResponse], Answer]:
    """All events of a stream, and its answer."""
    async with client.chat.stream(prompt, **arguments) as stream:
        events = [event async for event in stream]
        return events, await stream.final()


# --- StreamOptions


async def test_usage_updates_grow_to_the_final_usage(client: AsyncClient) -> None:
    """Each update has more tokens than the one before, and at most those of the final usage."""
    events, answer = await streamed(client, usage_updates=True, **GREEDY)
    updates = [event.usage_update.usage for event in events if event.HasField("usage_update")]
    figures = [update.completion_tokens for update in updates]
    assert len(figures) > 3
    assert figures == sorted(set(figures))
    assert {update.provenance for update in updates} == {UsageProvenance.USAGE_PROVENANCE_LOWER_BOUND}
    assert {update.prompt_tokens for update in updates} == {answer.usage.prompt_tokens}
    assert answer.usage.provenance == UsageProvenance.USAGE_PROVENANCE_EXACT
    assert figures[-1] <= answer.usage.completion_tokens == TOKENS
    plain, _ = await streamed(client, **GREEDY)
    assert "usage_update" not in kinds(plain)
    assert delta_text(events) == delta_text(plain)


async def test_coalesced_deltas(client: AsyncClient) -> None:
    """The same text is sent in fewer messages, and nothing else changes."""
    plain, _ = await streamed(client, **GREEDY)
    joined, answer = await streamed(client, max_coalesce_delay=10, **GREEDY)
    assert kinds(joined) == kinds(plain) == ["started", "text_delta", "choice_finished", "completed"]
    assert delta_text(joined) == delta_text(plain) == answer.text
    assert len(joined) < len(plain)
    assert [event.sequence for event in joined] == list(range(len(joined)))


async def test_heartbeats_of_a_suspended_engine(client: AsyncClient, vllm: VllmServer) -> None:
    """Heartbeats are sent while the engine sends nothing; the text is unchanged."""
    plain, _ = await streamed(client, **GREEDY)
    events: list[StreamChatCompletionResponse] = []
    async with client.chat.stream(SEA, heartbeat_interval=0.1, **GREEDY) as stream:
        async for event in stream:
            events.append(event)
            if event.HasField("text_delta"):
                break
        with suspended(vllm):
            beats = 0
            while beats < 3:
                events.append(await anext(stream))
                beats += events[-1].HasField("heartbeat")
        events += [event async for event in stream]
    assert kinds(events)[0] == "started"
    assert delta_text(events) == delta_text(plain)
    assert [event.sequence for event in events] == list(range(len(events)))


@pytest.mark.parametrize("before", [False, True])
async def test_heartbeats_during_prefill(client: AsyncClient, before: bool) -> None:
    """Heartbeats before `started` are sent only on request, because a call cannot be retried after them."""
    options = {"heartbeat_interval": 0.1, "early_heartbeats": before}
    arguments = {**GREEDY, "max_tokens": 2, "cache_salt": secrets.token_hex(8)}
    events, answer = await streamed(client, LONG, **options, **arguments)
    named = [event.WhichOneof("event") for event in events]
    assert ("heartbeat" in named[: named.index("started")]) is before
    assert named[-1] == "completed"
    assert answer.usage.completion_tokens == 2


async def test_nothing_is_sent_before_started_by_default(client: AsyncClient, vllm: VllmServer) -> None:
    """While the engine is silent, neither heartbeats nor initial metadata are sent."""
    async with client.chat.stream(SEA, heartbeat_interval=0.1, completion_id="silent", **GREEDY) as stream:
        with suspended(vllm):
            first = asyncio.ensure_future(anext(stream))
            await looked_up(client, "silent", lambda found: found.state == COMPLETION_STATE_RUNNING)
            await asyncio.sleep(0.5)
            assert not first.done()
            assert stream.initial_metadata == ()
        assert (await first).HasField("started")
        await stream.final()


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
async def test_timings_are_consistent(client: AsyncClient, *, whole: bool) -> None:
    """All five timings are sent; each is within the one that includes it, and all are within the duration of the call."""
    before = time.monotonic()
    answer = await client.chat.create(SEA, **GREEDY) if whole else (await streamed(client, **GREEDY))[1]
    waited = time.monotonic() - before
    timings = answer.completed.timings
    times = {field.name: value.ToNanoseconds() / 1e9 for field, value in timings.ListFields()}
    assert times.keys() == {field.name for field in timings.DESCRIPTOR.fields}
    assert 0 < times["queue"] < times["first_event_latency"] < times["total"] < waited
    assert 0 < times["mean_gap"] <= times["worst_gap"]
    assert times["worst_gap"] < times["total"] - times["first_event_latency"] + 1e-6  # they are sent in nanoseconds


async def test_completed_omits_messages_above_the_limit(vllm: VllmServer, engine: Engine, tmp_path: Path) -> None:
    """A stream omits them, because its deltas have the text; a unary answer never does."""
    flags = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{tmp_path / 'registry.db'}"]
    flags += ["--set", "server.max_completed_bytes=1024"]
    variables = {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key}
    [token] = engine.tokens(" something")
    arguments = {**GREEDY, "max_tokens": 120, "logit_bias": {token: 100.0}}
    async with (
        Gateway(settings.parse(flags, variables).settings) as gateway,
        AsyncClient(gateway.addresses[0], timeout=CALL_SECONDS) as client,
    ):
        events, answer = await streamed(client, **arguments)
        whole = await client.chat.create(SEA, **arguments)
    completed = events[-1].completed
    assert completed.messages_omitted
    assert not completed.choices[0].HasField("message")
    assert completed.choices[0].stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert delta_text(events) == answer.text == whole.text == " something" * 120
    assert not whole.completed.messages_omitted


# --- ToolCallPolicy


def calls_of(text: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 (whatever a stream takes)
    """Arguments of a request with one tool and this forced answer."""
    return {"model": MODEL, "tools": [WEATHER], "response_format": forced(text), "temperature": 0.0, **arguments}


def check_call(deltas: list[ToolCallDelta]) -> None:
    """Check the deltas of one call: STARTED, its fragments, and the verdict on the concatenated fragments."""
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


async def test_incremental_calls(client: AsyncClient) -> None:
    """Two calls, the second one malformed, are streamed in fragments with the same verdicts as without fragments."""
    city = "a town whose name is long enough to come in several pieces"
    text = "\n".join([call_text(f'{{"city": "{city}"}}'), call_text('{"city": Rome,,}')])
    events, answer = await streamed(
        client, **calls_of(f"Two.\n{text}", tool_choice="auto", incremental_tool_calls=True)
    )
    deltas = call_deltas(events)
    for index in (0, 1):
        check_call([delta for delta in deltas if delta.index == index])
    assert [delta.parse_status for delta in deltas].count(IN_PROGRESS) > 2
    # The verdicts come with the end of the choice, all together.
    assert [delta.parse_status for delta in deltas][-2:] == [SUCCEEDED, FAILED]
    assert [event.WhichOneof("event") for event in events][-4:] == [
        "tool_call_delta",
        "tool_call_delta",
        "choice_finished",
        "completed",
    ]
    assert delta_text(events) == answer.text == "Two.\n"
    assembled, _ = await streamed(client, **calls_of(f"Two.\n{text}", incremental_tool_calls=False))
    verdicts = call_deltas(assembled)
    assert [delta.parse_status for delta in verdicts] == [SUCCEEDED, FAILED]
    for delta in (*verdicts, *deltas):  # the engine makes ids anew for each answer
        for call in (delta, delta.tool_call):
            call.ClearField("call_id")
    assert verdicts == deltas[-2:]


async def test_an_incremental_required_call(client: AsyncClient) -> None:
    """The engine generates required calls as JSON, not in the format of the model's parser."""
    events, answer = await streamed(
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
        check_call([delta for delta in call_deltas(events) if delta.index == index])


async def test_an_incremental_truncated_call(client: AsyncClient) -> None:
    """The concatenated fragments are the raw text of the verdict TRUNCATED."""
    text = call_text(
        '{"city": "a name much too long for any city that there is or ever was, on this earth or another"}'
    )
    events, answer = await streamed(client, **calls_of(text, incremental_tool_calls=True, max_tokens=35))
    deltas = call_deltas(events)
    check_call(deltas)
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
async def test_schema_validation_on_request(client: AsyncClient, arguments: str, path: str | None) -> None:
    """A mismatch is FAILED with its path; without validation the call is SUCCEEDED."""
    request = calls_of(call_text(arguments), tools=[CITIES])
    unchecked = await client.chat.create(SEA, **request)
    assert [call.arguments for call in unchecked.tool_calls] == [arguments]
    assert unchecked.tool_calls_executable
    events, answer = await streamed(client, **request, validate_schema=True)
    [verdict] = call_deltas(events)
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
    """Arguments that vLLM generated with a schema pass the check of the gateway."""
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


async def test_an_invalid_schema_is_refused(client: AsyncClient, vllm: VllmServer) -> None:
    """The gateway refuses an invalid schema without calling the engine, which is suspended."""
    broken = tool_definition("b", "", input_schema={"type": "no such type"})
    with suspended(vllm), pytest.raises(InvalidRequestError) as caught:
        await client.chat.create(SEA, model=MODEL, tools=[WEATHER, broken], validate_schema=True)
    assert [violation.field for violation in caught.value.violations] == ["chat.tools[1].input_schema"]


# --- The way back


async def test_messages_of_completed_are_accepted_as_turns(client: AsyncClient) -> None:
    """Messages of `completed` are sent back unchanged over several rounds; vLLM accepts them, and the model reads them."""
    history = [user("Set the kitchen light to 40 percent.")]
    costs = []
    for percent in (40, 60, 80):
        calling, answer = await streamed(
            client, history, model=MODEL, tools=[LIGHT], tool_choice="required", temperature=0.0, max_tokens=512
        )
        costs.append(answer.usage.prompt_tokens)
        message = calling[-1].completed.choices[0].message
        assert message.tool_calls
        history.append(ChatMessage(assistant=message))
        history += [tool(call, f"It is at {percent} percent.") for call in message.tool_calls]
        saying, answer = await streamed(
            client, history, model=MODEL, tools=[LIGHT], tool_choice="none", temperature=0.0, max_tokens=16
        )
        message = saying[-1].completed.choices[0].message
        assert message.text == answer.text
        history += [ChatMessage(assistant=message), user("Make it brighter.")]
    assert costs == sorted(set(costs))


async def test_text_with_calls_and_empty_turns_are_accepted(client: AsyncClient) -> None:
    """A turn with text and two calls, and a turn whose only call failed, are accepted."""
    city = call_text('{"city": "Oslo"}')
    _, both = await streamed(client, **calls_of(f"I will look.\n{city}\n{city}"))
    assert both.text
    assert len(both.tool_calls) == 2
    _, failed = await streamed(client, **calls_of(call_text("{,}")))
    assert not failed.text
    assert not failed.tool_calls
    results = [tool(call, "Rain") for call in both.tool_calls]
    plain = await client.chat.create([user(SEA), user(SEA)], model=MODEL, max_tokens=1)
    for turns in ([both.message, *results], [failed.message]):
        answer = await client.chat.create([user(SEA), *turns, user(SEA)], model=MODEL, max_tokens=1)
        assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
