"""The ChatCompletion service end to end: a real server, and a look-alike of vLLM over real HTTP."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, model_registry_pb2, tool_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.sansio.events import Completed
from tests.support import recordings
from tests.support.gateway import (
    Events,
    Running,
    ask,
    failure_of,
    kinds,
    read,
    read_badly,
    read_well,
    running,
    settings_of,
    text_of,
    tool,
    user,
)
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire_server.settings import Settings
    from tests.conftest import StartGateway

CHUNKS = Chunks()
LOGPROBS: dict[str, Any] = {
    "content": [
        {
            "token": "é",
            "logprob": -0.25,
            "bytes": [195, 169],
            "top_logprobs": [{"token": "e", "logprob": -1.5, "bytes": [101]}],
        }
    ]
}


def with_logprobs(chunk: dict[str, Any]) -> dict[str, Any]:
    """The chunk with a token's log-probability."""
    chunk["choices"][0]["logprobs"] = LOGPROBS
    return chunk


def held(events: Events) -> None:
    """Hold a whole stream to the contract: what must be true of every one."""
    assert [event.sequence for event in events] == list(range(len(events)))
    names = kinds(events)
    assert names[0] == "started"
    assert names[-1] == "completed"
    assert names.count("started") == names.count("completed") == 1
    about_a_choice = {"text_delta", "reasoning_delta", "tool_call_delta", "choice_finished"}
    assert [event.HasField("choice_index") for event in events] == [name in about_a_choice for name in names]
    completed = events[-1].completed
    seen = sorted({event.choice_index for event in events if event.HasField("choice_index")})
    assert [choice.index for choice in completed.choices] == seen
    for choice in completed.choices:
        mine = [event for event in events if event.HasField("choice_index") and event.choice_index == choice.index]
        assert "".join(event.text_delta.text for event in mine) == choice.message.text
        assert "".join(event.reasoning_delta.text for event in mine) == choice.message.reasoning
        verdicts = [event.tool_call_delta for event in mine if event.HasField("tool_call_delta")]
        assert [verdict.index for verdict in verdicts] == sorted({verdict.index for verdict in verdicts})
        assert [v.tool_call for v in verdicts if v.HasField("tool_call")] == list(choice.message.tool_calls)
        assert [v for v in verdicts if v.HasField("failure")] == list(choice.failed_tool_calls)
        assert mine[-1].HasField("choice_finished")
        assert kinds(mine).count("choice_finished") == 1
        finished = mine[-1].choice_finished
        assert finished.stop_reason == choice.stop_reason
        assert finished.engine_finish_reason == choice.engine_finish_reason
        assert finished.tool_calls_executable == choice.tool_calls_executable


def offered(name: str) -> list[tool_pb2.Tool]:
    """The tools that a recorded request offered."""
    return [
        tool(called, input_schema=schema) for called, schema in recordings.load(name).asked["offered_tools"].items()
    ]


async def test_recordings_keep_the_contract(served: Running, vllm: FakeVllm) -> None:
    """Every recorded answer that began, over the wire: order, numbers, indexes, and an end that repeats the deltas."""
    for name in recordings.names():
        recording = recordings.load(name)
        expected = recording.read(incremental=False)[-1]
        if not isinstance(expected, Completed):
            continue
        vllm.play(Script.recording(TRANSCRIPTS / f"{name}.sse"))
        events, failure = await read(
            served.stream(ask(choice_count=recording.asked["choice_count"], tools=offered(name)))
        )
        held(events)
        completed = events[-1].completed
        assert [choice.text for choice in expected.choices] == [choice.message.text for choice in completed.choices], (
            name
        )
        assert (expected.fault is not None) == completed.HasField("error") == (failure is not None), name


async def test_started(served: Running, vllm: FakeVllm) -> None:
    """Who answers and how it was asked: the name that was used is the alias of the model that it leads to."""
    sampling = chat_pb.Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=-1,
        min_p=0.0,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        repetition_penalty=1.5,
        seed=7,
        max_tokens=9,
        min_tokens=1,
        stop=["x"],
        stop_token_ids=[5],
        ignore_eos=False,
        logit_bias={5: 1.5},
        bad_words=["y"],
    )
    assert {field.name for field, _ in sampling.ListFields()} == {field.name for field in sampling.DESCRIPTOR.fields}
    chat = ask(sampling=sampling)
    started = (await read_well(served.stream(chat)))[0].started
    assert re.fullmatch("cmpl-[0-9a-f]{32}-[0-9a-f]{8}", started.completion_id)
    assert (started.model, started.alias, started.provider_id) == ("vllm/fake", "fake", "vllm")
    assert started.create_time.seconds > 1_700_000_000
    assert started.effective_sampling == chat.sampling
    other = (await read_well(served.stream(ask(model="vllm/fake"))))[0].started
    assert (other.model, other.alias) == ("vllm/fake", "")
    assert other.completion_id != started.completion_id
    assert [sent.body["model"] for sent in vllm.chats] == ["fake", "fake"]


