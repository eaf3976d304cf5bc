"""The conversation in which a model calls functions, through both clients, with a gateway that says what it is told to."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel, model_serializer

from deltawire import (
    ChatRequest,
    StreamInterrupted,
    Tool,
    ToolCall,
    ToolChoice,
    ToolRoundsExceededError,
    function_tool,
    message_text,
    tool,
    user,
)
from deltawire.v1.chat_completion_pb2 import (
    Completed,
    CreateChatCompletionResponse,
    Usage,
    UsageProvenance,
)
from deltawire.v1.tool_pb2 import ToolCallDelta, ToolCallFailure, ToolCallFailureReason
from tests.client.scripted import WAIT, Gateway, calling, choice, saying, started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire import AsyncClient, ChatMessage, Client, StreamChatCompletionResponse, ToolLike, ToolRun

OSLO = ToolCall(call_id="c1", tool_name="weather", arguments='{"city": "Oslo"}')
BERGEN = ToolCall(call_id="c2", tool_name="weather", arguments='{"city": "Bergen"}')


@function_tool
def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """The weather."""
    return f"rain in {city}, 7 {unit}"


def counted(a: int, b: int = 2) -> list[int]:
    """A plain function, with a result that is no text."""
    return [a, b]


async def slow(city: str) -> str:
    """One that waits."""
    await asyncio.sleep(0)
    return f"slowly in {city}"


def broken(city: str) -> str:
    """One that does not work."""
    message = f"no {city}"
    raise LookupError(message)


def whole(events: Sequence[StreamChatCompletionResponse]) -> CreateChatCompletionResponse:
    """What a call with one answer gives, from the stream that says the same."""
    return CreateChatCompletionResponse(started=events[0].started, completed=events[-1].completed)


def answering(*calls: ToolCall, said: str = "") -> CreateChatCompletionResponse:
    """An answer with these calls, or this text."""
    return whole(calling(*calls, said=said) if calls else saying(said))


def failing(
    *failed: tuple[str, str, str, str], calls: Sequence[ToolCall] = (), reason: str = "END_OF_MESSAGE"
) -> CreateChatCompletionResponse:
    """An answer whose calls failed: id, name, reason, raw arguments."""
    deltas = [
        ToolCallDelta(
            call_id=call_id,
            tool_name=name,
            failure=ToolCallFailure(
                reason=ToolCallFailureReason.Value(f"TOOL_CALL_FAILURE_REASON_{why}"),
                message="it is wrong",
                raw_arguments=raw,
                instance_path="/city" if why == "SCHEMA_MISMATCH" else None,
            ),
        )
        for call_id, name, why, raw in failed
    ]
    end = choice(reason=reason, calls=calls, failed_tool_calls=deltas)
    return CreateChatCompletionResponse(started=started().started, completed=Completed(choices=[end]))


def results(messages: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """Call id and text of the last turn's results."""
    last = max(index for index, each in enumerate(messages) if each.HasField("assistant"))
    return [(each.tool.call_id, message_text(each)) for each in messages[last + 1 :]]


def asked(gateway: Gateway, number: int = -1) -> ChatRequest:
    """The chat request of a call."""
    request: ChatRequest = gateway.calls[number].request.chat
    return request


def test_a_conversation(gateway: Gateway, client: Client) -> None:
    """Asked, run, told, asked again: every turn is in the history, and every round's usage is counted."""
    adding = ToolCall(call_id="c3", tool_name="counted", arguments='{"a": 1}')
    gateway.will(answering(OSLO, BERGEN))
    gateway.will(answering(adding, said="And now:"))
    gateway.will(answering(said="It rains."))
    history = [user("Where does it rain?")]
    run = client.chat.run_tools(history, tools=[weather, counted], model="llama", temperature=0)
    assert (run.text, run.rounds, run.answer) == ("It rains.", 3, run.answers[-1])
    assert history == [user("Where does it rain?")]
    assert run.messages == (
        history[0],
        run.answers[0].message,
        tool("c1", "rain in Oslo, 7 C"),
        tool("c2", "rain in Bergen, 7 C"),
        run.answers[1].message,
        tool("c3", "[1,2]"),
        run.answers[2].message,
    )
    assert [len(call.request.chat.messages) for call in gateway.calls] == [1, 4, 6]
    assert tuple(asked(gateway).messages) == run.messages[:-1]
    for call in gateway.calls:
        assert call.request.chat.sampling.temperature == 0
        assert [each.name for each in call.request.chat.tools] == ["weather", "counted"]
    assert run.usage == Usage(prompt_tokens=9, completion_tokens=15, provenance=UsageProvenance.USAGE_PROVENANCE_EXACT)


