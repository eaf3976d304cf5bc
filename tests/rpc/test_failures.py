"""Every way in which a completion fails, end to end: status, details, trailers, and what is still told of the answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import StatusCode

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, model_registry_pb2, tool_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script, error_body
from deltawire_server.rpc.status import MAX_MESSAGE
from tests.rpc.test_chat_completion import held
from tests.support.gateway import (
    Failure,
    Running,
    ask,
    failure_of,
    kinds,
    read,
    read_badly,
    read_well,
    text_of,
    tool,
    user,
)
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from tests.conftest import StartGateway

CHUNKS = Chunks()
DONE = b"data: [DONE]\n\n"
LIMIT_OF_HEADERS = 8 * 1024
"""What gRPC clients take by default, with the 32 bytes per header that HTTP/2 counts."""


def counted(chunk: dict[str, Any], completion: int) -> dict[str, Any]:
    """The chunk with the running figures that are asked for."""
    return chunk | {"usage": {"prompt_tokens": 3, "completion_tokens": completion, "total_tokens": 3 + completion}}


BEGUN = (counted(CHUNKS.role(), 0), counted(CHUNKS.text("be"), 1), counted(CHUNKS.text("gun"), 2))


def in_band(code: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> Script:
    """An error event in place of an answer, as a real vLLM sends it."""
    return Script.chunks([error_body(code, message, kind, param)])


@dataclass(frozen=True)
class Before:
    """A failure before the first event.

    Attributes:
        script: What vLLM does.
        code: The call's status code.
        reason: The reason's name.
        retry: Whether trying again is advised.
        metadata: Of ErrorInfo, among others.
        violated: The field that is blamed; empty for none.
        token: Whether the caller brings a token.
        provider: Settings of the provider.
        server: Settings of the server.
        stream: Settings of streams.
    """

    script: Script
    code: StatusCode
    reason: str
    retry: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    violated: str = ""
    token: bool = False
    provider: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)


UNAVAILABLE = (StatusCode.UNAVAILABLE, "UPSTREAM_UNAVAILABLE", True)
SILENT = {"first_event_timeout": 0.1}

BEFORE = {
    "closed": Before(Script.generated(header_bytes=0, end="eof"), *UNAVAILABLE),
    "reset": Before(Script.generated(header_bytes=0, end="reset"), *UNAVAILABLE),
    "head cut off": Before(Script.generated(header_bytes=30, end="eof"), *UNAVAILABLE),
    "no data event": Before(Script.chunks([]), *UNAVAILABLE),
    "only comments, then the end": Before(Script.chunks([b": hm\n\n"]), *UNAVAILABLE),
    "only usage, then closed": Before(Script.chunks([CHUNKS.usage(3, 0)], after=1, end="eof"), *UNAVAILABLE),
    "head, then closed": Before(Script.generated(after=0, end="eof"), *UNAVAILABLE),
    "head, then reset": Before(Script.generated(after=0, end="reset"), *UNAVAILABLE),
    "half an event": Before(Script.chunks([b'data: {"id":'], end="cut"), *UNAVAILABLE),
    "HTTP 408": Before(Script.error(408, "late"), *UNAVAILABLE, {"http_status": "408"}),
    "HTTP 502": Before(
        Script.answer(b"<html>", status=502, content_type="text/html"), *UNAVAILABLE, {"http_status": "502"}
    ),
    "HTTP 503": Before(Script.error(503, "busy", "Service Unavailable"), *UNAVAILABLE, {"http_status": "503"}),
    "HTTP 504": Before(Script.error(504, "late"), *UNAVAILABLE, {"http_status": "504"}),
    "in-band 503": Before(in_band(503, "busy", "ServiceUnavailableError"), *UNAVAILABLE, {"http_status": "503"}),
    "silence": Before(
        Script.chunks([asyncio.Event()]),
        StatusCode.DEADLINE_EXCEEDED,
        "UPSTREAM_TIMEOUT",
        False,
        {"limit_seconds": "0.1"},
        provider=SILENT,
    ),
    "silence without a head": Before(
        Script.generated(headers_delay=3600),
        StatusCode.DEADLINE_EXCEEDED,
        "UPSTREAM_TIMEOUT",
        False,
        {"limit_seconds": "0.1"},
        provider=SILENT,
    ),
    "comments alone": Before(
        Script.generated(first_delay=3600, keep_alive=0.01),
        StatusCode.DEADLINE_EXCEEDED,
        "UPSTREAM_TIMEOUT",
        False,
        provider=SILENT,
    ),
    "longer than any call may": Before(
        Script.generated(first_delay=3600),
        StatusCode.DEADLINE_EXCEEDED,
        "DURATION_LIMIT_EXCEEDED",
        metadata={"limit_seconds": "0.1"},
        server={"max_duration": 0.1},
    ),
    "HTTP 500": Before(
        Script.error(500, "oops"), StatusCode.INTERNAL, "UPSTREAM_ERROR", metadata={"upstream_code": "500"}
    ),
    "in-band 500": Before(
        in_band(500, "oops"), StatusCode.INTERNAL, "UPSTREAM_ERROR", metadata={"upstream_code": "500"}
    ),
    "in-band without a code": Before(
        Script.chunks([{"error": {"message": "oops"}}]),
        StatusCode.INTERNAL,
        "UPSTREAM_ERROR",
        metadata={"upstream_code": "0"},
    ),
    "HTTP 400": Before(
        Script.error(400, "n must be 1", "BadRequestError"),
        StatusCode.INVALID_ARGUMENT,
        "UPSTREAM_REJECTED",
        metadata={"http_status": "400", "field": "chat.choice_count"},
        violated="chat.choice_count",
    ),
    "HTTP 422": Before(
        Script.error(422, "no", param="body.stop"),
        StatusCode.INVALID_ARGUMENT,
        "UPSTREAM_REJECTED",
        metadata={"field": "chat.sampling.stop"},
        violated="chat.sampling.stop",
    ),
    "in-band 400, bad regex": Before(
        Script.recording(TRANSCRIPTS / "err-bad-regex.sse"),
        StatusCode.INVALID_ARGUMENT,
        "UPSTREAM_REJECTED",
        metadata={"http_status": "400"},
    ),
    "in-band 400, too many logprobs": Before(
        Script.recording(TRANSCRIPTS / "err-top-logprobs-large.sse"),
        StatusCode.INVALID_ARGUMENT,
        "UPSTREAM_REJECTED",
        violated="chat.logprobs",
    ),
    "context too long": Before(
        Script.recording(TRANSCRIPTS / "err-prompt-too-long.body"),
        StatusCode.INVALID_ARGUMENT,
        "CONTEXT_LENGTH_EXCEEDED",
        metadata={"field": "chat.messages", "provider": "vllm"},
        violated="chat.messages",
    ),
    "vLLM's 404 on the model": Before(
        Script.recording(TRANSCRIPTS / "err-unknown-model.body"),
        StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        metadata={"model": "fake"},
    ),
    "in-band 404 on the model": Before(
        in_band(404, "gone", "NotFoundError", "model"),
        StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        metadata={"model": "fake"},
    ),
    "another 404": Before(
        Script.answer({"detail": "Not Found"}, status=404),
        StatusCode.FAILED_PRECONDITION,
        "PROVIDER_MISCONFIGURED",
        metadata={"http_status": "404"},
    ),
    "405": Before(
        Script.answer({"detail": "Method Not Allowed"}, status=405),
        StatusCode.FAILED_PRECONDITION,
        "PROVIDER_MISCONFIGURED",
    ),
    "a redirect": Before(
        Script.answer(b"", status=307, headers={"location": "/"}),
        StatusCode.FAILED_PRECONDITION,
        "PROVIDER_MISCONFIGURED",
    ),
    "401 for the operator's token": Before(
        Script.recording(TRANSCRIPTS / "auth-chat-none.body"),
        StatusCode.FAILED_PRECONDITION,
        "PROVIDER_MISCONFIGURED",
        metadata={"http_status": "401"},
        provider={"api_token": "operators"},
    ),
    "401 for the caller's token": Before(
        Script.recording(TRANSCRIPTS / "auth-chat-none.body"),
        StatusCode.UNAUTHENTICATED,
        "UPSTREAM_UNAUTHENTICATED",
        metadata={"http_status": "401"},
        token=True,
        provider={"api_token": "operators"},
    ),
    "403 for the caller's token": Before(
        Script.error(403, "no"), StatusCode.UNAUTHENTICATED, "UPSTREAM_UNAUTHENTICATED", token=True
    ),
    "429": Before(
        Script.error(429, "full"), StatusCode.RESOURCE_EXHAUSTED, "UPSTREAM_OVERLOADED", True, {"http_status": "429"}
    ),
    "not an event stream": Before(Script.answer({"choices": []}), StatusCode.INTERNAL, "UPSTREAM_MALFORMED"),
    "not JSON": Before(Script.chunks([b"data: {oops\n\n", DONE]), StatusCode.INTERNAL, "UPSTREAM_MALFORMED"),
    "not a chunk": Before(Script.chunks([b"data: []\n\n", DONE]), StatusCode.INTERNAL, "UPSTREAM_MALFORMED"),
    "[DONE] without a choice": Before(Script.chunks([DONE]), StatusCode.INTERNAL, "UPSTREAM_MALFORMED"),
    "an event without an end": Before(
        Script.chunks([b"data: " + b"x" * 5000]), StatusCode.UNAVAILABLE, "UPSTREAM_UNAVAILABLE", retry=True
    ),
    "an event that is too large": Before(
        Script.chunks([b"data: ", *[b"x" * 65536] * 20]),
        StatusCode.INTERNAL,
        "UPSTREAM_MALFORMED",
        stream={"max_event_bytes": 1024},
    ),
}


@pytest.mark.parametrize("row", BEFORE.values(), ids=BEFORE)
async def test_before_the_first_event(start_gateway: StartGateway, vllm: FakeVllm, row: Before) -> None:
    """A bare status: no message, no initial metadata, so that the call can be retried; Create fails alike."""
    vllm.play(row.script, row.script)
    metadata = (("x-request-id", "mine"), *((("x-vllm-api-token", "callers"),) if row.token else ()))
    async with start_gateway(provider=row.provider, server=row.server, stream=row.stream) as gateway:
        events, failure = await read_badly(gateway.stream(metadata=metadata))
        created = await failure_of(gateway.create(metadata=metadata))
    assert events == []
    for failed in (failure, created):
        assert failed.initial == {}
        assert (failed.code, failed.reason) == (row.code, row.reason)
        assert failed.fields == ([row.violated] if row.violated else [])
        assert (failed.retry_seconds is not None) is row.retry
        assert failed.metadata.items() >= {"request_id": "mine", "provider": "vllm", **row.metadata}.items()
        assert failed.resource == row.metadata.get("model")
        assert failed.message
        assert "callers" not in failed.message
    assert vllm.running == 0


@dataclass(frozen=True)
class After:
    """A failure after the first event.

    Attributes:
        pieces: What vLLM sends after it has begun.
        reason: The reason's name.
        stop_reason: Of the choice.
        end: How the answer ends, if not as HTTP asks.
        code: The call's status code.
        metadata: Of ErrorInfo, among others.
        settings: Of the gateway.
    """

    pieces: tuple[Any, ...]
    reason: str
    stop_reason: int
    end: Any = "clean"
    code: StatusCode = StatusCode.ABORTED
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


INCOMPLETE = ("UPSTREAM_INCOMPLETE", chat_pb.STOP_REASON_UPSTREAM_INCOMPLETE)
MALFORMED = ("UPSTREAM_MALFORMED", chat_pb.STOP_REASON_ERROR)
FAILED = ("UPSTREAM_ERROR", chat_pb.STOP_REASON_ERROR)

AFTER = {
    "closed": After((b"",), *INCOMPLETE, "eof"),
    "cut within a chunk": After((b"",), *INCOMPLETE, "cut"),
    "reset": After((b"",), *INCOMPLETE, "reset"),
    "ended without [DONE]": After((b"",), *INCOMPLETE, "no_done"),
    "[DONE] with an unfinished choice": After((DONE,), *INCOMPLETE),
    "an error event": After(
        (error_body(500, "oops", "InternalServerError"), DONE), *FAILED, metadata={"upstream_code": "500"}
    ),
    "a rejection": After((error_body(400, "no", "BadRequestError"), DONE), *FAILED, metadata={"upstream_code": "400"}),
    "finish reason error": After((CHUNKS.finish("error"), DONE), *FAILED),
    "not JSON": After((b"data: {oops\n\n", DONE), *MALFORMED),
    "a choice that was not asked for": After((CHUNKS.text("x", 5), DONE), *MALFORMED),
    "too many tool calls": After(
        (CHUNKS.call("a", "c0", 0), CHUNKS.call("a", "c1", 1), DONE),
        *MALFORMED,
        settings={"stream": {"max_tool_calls": 1}},
    ),
    "too long a tool call": After(
        (CHUNKS.call("a"), CHUNKS.arguments("x" * 2000), DONE),
        *MALFORMED,
        settings={"stream": {"max_tool_call_bytes": 1024}},
    ),
    "aborted": After((CHUNKS.finish("abort"), DONE), "UPSTREAM_ABORTED", chat_pb.STOP_REASON_UPSTREAM_INCOMPLETE),
    "silence": After(
        (asyncio.Event(),),
        "UPSTREAM_TIMEOUT",
        chat_pb.STOP_REASON_ERROR,
        metadata={"limit_seconds": "0.1"},
        settings={"provider": {"silence_timeout": 0.1}},
    ),
    "longer than any call may": After(
        (asyncio.Event(),),
        "DURATION_LIMIT_EXCEEDED",
        chat_pb.STOP_REASON_TIME_LIMIT,
        code=StatusCode.DEADLINE_EXCEEDED,
        metadata={"limit_seconds": "0.3"},
        settings={"server": {"max_duration": 0.3}},
    ),
}


@pytest.mark.parametrize("row", AFTER.values(), ids=AFTER)
async def test_after_the_first_event(start_gateway: StartGateway, vllm: FakeVllm, row: After) -> None:
    """What came is told to its end: `completed` with fault and usage; then the same as status. Create fails with it."""
    script = Script.chunks([*BEGUN, *(piece for piece in row.pieces if piece != b"")], end=row.end)
    if row.end != "clean":
        script = script.but(after=len(BEGUN))
    vllm.play(script, script)
    metadata = (("x-request-id", "mine"),)
    async with start_gateway(**row.settings) as gateway:
        events, failure = await read_badly(gateway.stream(metadata=metadata))
        created = await failure_of(gateway.create(metadata=metadata))
    held(events)
    assert text_of(events) == "begun"
    completed = events[-1].completed
    assert completed.choices[0].stop_reason == row.stop_reason
    assert not completed.choices[0].tool_calls_executable
    assert completed.usage.provenance == chat_pb.USAGE_PROVENANCE_LOWER_BOUND
    assert (completed.usage.prompt_tokens, completed.usage.completion_tokens) == (3, 2)
    assert completed.error.code == failure.code.value[0]
    assert error_reason_pb2.ErrorReason.Name(completed.error.reason) == f"ERROR_REASON_{failure.reason}"
    assert completed.error.message == failure.message
    assert failure.initial["x-request-id"] == "mine"
    assert created.initial == {}
    told = {
        "request_id": "mine",
        "provider": "vllm",
        "prompt_tokens": "3",
        "completion_tokens": "2",
        "usage_provenance": "LOWER_BOUND",
        **row.metadata,
    }
    for failed in (failure, created):
        assert (failed.code, failed.reason) == (row.code, row.reason)
        assert failed.retry_seconds is None
        assert failed.metadata.items() >= told.items()
    assert failure.metadata["completion_id"] == events[0].started.completion_id


@pytest.mark.parametrize(
    ("name", "end", "reason"),
    [
        ("fail-enginecore-sigkill", "clean", "UPSTREAM_ERROR"),
        ("fail-midstream-500-after-role", "clean", "UPSTREAM_ERROR"),
        ("fail-apiserver-sigkill", "cut", "UPSTREAM_INCOMPLETE"),
    ],
)
async def test_recorded_faults(served: Running, vllm: FakeVllm, name: str, end: Any, reason: str) -> None:  # noqa: ANN401
    """A real vLLM's deaths."""
    vllm.play(Script.recording(TRANSCRIPTS / f"{name}.sse", end=end))
    events, failure = await read_badly(served.stream())
    held(events)
    assert (failure.code, failure.reason) == (StatusCode.ABORTED, reason)


