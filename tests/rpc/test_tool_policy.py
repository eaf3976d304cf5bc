"""How tool calls are told and judged, end to end: what the policy asks for, and what a check does to a stream."""

from __future__ import annotations

import grpc
import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import tool_pb2
from deltawire_server.errors import GatewayError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.rpc.convert import ResponseWriter
from deltawire_server.sansio.events import StreamEvent, ToolCallSucceeded
from deltawire_server.upstream.request import ToolSpec
from tests.support.gateway import Running, ask, failure_of, read_well, tool
from tests.support.workers import CALLER, MakeWorker
from tests.support.workers import ask as asked

CHUNKS = Chunks()
CALLING = [CHUNKS.role(), CHUNKS.call("get_weather"), CHUNKS.arguments('{"city": '), CHUNKS.arguments("7}")]
VALIDATED = chat_pb.ToolCallPolicy(validate_schema=True)


def play(vllm: FakeVllm) -> None:
    """Let the model call the weather of a city that is no text."""
    vllm.play(Script.chunks([*CALLING, CHUNKS.finish("tool_calls")]))


@pytest.mark.parametrize("validate_schema", [False, True])
async def test_arguments_are_held_to_the_schema_on_demand(
    served: Running, vllm: FakeVllm, validate_schema: bool
) -> None:
    """The same call succeeds, or fails with the place and what was expected, and then nothing is to be executed."""
    play(vllm)
    policy = chat_pb.ToolCallPolicy(validate_schema=validate_schema)
    events = await read_well(served.stream(ask(tools=[tool()], tool_call_policy=policy)))
    [delta] = [event.tool_call_delta for event in events if event.HasField("tool_call_delta")]
    choice = events[-1].completed.choices[0]
    assert choice.tool_calls_executable is not validate_schema
    if validate_schema:
        assert delta.failure == tool_pb2.ToolCallFailure(
            reason=tool_pb2.TOOL_CALL_FAILURE_REASON_SCHEMA_MISMATCH,
            message='7 is not of type "string"',
            raw_arguments='{"city": 7}',
            instance_path="/city",
        )
        assert list(choice.failed_tool_calls) == [delta]
    else:
        assert delta.tool_call.arguments == '{"city": 7}'


async def test_each_schema_that_is_none_is_named(served: Running, vllm: FakeVllm) -> None:
    """Before the engine is asked, all at once; tools without a schema have nothing that could be wrong."""
    tools = [tool("a", input_schema='{"type": 5}'), tool("b", input_schema=""), tool("c", input_schema='{"$ref": "x"}')]
    failure = await failure_of(served.create(ask(tools=tools, tool_call_policy=VALIDATED)))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields == ["chat.tools[0].input_schema", "chat.tools[2].input_schema"]
    assert vllm.chats == []


async def test_without_the_check_a_schema_is_the_engines_matter(served: Running, vllm: FakeVllm) -> None:
    """What nobody asked the gateway to read is passed on."""
    play(vllm)
    events = await read_well(served.stream(ask(tools=[tool(input_schema='{"type": 5}')])))
    assert events[-1].completed.choices[0].tool_calls_executable


WEATHER = ToolSpec("get_weather")


async def test_incremental_calls_are_told_piece_by_piece(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """STARTED with id and name, then the pieces as the model writes them, then the verdict that they add up to."""
    play(vllm)
    request = asked(tools=(WEATHER,), incremental_tool_calls=True)
    async with make_worker() as worker, worker.completion(request, CALLER) as completion:
        writer = ResponseWriter(completion, 2**20)
        events: list[StreamEvent] = [event async for batch in completion.batches() for event in batch]
    messages = [writer.message(number, event) for number, event in enumerate(events)]
    deltas = [message.tool_call_delta for message in messages if message.HasField("tool_call_delta")]
    statuses = [delta.parse_status for delta in deltas]
    assert statuses[0] == tool_pb2.TOOL_CALL_PARSE_STATUS_STARTED
    assert deltas[0].tool_name == "get_weather"
    assert set(statuses[1:-1]) == {tool_pb2.TOOL_CALL_PARSE_STATUS_IN_PROGRESS}
    assert "".join(delta.arguments_fragment for delta in deltas) == '{"city": 7}'
    assert statuses[-1] == tool_pb2.TOOL_CALL_PARSE_STATUS_SUCCEEDED
    assert deltas[-1].tool_call.arguments == '{"city": 7}'
    assert {(delta.index, delta.call_id) for delta in deltas} == {(0, deltas[0].call_id)}


async def test_a_defective_check_is_told_as_our_own_fault(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A check that raises ends the call with INTERNAL: no verdict, and no end that looks like one."""

    def broken(arguments: str, _: object = None, /) -> tuple[str, str] | None:
        raise ZeroDivisionError(arguments)

    play(vllm)
    request = asked(tools=(WEATHER,), argument_checks={"get_weather": broken})
    events: list[StreamEvent] = []
    async with make_worker() as worker, worker.completion(request, CALLER) as completion:
        with pytest.raises(GatewayError) as caught:
            events += [event async for batch in completion.batches() for event in batch]
    assert caught.value.reason is Reason.INTERNAL
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not any(isinstance(event, ToolCallSucceeded) for event in events)
