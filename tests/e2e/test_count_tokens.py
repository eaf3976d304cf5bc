"""CountTokens on a real vLLM returns the prompt tokens of the completion of the same request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire import ToolCall, assistant, chat_request, developer, system, tool, user
from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from tests.e2e.support import CALL_SECONDS, LIGHT, MODEL, SEA, WEATHER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire import AsyncClient, ChatRequest
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub
    from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.e2e

CALL = ToolCall(call_id="call-1", tool_name="get_weather", arguments='{"city":  "Łódź"}')
TURNS = [
    user("What is the weather in Łódź? 👩‍🚀"),
    assistant("I will look.", tool_calls=[CALL]),
    tool("call-1", "Rain,\n4 degrees"),
    assistant("It rains."),
    user(["And", " tomorrow?"]),
]


@pytest.fixture
async def stub(gateway: GatewayProcess) -> AsyncIterator[ChatCompletionAsyncStub]:
    """A stub from generated code."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield ChatCompletionStub(channel)


def with_fields(request: ChatRequest, **fields: Any) -> ChatRequest:  # noqa: ANN401 (whatever the message takes)
    """The same request with more fields."""
    copied = chat_pb.ChatRequest()
    copied.CopyFrom(request)
    copied.MergeFrom(chat_pb.ChatRequest(**fields))
    return copied


def countable(request: ChatRequest) -> ChatRequest:
    """The same request without the fields that have no effect on its prompt, which CountTokens refuses."""
    copied = with_fields(request)
    for name in ("sampling", "response_format", "choice_count"):
        copied.ClearField(name)
    return copied


BOTH = [WEATHER, LIGHT]
REQUESTS = {
    "text": chat_request(SEA, model=MODEL),
    "empty text": chat_request("", model=MODEL),
    "several turns": chat_request(TURNS, model=MODEL),
    "system": chat_request([system("Be brief."), user(SEA)], model=MODEL),
    "developer": chat_request([system("Be brief."), developer("Be kind."), user(SEA)], model=MODEL),
    "tools": chat_request(SEA, model=MODEL, tools=BOTH),
    "several turns with tools": chat_request(TURNS, model=MODEL, tools=BOTH),
    "allowed tools": with_fields(chat_request(SEA, model=MODEL, tools=BOTH), allowed_tools=["set_light"]),
    "required": chat_request(SEA, model=MODEL, tools=BOTH, tool_choice="required"),
    "a named tool": chat_request(SEA, model=MODEL, tools=BOTH, tool_choice="set_light"),
    "no tools": chat_request(SEA, model=MODEL, tools=BOTH, tool_choice="none"),
    "template arguments": with_fields(
        chat_request(SEA, model=MODEL), chat_template_kwargs='{"date_string": "1 May", "enable_thinking": false}'
    ),
    "effort": with_fields(
        chat_request(SEA, model=MODEL), reasoning=chat_pb.Reasoning(effort=chat_pb.REASONING_EFFORT_HIGH)
    ),
    "no effort": with_fields(
        chat_request(SEA, model=MODEL), reasoning=chat_pb.Reasoning(effort=chat_pb.REASONING_EFFORT_NONE)
    ),
    "effort and arguments": with_fields(
        chat_request(SEA, model=MODEL),
        reasoning=chat_pb.Reasoning(effort=chat_pb.REASONING_EFFORT_LOW),
        chat_template_kwargs='{"enable_thinking": false, "reasoning_effort": "beyond all measure"}',
    ),
    "a form": chat_request(SEA, model=MODEL, response_format="json_object"),
    "several answers": chat_request(SEA, model=MODEL, choice_count=2, temperature=1.0),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_count_equals_the_prompt_tokens(client: AsyncClient, stub: ChatCompletionAsyncStub, name: str) -> None:
    """The count equals the usage, with every field that changes the prompt."""
    counted = await stub.CountTokens(chat_pb.CountTokensRequest(chat=countable(REQUESTS[name])), timeout=CALL_SECONDS)
    answer = await client.chat.create(with_fields(REQUESTS[name], sampling=chat_pb.Sampling(max_tokens=1)))
    assert counted.prompt_tokens == answer.usage.prompt_tokens > 0
    assert (counted.model, counted.provider_id, counted.max_context_tokens) == ("vllm/smollm2", "vllm", 4096)


async def test_fields_that_change_the_prompt_change_the_count(stub: ChatCompletionAsyncStub) -> None:
    """Each field that changes the prompt changes the count."""
    counts = {
        name: (
            await stub.CountTokens(chat_pb.CountTokensRequest(chat=countable(request)), timeout=CALL_SECONDS)
        ).prompt_tokens
        for name, request in REQUESTS.items()
    }
    assert counts["text"] < counts["allowed tools"] < counts["tools"]
    assert counts["text"] == counts["no tools"]
    assert (
        len({counts[name] for name in ("text", "template arguments", "effort", "no effort", "system", "developer")})
        == 6
    )
    assert counts["effort and arguments"] != counts["effort"]


async def test_a_prompt_that_does_not_fit_is_counted(stub: ChatCompletionAsyncStub) -> None:
    """A prompt above the context size is counted."""
    request = chat_request("word " * 5000, model=MODEL)
    counted = await stub.CountTokens(chat_pb.CountTokensRequest(chat=request), timeout=CALL_SECONDS)
    assert counted.prompt_tokens > counted.max_context_tokens


async def test_a_template_that_rejects_the_request(stub: ChatCompletionAsyncStub) -> None:
    """The error is the one of the completion; the caller's own template raises it."""
    request = with_fields(chat_request(SEA, model=MODEL), chat_template_kwargs='{"chat_template": "{{ 1 }}"}')
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(chat_pb.CountTokensRequest(chat=request), timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("deltawire-reason", "UPSTREAM_REJECTED") in tuple(caught.value.trailing_metadata() or ())