async def test_usage_without_any_figure_is_estimated(served: Running, vllm: FakeVllm) -> None:
    """The pieces of output are counted; of the prompt nothing is known."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.text("b"), DONE]))
    events, failure = await read_badly(served.stream())
    usage = events[-1].completed.usage
    assert (usage.provenance, usage.completion_tokens) == (chat_pb.USAGE_PROVENANCE_ESTIMATED, 2)
    assert not usage.HasField("prompt_tokens")
    assert failure.metadata["usage_provenance"] == "ESTIMATED"
    assert "prompt_tokens" not in failure.metadata


async def test_calls_of_a_cut_answer_are_told(served: Running, vllm: FakeVllm) -> None:
    """The call that was being written is TRUNCATED, with what the model said; a whole one before it is not to be executed."""
    pieces = [CHUNKS.role(), CHUNKS.call("get_weather", "c0"), CHUNKS.arguments("{}")]
    pieces += [CHUNKS.call("get_weather", "c1", 1), CHUNKS.arguments('{"ci', 1)]
    vllm.play(Script.chunks(pieces, after=5, end="eof"))
    events, failure = await read_badly(served.stream(ask(tools=[tool()])))
    held(events)
    (choice,) = events[-1].completed.choices
    assert [call.call_id for call in choice.message.tool_calls] == ["c0"]
    (failed,) = choice.failed_tool_calls
    assert failed.failure.reason == tool_pb2.TOOL_CALL_FAILURE_REASON_TRUNCATED
    assert failed.failure.raw_arguments == '{"ci'
    assert not choice.tool_calls_executable
    assert failure.reason == "UPSTREAM_INCOMPLETE"


async def test_an_answer_that_is_whole_does_not_fail_by_a_broken_connection(served: Running, vllm: FakeVllm) -> None:
    """Every choice has finished: what would have come after that is only `[DONE]`."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish(), b""], after=3, end="reset"))
    events = await read_well(served.stream())
    assert events[-1].completed.choices[0].stop_reason == chat_pb.STOP_REASON_END_OF_TURN