async def test_a_conversation_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """The same, with functions that wait and functions that do not, side by side."""
    waiting = ToolCall(call_id="c3", tool_name="slow", arguments='{"city": "Rome"}')
    gateway.will(answering(OSLO, waiting))
    gateway.will(answering(said="It rains."))
    run = await async_client.chat.run_tools("Where?", tools=[weather, slow])
    assert run.text == "It rains."
    assert results(asked(gateway).messages) == [("c1", "rain in Oslo, 7 C"), ("c3", "slowly in Rome")]


def test_nothing_to_call(gateway: Gateway, client: Client) -> None:
    """One round, and its turn in the history."""
    gateway.will(answering(said="Hello."))
    run = client.chat.run_tools("hi", tools=[weather], max_rounds=1)
    assert (run.rounds, run.text) == (1, "Hello.")
    assert [message_text(each) for each in run.messages] == ["hi", "Hello."]


def test_usage_is_as_good_as_its_weakest_part(gateway: Gateway, client: Client) -> None:
    """A figure that one round lacks is not made up, and an estimate makes the sum one."""
    first, second = answering(OSLO), answering(said="It rains.")
    first.completed.usage.CopyFrom(
        Usage(completion_tokens=2, reasoning_tokens=1, provenance=UsageProvenance.USAGE_PROVENANCE_ESTIMATED)
    )
    second.completed.usage.reasoning_tokens = 4
    gateway.will(first)
    gateway.will(second)
    assert client.chat.run_tools("hi", tools=[weather]).usage == Usage(
        completion_tokens=7, reasoning_tokens=5, provenance=UsageProvenance.USAGE_PROVENANCE_ESTIMATED
    )


@pytest.mark.parametrize("tool_choice", ["required", "weather", "auto", None])
def test_the_model_is_made_to_call_once(gateway: Gateway, client: Client, tool_choice: str | None) -> None:
    """From the second round on it is free, since a model that must call never answers."""
    gateway.will(answering(OSLO))
    gateway.will(answering(said="It rains."))
    client.chat.run_tools("hi", tools=[weather], tool_choice=tool_choice)
    assert asked(gateway, 0).HasField("tool_choice") == (tool_choice is not None)
    assert not asked(gateway, 1).HasField("tool_choice")


def test_a_model_that_must_not_call_stays_so(gateway: Gateway, client: Client) -> None:
    """What was forbidden is not allowed by a call that came all the same."""
    gateway.will(answering(OSLO))
    gateway.will(answering(said="It rains."))
    client.chat.run_tools("hi", tools=[weather], tool_choice="none")
    assert asked(gateway, 1).tool_choice == ToolChoice(mode=ToolChoice.MODE_NONE)


def test_a_whole_request(gateway: Gateway, client: Client) -> None:
    """Is taken as it is, with the functions added, and stays as it was."""
    request = ChatRequest(model="llama", messages=[user("hi")], tools=[Tool(name="own")])
    gateway.will(answering(OSLO))
    gateway.will(answering(said="It rains."))
    client.chat.run_tools(request, tools=[weather], timeout=5)
    assert [each.name for each in asked(gateway).tools] == ["own", "weather"]
    assert request == ChatRequest(model="llama", messages=[user("hi")], tools=[Tool(name="own")])


