"""The blocking client against a real gRPC server."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire import (
    CallCancelledError,
    CallInfo,
    ChatRequest,
    Client,
    CompletionNotFoundError,
    CompletionState,
    CompletionSummary,
    DeadlineExceededError,
    EtagMismatchError,
    InternalError,
    ModelNotFoundError,
    ModelState,
    ModelType,
    ProtocolError,
    StreamInterrupted,
    ToolCall,
    UnavailableError,
    UpstreamIncompleteError,
    UpstreamOverloadedError,
    UpstreamTimeoutError,
    chat_request,
    tls_credentials,
    tool,
    user,
)
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_RUNNING,
    CancelChatCompletionRequest,
    CancelChatCompletionResponse,
    Completed,
    CountTokensResponse,
    CreateChatCompletionResponse,
    GetChatCompletionRequest,
    GetChatCompletionResponse,
    ListChatCompletionsResponse,
)
from deltawire.v1.model_registry_pb2 import (
    HEALTH_STATUS_ERROR,
    CheckProviderHealthResponse,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    ListProvidersResponse,
    Provider,
    RefreshModelsResponse,
    RegisterModelRequest,
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
    serve,
    started,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATUS = grpc.StatusCode
CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Oslo"}')
# How long a test waits for what must come; it is never reached when things are right.
TIMEOUT = 10


def whole(text: str) -> CreateChatCompletionResponse:
    """An answer in one piece."""
    return CreateChatCompletionResponse(started=started().started, completed=completed(choice(said=text)).completed)


def test_create(gateway: Gateway, client: Client) -> None:
    """The request arrives as it was asked, the answer with what came beside it."""
    gateway.will(Headers((("x-request-id", "theirs"),)), whole("Hello"))
    answer = client.chat.create("hi", model="llama", temperature=0, metadata=[("traceparent", "00-1")], vllm_token="t")
    assert answer.text == "Hello"
    assert answer.request_id == "theirs"
    assert ("x-request-id", "theirs") in answer.initial_metadata
    assert gateway.last.request.chat == chat_request("hi", model="llama", temperature=0)
    assert gateway.last.metadata["traceparent"] == "00-1"
    assert gateway.last.metadata["x-vllm-api-token"] == "t"


def test_stream_of_events(gateway: Gateway, client: Client) -> None:
    """Every event, in order, then the end; the whole answer is still there afterwards."""
    gateway.will(Headers((("x-request-id", "theirs"),)), *saying("Hel", "lo"))
    with client.chat.stream("hi", model="llama", request_id="mine") as stream:
        assert (stream.request_id, stream.initial_metadata) == ("mine", ())
        events = list(stream)
        assert events == saying("Hel", "lo")
        assert stream.request_id == "theirs"
        assert list(stream) == []
        answer = stream.final()
    assert (answer.text, answer.request_id) == ("Hello", "theirs")
    assert stream.final() is answer
    assert answer.trailing_metadata == stream.trailing_metadata
    assert gateway.last.request.chat == chat_request("hi", model="llama")
    assert gateway.last.metadata["x-request-id"] == "mine"


def test_stream_of_text(gateway: Gateway, client: Client) -> None:
    """Only text, only of choice 0; the rest can be read from the answer."""
    gateway.will(*saying("Hel", "lo"))
    with client.chat.stream("hi", model="llama") as stream:
        assert list(stream.text) == ["Hel", "lo"]
        assert stream.final().stop_reason


def test_text_goes_on_where_events_were_left(gateway: Gateway, client: Client) -> None:
    """There is one stream, however it is read."""
    gateway.will(*saying("a", "b", "c"))
    with client.chat.stream("hi", model="llama") as stream:
        next(stream)
        assert next(stream.text) == "a"
        assert next(stream).text_delta.text == "b"
        assert stream.final().text == "abc"


def test_a_tool_call_and_back(gateway: Gateway, client: Client) -> None:
    """The answer's message and the results go back as they are."""
    gateway.will(*calling(CALL))
    gateway.will(*saying("Rain."))
    history = [user("Oslo?")]
    with client.chat.stream(history, model="llama") as stream:
        answer = stream.final()
    assert answer.tool_calls_executable
    history += [answer.message, *(tool(call, "rain") for call in answer.tool_calls)]
    with client.chat.stream(history, model="llama") as stream:
        assert stream.final().text == "Rain."
    sent = gateway.last.request.chat.messages
    assert sent[1].assistant.tool_calls[0] == CALL
    assert sent[2].tool.call_id == "call_1"