async def test_a_registered_models_names(served: Running, vllm: FakeVllm) -> None:
    """Id and alias lead to the provider's own name, and the answer says which was used."""
    await served.models.RegisterModel(
        model_registry_pb2.RegisterModelRequest(model_id="mine", provider_model_id="fake", aliases=["also"])
    )
    for name, alias in (("mine", ""), ("also", "also")):
        started = (await read_well(served.stream(ask(model=name))))[0].started
        assert (started.model, started.alias) == ("mine", alias)
    assert [sent.body["model"] for sent in vllm.chats] == ["fake", "fake"]


@pytest.mark.parametrize(("asked", "sent"), [(None, 40), (7, 7)])
async def test_the_operators_max_tokens(
    start_gateway: StartGateway, vllm: FakeVllm, asked: int | None, sent: int
) -> None:
    """It is for requests that name none; either way `started` says what was sent."""
    async with start_gateway(provider={"max_tokens": 40}) as gateway:
        chat = ask(sampling=chat_pb.Sampling(max_tokens=asked, top_k=3))
        events = await read_well(gateway.stream(chat))
    assert events[0].started.effective_sampling == chat_pb.Sampling(max_tokens=sent, top_k=3)
    assert vllm.chats[0].body["max_tokens"] == sent


async def test_the_whole_request_reaches_vllm(served: Running, vllm: FakeVllm) -> None:
    """From the message on the wire to the body in HTTP, all fields at once."""
    chat = ask(
        messages=[
            message_pb2.ChatMessage(system=message_pb2.SystemMessage(content=[message_pb2.ContentPart(text="s")])),
            message_pb2.ChatMessage(
                developer=message_pb2.DeveloperMessage(content=[message_pb2.ContentPart(text="d")])
            ),
            user("a", "b"),
            message_pb2.ChatMessage(
                assistant=message_pb2.AssistantMessage(
                    reasoning="r",
                    tool_calls=[
                        tool_pb2.ToolCall(call_id="c1", tool_name="get_weather", arguments='{"city":  "Oslo"}')
                    ],
                )
            ),
            message_pb2.ChatMessage(
                tool=message_pb2.ToolMessage(call_id="c1", content=[message_pb2.ContentPart(text="cold")])
            ),
        ],
        tools=[tool(description="d", strict=True, output_schema='{"type":"string"}')],
        tool_choice=tool_pb2.ToolChoice(tool_name="get_weather"),
        parallel_tool_calls=False,
        choice_count=2,
        logprobs=chat_pb.Logprobs(top_k=2),
        response_format=chat_pb.ResponseFormat(json_object=chat_pb.ResponseFormat.JsonObject()),
        sampling=chat_pb.Sampling(temperature=0.5),
    )
    await read_well(served.stream(chat))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "d", "strict": True, "parameters": schema}
    called = {"name": "get_weather", "arguments": '{"city":  "Oslo"}'}
    assert vllm.chats[0].body == {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "r",
                "tool_calls": [{"id": "c1", "type": "function", "function": called}],
            },
            {"role": "tool", "content": "cold", "tool_call_id": "c1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "n": 2,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_object"},
        "temperature": 0.5,
    }


async def test_text_usage_and_times(served: Running, vllm: FakeVllm) -> None:
    """A plain answer: its text, vLLM's own account of the tokens, and how long it took."""
    vllm.play(Script.generated(tokens=5))
    events = await read_well(served.stream())
    held(events)
    completed = events[-1].completed
    assert text_of(events) == "The sea keeps every letter"
    assert (completed.usage.completion_tokens, completed.usage.provenance) == (5, chat_pb.USAGE_PROVENANCE_EXACT)
    assert completed.usage.prompt_tokens > 0
    assert not completed.usage.HasField("cached_prompt_tokens")
    assert 0 < completed.timings.first_event_latency.ToNanoseconds() <= completed.timings.total.ToNanoseconds()
    assert completed.choices[0].stop_reason == chat_pb.STOP_REASON_END_OF_TURN
    assert not completed.HasField("error")
    assert not completed.messages_omitted


