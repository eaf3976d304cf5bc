"""Functions as tools on a real model: they are called and run, and the model answers with their results."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from pydantic import Field

from deltawire import Client, function_tool, message_text
from deltawire.v1.chat_completion_pb2 import UsageProvenance
from tests.e2e.support import CALL_SECONDS, MODEL

if TYPE_CHECKING:
    from deltawire import AsyncClient, StreamChatCompletionResponse, ToolRun
    from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.e2e

ASK = "Set the kitchen light to 40 percent."
# Far more rounds than the model takes; the first call is demanded, since one this small calls when it likes.
OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "tool_choice": "required",
    "temperature": 0.0,
    "max_tokens": 256,
    "max_rounds": 8,
}


class Room(enum.Enum):
    """Where lights are."""

    KITCHEN = "kitchen"
    BEDROOM = "bedroom"
    HALL = "hall"


class House:
    """Keeps what was set."""

    def __init__(self) -> None:
        self.lights: list[tuple[Room, int]] = []

    def set_light(self, room: Room, percent: Annotated[int, Field(ge=0, le=100)]) -> dict[str, Any]:
        """Set how bright a room is."""
        self.lights.append((room, percent))
        return {"room": room, "percent": percent, "done": True}


def check_run(run: ToolRun, house: House) -> None:
    """Check that every call was run with its types, that its result was sent with its id, and that the model answered with text."""
    calls = [call for answer in run.answers for call in answer.tool_calls]
    assert run.rounds >= 2
    assert not run.answer.tool_calls
    assert run.text
    assert 1 <= len(calls) == len(house.lights)
    assert {type(room) for room, _ in house.lights} == {Room}
    assert all(0 <= percent <= 100 for _, percent in house.lights)
    results = [message for message in run.messages if message.HasField("tool")]
    assert [message.tool.call_id for message in results] == [call.call_id for call in calls]
    assert all('"done":true' in message_text(message) for message in results)
    assert run.usage.provenance == UsageProvenance.USAGE_PROVENANCE_EXACT
    assert run.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in run.answers)
    # Each round reads what the rounds before it said.
    prompts = [answer.usage.prompt_tokens for answer in run.answers]
    assert prompts == sorted(set(prompts))


async def test_a_model_calls_functions(client: AsyncClient) -> None:
    """The asynchronous client runs the functions and reports every event of every round."""
    house = House()
    events: list[StreamChatCompletionResponse] = []
    tools = [function_tool(house.set_light, strict=True)]
    run = await client.chat.run_tools(ASK, tools=tools, on_event=events.append, **OPTIONS)
    check_run(run, house)
    assert sum(event.HasField("completed") for event in events) == run.rounds


async def test_a_model_calls_functions_of_a_blocking_client(gateway: GatewayProcess) -> None:
    """The blocking client runs the functions with unary calls."""
    house = House()

    def converse() -> ToolRun:
        with Client(gateway.address, timeout=CALL_SECONDS) as client:
            return client.chat.run_tools(ASK, tools=[function_tool(house.set_light, strict=True)], **OPTIONS)

    check_run(await asyncio.to_thread(converse), house)
