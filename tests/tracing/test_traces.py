"""The spans of calls, as a collector receives them: trees, attributes, ids that vLLM receives, and no content."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.errors import CallerError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.upstream.vllm_api import VllmApi
from tests.support.gateway import WAIT, Lines, ask, failure_of, read_badly, read_well, tool
from tests.tracing.conftest import VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway
    from tests.processes.conftest import StartWorker
    from tests.support.collector import Exported
    from tests.tracing.conftest import Traced

CHUNKS = Chunks()
CREATE = "deltawire.v1.ChatCompletion/CreateChatCompletion"
STREAM = "deltawire.v1.ChatCompletion/StreamChatCompletion"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "k=v"))
SECRET = "xylophone"
"""What is only in contents."""
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    """A second vLLM look-alike."""
    async with FakeVllm() as other:
        yield other


def sent_to(vllm: FakeVllm, number: int = 0) -> tuple[str, str]:
    """The trace and the span that a chat request to vLLM names as its parent."""
    _, trace, span, _ = vllm.chats[number].headers["traceparent"].split("-")
    return trace, span


def ids_of(span: Exported) -> tuple[str, str]:
    """Its trace and its own id."""
    return span.trace_id, span.span_id


async def test_the_tree_of_a_call_with_a_failed_attempt(
    start_gateway: StartGateway, vllm: FakeVllm, other: FakeVllm, traced: Traced, lines: Lines
) -> None:
    """One span for the call, below the caller's, and one for each attempt, which that replica's own spans belong to."""
    vllm.play(Script.error(503, f"busy with {SECRET}"))
    other.play(Script.chunks([CHUNKS.role(), CHUNKS.text(f"{SECRET} "), CHUNKS.text(SECRET), CHUNKS.finish()]))
    chat = ask(SECRET, model="vllm/fake", tools=[tool(SECRET, description=SECRET)])
    chat.sampling.temperature, chat.sampling.top_p, chat.sampling.max_tokens = 0.5, 0.25, 9
    async with traced() as collector, start_gateway(provider={"base_url": (vllm.base_url, other.base_url)}) as gateway:
        events = await read_well(gateway.stream(chat, metadata=METADATA))
    assert SECRET in events[-1].completed.choices[0].message.text
    call, failed, answered = collector.spans
    assert [span.trace_id for span in collector.spans] == [TRACE] * 3
    assert [span.parent_id for span in collector.spans] == [PARENT, call.span_id, call.span_id]
    assert [sent_to(vllm), sent_to(other)] == [ids_of(failed), ids_of(answered)]
    assert [chats.headers["tracestate"] for chats in (*vllm.chats, *other.chats)] == ["k=v", "k=v"]
    completion_id = events[0].started.completion_id
    entry = await lines.find("call")
    assert (call.name, call.span.kind, call.is_error) == (STREAM, call.span.SPAN_KIND_SERVER, False)
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": STREAM,
        "rpc.response.status_code": "OK",
        "deltawire.completion_id": completion_id,
        "deltawire.request_id": entry["request_id"],
        "deltawire.model": "vllm/fake",
        "deltawire.provider": "vllm",
        "deltawire.attempts": 2,
    }
    requested = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.max_tokens": 9,
        "server.address": "127.0.0.1",
        "deltawire.provider": "vllm",
        "deltawire.completion_id": completion_id,
    }
    assert (failed.name, failed.span.kind, failed.is_error) == ("chat fake", failed.span.SPAN_KIND_CLIENT, True)
    assert failed.attributes == requested | {
        "server.port": int(vllm.base_url.split(":")[2]),
        "deltawire.replica": f"{vllm.base_url}/v1",
        "error.type": "UPSTREAM_UNAVAILABLE",
    }
    assert not failed.span.events
    assert (answered.name, answered.is_error) == ("chat fake", False)
    attributes = answered.attributes
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert attributes == requested | {
        "server.port": int(other.base_url.split(":")[2]),
        "deltawire.replica": f"{other.base_url}/v1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.output_tokens": 2,
    }
    assert [event.name for event in answered.span.events] == ["first chunk"]
    assert (entry["trace_id"], entry["attempts"], entry["replica"]) == (TRACE, 2, f"{other.base_url}/v1")
    assert SECRET not in str(collector.requests)


async def test_the_resource(start_gateway: StartGateway, traced: Traced) -> None:
    """It identifies the gateway, its version, this process, and the worker if there are several."""
    async with traced(worker=3) as collector, start_gateway() as gateway:
        await gateway.create()
    resource = collector.spans[0].resource
    assert (resource["service.name"], resource["service.version"]) == ("deltawire", VERSION)
    assert resource["deltawire.worker"] == 3
    assert resource["service.instance.id"]


async def test_the_environment_has_precedence(
    start_gateway: StartGateway, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what the gateway reports about itself."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=one,team=blue")
    async with traced() as collector, start_gateway() as gateway:
        await gateway.create()
    resource = collector.spans[0].resource
    assert (resource["service.name"], resource["service.instance.id"], resource["team"]) == ("chat", "one", "blue")
    assert "deltawire.worker" not in resource


async def test_a_call_without_a_trace_begins_one(start_gateway: StartGateway, vllm: FakeVllm, traced: Traced) -> None:
    """VLLM's spans belong to it, and the log line names it."""
    async with traced() as collector, start_gateway() as gateway:
        await gateway.create()
    call, attempt = collector.spans
    assert (call.name, call.parent_id, attempt.parent_id) == (CREATE, "", call.span_id)
    assert sent_to(vllm) == ids_of(attempt)
    assert call.attributes["deltawire.model"] == "vllm/fake"