async def test_everything_that_an_answer_can_hold(served: Running, vllm: FakeVllm) -> None:
    """Reasoning, text, whole and broken calls of two choices, log-probabilities and stops: every field goes over the wire."""
    vllm.play(
        Script.chunks(
            [
                CHUNKS.role(),
                CHUNKS.role(1),
                with_logprobs(CHUNKS.reasoning("hm")),
                with_logprobs(CHUNKS.text("é")),
                CHUNKS.call("get_weather", "c0"),
                CHUNKS.arguments('{"city":"Oslo"}'),
                CHUNKS.call("get_weather", "c1", 1),
                CHUNKS.arguments('{"city"', 1),
                CHUNKS.text("two", 1),
                CHUNKS.finish("tool_calls"),
                CHUNKS.finish("stop", 1) | {},
                CHUNKS.usage(3, 9),
            ]
        )
    )
    chat = ask(tools=[tool()], choice_count=2, logprobs=chat_pb.Logprobs(top_k=1))
    events = await read_well(served.stream(chat))
    held(events)
    logprobs = [
        chat_pb.TokenLogprob(
            token="é",
            logprob=-0.25,
            raw_bytes=b"\xc3\xa9",
            alternatives=[chat_pb.TokenLogprob.Alternative(token="e", logprob=-1.5, raw_bytes=b"e")],
        )
    ]
    reasoning = next(event.reasoning_delta for event in events if event.HasField("reasoning_delta"))
    assert (reasoning.text, list(reasoning.logprobs)) == ("hm", logprobs)
    text = next(event.text_delta for event in events if event.HasField("text_delta"))
    assert (text.text, list(text.logprobs)) == ("é", logprobs)
    first, second = events[-1].completed.choices
    whole = tool_pb2.ToolCall(call_id="c0", tool_name="get_weather", arguments='{"city":"Oslo"}')
    assert list(first.message.tool_calls) == [whole]
    (broken,) = first.failed_tool_calls
    assert (broken.index, broken.call_id, broken.tool_name) == (1, "c1", "get_weather")
    assert broken.parse_status == tool_pb2.TOOL_CALL_PARSE_STATUS_FAILED
    assert broken.failure.reason == tool_pb2.TOOL_CALL_FAILURE_REASON_MALFORMED_JSON
    assert (broken.failure.raw_arguments, broken.failure.byte_offset) == ('{"city"', 7)
    assert (first.stop_reason, first.tool_calls_executable) == (chat_pb.STOP_REASON_END_OF_MESSAGE, False)
    assert second.message.text == "two"
    assert not first.logprobs


@pytest.mark.parametrize(
    ("matched", "stop_reason", "expected"),
    [
        ("END", chat_pb.STOP_REASON_STOP_SEQUENCE, "matched_stop"),
        (42, chat_pb.STOP_REASON_STOP_SEQUENCE, "matched_token_id"),
        (7, chat_pb.STOP_REASON_END_OF_TURN, "matched_token_id"),
        (None, chat_pb.STOP_REASON_END_OF_TURN, None),
    ],
)
async def test_what_made_the_engine_stop(
    served: Running, vllm: FakeVllm, matched: str | int | None, stop_reason: int, expected: str | None
) -> None:
    """The caller's own stops are STOP_SEQUENCE; what matched is told either way, a text or a token."""
    finish = CHUNKS.finish("stop")
    finish["choices"][0]["stop_reason"] = matched
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), finish]))
    chat = ask(sampling=chat_pb.Sampling(stop=["END"], stop_token_ids=[42]))
    finished = (await read_well(served.stream(chat)))[-2].choice_finished
    assert finished.stop_reason == stop_reason
    assert finished.WhichOneof("matched") == expected
    assert (finished.matched_stop or finished.matched_token_id or None) == matched