def test_a_tool_that_is_no_function_ends_the_run(gateway: Gateway, client: Client) -> None:
    """Its calls are the caller's to execute; nothing of that turn was run."""
    gateway.will(answering(OSLO, ToolCall(call_id="c2", tool_name="ask_user", arguments="{}")))
    run = client.chat.run_tools("hi", tools=[broken, weather, Tool(name="ask_user"), {"name": "other"}])
    assert run.answer.tool_calls_executable
    assert [call.tool_name for call in run.answer.tool_calls] == ["weather", "ask_user"]
    assert run.messages[-1] == run.answer.message
    assert [each.name for each in asked(gateway).tools] == ["broken", "weather", "ask_user", "other"]


def test_rounds_run_out(gateway: Gateway, client: Client) -> None:
    """The error has all that was said; the calls of the last round were not run, since the model would not learn of them."""
    gateway.will(answering(OSLO))
    gateway.will(answering(BERGEN))
    with pytest.raises(ToolRoundsExceededError, match="still called tools in round 2, the last") as caught:
        client.chat.run_tools("hi", tools=[weather], max_rounds=2)
    run: ToolRun = caught.value.run
    assert run.rounds == 2
    assert run.messages[-1] == run.answer.message
    assert results(run.messages[:-1]) == [("c1", "rain in Oslo, 7 C")]


# --- calls that cannot be run


def test_arguments_that_do_not_fit_are_told(gateway: Gateway, client: Client) -> None:
    """A turn is run whole or not at all: the model reads what was wrong with one call, and that the other was not run."""
    wrong = ToolCall(call_id="c3", tool_name="weather", arguments='{"city": "Rome", "unit": "K"}')
    ran: list[str] = []

    def note(city: str) -> str:
        ran.append(city)
        return city

    noted = ToolCall(call_id="c4", tool_name="note", arguments='{"city": "Oslo"}')
    gateway.will(answering(noted, wrong))
    gateway.will(answering(OSLO))
    gateway.will(answering(said="It rains."))
    run = client.chat.run_tools("hi", tools=[weather, note])
    assert ran == []
    assert results(asked(gateway, 1).messages) == [
        ("c4", "Not run: another call of the same turn cannot be run; call again"),
        ("c3", "Not run: the arguments do not fit: unit: Input should be 'C' or 'F'"),
    ]
    assert run.text == "It rains."


def test_failed_calls_are_told(gateway: Gateway, client: Client) -> None:
    """Each is sent back with what was wrong; what is no JSON is told beside it, since it cannot be sent as arguments."""
    gateway.will(
        failing(
            ("f1", "whether", "UNKNOWN_TOOL", '{"city": "Rome"}'),
            ("f2", "weather", "MALFORMED_JSON", '{"city": '),
            ("f3", "weather", "NOT_AN_OBJECT", "[1]"),
            ("f4", "weather", "SCHEMA_MISMATCH", '{"city": 1}'),
            calls=[OSLO, ToolCall(call_id="c2", tool_name="ask_user", arguments="{}")],
        )
    )
    gateway.will(answering(said="Sorry."))
    run = client.chat.run_tools("hi", tools=[weather, Tool(name="ask_user")])
    assert run.text == "Sorry."
    said = asked(gateway).messages[1].assistant.tool_calls
    assert [(call.call_id, call.tool_name, call.arguments) for call in said] == [
        ("c1", "weather", '{"city": "Oslo"}'),
        ("c2", "ask_user", "{}"),
        ("f1", "whether", '{"city": "Rome"}'),
        ("f2", "weather", "{}"),
        ("f3", "weather", "{}"),
        ("f4", "weather", '{"city": 1}'),
    ]
    assert results(asked(gateway).messages) == [
        ("c1", "Not run: another call of the same turn cannot be run; call again"),
        ("c2", "Not run: another call of the same turn cannot be run; call again"),
        ("f1", "Not run: it is wrong"),
        ("f2", 'Not run: it is wrong. You wrote: {"city": '),
        ("f3", "Not run: it is wrong. You wrote: [1]"),
        ("f4", "Not run: at /city, it is wrong"),
    ]


