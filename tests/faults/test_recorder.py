"""The recorder: it sees every call of a gateway in this process, and says which broke the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc import aio

from deltawire import AsyncClient
from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from tests.support.contract import Ending, check_stream
from tests.support.gateway import Running, ask, read, until
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway

Response = chat_pb.StreamChatCompletionResponse


class _Broken(chat_completion_pb2_grpc.ChatCompletionServicer):
    """A service that keeps no promise; one method writes, one yields, one aborts."""

    async def StreamChatCompletion(  # noqa: N802
        self, request: chat_pb.StreamChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Response]:
        """No `completed`; of a resume, no reason."""
        if request.HasField("resume"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no")
        yield Response(started=chat_pb.Started())

    async def CreateChatCompletion(  # noqa: N802
        self, request: chat_pb.CreateChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.CreateChatCompletionResponse:
        """OK and empty."""
        await context.send_initial_metadata((("x-request-id", request.chat.model),))
        return chat_pb.CreateChatCompletionResponse()

    async def CancelChatCompletion(  # noqa: N802
        self, request: chat_pb.CancelChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.CancelChatCompletionResponse:
        """A code without a reason, by the other way to set one."""
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details(request.completion_id)
        context.set_trailing_metadata((("a", "b"),))
        return chat_pb.CancelChatCompletionResponse()

    async def GetChatCompletion(  # noqa: N802
        self, request: chat_pb.GetChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.GetChatCompletionResponse:
        """Not called."""
        raise NotImplementedError

    async def ListChatCompletions(  # noqa: N802
        self, request: chat_pb.ListChatCompletionsRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.ListChatCompletionsResponse:
        """Not called."""
        raise NotImplementedError

    async def CountTokens(  # noqa: N802
        self, request: chat_pb.CountTokensRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.CountTokensResponse:
        """Not called."""
        raise NotImplementedError


async def test_every_call_is_checked(served: Running, contract_is_kept: Recorder) -> None:
    """Those of the tests' own stubs and those of the client, streamed or not, well or not."""
    await read(served.stream())
    await served.create()
    await read(served.stream(ask(model="unknown")))
    async with AsyncClient(served.address) as client:
        await client.chat.create("hi", model="fake")
        async with client.chat.stream("hi", model="fake") as stream:
            await stream.final()
    assert contract_is_kept.checked["StreamChatCompletion"] == 3
    assert contract_is_kept.checked["CreateChatCompletion"] == 2
    assert contract_is_kept.broken == []


async def test_a_call_that_its_caller_ends_is_no_breach(
    start_gateway: StartGateway, contract_is_kept: Recorder
) -> None:
    """What is missing then could not be sent."""
    async with start_gateway() as gateway:
        call = gateway.stream()
        await call.read()
        call.cancel()
    assert contract_is_kept.checked == {"StreamChatCompletion": 1}
    assert contract_is_kept.broken == []


async def test_what_is_checked_is_what_was_sent(served: Running, contract_is_kept: Recorder) -> None:
    """A gateway's handler may get bytes and parse them itself: the request is still known."""
    seen: list[chat_pb.StreamChatCompletionRequest] = []

    def remember(request: chat_pb.StreamChatCompletionRequest, responses: object, ending: Ending) -> None:
        seen.append(request)
        check_stream(request, cast("Any", responses), ending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.recorder.check_stream", remember)
        await read(served.stream(ask("what")))
        await until(lambda: contract_is_kept.checked["StreamChatCompletion"] == 1)
    assert seen == [chat_pb.StreamChatCompletionRequest(chat=ask("what"))]


async def test_a_request_that_is_not_protobuf_is_refused_by_the_contract(
    served: Running, contract_is_kept: Recorder
) -> None:
    """It has a reason and all trailers, as any refusal."""
    method: Any = served.channel.unary_stream("/deltawire.v1.ChatCompletion/StreamChatCompletion")
    _, failure = await read(method(b"\xff\xff\xff"))
    assert failure is not None
    assert failure.reason == "INVALID_REQUEST"
    await until(lambda: contract_is_kept.checked["StreamChatCompletion"] == 1)


async def test_a_broken_service_is_named() -> None:
    """Each of its calls."""
    recorder = Recorder()
    server = aio.server(interceptors=[recorder])
    chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(_Broken(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = chat_completion_pb2_grpc.ChatCompletionStub(channel)
        assert len([each async for each in stub.StreamChatCompletion(chat_pb.StreamChatCompletionRequest())]) == 1
        await stub.CreateChatCompletion(chat_pb.CreateChatCompletionRequest())
        resume = chat_pb.StreamChatCompletionRequest(resume=chat_pb.ResumePoint(completion_id="a"))
        for call in (
            stub.StreamChatCompletion(resume).read(),
            stub.CancelChatCompletion(chat_pb.CancelChatCompletionRequest()),
        ):
            try:
                await call
            except aio.AioRpcError:
                continue
            raise AssertionError("the call did not fail")
    await server.stop(None)
    assert sorted(each.partition(": ")[2] for each in recorder.broken) == [
        "INTERNAL ('') has no reason",
        "NOT_FOUND ('no') has no reason",
        "contract 7: the call ended OK without a completed answer",
        "contract 7: the call ended OK without completed, after started",
    ]