async def test_a_call_that_fails_at_every_replica(
    start_gateway: StartGateway, vllm: FakeVllm, other: FakeVllm, traced: Traced, lines: Lines
) -> None:
    """Each attempt has its own reason, and the call that of its status; the log line counts both."""
    vllm.play(Script.error(429, f"full of {SECRET}"))
    await other.crash()
    async with traced() as collector, start_gateway(provider={"base_url": (vllm.base_url, other.base_url)}) as gateway:
        failure = await failure_of(gateway.create())
    call, *attempts = collector.spans
    assert failure.reason == call.attributes["error.type"] == call.span.status.message == "UPSTREAM_UNAVAILABLE"
    assert (call.is_error, call.attributes["rpc.response.status_code"]) == (True, "UNAVAILABLE")
    assert [span.attributes["error.type"] for span in attempts] == ["UPSTREAM_OVERLOADED", "UPSTREAM_UNAVAILABLE"]
    assert all(span.is_error for span in attempts)
    entry = await lines.find("call")
    assert (entry["attempts"], entry["replica"], entry["level"]) == (2, f"{other.base_url}/v1", "warning")
    assert SECRET not in str(collector.requests)


async def test_a_callers_mistake(start_gateway: StartGateway, traced: Traced) -> None:
    """It has a reason, and is no error of the server; no replica is asked."""
    async with traced() as collector, start_gateway() as gateway:
        await failure_of(gateway.create(chat_pb.ChatRequest()))
        await failure_of(gateway.create(ask(model="unknown")))
    for call, (code, reason) in zip(
        collector.spans, [("INVALID_ARGUMENT", "INVALID_REQUEST"), ("NOT_FOUND", "MODEL_NOT_FOUND")], strict=True
    ):
        assert (call.attributes["rpc.response.status_code"], call.attributes["error.type"]) == (code, reason)
        assert not call.is_error


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_its_caller_cancels(
    start_gateway: StartGateway, vllm: FakeVllm, traced: Traced, lines: Lines, *, begun: bool
) -> None:
    """Neither span is an error, and both are exported, whether the answer has begun or not."""
    vllm.play(Script.chunks([*([CHUNKS.role(), CHUNKS.text("a")] if begun else []), asyncio.Event()]))
    async with traced() as collector, start_gateway() as gateway:
        call = gateway.stream()
        if begun:
            await anext(aiter(call))
        chat = await vllm.received()
        call.cancel()
        await asyncio.wait_for(chat.closed_early.wait(), WAIT)
        await lines.find("call", attempts=1, replica=f"{vllm.base_url}/v1")
    call_span, attempt = collector.spans
    assert (call_span.attributes["error.type"], call_span.is_error) == ("CANCELLED", False)
    assert (attempt.attributes["error.type"], attempt.is_error) == ("canceled", False)
    assert len(attempt.span.events) == begun


