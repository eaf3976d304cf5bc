"""Checks of a server that has only an address: the promises that every server of deltawire.v1 keeps, with any model.

    python -m tests.conformance.server_checks --target HOST:PORT [--key KEY] [--model MODEL] [--case PREFIX]

A check is an async function with the name of its group first; its docstring is the promise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc, model_registry_pb2_grpc, tool_pb2
from deltawire.v1 import model_registry_pb2 as registry_pb
from tests.conformance.client_driver import Outcome
from tests.conformance.fold import fold
from tests.support.contract import ContractError, Ending, check_stream, check_whole
from tests.support.gateway import Failure, ask, failure_of, taken_apart, tool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Check = Callable[["Server"], Awaitable[None]]

LIMIT: Final = 120.0
"""Seconds for one check; a small model on a CPU needs a few for each answer."""
CONNECT_LIMIT: Final = 10.0
"""Seconds until a server must answer at all."""
RETENTION: Final = 60
_SERVICES: Final = ("deltawire.v1.ChatCompletion", "deltawire.v1.ModelRegistry")
_CHECKS: Final[dict[str, Check]] = {}
_GENEROUS: Final = 2000


@dataclass(frozen=True)
class Server:
    """The server that is checked, by stubs of its services on one channel."""

    channel: aio.Channel
    metadata: tuple[tuple[str, str], ...]
    model: str

    @property
    def chat(self) -> chat_completion_pb2_grpc.ChatCompletionAsyncStub:
        """The ChatCompletion service."""
        return chat_completion_pb2_grpc.ChatCompletionStub(self.channel)

    @property
    def models(self) -> model_registry_pb2_grpc.ModelRegistryAsyncStub:
        """The ModelRegistry service."""
        return model_registry_pb2_grpc.ModelRegistryStub(self.channel)

    def ask(self, text: str = "Say hello.", tokens: int = 16, **fields: Any) -> chat_pb.ChatRequest:  # noqa: ANN401
        """A greedy request, with other fields of its message."""
        sampling = chat_pb.Sampling(temperature=0, max_tokens=tokens)
        return ask(text, **{"model": self.model, "sampling": sampling, **fields})

    def ask_long(self, completion_id: str) -> chat_pb.ChatRequest:
        """A request whose answer takes its time."""
        sampling = chat_pb.Sampling(temperature=0, max_tokens=_GENEROUS, ignore_eos=True)
        return self.ask("Count from 1 to 10000.", completion_id=completion_id, sampling=sampling)

    def open(self, request: chat_pb.StreamChatCompletionRequest, *more: tuple[str, str]) -> Any:  # noqa: ANN401
        """Begin a stream."""
        return self.chat.StreamChatCompletion(request, metadata=(*self.metadata, *more))

    async def stream(
        self, chat: chat_pb.ChatRequest, options: chat_pb.StreamOptions | None = None
    ) -> list[chat_pb.StreamChatCompletionResponse]:
        """The events of a stream that must end well, checked against the contract."""
        return await self.read(chat_pb.StreamChatCompletionRequest(chat=chat, options=options))

    async def read(self, request: chat_pb.StreamChatCompletionRequest) -> list[chat_pb.StreamChatCompletionResponse]:
        """The same for any request."""
        return await _rest(self.open(request), request)

    async def create(self, chat: chat_pb.ChatRequest) -> chat_pb.CreateChatCompletionResponse:
        """The answer to a unary request, checked against the contract."""
        request = chat_pb.CreateChatCompletionRequest(chat=chat)
        response = await self.chat.CreateChatCompletion(request, metadata=self.metadata)
        check_whole(request, response, Ending())
        return response

    async def get(self, completion_id: str) -> chat_pb.GetChatCompletionResponse:
        """Look a completion up."""
        request = chat_pb.GetChatCompletionRequest(completion_id=completion_id)
        return await self.chat.GetChatCompletion(request, metadata=self.metadata)

    async def cancel(self, completion_id: str) -> chat_pb.CancelChatCompletionResponse:
        """Cancel a completion softly."""
        request = chat_pb.CancelChatCompletionRequest(completion_id=completion_id)
        return await self.chat.CancelChatCompletion(request, metadata=self.metadata)

    async def list_models(self, page_size: int = 0) -> list[registry_pb.Model]:
        """All models, page by page."""
        models: list[registry_pb.Model] = []
        token = ""
        while True:
            request = registry_pb.ListModelsRequest(page_size=page_size, page_token=token)
            page = await self.models.ListModels(request, metadata=self.metadata)
            assert not page_size or len(page.models) <= page_size
            models += page.models
            token = page.next_page_token
            if not token:
                return models

    async def refused(self, call: Awaitable[object], code: grpc.StatusCode, reason: str, *fields: str) -> None:
        """A call must fail like this."""
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (code, reason), failure
        assert tuple(failure.fields) == fields, failure.fields


def check(function: Check) -> Check:
    """Add a check."""
    _CHECKS[function.__name__.replace("_", "/", 1).replace("_", "-")] = function
    return function


async def _rest(
    call: Any,  # noqa: ANN401
    request: chat_pb.StreamChatCompletionRequest,
    read: Sequence[chat_pb.StreamChatCompletionResponse] = (),
) -> list[chat_pb.StreamChatCompletionResponse]:
    """All events of a stream, some of which have been read; it must end well and keep the contract."""
    events = [*read, *[event async for event in call]]
    check_stream(request, events, Ending(await _name(call)))
    return events


async def _name(call: Any) -> str:  # noqa: ANN401
    name: str = (await call.code()).name
    return name


async def _until_text(call: Any) -> list[chat_pb.StreamChatCompletionResponse]:  # noqa: ANN401
    """The events up to the first text."""
    events = []
    async for event in call:
        events.append(event)
        if event.HasField("text_delta") or event.HasField("reasoning_delta"):
            return events
    raise AssertionError("the answer has no text")


def _new_id() -> str:
    return f"conformance-{uuid.uuid4().hex}"


def _final(events: Sequence[chat_pb.StreamChatCompletionResponse]) -> chat_pb.Completed:
    assert events, "the stream has no events"
    return events[-1].completed


def _same(
    one: Sequence[chat_pb.StreamChatCompletionResponse], other: Sequence[chat_pb.StreamChatCompletionResponse]
) -> None:
    first, second = ([event for event in events if not event.HasField("heartbeat")] for events in (one, other))
    assert first == second


# --- Streams ---------------------------------------------------------------------------------------------------------


@check
async def stream_contract(server: Server) -> None:
    """A stream keeps the nine rules of the contract, and its deltas add up to the messages of completed."""
    events = await server.stream(server.ask())
    stated = fold(events)
    assert stated.choices, "the answer has no choice"
    assert stated.choices[0].message == _final(events).choices[0].message


@check
async def stream_options(server: Server) -> None:
    """Usage updates are cumulative; heartbeats and held-back deltas change no text."""
    plain = await server.stream(server.ask())
    request = chat_pb.StreamOptions(usage_updates=True, early_heartbeats=True)
    request.heartbeat_interval.FromMilliseconds(100)
    request.max_coalesce_delay.FromMilliseconds(500)
    asked = chat_pb.StreamChatCompletionRequest(chat=server.ask(), options=request)
    events = await server.read(asked)
    counts = [event.usage_update.usage.completion_tokens for event in events if event.HasField("usage_update")]
    assert counts == sorted(counts)
    assert [each.message for each in fold(events).choices] == [each.message for each in fold(plain).choices]


@check
async def stream_tool_call(server: Server) -> None:
    """A tool call that must come has one verdict, assembled or incremental."""
    for streaming in (chat_pb.TOOL_CALL_STREAMING_ASSEMBLED, chat_pb.TOOL_CALL_STREAMING_INCREMENTAL):
        chat = server.ask(
            "What is the weather in Oslo?",
            tokens=200,
            tools=[tool(strict=True)],
            tool_choice=tool_pb2.ToolChoice(mode=tool_pb2.ToolChoice.MODE_REQUIRED),
            tool_call_policy=chat_pb.ToolCallPolicy(streaming=streaming),
        )
        events = await server.stream(chat)
        (choice,) = fold(events).choices
        assert choice.message.tool_calls or choice.failed_tool_calls, "no verdict came"
        assert choice.tool_calls_executable == _final(events).choices[0].tool_calls_executable


@check
async def stream_out_of_tokens(server: Server) -> None:
    """An answer that reaches max_tokens says so, and counts its tokens."""
    sampling = chat_pb.Sampling(temperature=0, max_tokens=3, ignore_eos=True)
    events = await server.stream(server.ask("Count from 1 to 100.", sampling=sampling))
    assert _final(events).choices[0].stop_reason == chat_pb.STOP_REASON_OUT_OF_TOKENS
    assert _final(events).usage.completion_tokens == 3


@check
async def stream_logprobs(server: Server) -> None:
    """Log-probabilities come only if they are asked for, with at most as many alternatives as asked for."""
    for top_k, chat in ((2, server.ask(logprobs=chat_pb.Logprobs(top_k=2))), (-1, server.ask())):
        deltas = [event.text_delta for event in await server.stream(chat)]
        assert all(len(each.alternatives) <= top_k for delta in deltas for each in delta.logprobs)


@check
async def stream_request_id(server: Server) -> None:
    """The request id is that of the caller, in the initial metadata."""
    call = server.open(chat_pb.StreamChatCompletionRequest(chat=server.ask()), ("x-request-id", "conformance 1"))
    assert [event async for event in call]
    assert dict(await call.initial_metadata())["x-request-id"] == "conformance 1"


@check
async def stream_soft_time_limit(server: Server) -> None:
    """A soft time limit ends an answer normally, with its text and its usage."""
    chat = server.ask_long(_new_id())
    chat.soft_time_limit.FromMilliseconds(1500)
    completed = _final(await server.stream(chat))
    assert not completed.choices or completed.choices[0].stop_reason == chat_pb.STOP_REASON_TIME_LIMIT


@check
async def create_equals_stream(server: Server) -> None:
    """CreateChatCompletion gives a greedy request the answer that the stream has."""
    whole = await server.create(server.ask())
    streamed = _final(await server.stream(server.ask()))
    for choice in (*whole.completed.choices, *streamed.choices):
        choice.ClearField("logprobs")
    assert list(whole.completed.choices) == list(streamed.choices)
    assert whole.completed.usage.completion_tokens == streamed.usage.completion_tokens
    assert whole.started.model


@check
async def create_counts_tokens(server: Server) -> None:
    """CountTokens gives the prompt's tokens as the usage has them, or says that the engine cannot."""
    prompt = server.ask()
    prompt.ClearField("sampling")
    call = server.chat.CountTokens(chat_pb.CountTokensRequest(chat=prompt), metadata=server.metadata)
    if await _name(call) != "OK":
        await server.refused(call, grpc.StatusCode.UNIMPLEMENTED, "ENDPOINT_NOT_SUPPORTED")
        return
    counted = await call
    usage = (await server.create(server.ask())).completed.usage
    assert counted.prompt_tokens == usage.prompt_tokens