def test_failed_calls_use_up_rounds(gateway: Gateway, client: Client) -> None:
    """A model that never gets it right is stopped as well."""
    gateway.will(failing(("f1", "x", "UNKNOWN_TOOL", "{}")))
    with pytest.raises(ToolRoundsExceededError):
        client.chat.run_tools("hi", tools=[weather], max_rounds=1)


@pytest.mark.parametrize(
    ("failed", "reason"),
    [
        (("f1", "weather", "TRUNCATED", '{"city'), "OUT_OF_TOKENS"),
        (("f1", "", "MISSING_NAME", "{}"), "END_OF_MESSAGE"),
        (("f1", "weather", "TRUNCATED", "{}"), "CANCELLED"),
    ],
)
def test_what_cannot_be_told_ends_the_run(
    gateway: Gateway, client: Client, failed: tuple[str, str, str, str], reason: str
) -> None:
    """An answer that was cut would be cut again, and a call without a name cannot be sent back; nothing is run."""
    gateway.will(failing(failed, calls=[OSLO], reason=reason))
    run = client.chat.run_tools("hi", tools=[weather])
    assert run.rounds == 1
    assert not run.answer.tool_calls_executable
    assert len(run.answer.failed_tool_calls) == 1


# --- functions that fail


def test_an_exception_goes_through(gateway: Gateway, client: Client) -> None:
    """As it is, with a note of which call it was."""
    gateway.will(answering(ToolCall(call_id="c1", tool_name="broken", arguments='{"city": "Oslo"}')))
    with pytest.raises(LookupError, match="no Oslo") as caught:
        client.chat.run_tools("hi", tools=[broken])
    assert caught.value.__notes__ == ["in the tool 'broken', called by the model as 'c1'"]


async def test_an_exception_goes_through_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """As it is and not in a group; the functions beside it are cancelled."""
    ended = asyncio.Event()

    async def endless(city: str) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return city

    calls = [
        ToolCall(call_id="c1", tool_name="endless", arguments='{"city": "Oslo"}'),
        ToolCall(call_id="c2", tool_name="broken", arguments='{"city": "Oslo"}'),
    ]
    gateway.will(answering(*calls))
    with pytest.raises(LookupError, match="no Oslo"):
        await async_client.chat.run_tools("hi", tools=[endless, broken])
    assert ended.is_set()


async def test_an_exception_may_be_told(gateway: Gateway, client: Client, async_client: AsyncClient) -> None:
    """Type and message, and nothing more of the program; the other results stand beside it."""
    for _ in range(2):
        gateway.will(answering(OSLO, ToolCall(call_id="c2", tool_name="broken", arguments='{"city": "Oslo"}')))
        gateway.will(answering(said="Sorry."))
    tools: list[ToolLike] = [weather, broken]
    told = [("c1", "rain in Oslo, 7 C"), ("c2", "Failed: LookupError: no Oslo")]
    await asyncio.to_thread(client.chat.run_tools, "hi", tools=tools, on_error="return")
    assert results(asked(gateway).messages) == told
    await async_client.chat.run_tools("hi", tools=tools, on_error="return")
    assert results(asked(gateway).messages) == told


class UnreadableError(Exception):
    """An exception that is broken itself."""

    def __str__(self) -> str:
        message = "not now"
        raise RuntimeError(message)


class Spiteful(BaseModel):
    """A result whose own code fails."""

    @model_serializer
    def fail(self) -> str:
        """Make no JSON."""
        raise UnreadableError


def endless() -> list[object]:
    """A list that holds itself."""
    made: list[object] = []
    made.append(made)
    return made


NO_JSON = "TypeError: the result of the tool 'odd' must be text or something that JSON has: "


