"""The asynchronous client: the same as the blocking one, and what only asyncio has."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import grpc
import pytest
from grpc import aio

from deltawire import (
    AsyncClient,
    CallCancelledError,
    CallInfo,
    DeadlineExceededError,
    ModelNotFoundError,
    ProtocolError,
    StreamInterrupted,
    ToolCall,
    UpstreamIncompleteError,
    _aio,
    _client,
    chat_request,
    tool,
    user,
)
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_RUNNING,
    CancelChatCompletionResponse,
    Completed,
    CompletionSummary,
    CountTokensResponse,
    CreateChatCompletionResponse,
    GetChatCompletionResponse,
    ListChatCompletionsResponse,
)
from deltawire.v1.model_registry_pb2 import (
    HEALTH_STATUS_OK,
    CheckProviderHealthResponse,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    ListProvidersResponse,
    Model,
    Provider,
    RefreshModelsResponse,
    RegisterModelResponse,
    UnregisterModelRequest,
    UnregisterModelResponse,
    UpdateModelResponse,
)
from tests.client.scripted import (
    WAIT,
    Fail,
    Gateway,
    Headers,
    calling,
    choice,
    completed,
    model,
    saying,
    started,
)

STATUS = grpc.StatusCode
CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Oslo"}')
TIMEOUT = 10


def whole(text: str) -> CreateChatCompletionResponse:
    """An answer in one piece."""
    return CreateChatCompletionResponse(started=started().started, completed=completed(choice(said=text)).completed)


async def has_arrived(gateway: Gateway) -> None:
    """Wait for the first call."""
    assert await asyncio.to_thread(gateway.arrived.wait, TIMEOUT)


async def has_ended(gateway: Gateway) -> bool:
    """Whether the latest call has ended on the gateway's side, or does soon."""
    return await asyncio.to_thread(gateway.last.ended.wait, TIMEOUT)


@pytest.mark.parametrize("name", ["Client", "Chat", "ChatStream", "Models", "ModelList", "ModelWatch", "Providers"])
def test_both_clients_are_the_same(name: str) -> None:
    """Every public method takes the same arguments in both."""
    blocking, asynchronous = getattr(_client, name), getattr(_aio, f"Async{name}")

    def public(kind: type) -> dict[str, list[str]]:
        members = {member: value for member, value in vars(kind).items() if not member.startswith("_")}
        return {
            member: [] if isinstance(value, property) else list(inspect.signature(value).parameters)
            for member, value in members.items()
        }

    assert public(blocking) == public(asynchronous)
    assert list(inspect.signature(blocking).parameters) == list(inspect.signature(asynchronous).parameters)


def test_it_needs_a_loop() -> None:
    """Made elsewhere, it would belong to a loop that never runs."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient()


async def test_create(gateway: Gateway, async_client: AsyncClient) -> None:
    """The request arrives as it was asked, the answer with what came beside it."""
    gateway.will(Headers((("x-request-id", "theirs"),)), whole("Hello"))
    answer = await async_client.chat.create("hi", model="llama", temperature=0, wait_for_ready=True)
    assert (answer.text, answer.request_id) == ("Hello", "theirs")
    assert gateway.last.request.chat == chat_request("hi", model="llama", temperature=0)


async def test_stream_of_events(gateway: Gateway, async_client: AsyncClient) -> None:
    """Every event, in order, then the end; the whole answer is still there afterwards."""
    gateway.will(Headers((("x-request-id", "theirs"),)), *saying("Hel", "lo"))
    async with async_client.chat.stream("hi", model="llama", request_id="mine") as stream:
        assert stream.request_id == "mine"
        events = [event async for event in stream]
        assert events == saying("Hel", "lo")
        assert [event async for event in stream] == []
        answer = await stream.final()
    assert (answer.text, answer.request_id) == ("Hello", "theirs")
    assert await stream.final() is answer


async def test_stream_of_text(gateway: Gateway, async_client: AsyncClient) -> None:
    """Only text; the rest can be read from the answer."""
    gateway.will(*saying("Hel", "lo"))
    async with async_client.chat.stream("hi", model="llama") as stream:
        assert [piece async for piece in stream.text] == ["Hel", "lo"]
        assert (await stream.final()).stop_reason


async def test_a_tool_call_and_back(gateway: Gateway, async_client: AsyncClient) -> None:
    """The answer's message and the results go back as they are."""
    gateway.will(*calling(CALL))
    gateway.will(whole("Rain."))
    async with async_client.chat.stream("Oslo?", model="llama") as stream:
        answer = await stream.final()
    history = [user("Oslo?"), answer.message, *(tool(call, "rain") for call in answer.tool_calls)]
    assert (await async_client.chat.create(history, model="llama")).text == "Rain."
    assert list(gateway.last.request.chat.messages) == history