# --- Errors ----------------------------------------------------------------------------------------------------------


def _bad_requests(server: Server) -> Mapping[str, tuple[chat_pb.StreamChatCompletionRequest, tuple[str, ...]]]:
    """Requests that no server may accept, and the fields to blame, by what is wrong."""

    def chat(*fields: str, options: chat_pb.StreamOptions | None = None, **values: Any) -> Any:  # noqa: ANN401
        asked = ask("hi", **{"model": server.model, **values})
        return chat_pb.StreamChatCompletionRequest(chat=asked, options=options), fields

    def options(field: str, **values: Any) -> Any:  # noqa: ANN401
        return chat(f"options.{field}", options=chat_pb.StreamOptions(**values))

    point = chat_pb.ResumePoint
    stream = chat_pb.StreamChatCompletionRequest
    both = stream(resume=point(completion_id="c"), options=chat_pb.StreamOptions(usage_updates=True))
    return {
        "nothing": (stream(), ("start",)),
        "no messages": chat("chat.messages", messages=[]),
        "a message without a role": chat("chat.messages[0]", messages=[{}]),
        "a message without content": chat("chat.messages[0].user", messages=[{"user": {}}]),
        "a tool without a name": chat("chat.tools[0].name", tools=[tool("")]),
        "two tools of one name": chat("chat.tools[1].name", tools=[tool("a"), tool("a")]),
        "a schema that is no object": chat("chat.tools[0].input_schema", tools=[tool("a", input_schema="[]")]),
        "a choice of no tool": chat(
            "chat.tool_choice.tool_name", tool_choice=tool_pb2.ToolChoice(tool_name="b"), tools=[tool("a")]
        ),
        "an allowed tool that is not there": chat("chat.allowed_tools[0]", tools=[tool("a")], allowed_tools=["b"]),
        "min_tokens below 0": chat("chat.sampling.min_tokens", sampling=chat_pb.Sampling(min_tokens=-1)),
        "choice_count below 0": chat("chat.choice_count", choice_count=-1),
        "a completion id with a slash": chat("chat.completion_id", completion_id="a/b"),
        "no time": chat("chat.soft_time_limit", soft_time_limit={}),
        "two fields": chat("chat.messages", "chat.completion_id", messages=[], completion_id="a/b"),
        "a heartbeat every 10 ms": options("heartbeat_interval", heartbeat_interval={"nanos": 10_000_000}),
        "a delay of 11 s": options("max_coalesce_delay", max_coalesce_delay={"seconds": 11}),
        "a retention of half a second": options("retention", retention={"nanos": 500_000_000}),
        "a resume without an id": (stream(resume=point()), ("resume.completion_id",)),
        "a resume after -1": (stream(resume=point(completion_id="c", last_sequence=-1)), ("resume.last_sequence",)),
        "a resume with options": (both, ("options",)),
    }