@pytest.mark.parametrize(
    ("result", "kind", "told"),
    [
        (object(), TypeError, NO_JSON),
        (b"\xff", TypeError, NO_JSON),
        (endless(), TypeError, NO_JSON),
        (["\udcff"], TypeError, NO_JSON),
        ("a\udcff", ValueError, None),
        (Spiteful(), Exception, ""),
    ],
    ids=["object", "bytes", "cycle", "surrogate in a list", "surrogate", "broken class"],
)
async def test_a_result_that_cannot_be_told(
    gateway: Gateway,
    client: Client,
    async_client: AsyncClient,
    result: object,
    kind: type[Exception],
    told: str | None,
) -> None:
    """It is like an exception of the function: raised with the tool's name, or told; a text is told as far as it is one."""

    def odd() -> object:
        return result

    call = ToolCall(call_id="c1", tool_name="odd", arguments="{}")
    for _ in range(2):
        gateway.will(answering(call))
        gateway.will(answering(said="Sorry."))
    await asyncio.to_thread(client.chat.run_tools, "hi", tools=[odd], on_error="return")
    await async_client.chat.run_tools("hi", tools=[odd], on_error="return")
    for asked_again in asked(gateway, 1), asked(gateway, 3):
        ((_, text),) = results(asked_again.messages)
        assert text == "a\ufffd" if told is None else text.startswith(f"Failed: {told}")
    for _ in range(2):
        gateway.will(answering(call))
    with pytest.raises(kind) as caught:
        await asyncio.to_thread(client.chat.run_tools, "hi", tools=[odd])
    with pytest.raises(kind) as caught_too:
        await async_client.chat.run_tools("hi", tools=[odd])
    for each in caught.value, caught_too.value:
        assert each.__notes__ == ["in the tool 'odd', called by the model as 'c1'"]
        assert kind is Exception or "the result of the tool 'odd'" in str(each)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LookupError("no \udcff"), "Failed: LookupError: no \ufffd"),
        (LookupError("\ud83d\ude00"), "Failed: LookupError: 😀"),
        (UnreadableError(), "Failed: UnreadableError: its message cannot be read"),
    ],
    ids=["surrogate", "surrogates that belong together", "no message"],
)
def test_an_exception_that_cannot_be_told_as_it_is(
    gateway: Gateway, client: Client, error: Exception, told: str
) -> None:
    """What can be told of it is."""

    def odd() -> None:
        raise error

    gateway.will(answering(ToolCall(call_id="c1", tool_name="odd", arguments="{}")))
    gateway.will(answering(said="Sorry."))
    client.chat.run_tools("hi", tools=[odd], on_error="return")
    assert results(asked(gateway).messages) == [("c1", told)]


# --- asynchronous functions, threads and cancelling


async def test_calls_of_a_turn_run_at_the_same_time(gateway: Gateway, async_client: AsyncClient) -> None:
    """Each of them waits here for the other: one function on the loop, one in a thread."""
    loop_is_there = threading.Event()
    thread_is_there = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def on_the_loop() -> str:
        loop_is_there.set()
        await thread_is_there.wait()
        return "a"

    def in_a_thread() -> str:
        loop.call_soon_threadsafe(thread_is_there.set)
        return "b" if loop_is_there.wait(30) else "never"

    names = ["on_the_loop", "in_a_thread"]
    gateway.will(answering(*[ToolCall(call_id=name, tool_name=name, arguments="{}") for name in names]))
    gateway.will(answering(said="Done."))
    await async_client.chat.run_tools("hi", tools=[on_the_loop, in_a_thread])
    assert results(asked(gateway).messages) == [("on_the_loop", "a"), ("in_a_thread", "b")]


async def test_a_function_may_give_back_something_to_wait_for(gateway: Gateway, async_client: AsyncClient) -> None:
    """As functions do that only pass on to one with `async`."""

    def passing_on(city: str) -> Any:  # noqa: ANN401 (what `slow` gives)
        return slow(city)

    gateway.will(answering(ToolCall(call_id="c1", tool_name="passing_on", arguments='{"city": "Rome"}')))
    gateway.will(answering(said="Done."))
    await async_client.chat.run_tools("hi", tools=[passing_on])
    assert results(asked(gateway).messages) == [("c1", "slowly in Rome")]