async def test_an_answer_that_breaks_off(start_gateway: StartGateway, vllm: FakeVllm, traced: Traced) -> None:
    """The attempt has its usage so far and the reason; ABORTED is no error of a server, by the conventions."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.text("b")], end="cut"))
    async with traced() as collector, start_gateway() as gateway:
        _, failure = await read_badly(gateway.stream())
    call, attempt = collector.spans
    assert failure.reason == call.attributes["error.type"] == attempt.attributes["error.type"] == "UPSTREAM_INCOMPLETE"
    assert (call.is_error, attempt.is_error) == (False, True)
    assert attempt.attributes["gen_ai.usage.output_tokens"] == 2
    assert "gen_ai.response.finish_reasons" not in attempt.attributes


async def test_a_time_limit_before_the_first_event(
    start_gateway: StartGateway, vllm: FakeVllm, traced: Traced, lines: Lines
) -> None:
    """The attempt ends with the reason of its completion, and counts."""
    vllm.play(Script.chunks([asyncio.Event()]))
    async with traced() as collector, start_gateway(server={"max_duration": 1}) as gateway:
        await failure_of(gateway.create())
    call, attempt = collector.spans
    assert call.attributes["error.type"] == attempt.attributes["error.type"] == "DURATION_LIMIT_EXCEEDED"
    assert (call.is_error, attempt.is_error) == (True, True)
    assert (await lines.find("call"))["attempts"] == 1


async def test_a_token_count(start_gateway: StartGateway, vllm: FakeVllm, traced: Traced) -> None:
    """It is an attempt too."""
    async with traced() as collector, start_gateway() as gateway:
        request = chat_pb.CountTokensRequest(chat=ask(SECRET))
        count = await gateway.chat.CountTokens(request, metadata=METADATA)
    call, attempt = collector.spans
    assert (attempt.name, attempt.parent_id) == ("count_tokens fake", call.span_id)
    assert attempt.attributes["gen_ai.usage.input_tokens"] == count.prompt_tokens
    (sent,) = (request for request in vllm.requests if request.path == "/tokenize")
    assert sent.headers["traceparent"] == f"00-{TRACE}-{attempt.span_id}-01"
    assert SECRET not in str(collector.requests)


async def test_a_resumed_stream(start_gateway: StartGateway, vllm: FakeVllm, traced: Traced) -> None:
    """The attempt belongs to the call that began the completion; a later call has a trace of its own and a link to that one."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
    async with traced() as collector, start_gateway() as gateway:
        first = gateway.stream(options=KEPT)
        completion_id = (await anext(aiter(first))).started.completion_id
        first.cancel()
        resumed = gateway.resume(completion_id)
        await anext(aiter(resumed))
        gate.set()
        await read_well(resumed)
    begun, attempt, again = collector.spans
    assert (attempt.parent_id, begun.parent_id, again.parent_id) == (begun.span_id, "", "")
    assert again.trace_id != begun.trace_id
    assert [(link.trace_id, link.span_id) for link in again.span.links] == [(begun.span.trace_id, begun.span.span_id)]
    assert not begun.span.links
    assert attempt.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert {span.attributes["deltawire.completion_id"] for span in collector.spans} == {completion_id}


async def test_a_retry_that_joins_a_completion(start_gateway: StartGateway, traced: Traced) -> None:
    """One attempt for both calls; the second one has a link to the first."""
    async with traced() as collector, start_gateway() as gateway:
        chat = ask(completion_id="mine")
        for _ in range(2):
            await read_well(gateway.stream(chat, options=KEPT))
    begun, attempt, again = collector.spans
    assert attempt.parent_id == begun.span_id
    assert [link.span_id for link in again.span.links] == [begun.span.span_id]