@check
async def errors_invalid_requests(server: Server) -> None:
    """A request that breaks a rule is INVALID_REQUEST, with every field, before anything was sent."""
    wrong = []
    for name, (request, fields) in _bad_requests(server).items():
        failure = await _stream_failure(server, request)
        if (failure.code, failure.reason, tuple(failure.fields)) != (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            fields,
        ):
            wrong.append(f"{name}: {failure.code.name} {failure.reason} {failure.fields}, expected {fields}")
        if failure.initial:
            wrong.append(f"{name}: initial metadata came before the failure")
    assert not wrong, "\n".join(wrong)


async def _stream_failure(server: Server, request: chat_pb.StreamChatCompletionRequest) -> Failure:
    try:
        events = [event async for event in server.open(request)]
    except aio.AioRpcError as error:
        return taken_apart(error)
    raise AssertionError(f"the call did not fail: {events}")


@check
async def errors_unknown_model(server: Server) -> None:
    """A model that does not exist is MODEL_NOT_FOUND, in both methods."""
    chat = ask(model="conformance/no-such-model")
    failure = await _stream_failure(server, chat_pb.StreamChatCompletionRequest(chat=chat))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"), failure
    await server.refused(server.create(chat), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


@check
async def errors_unknown_completion(server: Server) -> None:
    """An id without a completion is COMPLETION_NOT_FOUND, for each call about a completion."""
    for call in (server.get(_new_id()), server.cancel(_new_id())):
        await server.refused(call, grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
    resume = chat_pb.StreamChatCompletionRequest(resume=chat_pb.ResumePoint(completion_id=_new_id()))
    failure = await _stream_failure(server, resume)
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND"), failure


@check
async def errors_compressed_request(server: Server) -> None:
    """A compressed request is UNIMPLEMENTED."""
    request = chat_pb.CreateChatCompletionRequest(chat=server.ask("hello " * 1000))
    call = server.chat.CreateChatCompletion(request, metadata=server.metadata, compression=grpc.Compression.Gzip)
    with contextlib.suppress(aio.AioRpcError):
        await call
    assert await _name(call) == "UNIMPLEMENTED"


# --- Cancel and lookup -----------------------------------------------------------------------------------------------


@check
async def cancel_softly(server: Server) -> None:
    """A soft cancel ends an answer normally: its text, CANCELLED, its usage, status OK. A second one has no effect."""
    request = chat_pb.StreamChatCompletionRequest(chat=server.ask_long(_new_id()))
    call = server.open(request)
    events = await _until_text(call)
    completion_id = request.chat.completion_id
    assert (await server.get(completion_id)).state == chat_pb.COMPLETION_STATE_RUNNING
    assert (await server.cancel(completion_id)).state == chat_pb.COMPLETION_STATE_RUNNING
    completed = _final(await _rest(call, request, events))
    assert completed.choices[0].stop_reason == chat_pb.STOP_REASON_CANCELLED
    assert not completed.choices[0].tool_calls_executable
    assert (await server.get(completion_id)).state == chat_pb.COMPLETION_STATE_COMPLETED
    assert (await server.cancel(completion_id)).state == chat_pb.COMPLETION_STATE_COMPLETED


@check
async def cancel_hard(server: Server) -> None:
    """A canceled call ends the completion: it has FAILED, with code CANCELLED and its usage."""
    chat = server.ask_long(_new_id())
    call = server.open(chat_pb.StreamChatCompletionRequest(chat=chat))
    await _until_text(call)
    call.cancel()
    found = await server.get(chat.completion_id)
    while found.state == chat_pb.COMPLETION_STATE_RUNNING:
        await asyncio.sleep(0.05)
        found = await server.get(chat.completion_id)
    assert found.state == chat_pb.COMPLETION_STATE_FAILED
    assert found.error.code == grpc.StatusCode.CANCELLED.value[0]
    assert found.usage.provenance


@check
async def lookup_ended(server: Server) -> None:
    """A completion that has ended is found and listed, with the usage of its stream."""
    chat = server.ask(completion_id=_new_id())
    completed = _final(await server.stream(chat))
    found = await server.get(chat.completion_id)
    assert (found.completion_id, found.state) == (chat.completion_id, chat_pb.COMPLETION_STATE_COMPLETED)
    assert found.usage == completed.usage
    listed = await server.chat.ListChatCompletions(
        chat_pb.ListChatCompletionsRequest(page_size=1), metadata=server.metadata
    )
    assert len(listed.completions) == 1
    assert not listed.completions[0].completion_id or listed.completions[0].state


# --- Resume ----------------------------------------------------------------------------------------------------------


@check
async def resume_after_a_cut(server: Server) -> None:
    """A retained stream goes on after any event: together its parts are the answer, and a replay is the same."""
    chat = server.ask("Count from 1 to 20.", tokens=40, completion_id=_new_id())
    request = chat_pb.StreamChatCompletionRequest(chat=chat)
    request.options.retention.FromSeconds(RETENTION)
    call = server.open(request)
    events = await _until_text(call)
    call.cancel()
    point = chat_pb.ResumePoint(completion_id=chat.completion_id, last_sequence=events[-1].sequence)
    resumed = await server.read(chat_pb.StreamChatCompletionRequest(resume=point))
    check_stream(request, [*events, *resumed], Ending())
    point.ClearField("last_sequence")
    _same(await server.read(chat_pb.StreamChatCompletionRequest(resume=point)), [*events, *resumed])
    point.last_sequence = resumed[-1].sequence
    assert await server.read(chat_pb.StreamChatCompletionRequest(resume=point)) == []
    assert (await server.get(chat.completion_id)).completed == resumed[-1].completed


@check
async def resume_equal_request(server: Server) -> None:
    """An equal request with the id of a retained stream gets the same generation; another one is refused."""
    chat = server.ask(completion_id=_new_id())
    options = chat_pb.StreamOptions()
    options.retention.FromSeconds(RETENTION)
    _same(await server.stream(chat, options), await server.stream(chat, options))
    other = chat_pb.StreamChatCompletionRequest(chat=server.ask("Another.", completion_id=chat.completion_id))
    failure = await _stream_failure(server, other)
    assert (failure.code, failure.reason) == (grpc.StatusCode.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS"), failure


# --- Models ----------------------------------------------------------------------------------------------------------


@check
async def models_list_and_get(server: Server) -> None:
    """Models are listed by ascending id, in pages of any size, and each can be read."""
    models = await server.list_models()
    assert models, "there are no models"
    assert [model.id for model in models] == sorted(model.id for model in models)
    assert [model.id for model in await server.list_models(page_size=1)] == [model.id for model in models]
    found = await server.models.GetModel(registry_pb.GetModelRequest(model_id=models[0].id), metadata=server.metadata)
    assert found.model.id == models[0].id
    unknown = registry_pb.GetModelRequest(model_id="conformance/no-such-model")
    call = server.models.GetModel(unknown, metadata=server.metadata)
    await server.refused(call, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


@check
async def models_watch(server: Server) -> None:
    """A watch has a snapshot of all models and a bookmark; from its revision another one goes on without a snapshot."""
    listed = [model.id for model in await server.list_models()]
    for batch in (False, True):
        ids, revision = await _until_bookmark(server, registry_pb.WatchModelsRequest(batch_snapshot=batch))
        assert ids == listed
        assert revision
        missed, _ = await _until_bookmark(server, registry_pb.WatchModelsRequest(revision=revision))
        assert missed == []
    unknown = registry_pb.WatchModelsRequest(revision="no-such-revision")
    call = server.models.WatchModels(unknown, metadata=server.metadata)
    await server.refused(call.read(), grpc.StatusCode.OUT_OF_RANGE, "REVISION_GONE")


async def _until_bookmark(server: Server, request: registry_pb.WatchModelsRequest) -> tuple[list[str], str]:
    """The ids of the models in a watch up to its first bookmark, and the bookmark's revision."""
    ids: list[str] = []
    call = server.models.WatchModels(request, metadata=server.metadata)
    async for event in call:
        if event.bookmark:
            call.cancel()
            return ids, event.revision
        ids += [model.id for model in event.models] or [event.model.id]
    raise AssertionError("the watch ended before its bookmark")


@check
async def models_providers(server: Server) -> None:
    """Providers are listed, and each has a health."""
    listed = await server.models.ListProviders(registry_pb.ListProvidersRequest(), metadata=server.metadata)
    assert listed.providers, "there are no providers"
    for provider in listed.providers:
        request = registry_pb.CheckProviderHealthRequest(provider_id=provider.id)
        assert (await server.models.CheckProviderHealth(request, metadata=server.metadata)).status


# --- Health and reflection -------------------------------------------------------------------------------------------


@check
async def standard_health(server: Server) -> None:
    """The standard health service knows the server and each of its services."""
    stub = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", *_SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), metadata=server.metadata)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


@check
async def standard_reflection(server: Server) -> None:
    """Reflection lists the services, and has their files."""
    reflect = server.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service) for service in _SERVICES),
    ]
    listed, *files = [answer async for answer in reflect(iter(asked), metadata=server.metadata)]
    assert set(_SERVICES) <= {service.name for service in listed.list_services_response.service}
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in files)


