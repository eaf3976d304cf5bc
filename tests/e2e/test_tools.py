"""Tool calls: guided by a schema, forced into every form that a model may generate, and answered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from deltawire import StopReason, tool, user
from deltawire.v1.chat_completion_pb2 import UsageProvenance
from deltawire.v1.tool_pb2 import ToolCallFailureReason, ToolCallParseStatus
from tests.e2e.support import LIGHT, LIGHT_SCHEMA, MODEL, SEA, WEATHER, call_text, forced, kinds

if TYPE_CHECKING:
    from deltawire import Answer, AsyncClient, StreamChatCompletionResponse, ToolCall
    from deltawire.v1.tool_pb2 import ToolCallDelta
    from tests.e2e.support import Engine

pytestmark = pytest.mark.e2e

CUT_ARGUMENTS = '{"city": "a name much too long for any city that there is or ever was"}'
ASK_LIGHT = "Set the kitchen light to 40 percent."


async def stream_forced(
    client: AsyncClient, text: str, *, max_tokens: int | None = None
) -> tuple[list[StreamChatCompletionResponse], Answer]:
    """The answer to a request with one tool and this forced text."""
    async with client.chat.stream(
        SEA, model=MODEL, tools=[WEATHER], response_format=forced(text), temperature=0.0, max_tokens=max_tokens
    ) as stream:
        events = [event async for event in stream]
        return events, await stream.final()


def verdicts(events: list[StreamChatCompletionResponse]) -> list[ToolCallDelta]:
    """The verdicts, in order."""
    return [event.tool_call_delta for event in events if event.HasField("tool_call_delta")]


def follows_the_schema(call: ToolCall) -> bool:
    """Whether the call's arguments are what the schema of `LIGHT` allows."""
    arguments = json.loads(call.arguments)
    return (
        arguments.keys() == {"room", "percent"}
        and arguments["room"] in ("kitchen", "bedroom", "hall")
        and type(arguments["percent"]) is int
        and 0 <= arguments["percent"] <= 100
    )


async def test_a_required_strict_call_follows_its_schema(client: AsyncClient) -> None:
    """One verdict precedes the end of the choice, with arguments that follow the schema."""
    async with client.chat.stream(
        ASK_LIGHT, model=MODEL, tools=[LIGHT], tool_choice="required", temperature=0.0, max_tokens=512
    ) as stream:
        events = [event async for event in stream]
        answer = await stream.final()
    assert kinds(events)[-3:] == ["tool_call_delta", "choice_finished", "completed"]
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_MESSAGE
    assert answer.choices[0].engine_finish_reason == "tool_calls"
    assert answer.tool_calls_executable
    assert answer.tool_calls
    for verdict, call in zip(verdicts(events), answer.tool_calls, strict=True):
        assert verdict.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_SUCCEEDED
        assert verdict.tool_call == call
        assert verdict.call_id == call.call_id != ""
        assert verdict.tool_name == call.tool_name == "set_light"
        assert follows_the_schema(call)
    assert answer.usage.provenance == UsageProvenance.USAGE_PROVENANCE_EXACT


async def test_a_unary_required_call(client: AsyncClient) -> None:
    """A unary call returns the same tool call."""
    answer = await client.chat.create(
        ASK_LIGHT, model=MODEL, tools=[LIGHT], tool_choice="required", temperature=0.0, max_tokens=512
    )
    assert answer.tool_calls_executable
    assert all(follows_the_schema(call) for call in answer.tool_calls)


async def test_a_named_tool_is_called(client: AsyncClient) -> None:
    """The engine's finish reason is "stop", but the stop reason is END_OF_MESSAGE."""
    answer = await client.chat.create(
        ASK_LIGHT, model=MODEL, tools=[WEATHER, LIGHT], tool_choice="set_light", temperature=0.0, max_tokens=512
    )
    [call] = answer.tool_calls
    assert call.tool_name == "set_light"
    assert follows_the_schema(call)
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_MESSAGE
    assert answer.choices[0].engine_finish_reason == "stop"
    assert answer.tool_calls_executable