async def test_a_call_that_is_passed_on(start_worker: StartWorker, vllm: FakeVllm, traced: Traced) -> None:
    """The worker that has the completion has a span below that of the worker that was called; the trace goes on to vLLM."""
    async with traced() as collector, start_worker(0) as one, start_worker(1) as two:
        for worker in (one, two):
            await worker.create(ask(completion_id="mine"), metadata=METADATA)
    passed = {
        span.attributes["deltawire.passed_to"]: span
        for span in collector.spans
        if "deltawire.passed_to" in span.attributes
    }
    ((number, outer),) = passed.items()
    inner = next(span for span in collector.spans if span.parent_id == outer.span_id)
    assert (outer.name, inner.name, outer.parent_id) == (CREATE, CREATE, PARENT)
    assert number in (0, 1)
    assert {span.trace_id for span in collector.spans} == {TRACE}
    for attempt in (span for span in collector.spans if span.name == "chat fake"):
        assert attempt.parent_id != outer.span_id
        assert ids_of(attempt) in {sent_to(vllm, place) for place in range(len(vllm.chats))}


@pytest.mark.parametrize("why", ["the caller's flag", "the sampler"])
async def test_what_is_not_sampled(
    start_gateway: StartGateway, vllm: FakeVllm, traced: Traced, lines: Lines, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Nothing is exported, and vLLM learns it too; the log line still has the trace."""
    metadata: tuple[tuple[str, str], ...] = ()
    if why == "the sampler":
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    else:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
    async with traced() as collector, start_gateway() as gateway:
        await read_well(gateway.stream(metadata=metadata))
    assert not collector.requests
    _, trace, span, flags = vllm.chats[0].headers["traceparent"].split("-")
    assert not int(flags, 16) & 1
    assert span != PARENT
    assert (await lines.find("call"))["trace_id"] == trace
    assert trace == TRACE or why == "the sampler"


async def test_calls_of_the_registry_have_spans_and_health_has_none(
    start_gateway: StartGateway, traced: Traced
) -> None:
    """Without attempts: what the registry asks of providers serves many calls."""
    async with traced() as collector, start_gateway() as gateway:
        await gateway.models.ListProviders(model_registry_pb2.ListProvidersRequest())
    assert [span.name for span in collector.spans] == ["deltawire.v1.ModelRegistry/ListProviders"]


async def test_without_exported_traces_the_callers_context_goes_on(
    start_gateway: StartGateway, vllm: FakeVllm, lines: Lines
) -> None:
    """Unchanged; the log line has its trace, or none."""
    async with start_gateway() as gateway:
        await gateway.create(metadata=METADATA)
        await gateway.create()
    headers = vllm.chats[0].headers
    assert (headers["traceparent"], headers["tracestate"]) == (METADATA[0][1], METADATA[1][1])
    assert "traceparent" not in vllm.chats[1].headers
    assert (await lines.find("call"))["trace_id"] == TRACE
    await lines.find("call", trace_id=None)


@pytest.mark.parametrize(
    ("end", "expected"), [("cancel", "canceled"), ("defect", "INTERNAL"), ("refusal", "UPSTREAM_REJECTED")]
)
async def test_a_token_count_that_fails(
    start_gateway: StartGateway,
    traced: Traced,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    expected: str,
) -> None:
    """Its attempt ends with the reason, however it ends."""
    asked = asyncio.Event()

    async def count(*_: object, **__: object) -> None:
        asked.set()
        if end == "cancel":
            await asyncio.Event().wait()
        raise ZeroDivisionError if end == "defect" else CallerError(Reason.UPSTREAM_REJECTED, SECRET)

    monkeypatch.setattr(VllmApi, "count", count)
    async with traced() as collector, start_gateway() as gateway:
        call = gateway.chat.CountTokens(chat_pb.CountTokensRequest(chat=ask()))
        await asked.wait()
        if end == "cancel":
            call.cancel()
        else:
            await failure_of(call)
        await lines.find("call")
    attempt = collector.spans[1]
    assert (attempt.attributes["error.type"], attempt.is_error) == (expected, end != "cancel")
    assert SECRET not in str(collector.requests)
