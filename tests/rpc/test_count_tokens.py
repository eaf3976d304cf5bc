"""CountTokens over the wire: what is counted, for which model, and what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2 as registry_pb
from deltawire_server.fake_vllm import FakeVllm
from deltawire_server.rpc.validate import COUNTED
from tests.support.gateway import Lines, Running, ask, failure_of, read_well, tool, user

if TYPE_CHECKING:
    from tests.conftest import StartGateway


def counting(chat: chat_pb.ChatRequest | None = None) -> chat_pb.CountTokensRequest:
    """A request to count."""
    return chat_pb.CountTokensRequest(chat=ask() if chat is None else chat)


async def test_a_count_is_what_the_completion_costs(served: Running, lines: Lines) -> None:
    """With the model and the provider that would answer, and how much the model takes; the log line has it too."""
    chat = ask(messages=[user("some words"), user("and some more")])
    counted = await served.chat.CountTokens(counting(chat))
    events = await read_well(served.stream(chat))
    assert counted.prompt_tokens == events[-1].completed.usage.prompt_tokens
    assert (counted.max_context_tokens, counted.model, counted.provider_id) == (4096, "vllm/fake", "vllm")
    entry = await lines.find("call", method="deltawire.v1.ChatCompletion/CountTokens")
    assert (entry["model"], entry["prompt_tokens"], entry["code"]) == ("vllm/fake", counted.prompt_tokens, "OK")


async def test_the_tools_that_are_counted_are_those_that_are_offered(served: Running, vllm: FakeVllm) -> None:
    """And the caller's own token goes along."""
    chat = ask(tools=[tool("a"), tool("b")], allowed_tools=["b"])
    await served.chat.CountTokens(counting(chat), metadata=(("x-vllm-api-token", "mine"),))
    request = vllm.requests[-1]
    assert [each["function"]["name"] for each in request.body["tools"]] == ["b"]
    assert request.headers["authorization"] == "Bearer mine"


async def test_what_is_no_request(served: Running, vllm: FakeVllm) -> None:
    """Refused like a request for a completion, and nothing is asked."""
    for request, fields in (
        (chat_pb.CountTokensRequest(), ["chat"]),
        (counting(chat_pb.ChatRequest(model="fake")), ["chat.messages"]),
    ):
        failure = await failure_of(served.chat.CountTokens(request))
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", fields)
    assert all(request.method == "GET" for request in vllm.requests)  # it is listed all the time


async def test_fields_without_an_effect_on_the_count(served: Running, vllm: FakeVllm) -> None:
    """They are refused, each by its name: every field but those that the count depends on, which are taken."""
    for field in chat_pb.ChatRequest.DESCRIPTOR.fields:
        chat = ask()
        if field.message_type is None and not field.is_repeated:
            value = {field.CPPTYPE_STRING: "x", field.CPPTYPE_BOOL: True}.get(field.cpp_type, 1)
            setattr(chat, field.name, value)
        elif field.message_type is not None and not field.is_repeated:
            getattr(chat, field.name).SetInParent()
        if field.name in COUNTED:
            continue
        failure = await failure_of(served.chat.CountTokens(counting(chat)))
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", [f"chat.{field.name}"])
    thinking = chat_pb.Reasoning(effort=chat_pb.REASONING_EFFORT_LOW, token_budget=5, include=True)
    failure = await failure_of(served.chat.CountTokens(counting(ask(reasoning=thinking))))
    assert failure.fields == ["chat.reasoning.token_budget", "chat.reasoning.include"]
    assert not [request for request in vllm.requests if request.path == "/tokenize"]


async def test_models_that_cannot_be_counted_for(served: Running) -> None:
    """One that is not there, and one that does not chat."""
    failure = await failure_of(served.chat.CountTokens(counting(ask(model="no"))))
    assert failure.reason == "MODEL_NOT_FOUND"
    embedding = registry_pb.RegisterModelRequest(
        model_id="fake", type=registry_pb.MODEL_TYPE_EMBEDDING, embedding_dimension=4
    )
    await served.models.RegisterModel(embedding)
    failure = await failure_of(served.chat.CountTokens(counting()))
    assert failure.reason == "MODEL_WRONG_TYPE"


async def test_a_provider_that_does_not_count(start_gateway: StartGateway) -> None:
    """UNIMPLEMENTED, naming the endpoint."""
    async with (
        FakeVllm(without_endpoints=("/tokenize",)) as vllm,
        start_gateway(base_url=vllm.base_url) as gateway,
    ):
        failure = await failure_of(gateway.chat.CountTokens(counting()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "ENDPOINT_NOT_SUPPORTED")
    assert failure.metadata["endpoint"] == "/tokenize"
    assert "/tokenize" in failure.message


async def test_a_field_that_the_provider_does_not_know(start_gateway: StartGateway) -> None:
    """A bare status, as for any request that has to change, streamed and whole."""
    async with (
        FakeVllm(without_fields=("cache_salt",)) as vllm,
        start_gateway(base_url=vllm.base_url) as gateway,
    ):
        failure = await failure_of(gateway.create(ask(cache_salt="s")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_NOT_SUPPORTED")
    assert failure.fields == ["chat.cache_salt"]
    assert (failure.metadata["field"], failure.metadata["version"]) == ("chat.cache_salt", "0.32.0")