async def test_two_calls_in_one_answer(client: AsyncClient) -> None:
    """Both calls are received in order, each with its own id."""
    text = "\n".join([call_text('{"city": "Oslo"}'), call_text('{"city": "Rome"}')])
    events, answer = await stream_forced(client, text)
    assert [verdict.index for verdict in verdicts(events)] == [0, 1]
    assert [call.arguments for call in answer.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert len({call.call_id for call in answer.tool_calls}) == 2
    assert answer.tool_calls_executable
    assert not answer.text


async def test_text_beside_a_call(client: AsyncClient) -> None:
    """The text before the call is received without the markup of the call."""
    events, answer = await stream_forced(client, "I will look that up.\n" + call_text('{"city": "Oslo"}'))
    assert kinds(events) == ["started", "text_delta", "tool_call_delta", "choice_finished", "completed"]
    assert answer.text == "I will look that up.\n"
    [call] = answer.tool_calls
    assert call.arguments == '{"city": "Oslo"}'
    assert answer.tool_calls_executable


async def test_a_call_without_arguments(client: AsyncClient) -> None:
    """Empty arguments remain an empty object."""
    _, answer = await stream_forced(client, call_text("{}"))
    [call] = answer.tool_calls
    assert call.arguments == "{}"


async def test_malformed_arguments_fail_with_their_text(client: AsyncClient) -> None:
    """The engine reports "tool_calls"; the call is FAILED, with its text and the offset of the error."""
    events, answer = await stream_forced(client, call_text('{"city": Oslo,,}'))
    [verdict] = verdicts(events)
    assert verdict.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED
    assert verdict.tool_name == "get_weather"
    failure = verdict.failure
    assert failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_MALFORMED_JSON
    # The parser passes on what stands up to the end of the envelope, hence the second brace.
    assert failure.raw_arguments.startswith('{"city": Oslo,,}')
    assert failure.byte_offset == len('{"city": ')
    assert not answer.tool_calls
    assert list(answer.failed_tool_calls) == [verdict]
    assert not answer.tool_calls_executable
    assert answer.choices[0].engine_finish_reason == "tool_calls"


async def test_arguments_that_are_no_object_fail(client: AsyncClient) -> None:
    """Complete JSON arguments that are not an object are FAILED."""
    events, answer = await stream_forced(client, call_text('["Oslo"]'))
    [verdict] = verdicts(events)
    assert verdict.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED
    assert verdict.failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_NOT_AN_OBJECT
    assert verdict.failure.raw_arguments == '["Oslo"]'
    assert not answer.tool_calls_executable


async def test_a_cut_call_is_truncated(client: AsyncClient, engine: Engine) -> None:
    """A call that is cut off by the token limit keeps its text and cannot be executed."""
    # A grammar lets the model split the text otherwise than the tokenizer would, so this cuts somewhere within.
    most = len(engine.tokens(call_text(CUT_ARGUMENTS))) - 10
    events, answer = await stream_forced(client, call_text(CUT_ARGUMENTS), max_tokens=most)
    [verdict] = verdicts(events)
    assert verdict.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED
    assert verdict.failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_TRUNCATED
    assert verdict.failure.raw_arguments
    assert CUT_ARGUMENTS.startswith(verdict.failure.raw_arguments)
    assert verdict.failure.raw_arguments != CUT_ARGUMENTS
    assert answer.stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert not answer.tool_calls
    assert not answer.tool_calls_executable


async def test_an_unknown_tool_fails(client: AsyncClient) -> None:
    """The gateway checks tool names, because the engine does not."""
    events, answer = await stream_forced(client, call_text('{"city": "Oslo"}', name="get_whether"))
    [verdict] = verdicts(events)
    assert verdict.failure.reason == ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_UNKNOWN_TOOL
    assert not answer.tool_calls_executable


async def test_tool_choice_none(client: AsyncClient) -> None:
    """No call is generated, and the prompt has as many tokens as without tools."""
    plain = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=8)
    none = await client.chat.create(SEA, model=MODEL, tools=[LIGHT], tool_choice="none", temperature=0.0, max_tokens=8)
    assert none.text == plain.text
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert not none.tool_calls


async def test_parallel_tool_calls_false(client: AsyncClient) -> None:
    """Only the first of two calls is received."""
    text = "\n".join([call_text('{"city": "Oslo"}'), call_text('{"city": "Rome"}')])
    answer = await client.chat.create(
        SEA, model=MODEL, tools=[WEATHER], parallel_tool_calls=False, response_format=forced(text)
    )
    assert [call.arguments for call in answer.tool_calls] == ['{"city": "Oslo"}']


async def test_a_tool_result(client: AsyncClient) -> None:
    """The message of the first answer is sent back unchanged, followed by the tool result."""
    question = user(ASK_LIGHT)
    first = await client.chat.create(
        [question], model=MODEL, tools=[LIGHT], tool_choice="required", temperature=0.0, max_tokens=512
    )
    results = [tool(call, "done") for call in first.tool_calls]
    second = await client.chat.create(
        [question, first.message, *results], model=MODEL, tools=[LIGHT], temperature=0.0, max_tokens=16
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.stop_reason != StopReason.STOP_REASON_UNSPECIFIED


async def test_a_schema_is_sent_verbatim(client: AsyncClient) -> None:
    """A schema as text with references guides the arguments."""
    schema = json.dumps({"$ref": "#/$defs/light", "$defs": {"light": LIGHT_SCHEMA}})
    described = type(LIGHT)(name="set_light", input_schema=schema, strict=True)
    answer = await client.chat.create(
        ASK_LIGHT, model=MODEL, tools=[described], tool_choice="required", temperature=0.0, max_tokens=512
    )
    assert answer.tool_calls
    assert all(follows_the_schema(call) for call in answer.tool_calls)