# --- Running them ----------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The names of all checks."""
    return list(_CHECKS)


async def run(
    target: str, key: str = "", model: str = "", prefix: str = "", credentials: grpc.ChannelCredentials | None = None
) -> list[Outcome]:
    """Run the checks whose names begin with a prefix, one after another.

    Args:
        target: "host:port".
        key: The caller's access key; "" for none.
        model: The model to ask; "" if the server has exactly one.
        prefix: Of the names of checks.
        credentials: For TLS; `None` for plaintext.

    Raises:
        ConnectionError: No gRPC server answers there.
    """
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    outcomes = []
    async with aio.secure_channel(target, credentials) if credentials else aio.insecure_channel(target) as channel:
        try:
            async with asyncio.timeout(CONNECT_LIMIT):
                await channel.channel_ready()
        except TimeoutError:
            message = f"no gRPC server answers at {target} within {CONNECT_LIMIT:g} s: check the address, and --tls"
            raise ConnectionError(message) from None
        server = Server(channel, metadata, model)
        for name, function in _CHECKS.items():
            if name.startswith(prefix):
                outcomes.append(Outcome(name, await _difference(function, server)))
    return outcomes


async def _difference(function: Check, server: Server) -> str:
    """What is wrong, or ""."""
    try:
        async with asyncio.timeout(LIMIT):
            await function(server)
    except ContractError as error:
        wrong = str(error)
    except AssertionError as error:
        wrong = str(error) or f"not so: {_source(error)}"
    except aio.AioRpcError as error:
        wrong = f"the call failed: {error.code().name}: {error.details()}"
    except TimeoutError:
        wrong = f"not done after {LIMIT:g} s"
    except ValueError as error:
        wrong = f"the answer breaks the contract: {error}"
    else:
        return ""
    return f"{function.__doc__}\n{wrong}"