def test_a_function_that_waits_needs_the_other_client(gateway: Gateway, client: Client) -> None:
    """CompletionView before anything is asked."""
    with pytest.raises(TypeError, match="slow must be awaited: use AsyncClient"):
        client.chat.run_tools("hi", tools=[weather, slow])
    assert gateway.calls == []


async def test_cancelling_cancels_the_call(gateway: Gateway, async_client: AsyncClient) -> None:
    """While the model is asked: the gateway sees the call end."""
    gateway.will(WAIT)
    task = asyncio.create_task(async_client.chat.run_tools("hi", tools=[weather]))
    await asyncio.to_thread(gateway.arrived.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(gateway.last.ended.wait, 30)


async def test_cancelling_cancels_the_functions(gateway: Gateway, async_client: AsyncClient) -> None:
    """While they run: they see it, and nothing more is asked."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    gateway.will(answering(ToolCall(call_id="c1", tool_name="endless", arguments="{}")))
    task = asyncio.create_task(async_client.chat.run_tools("hi", tools=[endless]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
    assert len(gateway.calls) == 1


# --- events


def test_events_can_be_watched(gateway: Gateway, client: Client) -> None:
    """Every event of every answer, as a stream gives it, and the same run in the end."""
    gateway.will(*calling(OSLO, said="Let me see."))
    gateway.will(*saying("It ", "rains."))
    events: list[StreamChatCompletionResponse] = []
    run = client.chat.run_tools("hi", tools=[weather], on_event=events.append)
    assert events == [*calling(OSLO, said="Let me see."), *saying("It ", "rains.")]
    assert run.text == "It rains."
    assert results(run.messages[:-1]) == [("c1", "rain in Oslo, 7 C")]


@pytest.mark.parametrize("waits", [False, True])
async def test_events_can_be_watched_with_asyncio(gateway: Gateway, async_client: AsyncClient, waits: bool) -> None:
    """What is called with them may have to be awaited."""
    gateway.will(*calling(OSLO))
    gateway.will(*saying("It rains."))
    events: list[StreamChatCompletionResponse] = []

    async def note(event: StreamChatCompletionResponse) -> None:
        await asyncio.sleep(0)
        events.append(event)

    run = await async_client.chat.run_tools("hi", tools=[weather], on_event=note if waits else events.append)
    assert events == [*calling(OSLO), *saying("It rains.")]
    assert run.rounds == 2


def test_a_stream_that_breaks_off_ends_the_run(gateway: Gateway, client: Client) -> None:
    """With the error of any other stream; nothing of that answer was run."""
    gateway.will(*calling(OSLO)[:-1])
    with pytest.raises(StreamInterrupted):
        client.chat.run_tools("hi", tools=[broken, weather], on_event=lambda _: None)


# --- what makes no sense


SENSELESS: dict[str, tuple[dict[str, Any], str]] = {
    "two of one name": ({"tools": [weather, Tool(name="weather")]}, "several tools are named weather"),
    "several answers": ({"choice_count": 2}, "choice_count must be 1"),
    "no round": ({"max_rounds": 0}, "max_rounds must be 1 or more, not 0"),
    "a word": ({"on_error": "ignore"}, 'on_error must be "raise" or "return", not \'ignore\''),
}


@pytest.mark.parametrize(("arguments", "why"), SENSELESS.values(), ids=SENSELESS.keys())
def test_what_makes_no_sense(gateway: Gateway, client: Client, arguments: dict[str, Any], why: str) -> None:
    """Is told before anything is asked."""
    with pytest.raises(ValueError, match=why):
        client.chat.run_tools("hi", **{"tools": [weather], **arguments})
    assert gateway.calls == []


def test_one_id_for_several_answers_makes_no_sense(gateway: Gateway, client: Client) -> None:
    """An id belongs to one answer."""
    with pytest.raises(ValueError, match="completion_id names one answer"):
        client.chat.run_tools(ChatRequest(completion_id="mine"), tools=[weather])
    assert gateway.calls == []
