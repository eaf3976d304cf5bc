"""The blocking client over grpcio-testing's fake channel: what goes out and what comes in, with no network at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc_testing
import pytest

from deltawire import Client, ModelAmbiguousError, StreamInterrupted, chat_request
from deltawire.v1 import chat_completion_pb2 as chat
from deltawire.v1 import model_registry_pb2 as registry
from tests.client.scripted import Fail, choice, completed, model, saying, started

CHAT = chat.DESCRIPTOR.services_by_name["ChatCompletion"]
REGISTRY = registry.DESCRIPTOR.services_by_name["ModelRegistry"]


@pytest.fixture
def channel() -> Any:  # noqa: ANN401 -- grpc_testing ships no types
    """A channel whose other end is the test."""
    return grpc_testing.channel([CHAT, REGISTRY], grpc_testing.strict_real_time())


def test_create(channel: Any) -> None:  # noqa: ANN401
    """One request out, one answer in."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(Client(channel=channel).chat.create, "hi", model="llama", request_id="r1")
        metadata, request, rpc = channel.take_unary_unary(CHAT.methods_by_name["CreateChatCompletion"])
        done = completed(choice(said="Hello")).completed
        rpc.send_initial_metadata((("x-request-id", "r1"),))
        rpc.terminate(
            chat.CreateChatCompletionResponse(started=started().started, completed=done), (), grpc.StatusCode.OK, ""
        )
        assert answer.result().text == "Hello"
    assert request.chat == chat_request("hi", model="llama")
    assert ("x-request-id", "r1") in metadata


def test_stream(channel: Any) -> None:  # noqa: ANN401
    """Events are handed on one by one, as they come."""
    stream = Client(channel=channel).chat.stream("hi", model="llama")
    _, request, rpc = channel.take_unary_stream(CHAT.methods_by_name["StreamChatCompletion"])
    assert request.chat == chat_request("hi", model="llama")
    rpc.send_initial_metadata(())
    for event in saying("Hel", "lo"):
        rpc.send_response(event)
        assert next(stream) == event
    rpc.terminate((), grpc.StatusCode.OK, "")
    assert stream.final().text == "Hello"


def test_a_broken_stream(channel: Any) -> None:  # noqa: ANN401
    """What came stays, and the end of the call says why there is no more."""
    stream = Client(channel=channel).chat.stream("hi", model="llama")
    _, _, rpc = channel.take_unary_stream(CHAT.methods_by_name["StreamChatCompletion"])
    rpc.send_initial_metadata(())
    for event in saying("Hel", "lo")[:2]:
        rpc.send_response(event)
    assert next(stream.text) == "Hel"
    rpc.terminate((), grpc.StatusCode.UNAVAILABLE, "the connection was lost")
    with pytest.raises(StreamInterrupted) as caught:
        stream.final()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.message == "the connection was lost"


def test_a_failed_lookup(channel: Any) -> None:  # noqa: ANN401
    """Details arrive with the error."""
    fail = Fail(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_AMBIGUOUS", metadata={"providers": "a, b"})
    with ThreadPoolExecutor(1) as pool:
        looked_up = pool.submit(Client(channel=channel).models.get, "llama")
        _, request, rpc = channel.take_unary_unary(REGISTRY.methods_by_name["GetModel"])
        rpc.send_initial_metadata(())
        rpc.terminate(registry.GetModelResponse(model=model("x")), fail.trailing(), fail.code, "several")
        with pytest.raises(ModelAmbiguousError) as caught:
            looked_up.result()
    assert request.model_id == "llama"
    assert caught.value.metadata == {"providers": "a, b"}