@pytest.mark.parametrize("way", ["create", "stream"])
async def test_a_failure_before_the_first_event(gateway: Gateway, async_client: AsyncClient, way: str) -> None:
    """It is the error of its reason, with gRPC's own behind it."""
    gateway.will(Fail(STATUS.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"model": "x", "request_id": "r9"}))
    chat = async_client.chat
    with pytest.raises(ModelNotFoundError) as caught:
        await (chat.create("hi", model="x") if way == "create" else chat.stream("hi", model="x").final())
    assert caught.value.request_id == "r9"
    assert isinstance(caught.value.__cause__, grpc.RpcError)


async def test_a_fault_after_the_first_event(gateway: Gateway, async_client: AsyncClient) -> None:
    """`completed` is seen, and then the error is raised."""
    events = saying("Hel")
    events[-1].completed.error.CopyFrom(Completed.Error(code=10, reason=15, message="gone"))  # type: ignore[arg-type]
    gateway.will(*events, Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE"))
    async with async_client.chat.stream("hi", model="llama") as stream:
        assert [await anext(stream) for _ in events] == events
        with pytest.raises(UpstreamIncompleteError) as caught:
            await anext(stream)
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"


@pytest.mark.parametrize("end", [[], [Fail(STATUS.UNAVAILABLE, trailers=())], [Fail(STATUS.INTERNAL, trailers=())]])
async def test_a_stream_that_breaks_off(gateway: Gateway, async_client: AsyncClient, end: list[Fail]) -> None:
    """It is never taken for an answer, and never begun again."""
    gateway.will(*saying("Hel", "lo")[:2], *end)
    with pytest.raises(StreamInterrupted) as caught:
        await async_client.chat.stream("hi", model="llama").final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"
    assert len(gateway.calls) == 1


async def test_unavailable_is_tried_again(gateway: Gateway, async_client: AsyncClient) -> None:
    """While nothing has come; the caller sees only the answer."""
    gateway.will(Fail(STATUS.UNAVAILABLE, "DRAINING"))
    gateway.will(*saying("Hello"))
    async with async_client.chat.stream("hi", model="llama") as stream:
        assert (await stream.final()).text == "Hello"
    assert len(gateway.calls) == 2


async def test_a_gap_ends_the_call(gateway: Gateway, async_client: AsyncClient) -> None:
    """The other side is told, and the same error comes again."""
    events = saying("a", "b")
    gateway.will(events[0], events[2], WAIT)
    stream = async_client.chat.stream("hi", model="llama")
    with pytest.raises(ProtocolError, match="event 1 was expected"):
        await stream.final()
    assert await has_ended(gateway)
    with pytest.raises(ProtocolError):
        await anext(stream)


async def test_leaving_the_block_ends_the_call(gateway: Gateway, async_client: AsyncClient) -> None:
    """On both sides, also when the loop inside was left early."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    async with async_client.chat.stream("hi", model="llama") as stream:
        async for piece in stream.text:
            assert piece == "Hel"
            break
    assert await has_ended(gateway)
    with pytest.raises(CallCancelledError) as caught:
        await stream.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"


async def test_another_task_may_cancel(gateway: Gateway, async_client: AsyncClient) -> None:
    """A reader gets the error, and its task is not canceled."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    async with async_client.chat.stream("hi", model="llama") as stream:
        assert await anext(stream.text) == "Hel"
        reader = asyncio.create_task(stream.final())
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(CallCancelledError):
            await reader
    assert not reader.cancelled()


async def test_cancelling_the_task_cancels_the_call(gateway: Gateway, async_client: AsyncClient) -> None:
    """The cancellation goes on as asyncio wants it, and the stream knows that it is over."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    stream = async_client.chat.stream("hi", model="llama")
    await anext(stream.text)
    reader = asyncio.create_task(stream.final())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await has_ended(gateway)
    with pytest.raises(CallCancelledError):
        await stream.final()


async def test_cancelling_the_task_of_a_whole_answer(gateway: Gateway, async_client: AsyncClient) -> None:
    """So it is for a call with one answer."""
    gateway.will(WAIT, whole("never"))
    asked = asyncio.create_task(async_client.chat.create("hi", model="llama"))
    await has_arrived(gateway)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await has_ended(gateway)


@pytest.mark.parametrize("way", ["create", "stream"])
async def test_closing_the_client_ends_its_calls(gateway: Gateway, way: str) -> None:
    """Who waits gets the error of a cancelled call, and is not cancelled itself."""
    gateway.will(WAIT, whole("never") if way == "create" else started())
    client = AsyncClient(gateway.target)
    if way == "create":
        waiting: asyncio.Task[Any] = asyncio.create_task(client.chat.create("hi", model="llama"))
    else:
        waiting = asyncio.create_task(client.chat.stream("hi", model="llama").final())
    await has_arrived(gateway)
    await client.close()
    with pytest.raises(CallCancelledError):
        await waiting
    assert not waiting.cancelled()


async def test_a_timeout(gateway: Gateway, async_client: AsyncClient) -> None:
    """The call's own, and what had come."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    async with async_client.chat.stream("hi", model="llama", timeout=1) as stream:
        with pytest.raises(DeadlineExceededError) as caught:
            await stream.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"


async def test_completions_by_id(gateway: Gateway, async_client: AsyncClient) -> None:
    """Cancelled, looked up, and the tokens of a prompt counted."""
    cancelled = CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING)
    found = GetChatCompletionResponse(completion_id="mine", state=COMPLETION_STATE_RUNNING)
    counted = CountTokensResponse(prompt_tokens=12)
    for answer in (cancelled, found, counted):
        gateway.will(answer)
    assert await async_client.chat.cancel("mine") == cancelled
    assert await async_client.chat.get("mine") == found
    assert await async_client.chat.count_tokens("hi", model="llama", request_id="r1") == counted
    assert [call.request.completion_id for call in gateway.calls[:2]] == ["mine", "mine"]
    assert gateway.last.request.chat == chat_request("hi", model="llama")
    assert gateway.last.metadata["x-request-id"] == "r1"