def test_a_whole_request(gateway: Gateway, client: Client) -> None:
    """A raw message goes out unchanged, by both ways."""
    request = ChatRequest(model="llama", messages=[user("hi")])
    gateway.will(whole("a"))
    gateway.will(*saying("b"))
    assert client.chat.create(request).text == "a"
    with client.chat.stream(request) as stream:
        assert stream.final().text == "b"
    assert [call.request.chat for call in gateway.calls] == [request, request]


@pytest.mark.parametrize("way", ["create", "stream"])
def test_a_failure_before_the_first_event(gateway: Gateway, client: Client, way: str) -> None:
    """It is the error of its reason, with gRPC's own behind it."""
    gateway.will(Fail(STATUS.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"model": "x", "request_id": "r9"}))
    with pytest.raises(ModelNotFoundError) as caught:
        client.chat.create("hi", model="x") if way == "create" else client.chat.stream("hi", model="x").final()
    assert caught.value.request_id == "r9"
    assert caught.value.metadata["model"] == "x"
    assert caught.value.answer is None
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_fault_after_the_first_event(gateway: Gateway, client: Client) -> None:
    """`completed` is seen, and then the error is raised; again and again if asked."""
    fault = Completed.Error(code=10, reason=15, message="gone")  # type: ignore[arg-type]
    events = saying("Hel")
    events[-1].completed.error.CopyFrom(fault)
    gateway.will(*events, Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE"))
    with client.chat.stream("hi", model="llama") as stream:
        assert [next(stream) for _ in events] == events
        with pytest.raises(UpstreamIncompleteError) as caught:
            next(stream)
        with pytest.raises(UpstreamIncompleteError) as again:
            stream.final()
    assert again.value is caught.value
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"


@pytest.mark.parametrize("end", [[], [Fail(STATUS.UNAVAILABLE, trailers=())], [Fail(STATUS.INTERNAL, trailers=())]])
def test_a_stream_that_breaks_off(gateway: Gateway, client: Client, end: list[Fail]) -> None:
    """It is never taken for an answer, and never begun again."""
    gateway.will(*saying("Hel", "lo")[:2], *end)
    with client.chat.stream("hi", model="llama") as stream, pytest.raises(StreamInterrupted) as caught:
        stream.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"
    assert len(gateway.calls) == 1


def test_a_gap_ends_the_call(gateway: Gateway, client: Client) -> None:
    """The other side is told, and the same error comes again."""
    events = saying("a", "b")
    gateway.will(events[0], events[2], WAIT)
    with client.chat.stream("hi", model="llama", request_id="r") as stream:
        with pytest.raises(ProtocolError, match="event 1 was expected") as caught:
            stream.final()
        assert gateway.last.ended.wait(TIMEOUT)
        with pytest.raises(ProtocolError):
            next(stream)
    assert caught.value.request_id == "r"


def test_leaving_the_block_ends_the_call(gateway: Gateway, client: Client) -> None:
    """On both sides; what had come stays readable from the error."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    with client.chat.stream("hi", model="llama") as stream:
        assert next(stream.text) == "Hel"
    assert gateway.last.ended.wait(TIMEOUT)
    with pytest.raises(CallCancelledError) as caught:
        stream.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"


def test_another_thread_may_cancel(gateway: Gateway, client: Client) -> None:
    """A reader gets the error."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    with client.chat.stream("hi", model="llama") as stream, ThreadPoolExecutor(1) as pool:
        assert next(stream.text) == "Hel"
        reader = pool.submit(stream.final)
        stream.cancel()
        with pytest.raises(CallCancelledError):
            reader.result(TIMEOUT)


def test_closing_the_client_ends_its_calls(gateway: Gateway) -> None:
    """A reader gets the error of a cancelled call."""
    gateway.will(started(), WAIT)
    with Client(gateway.target) as client:
        stream = client.chat.stream("hi", model="llama")
        next(stream)
    with pytest.raises(CallCancelledError):
        stream.final()


def test_a_timeout(gateway: Gateway) -> None:
    """The client's own, and what had come."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    with Client(gateway.target, timeout=1) as client, client.chat.stream("hi", model="llama") as stream:
        with pytest.raises(DeadlineExceededError) as caught:
            stream.final()
        assert caught.value.answer is not None
        assert caught.value.answer.text == "Hel"


@pytest.mark.parametrize("way", ["create", "stream"])
def test_unavailable_is_tried_again(gateway: Gateway, client: Client, way: str) -> None:
    """While nothing has come, under the same request id; the caller sees only the answer."""
    gateway.will(Fail(STATUS.UNAVAILABLE, "DRAINING"))
    if way == "create":
        gateway.will(whole("Hello"))
        assert client.chat.create("hi", model="llama").text == "Hello"
    else:
        gateway.will(*saying("Hello"))
        with client.chat.stream("hi", model="llama") as stream:
            assert stream.final().text == "Hello"
    first, second = gateway.calls
    assert first.metadata["x-request-id"] == second.metadata["x-request-id"]


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (Fail(STATUS.INTERNAL, "INTERNAL"), InternalError),
        (Fail(STATUS.RESOURCE_EXHAUSTED, "UPSTREAM_OVERLOADED", retry_after=2), UpstreamOverloadedError),
    ],
)
def test_nothing_else_is_tried_again(gateway: Gateway, client: Client, fail: Fail, kind: type[Exception]) -> None:
    """The request itself may cause the failure, and an overloaded server has asked for a pause."""
    gateway.will(fail)
    with pytest.raises(kind):
        client.chat.create("hi", model="llama")
    assert len(gateway.calls) == 1


@pytest.mark.parametrize("way", ["create", "stream"])
@pytest.mark.parametrize("pushback", ["-1", "400"])
def test_the_gateway_says_when_to_try_again(gateway: Gateway, client: Client, way: str, pushback: str) -> None:
    """A pushback of -1 ends gRPC's own retries at once; another one is the pause before the next attempt."""
    refused = Fail(STATUS.UNAVAILABLE, message="draining", trailers=(("grpc-retry-pushback-ms", pushback),))
    gateway.will(refused)
    if pushback != "-1":
        gateway.will(*([whole("Hello")] if way == "create" else saying("Hello")))
    began = time.monotonic()

    def ask() -> str:
        if way == "create":
            return client.chat.create("hi", model="llama").text
        with client.chat.stream("hi", model="llama") as stream:
            return stream.final().text

    if pushback == "-1":
        with pytest.raises(UnavailableError):
            ask()
        assert len(gateway.calls) == 1
    else:
        assert ask() == "Hello"
        assert time.monotonic() - began >= 0.4
        assert len(gateway.calls) == 2


@pytest.mark.parametrize("way", ["create", "stream"])
def test_a_silent_provider_is_not_the_callers_timeout(gateway: Gateway, client: Client, way: str) -> None:
    """The status is the same, DEADLINE_EXCEEDED: the reason says which of the two it was, and nothing is tried again."""
    gateway.will(Fail(STATUS.DEADLINE_EXCEEDED, "UPSTREAM_TIMEOUT", metadata={"limit_seconds": "600"}))
    stream = client.chat.stream("hi", model="llama", timeout=60, retention=60) if way == "stream" else None
    with pytest.raises(UpstreamTimeoutError) as caught:
        stream.final() if stream else client.chat.create("hi", model="llama", timeout=60)
    assert not isinstance(caught.value, DeadlineExceededError)
    assert (caught.value.code, caught.value.answer) == (STATUS.DEADLINE_EXCEEDED, None)
    assert len(gateway.calls) == 1


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_nobody_there() -> None:
    """The error has the id that was sent, since nothing came back."""
    with Client(f"127.0.0.1:{free_port()}") as client, pytest.raises(UnavailableError) as caught:
        client.chat.create("hi", model="llama", request_id="mine")
    assert caught.value.request_id == "mine"
    assert caught.value.reason == ""


def test_completions_by_id(gateway: Gateway, client: Client) -> None:
    """Cancelled, looked up: the request as asked, the answer as it came."""
    cancelled = CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING)
    found = GetChatCompletionResponse(completion_id="mine", state=COMPLETION_STATE_RUNNING, last_sequence=4)
    gateway.will(cancelled)
    gateway.will(found)
    gateway.will(Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND"))
    assert client.chat.cancel("mine", request_id="r1") == cancelled
    assert gateway.last.metadata["x-request-id"] == "r1"
    assert client.chat.get("mine") == found
    assert [call.request for call in gateway.calls] == [
        CancelChatCompletionRequest(completion_id="mine"),
        GetChatCompletionRequest(completion_id="mine"),
    ]
    with pytest.raises(CompletionNotFoundError):
        client.chat.get("mine")


def test_counting_tokens(gateway: Gateway, client: Client) -> None:
    """It takes what `create` takes, a whole request too."""
    counted = CountTokensResponse(prompt_tokens=12, max_context_tokens=4096)
    gateway.will(counted)
    gateway.will(counted)
    assert client.chat.count_tokens("hi", model="llama", chat_template_kwargs={"a": 1}, timeout=60) == counted
    assert gateway.last.request.chat == chat_request("hi", model="llama", chat_template_kwargs={"a": 1})
    assert client.chat.count_tokens(ChatRequest(model="llama")) == counted
    assert gateway.last.request.chat == ChatRequest(model="llama")


def test_models(gateway: Gateway, client: Client) -> None:
    """Pages are fetched as they are needed, and who did not answer is known at the end."""
    a, b, c = model("a"), model("b"), model("c")
    gateway.will(ListModelsResponse(models=[a, b], next_page_token="2", unreachable_provider_ids=["p"]))
    gateway.will(ListModelsResponse(next_page_token="3"))
    gateway.will(ListModelsResponse(models=[c]))
    listing = client.models.list(page_size=2, state="serving")
    assert next(listing) == a
    assert len(gateway.calls) == 1
    assert list(listing) == [b, c]
    assert listing.unreachable_provider_ids == ["p"]
    serving = ModelState.MODEL_STATE_SERVING
    assert [call.request for call in gateway.calls] == [
        ListModelsRequest(page_size=2, page_token=token, state=serving) for token in ("", "2", "3")
    ]


def test_a_list_of_completions(gateway: Gateway, client: Client) -> None:
    """Page by page; the filters by value or by name."""
    a, b = CompletionSummary(completion_id="a"), CompletionSummary(completion_id="b")
    gateway.will(ListChatCompletionsResponse(completions=[a], next_page_token="2", unreachable_workers=[3]))
    gateway.will(ListChatCompletionsResponse(completions=[b], unreachable_workers=[3]))
    since = datetime(2026, 11, 28, tzinfo=UTC)
    states: list[Any] = ["running", CompletionState.COMPLETION_STATE_FAILED]
    listing = client.chat.list(caller="ann", states=states, create_time_from=since, page_size=1)
    assert next(listing) == a
    assert len(gateway.calls) == 1
    assert list(listing) == [b]
    assert listing.unreachable_workers == [3]
    request = gateway.last.request
    assert (request.caller, request.page_size, request.page_token) == ("ann", 1, "2")
    assert list(request.states) == [CompletionState.COMPLETION_STATE_RUNNING, CompletionState.COMPLETION_STATE_FAILED]
    assert request.create_time_from.ToDatetime(UTC) == since


def test_a_list_that_cannot_be_requested(client: Client) -> None:
    """A state that does not exist, and times without a zone or of another type."""
    with pytest.raises(ValueError, match="COMPLETION_STATE_LOST"):
        client.chat.list(states=["lost"])
    with pytest.raises(ValueError, match="create_time_from must have a time zone"):
        client.chat.list(create_time_from=datetime(2026, 11, 28))  # noqa: DTZ001 (the point of the test)
    with pytest.raises(TypeError, match="create_time_from: a datetime is needed, not str"):
        client.chat.list(create_time_from="2026-11-28")  # type: ignore[arg-type]


def test_operators_name_the_caller(gateway: Gateway, client: Client) -> None:
    """In look-ups and cancels."""
    gateway.will(CancelChatCompletionResponse())
    gateway.will(GetChatCompletionResponse())
    client.chat.cancel("c", caller="ann")
    client.chat.get("c", caller="ann")
    assert [(call.request.completion_id, call.request.caller) for call in gateway.calls] == [("c", "ann")] * 2


def test_get_register_and_unregister(gateway: Gateway, client: Client) -> None:
    """Requests as asked, results as they came."""
    llama = model("llama")
    gateway.will(GetModelResponse(model=llama))
    gateway.will(RegisterModelResponse(model=llama))
    gateway.will(RegisterModelResponse(model=llama))
    gateway.will(UnregisterModelResponse())
    assert client.models.get("l") == llama
    assert client.models.register("llama", model_type="llm", aliases=["l"], annotations={"a": "b"}) == llama
    assert client.models.register(RegisterModelRequest(model_id="llama")) == llama
    client.models.unregister("llama")
    assert [call.request for call in gateway.calls[1:3]] == [
        RegisterModelRequest(model_id="llama", type=ModelType.MODEL_TYPE_LLM, aliases=["l"], annotations={"a": "b"}),
        RegisterModelRequest(model_id="llama"),
    ]
    assert gateway.calls[0].request.model_id == "l"
    assert gateway.last.request == UnregisterModelRequest(model_id="llama")


def test_changes_to_what_was_read(gateway: Gateway, client: Client) -> None:
    """An etag goes along, and its mismatch is an error of its own that is not tried again."""
    read, now = model("llama", etag="r1"), model("llama", etag="r2", aliases=["l"])
    gateway.will(UpdateModelResponse(model=now))
    assert client.models.update(read, aliases=["l"]) == now
    assert gateway.last.request.model.etag == "r1"
    gateway.will(Fail(STATUS.ABORTED, "ETAG_MISMATCH", metadata={"model": "llama", "etag": "r2"}))
    with pytest.raises(EtagMismatchError) as caught:
        client.models.update(read, model_type="rerank")
    assert caught.value.metadata["etag"] == "r2"
    gateway.will(UnregisterModelResponse())
    client.models.unregister("llama", etag="r2")
    assert gateway.last.request == UnregisterModelRequest(model_id="llama", etag="r2")


def test_refresh(gateway: Gateway, client: Client) -> None:
    """One that cannot be listed is an answer."""
    answers = [
        RefreshModelsResponse.Provider(provider_id="a", model_count=2),
        RefreshModelsResponse.Provider(provider_id="b", error="refused"),
    ]
    gateway.will(RefreshModelsResponse(providers=answers))
    gateway.will(RefreshModelsResponse(providers=answers[:1]))
    assert list(client.models.refresh()) == answers
    assert gateway.last.request.provider_id == ""
    assert list(client.models.refresh("a")) == answers[:1]
    assert gateway.last.request.provider_id == "a"


def test_providers_come_in_pages(gateway: Gateway, client: Client) -> None:
    """All of them are returned, whatever size a page has."""
    gateway.will(ListProvidersResponse(providers=[Provider(id="a")], next_page_token="2"))
    gateway.will(ListProvidersResponse(providers=[Provider(id="b")], next_page_token="3"))
    gateway.will(ListProvidersResponse(providers=[Provider(id="c")]))
    assert [each.id for each in client.providers.list(timeout=60)] == ["a", "b", "c"]
    assert [call.request.page_token for call in gateway.calls] == ["", "2", "3"]


def test_providers(gateway: Gateway, client: Client) -> None:
    """A provider that is down is an answer."""
    vllm = Provider(id="vllm", kind="vllm", base_urls=["http://127.0.0.1:8000/v1"])
    gateway.will(ListProvidersResponse(providers=[vllm]))
    gateway.will(CheckProviderHealthResponse(status=HEALTH_STATUS_ERROR, message="HTTP 503"))
    assert list(client.providers.list()) == [vllm]
    health = client.providers.health("vllm")
    assert (health.status, health.message) == (HEALTH_STATUS_ERROR, "HTTP 503")
    assert gateway.last.request.provider_id == "vllm"


def test_what_comes_beside_a_result(gateway: Gateway, client: Client) -> None:
    """Request id and metadata, for calls whose result is a plain message; after a failure too."""
    info = CallInfo()
    gateway.will(Headers((("x-request-id", "theirs"),)), GetModelResponse(model=model("llama")))
    client.models.get("llama", info=info)
    assert info.request_id == "theirs"
    gateway.will(Fail(STATUS.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"request_id": "r9"}))
    with pytest.raises(ModelNotFoundError):
        client.models.get("x", info=info)
    assert info.request_id == "r9"
    assert dict(info.trailing_metadata)["deltawire-reason"] == "MODEL_NOT_FOUND"