async def test_none_hides_the_tools(served: Running, vllm: FakeVllm) -> None:
    """Under NONE a call that the model makes all the same is of a tool that it was not given."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.call("get_weather"), CHUNKS.finish("tool_calls")]))
    chat = ask(tools=[tool()], tool_choice=tool_pb2.ToolChoice(mode=tool_pb2.ToolChoice.MODE_NONE))
    (choice,) = (await read_well(served.stream(chat)))[-1].completed.choices
    assert "tools" not in vllm.chats[0].body
    assert choice.failed_tool_calls[0].failure.reason == tool_pb2.TOOL_CALL_FAILURE_REASON_UNKNOWN_TOOL
    assert not choice.tool_calls_executable


async def test_a_required_call(served: Running) -> None:
    """Comes whole, executable, and can be sent back as it is."""
    chat = ask(tools=[tool()], tool_choice=tool_pb2.ToolChoice(mode=tool_pb2.ToolChoice.MODE_REQUIRED))
    events = await read_well(served.stream(chat))
    held(events)
    (choice,) = events[-1].completed.choices
    assert choice.tool_calls_executable
    (call,) = choice.message.tool_calls
    assert (call.tool_name, call.arguments) == ("get_weather", '{"city": "Oslo"}')
    result = message_pb2.ToolMessage(call_id=call.call_id, content=[message_pb2.ContentPart(text="cold")])
    history = [user("hi"), message_pb2.ChatMessage(assistant=choice.message), message_pb2.ChatMessage(tool=result)]
    await read_well(served.stream(ask(messages=history)))


async def test_nothing_is_sent_before_the_engine_has_begun(served: Running, vllm: FakeVllm) -> None:
    """Initial metadata comes with the first event and not with the head of vLLM's answer."""
    begin, go_on = asyncio.Event(), asyncio.Event()
    vllm.play(Script.chunks([b": soon\n\n", begin, CHUNKS.role(), go_on, CHUNKS.text("a"), CHUNKS.finish()]))
    call = served.stream(metadata=(("x-request-id", "mine"),))
    initial = asyncio.create_task(call.initial_metadata())
    await vllm.received()
    await read_well(served.stream())  # time for anything that would come too early
    assert not initial.done()
    begin.set()
    assert dict(await initial)["x-request-id"] == "mine"
    messages = aiter(call)
    assert (await anext(messages)).WhichOneof("event") == "started"
    go_on.set()
    assert kinds([event async for event in messages]) == ["text_delta", "choice_finished", "completed"]


async def test_create_is_the_end_of_the_stream(served: Running, vllm: FakeVllm) -> None:
    """Create's answer is what a stream's `started` and `completed` say, and has the log-probabilities too."""
    script = Script.chunks(
        [
            CHUNKS.role(),
            with_logprobs(CHUNKS.reasoning("hm")),
            with_logprobs(CHUNKS.text("é")),
            CHUNKS.call("get_weather", "c0"),
            CHUNKS.arguments("{}"),
            CHUNKS.finish("tool_calls"),
            CHUNKS.usage(3, 9),
        ]
    )
    vllm.play(script, script)
    chat = ask(tools=[tool()], logprobs=chat_pb.Logprobs(top_k=1))
    events = await read_well(served.stream(chat))
    created = await served.create(chat)
    streamed = chat_pb.CreateChatCompletionResponse(started=events[0].started, completed=events[-1].completed)
    assert len(created.completed.choices[0].logprobs) == 2
    created.completed.choices[0].ClearField("logprobs")
    for message in (created, streamed):
        message.completed.ClearField("timings")
        message.started.ClearField("completion_id")
        message.started.ClearField("create_time")
    assert MessageToDict(created) == MessageToDict(streamed)
    assert vllm.chats[0].body == vllm.chats[1].body


async def test_create_returns_the_request_id(served: Running) -> None:
    """In its initial metadata."""
    call = served.chat.CreateChatCompletion(
        chat_pb.CreateChatCompletionRequest(chat=ask()), metadata=(("x-request-id", "mine"),)
    )
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"
    await call


@pytest.mark.parametrize(("limit", "omitted"), [(1024, True), (1024 * 1024, False)])
async def test_messages_are_left_out_above_the_limit(
    start_gateway: StartGateway, vllm: FakeVllm, limit: int, omitted: bool
) -> None:
    """What the deltas have said need not be said again; stop reasons, usage and the index stay."""
    text = "x" * 4096
    script = Script.chunks(
        [
            CHUNKS.role(),
            CHUNKS.text(text),
            CHUNKS.call("unknown"),
            CHUNKS.arguments("{}"),
            CHUNKS.finish("tool_calls"),
            CHUNKS.usage(1, 2),
        ]
    )
    vllm.play(script, script)
    async with start_gateway(server={"max_completed_bytes": limit}) as gateway:
        events = await read_well(gateway.stream())
        created = await gateway.create()
    completed = events[-1].completed
    (choice,) = completed.choices
    assert text_of(events) == text
    assert completed.messages_omitted is omitted
    assert choice.HasField("message") is not omitted
    assert bool(choice.failed_tool_calls) is not omitted
    assert choice.stop_reason == chat_pb.STOP_REASON_END_OF_MESSAGE
    assert completed.usage.completion_tokens == 2
    # A whole answer has no deltas that would say it.
    assert not created.completed.messages_omitted
    assert created.completed.choices[0].message.text == text