async def test_a_list_of_completions(gateway: Gateway, async_client: AsyncClient) -> None:
    """Page by page, and what operators name."""
    a, b = CompletionSummary(completion_id="a"), CompletionSummary(completion_id="b")
    gateway.will(ListChatCompletionsResponse(completions=[a], next_page_token="2", unreachable_workers=[3]))
    gateway.will(ListChatCompletionsResponse(completions=[b]))
    listing = async_client.chat.list(caller="ann", states=["running"])
    assert [each async for each in listing] == [a, b]
    assert listing.unreachable_workers == [3]
    assert gateway.last.request.page_token == "2"
    gateway.will(CancelChatCompletionResponse())
    gateway.will(GetChatCompletionResponse())
    await async_client.chat.cancel("c", caller="ann")
    await async_client.chat.get("c", caller="ann")
    assert [call.request.caller for call in gateway.calls] == ["ann"] * 4


async def test_models_and_providers(gateway: Gateway, async_client: AsyncClient) -> None:
    """Requests as asked, results as they came, pages as they are needed."""
    llama, vllm = model("llama"), Provider(id="vllm")
    gateway.will(ListModelsResponse(models=[llama], next_page_token="2"))
    gateway.will(ListModelsResponse(models=[model("m")], unreachable_provider_ids=["p"]))
    listing = async_client.models.list(page_size=1, source="registered")
    assert [each.id async for each in listing] == ["llama", "m"]
    assert listing.unreachable_provider_ids == ["p"]
    assert gateway.last.request == ListModelsRequest(page_size=1, page_token="2", source=1)  # type: ignore[arg-type]

    gateway.will(GetModelResponse(model=llama))
    gateway.will(RegisterModelResponse(model=llama))
    gateway.will(UpdateModelResponse(model=llama))
    gateway.will(UnregisterModelResponse())
    gateway.will(RefreshModelsResponse(providers=[RefreshModelsResponse.Provider(provider_id="vllm", model_count=1)]))
    gateway.will(ListProvidersResponse(providers=[vllm], next_page_token="2"))
    gateway.will(ListProvidersResponse(providers=[Provider(id="w")]))
    gateway.will(CheckProviderHealthResponse(status=HEALTH_STATUS_OK))
    info = CallInfo()
    assert await async_client.models.get("llama", info=info, request_id="mine") == llama
    assert info.request_id == "mine"
    assert await async_client.models.register("llama", aliases=["l"]) == llama
    assert list(gateway.last.request.aliases) == ["l"]
    assert await async_client.models.update("llama", aliases=[], etag="r1") == llama
    assert gateway.last.request.model == Model(id="llama", etag="r1")
    await async_client.models.unregister("l", etag="r2")
    assert gateway.last.request == UnregisterModelRequest(model_id="l", etag="r2")
    assert [each.model_count for each in await async_client.models.refresh("vllm")] == [1]
    assert gateway.last.request.provider_id == "vllm"
    assert list(await async_client.providers.list()) == [vllm, Provider(id="w")]
    assert gateway.last.request.page_token == "2"
    assert (await async_client.providers.health("vllm")).status == HEALTH_STATUS_OK