class Stamp(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Counts calls of both kinds and lets them through."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def _through(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:  # noqa: ANN401
        self.methods.append(details.method.rpartition("/")[2])
        return continuation(details, request)

    intercept_unary_unary = _through  # type: ignore[assignment]
    intercept_unary_stream = _through  # type: ignore[assignment]


def test_interceptors_and_a_channel_of_your_own(gateway: Gateway) -> None:
    """Both are used, and the channel is left open."""
    stamp = Stamp()
    gateway.will(GetModelResponse(model=model("llama")))
    gateway.will(*saying("hi"))
    gateway.will(Fail(STATUS.NOT_FOUND, "MODEL_NOT_FOUND"))
    gateway.will(GetModelResponse(model=model("llama")))
    with grpc.insecure_channel(gateway.target) as channel:
        with Client(channel=channel, interceptors=[stamp], token="key") as client:
            client.models.get("llama")
            with client.chat.stream("hi", model="llama") as stream:
                assert stream.final().text == "hi"
            with pytest.raises(ModelNotFoundError):
                client.models.get("x")
        assert gateway.last.metadata["authorization"] == "Bearer key"
        assert stamp.methods == ["GetModel", "StreamChatCompletion", "GetModel"]
        assert Client(channel=channel).models.get("llama").id == "llama"


def test_a_unix_socket(tmp_path: Path) -> None:
    """It counts as this machine: tokens may go over it."""
    with serve(f"unix:{tmp_path}/s") as gateway, Client(gateway.target, token="key") as client:
        gateway.will(whole("Hello"))
        assert client.chat.create("hi", model="llama").text == "Hello"
        assert gateway.last.metadata["authorization"] == "Bearer key"


def test_tls(tmp_path: Path) -> None:
    """With a certificate authority of one's own; without it, the gateway is not trusted."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )  # fmt: skip
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with serve(credentials=credentials) as gateway:
        with Client(gateway.target, credentials=tls_credentials(ca_file=cert), token="key") as client:
            gateway.will(whole("Hello"))
            assert client.chat.create("hi", model="llama").text == "Hello"
        with Client(gateway.target, tls=True) as client, pytest.raises(UnavailableError):
            client.chat.create("hi", model="llama")


def test_threads_share_a_client(gateway: Gateway, client: Client) -> None:
    """Each gets its own answer."""
    for _ in range(6):
        gateway.will(*saying("Hel", "lo"))
    together = threading.Barrier(6)

    def ask(name: str) -> tuple[str, str]:
        together.wait(TIMEOUT)
        with client.chat.stream(name, model="llama", request_id=name) as stream:
            return stream.final().text, stream.request_id

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, "abcdef"))
    assert answers == [("Hello", name) for name in "abcdef"]
    assert {call.metadata["x-request-id"] for call in gateway.calls} == set("abcdef")