async def test_calls_one_after_the_other_use_one_connection(served: Running, vllm: FakeVllm) -> None:
    """Whether streamed or not: the end of each body is read."""
    await read_well(served.stream())
    connections = vllm.connections  # with those of the listing and of what the engine is
    for _ in range(3):
        await read_well(served.stream())
        await served.create()
    assert len(vllm.chats) == 7
    assert vllm.connections <= connections


async def test_headers_of_a_call_reach_vllm(served: Running, vllm: FakeVllm) -> None:
    """The caller's token, its request id and its trace."""
    metadata = (
        ("x-vllm-api-token", "callers"),
        ("x-request-id", "mine"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "k=v"),
        ("authorization", "Bearer for-the-gateway"),
    )
    await read_well(served.stream(metadata=metadata))
    headers = vllm.chats[0].headers
    assert headers["authorization"] == "Bearer callers"
    assert headers["x-request-id"].startswith("mine-")
    assert (headers["traceparent"], headers["tracestate"]) == (
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "k=v",
    )
    assert headers["user-agent"].startswith("deltawire/")


async def test_provider_data_propagation(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """The caller's token goes before the configured one; where the provider is, only the operator says."""
    async with start_gateway(provider={"api_token": "operators"}) as gateway:
        metadata = (("x-vllm-api-token", "test-token-123"), ("x-vllm-url", "http://127.0.0.1:1/v1"))
        await gateway.create(metadata=metadata)
        await gateway.create()
    assert [chat.headers["authorization"] for chat in vllm.chats] == ["Bearer test-token-123", "Bearer operators"]


async def test_a_callers_token_goes_where_the_call_says(tmp_path: Path, vllm: FakeVllm) -> None:
    """With two providers: to the one that the model's name begins with, and by a bare name or an alias to none.

    If that provider requires it, the failure says that it was not sent; where the operator marked the provider, it is sent.
    """
    metadata = (("x-vllm-api-token", "callers"),)

    def settings(*, marked: bool = False) -> Settings:
        one = settings_of(vllm.base_url, tmp_path, provider={"accept_caller_tokens": marked})
        return one.model_copy(update={"providers": dict.fromkeys(("a", "b"), one.providers["vllm"])})

    async with running(settings()) as gateway:
        register = model_registry_pb2.RegisterModelRequest(model_id="mine", provider_id="a", provider_model_id="fake")
        await gateway.models.RegisterModel(register)
        for model, sent in (("a/fake", "Bearer callers"), ("b/fake", "Bearer callers"), ("mine", None)):
            await gateway.create(chat=ask(model=model), metadata=metadata)
            assert vllm.chats[-1].headers.get("authorization") == sent
        for rpc in ("Create", "Stream"):
            vllm.play(Script.error(401, "Unauthorized"))
            if rpc == "Create":
                failure = await failure_of(gateway.create(chat=ask(model="mine"), metadata=metadata))
            else:
                _, failure = await read_badly(gateway.stream(chat=ask(model="mine"), metadata=metadata))
            assert failure.reason == "UPSTREAM_UNAUTHENTICATED"
            assert "the one in x-vllm-api-token was not sent" in failure.message
            assert "callers" not in failure.message
    async with running(settings(marked=True)) as gateway:
        await gateway.create(chat=ask(model="mine"), metadata=metadata)
        assert vllm.chats[-1].headers["authorization"] == "Bearer callers"


async def test_openai_chat_completion_is_async(served: Running, vllm: FakeVllm) -> None:
    """Calls under way do not wait for each other."""
    gate = asyncio.Event()
    vllm.play(*[Script.chunks([gate, CHUNKS.role(), CHUNKS.finish()])] * 4)
    calls = [asyncio.create_task(served.create()) for _ in range(4)]
    await vllm.received(4)
    gate.set()
    await asyncio.gather(*calls)


@pytest.mark.parametrize("rpc", ["Create", "Stream"])
async def test_a_request_without_chat(served: Running, rpc: str) -> None:
    """Is refused by either, and the field is named as that request has it."""
    if rpc == "Create":
        failure = await failure_of(served.chat.CreateChatCompletion(chat_pb.CreateChatCompletionRequest()))
        assert failure.fields == ["chat"]
    else:
        _, failure = await read_badly(served.chat.StreamChatCompletion(chat_pb.StreamChatCompletionRequest()))
        assert failure.fields == ["start"]
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_an_invalid_request_does_not_reach_vllm(served: Running, vllm: FakeVllm) -> None:
    """Every violated field is in the answer."""
    failure = await failure_of(served.create(chat_pb.ChatRequest(choice_count=0)))
    assert failure.fields == ["chat.messages", "chat.choice_count"]
    assert failure.metadata["field"] == "chat.messages"
    assert not vllm.chats