class OnUnary(aio.UnaryUnaryClientInterceptor):
    """Notes calls with one answer. One class for each kind: grpc.aio sorts interceptors by class."""

    def __init__(self, methods: list[bytes]) -> None:
        self._methods = methods

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:  # noqa: ANN401
        """Note and pass on."""
        self._methods.append(bytes(client_call_details.method).rpartition(b"/")[2])
        return await continuation(client_call_details, request)


class OnStream(aio.UnaryStreamClientInterceptor):
    """Notes streams."""

    def __init__(self, methods: list[bytes]) -> None:
        self._methods = methods

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:  # noqa: ANN401
        """Note and pass on."""
        self._methods.append(bytes(client_call_details.method).rpartition(b"/")[2])
        return await continuation(client_call_details, request)


async def test_interceptors(gateway: Gateway) -> None:
    """Calls of both kinds go through them, well or not."""
    methods: list[bytes] = []
    gateway.will(GetModelResponse(model=model("llama")))
    gateway.will(*saying("hi"))
    gateway.will(Fail(STATUS.NOT_FOUND, "MODEL_NOT_FOUND"))
    async with AsyncClient(gateway.target, interceptors=[OnUnary(methods), OnStream(methods)]) as client:
        assert (await client.models.get("llama")).id == "llama"
        async with client.chat.stream("hi", model="llama") as stream:
            assert (await stream.final()).text == "hi"
        with pytest.raises(ModelNotFoundError):
            await client.models.get("x")
    assert methods == [b"GetModel", b"StreamChatCompletion", b"GetModel"]


async def test_a_channel_of_your_own(gateway: Gateway) -> None:
    """It is left open, and its interceptors are its own."""
    gateway.will(GetModelResponse(model=model("llama")))
    async with aio.insecure_channel(gateway.target) as channel:
        async with AsyncClient(channel=channel):
            pass
        assert (await AsyncClient(channel=channel).models.get("llama")).id == "llama"
        with pytest.raises(ValueError, match="give them to yours"):
            AsyncClient(channel=channel, interceptors=[OnUnary([])])


async def test_tls_is_used_if_asked_for(gateway: Gateway) -> None:
    """A gateway that speaks plaintext is not talked to."""
    async with AsyncClient(gateway.target, tls=True) as client:
        with pytest.raises(DeadlineExceededError):
            await client.models.get("llama", timeout=0.3, wait_for_ready=True)
    assert gateway.calls == []