async def test_no_choices(served: Running, vllm: FakeVllm) -> None:
    """A chunk without choices begins nothing: an answer of nothing else is none."""
    vllm.play(Script.chunks([CHUNKS.usage(3, 0)]))
    events, failure = await read_badly(served.stream())
    assert events == []
    assert failure.reason == "UPSTREAM_MALFORMED"


async def test_a_refused_connection(served: Running, vllm: FakeVllm) -> None:
    """The model is known and the provider is gone: UNAVAILABLE with RetryInfo, without the address."""
    await read_well(served.stream())
    await vllm.crash()
    _, failure = await read_badly(served.stream())
    assert (failure.code, failure.reason) == (StatusCode.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")
    assert failure.retry_seconds == 1.0
    assert str(vllm.port) not in failure.message
    await vllm.start_listening()
    await read_well(served.stream())


async def test_a_provider_that_is_away_from_the_start(served: Running, vllm: FakeVllm) -> None:
    """No model can be looked up: that is its absence too, not NOT_FOUND."""
    await vllm.crash()
    _, failure = await read_badly(served.stream())
    assert (failure.code, failure.reason) == (StatusCode.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")


async def test_an_unknown_model(served: Running, vllm: FakeVllm) -> None:
    """NOT_FOUND with what there is, before anything is asked of vLLM's chat."""
    _, failure = await read_badly(served.stream(ask(model="gpt-5")))
    assert (failure.code, failure.reason) == (StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "fake" in failure.message
    assert (failure.metadata["model"], failure.resource) == ("gpt-5", "gpt-5")
    assert not vllm.chats


async def test_a_model_of_the_wrong_type(served: Running, vllm: FakeVllm) -> None:
    """An embedding model cannot chat."""
    await served.models.RegisterModel(
        model_registry_pb2.RegisterModelRequest(
            model_id="vectors",
            provider_model_id="fake",
            type=model_registry_pb2.MODEL_TYPE_EMBEDDING,
            embedding_dimension=1024,
        )
    )
    _, failure = await read_badly(served.stream(ask(model="vectors")))
    assert (failure.code, failure.reason) == (StatusCode.FAILED_PRECONDITION, "MODEL_WRONG_TYPE")
    assert failure.metadata.items() >= {"model": "vectors", "type": "EMBEDDING"}.items()
    assert not vllm.chats


async def test_too_many_streams(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """One more than the limit is refused with the limit in it, for Create too; when one ends there is room again."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with start_gateway(server={"max_streams": 1}) as gateway:
        first = gateway.stream()
        messages = aiter(first)
        await anext(messages)
        _, failure = await read_badly(gateway.stream())
        for failed in (failure, await failure_of(gateway.create())):
            assert (failed.code, failed.reason) == (StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
            assert (failed.retry_seconds, failed.quota) == (1.0, True)
            assert failed.metadata["limit"] == "1"
            assert failed.initial == {}
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
        await read_well(gateway.stream())
        vllm.play(Script.error(500, "no"))
        await read_badly(gateway.stream())
        await read_well(gateway.stream())


def size_of_headers(failure: Failure) -> int:
    """What the trailers take in the worst case: escaped, in base64, and counted as HTTP/2 counts."""
    size = len("grpc-message") + 32 + 3 * len(failure.message.encode())
    for key, value in failure.trailers.items():
        size += len(key) + 32 + (len(value) if isinstance(value, str) else len(value) * 4 // 3 + 4)
    return size


@pytest.mark.parametrize("character", ["x", "%", "\n", "é", "日", "\U0001f600"])
async def test_a_long_message_is_cut_to_what_trailers_hold(served: Running, vllm: FakeVllm, character: str) -> None:
    """The caller gets the real status, before and after the first event, whatever the alphabet."""
    message = character * 4000
    error = error_body(400, message, "BadRequestError", "stop")
    vllm.play(Script.answer(error, status=400), Script.chunks([error]), Script.chunks([*BEGUN, error]))
    for code in (StatusCode.INVALID_ARGUMENT, StatusCode.INVALID_ARGUMENT, StatusCode.ABORTED):
        _, failure = await read(served.stream(metadata=(("x-request-id", "r" * 128),)))
        assert failure is not None
        assert failure.code is code
        assert character * 50 in failure.message
        assert failure.message.endswith("…")
        assert len(failure.message.encode()) <= MAX_MESSAGE
        assert size_of_headers(failure) <= LIMIT_OF_HEADERS


@pytest.mark.parametrize("character", ["x", "日", "\U0001f600"])
async def test_many_violations_are_cut_to_what_trailers_hold(served: Running, character: str) -> None:
    """As many as fit; the first one always does."""
    tools = [tool(character * 400) for _ in range(100)]
    _, failure = await read_badly(served.stream(chat_pb.ChatRequest(messages=[user()] * 100, tools=tools)))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields[:2] == ["chat.messages[0].user", "chat.messages[1].user"]
    assert size_of_headers(failure) <= LIMIT_OF_HEADERS
