"""How typed code uses the client. `mypy --strict` is the test: this file is checked and never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never, assert_type

from deltawire import (
    Answer,
    AsyncClient,
    Client,
    Message,
    Model,
    StopReason,
    StreamChatCompletionResponse,
    Tool,
    ToolCall,
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
        case "completed":
            return event.completed.error.message
        case None:
            return "an event of a later version"
        case _:
            assert_never(kind)


def on_outcome(event: StreamChatCompletionResponse) -> str:
    """Both outcomes of a tool call."""
    delta = event.tool_call_delta
    outcome = delta.WhichOneof("outcome")
    match outcome:
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


def on_message(message: Message) -> int:
    """Every role."""
    role = message.WhichOneof("role")
    match role:
        case "system" | "developer" | "user" | "assistant" | "tool":
            return len(role)
        case None:
            return 0
        case _:
            assert_never(role)


def blocking(client: Client) -> Answer:
    """What comes out of the blocking client is typed throughout."""
    tools: list[Tool | Mapping[str, Any]] = [tool_definition("f", input_schema={"type": "object"}), {"name": "g"}]
    history = [user("hi")]
    with client.chat.stream(history, model="llama", tools=tools, temperature=0, timeout=5.0) as stream:
        for piece in stream.text:
            assert_type(piece, str)
        answer = stream.final()
    history.append(answer.message)
    history.extend(tool(call, "done") for call in answer.tool_calls)
    for model in client.models.list(page_size=10):
        assert_type(model, Model)
    client.chat.create("hi", modle="llama")  # type: ignore[call-arg]
    client.chat.create("hi", temperature="hot")  # type: ignore[arg-type]
    client.chat.create(3)  # type: ignore[arg-type]
    Client("127.0.0.1:1", tokn="key")  # type: ignore[call-arg]
    return client.chat.create(history, model="llama", seed=7)


async def asynchronous(client: AsyncClient) -> Answer:
    """And so is what comes out of the asynchronous one."""
    async with client.chat.stream("hi", model="llama") as stream:
        async for event in stream:
            assert_type(event, StreamChatCompletionResponse)
        async for piece in stream.text:
            assert_type(piece, str)
        assert_type(await stream.final(), Answer)
    async for model in client.models.list():
        assert_type(model, Model)
    return await client.chat.create("hi", model="llama")
