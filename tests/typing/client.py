"""How typed code uses the client. `mypy --strict` is the test: this file is checked and never run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, assert_never, assert_type

from deltawire import (
    Answer,
    AsyncChatStream,
    AsyncClient,
    CancelChatCompletionResponse,
    ChatMessage,
    ChatStream,
    Client,
    CompletionSummary,
    CountTokensResponse,
    GetChatCompletionResponse,
    Model,
    ModelChange,
    Notice,
    StopReason,
    StreamChatCompletionResponse,
    Tool,
    ToolCall,
    ToolRun,
    Usage,
    WatchBookmark,
    WatchEvent,
    choice,
    function_tool,
    image,
    tool,
    tool_definition,
    user,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire.v1.tool_pb2 import ToolCallFailure


def on_event(event: StreamChatCompletionResponse) -> str:
    """Every kind of event: a kind that is left out here does not pass."""
    kind = event.WhichOneof("event")
    match kind:
        case "started":
            return event.started.completion_id
        case "text_delta":
            return event.text_delta.text
        case "reasoning_delta":
            return event.reasoning_delta.text
        case "tool_call_delta":
            return on_outcome(event)
        case "choice_finished":
            return StopReason.Name(event.choice_finished.stop_reason)
        case "usage_update":
            return str(event.usage_update.usage.completion_tokens)
        case "notice":
            return event.notice.message
        case "completed":
            return event.completed.error.message
        case "heartbeat" | None:
            return "nothing, or an event of a later version"
        case _:
            assert_never(kind)


def on_outcome(event: StreamChatCompletionResponse) -> str:
    """Every outcome of a tool call, and a piece of one."""
    delta = event.tool_call_delta
    outcome = delta.WhichOneof("outcome")
    match outcome:
        case "arguments_fragment":
            return delta.arguments_fragment
        case "tool_call":
            assert_type(delta.tool_call, ToolCall)
            return delta.tool_call.arguments
        case "failure":
            failure: ToolCallFailure = delta.failure
            return failure.raw_arguments
        case None:
            return ""
        case _:
            assert_never(outcome)


def on_message(message: ChatMessage) -> int:
    """Every role."""
    role = message.WhichOneof("role")
    match role:
        case "system" | "developer" | "user" | "assistant" | "tool":
            return len(role)
        case None:
            return 0
        case _:
            assert_never(role)


def on_watch(event: WatchEvent) -> str:
    """Both kinds of event of a watch, and every kind of change."""
    match event:
        case WatchBookmark(revision):
            return revision
        case ModelChange(change, model):
            match change:
                case "ADDED" | "MODIFIED" | "REMOVED":
                    return model.id
                case _:
                    assert_never(change)
        case _:
            assert_never(event)


def blocking(client: Client) -> Answer:
    """What comes out of the blocking client is typed throughout."""
    tools: list[Tool | Mapping[str, Any]] = [tool_definition("f", input_schema={"type": "object"}), {"name": "g"}]
    history = [user("hi")]
    with client.chat.stream(history, model="llama", tools=tools, temperature=0, timeout=5.0) as stream:
        for piece in stream.text:
            assert_type(piece, str)
        answer = stream.final()
    with client.chat.stream(
        user(["What?", image(b"png"), {"type": "text", "text": "That."}]),
        model="llama",
        reasoning="high",
        response_format=choice(["a", "b"]),
        chat_template_kwargs={"a": 1},
        soft_time_limit=timedelta(minutes=1),
        retention=60,
    ) as stream:
        assert_type(stream.cancel_softly(), CancelChatCompletionResponse)
        assert_type(stream.usage, Usage)
        assert_type(stream.notices, tuple[Notice, ...])
        assert_type(stream.last_sequence, int | None)
    with client.chat.resume(stream.completion_id, stream.last_sequence, retention=5, timeout=5.0) as resumed:
        assert_type(resumed, ChatStream)
    assert_type(client.chat.cancel("mine", timeout=5.0), CancelChatCompletionResponse)
    assert_type(client.chat.get("mine"), GetChatCompletionResponse)
    for completion in client.chat.list(states=["running"], caller="ann"):
        assert_type(completion, CompletionSummary)
    client.chat.list(state="running")  # type: ignore[call-arg]
    assert_type(client.chat.count_tokens("hi", model="llama").prompt_tokens, int)
    client.chat.create("hi", retention=5)  # type: ignore[call-arg]
    client.chat.stream("hi", retention="long")  # type: ignore[arg-type]
    history.append(answer.message)
    history.extend(tool(call, "done") for call in answer.tool_calls)
    for model in client.models.list(page_size=10, state="serving"):
        assert_type(model, Model)
        assert_type(client.models.update(model, aliases=["a"], embedding_dimension=None, timeout=5.0), Model)
    with client.models.watch("7", known=[Model(id="a")]) as watch:
        for change in watch:
            on_watch(change)
        assert_type(watch.revision, str)
    client.models.update("a", alias=["b"])  # type: ignore[call-arg]
    client.models.list(stat="serving")  # type: ignore[call-arg]
    client.chat.create("hi", modle="llama")  # type: ignore[call-arg]
    client.chat.create("hi", temperature="hot")  # type: ignore[arg-type]
    client.chat.create(3)  # type: ignore[arg-type]
    Client("127.0.0.1:1", tokn="key")  # type: ignore[call-arg]
    return client.chat.create(history, model="llama", seed=7)


@function_tool
def add(first: int, second: int = 0) -> int:
    """A function stays what it was, and is a tool besides."""
    return first + second


@function_tool(strict=True)
async def fetch(url: str) -> str:
    """One that waits."""
    return url


async def calling_functions(client: Client, other: AsyncClient) -> None:
    """Functions as tools, by both clients."""
    assert_type(add(1, second=2), int)
    assert_type(await fetch("x"), str)
    assert_type(add.definition, Tool)
    run = client.chat.run_tools("hi", tools=[add, print, Tool(name="t"), {"name": "g"}], model="llama", timeout=5.0)
    assert_type(run, ToolRun)
    assert_type(run.answer, Answer)
    assert_type(run.messages, tuple[ChatMessage, ...])
    assert_type(await other.chat.run_tools("hi", tools=[fetch], on_error="return", temperature=0), ToolRun)
    add("1")  # type: ignore[arg-type]
    client.chat.run_tools("hi")  # type: ignore[call-arg]
    client.chat.run_tools("hi", tools=[3])  # type: ignore[list-item]
    client.chat.run_tools("hi", tools=[add], on_error="ignore")  # type: ignore[arg-type]
    client.chat.run_tools("hi", tools=[add], modle="llama")  # type: ignore[call-arg]


async def asynchronous(client: AsyncClient) -> Answer:
    """And so is what comes out of the asynchronous one."""
    async with client.chat.stream("hi", model="llama") as stream:
        async for event in stream:
            assert_type(event, StreamChatCompletionResponse)
        async for piece in stream.text:
            assert_type(piece, str)
        assert_type(await stream.final(), Answer)
        assert_type(await stream.cancel_softly(), CancelChatCompletionResponse)
    async with client.chat.resume("mine") as resumed:
        assert_type(resumed, AsyncChatStream)
    assert_type(await client.chat.cancel("mine"), CancelChatCompletionResponse)
    assert_type(await client.chat.get("mine", caller="ann"), GetChatCompletionResponse)
    async for completion in client.chat.list(page_size=10):
        assert_type(completion, CompletionSummary)
    assert_type(await client.chat.count_tokens("hi"), CountTokensResponse)
    async for model in client.models.list(model_type="llm"):
        assert_type(model, Model)
        assert_type(await client.models.update(model, annotations={}), Model)
    async with client.models.watch() as watch:
        async for change in watch:
            on_watch(change)
    return await client.chat.create("hi", model="llama")