def _source(error: BaseException) -> str:
    """The statement of this file that failed, and where it stands."""
    stack = traceback.extract_tb(error.__traceback__)
    last = next(frame for frame in reversed(stack) if frame.filename == __file__)
    return f"{last.line} (server_checks.py, line {last.lineno})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a server. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.server_checks", description="Check a server")
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="the address of the server")
    parser.add_argument("--key", default="", help="the access key; needs the permissions call and read")
    parser.add_argument("--model", default="", help="the model to ask; by default the only one")
    parser.add_argument("--tls", action="store_true", help="connect with TLS")
    parser.add_argument("--case", default="", metavar="PREFIX", help="only checks whose names begin with this")
    given = parser.parse_args(arguments)
    credentials = grpc.ssl_channel_credentials() if given.tls else None
    if not any(name.startswith(given.case) for name in _CHECKS):
        parser.error(f"--case: no check begins with {given.case!r}; they are {', '.join(_CHECKS)}")
    try:
        outcomes = asyncio.run(run(given.target, given.key, given.model, given.case, credentials))
    except ConnectionError as error:
        print(error, file=sys.stderr)
        return 1
    for outcome in outcomes:
        print(f"{'FAILED' if outcome.difference else 'passed'}  {outcome.case}")
        if outcome.difference:
            print("        " + outcome.difference.replace("\n", "\n        "))
    return 1 if any(outcome.difference for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
