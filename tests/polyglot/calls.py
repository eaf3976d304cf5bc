"""What the tests of every language share: a gateway, the Python client's view of a stream, and comparing two views."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format

from deltawire import AsyncClient, CallError, tool_from_openai, user
from deltawire.v1.chat_completion_pb2 import ChatRequest, StreamChatCompletionResponse
from deltawire_server.app import Gateway
from deltawire_server.settings import parse
from tests.polyglot.programs import LIMIT, started, tool
from tests.support import recordings

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from deltawire._aio.chat import AsyncChatStream
    from deltawire_server.fake_vllm import FakeVllm

MODEL = "vllm/fake"

COMPLETIONS = 24
"""Of each kind, in tests of calls about them. An Envoy that draws finds the gateway of all of these once in 16 million."""

_numbers = itertools.count()


@contextlib.asynccontextmanager
async def gateway(
    vllm: FakeVllm, folder: Path, *flags: str, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway in front of a fake vLLM, and its address."""
    store = folder / f"registry-{next(_numbers)}.db"
    own = ("--vllm-url", vllm.base_url, "--listen", listen, "--database-url", f"sqlite:///{store}")
    async with Gateway(parse((*own, *flags), {}).settings) as serving:
        (address,) = serving.addresses
        yield serving, address


@contextlib.asynccontextmanager
async def gateway_process(vllm: FakeVllm, folder: Path) -> AsyncIterator[tuple[Process, str]]:
    """The same as a process of its own, which can be killed."""
    database = f"sqlite:///{folder}/process-{next(_numbers)}.db"
    own = ("--vllm-url", vllm.base_url, "--listen", "127.0.0.1:0", "--database-url", database)
    async with started(tool("deltawire-server"), *own, "--log-format", "json", home=folder) as process:
        assert process.stderr is not None
        async with asyncio.timeout(LIMIT):
            async for line in process.stderr:
                entry = json.loads(line)
                if entry["event"] == "serving":
                    (address,) = entry["addresses"]
                    yield process, address
                    return
        pytest.fail("the gateway did not start")


@dataclass(frozen=True)
class Reply:
    """What came of a call: its events, and the error that ended it, if one did."""

    events: list[StreamChatCompletionResponse]
    error: CallError | None = None

    @property
    def answer(self) -> list[dict[str, Any]]:
        """The events in the form in which they can be compared. The call must have ended well."""
        assert self.error is None, self.error
        return fold(self.events)


async def ask(
    target: str, chat: ChatRequest, request_id: str | None = None, began: asyncio.Event | None = None
) -> Reply:
    """Stream an answer with the Python client. It makes one attempt: so any observed retry is that of a proxy.

    Args:
        target: Where.
        chat: What.
        request_id: What the call is known by.
        began: Set at the first piece of text.
    """
    events: list[StreamChatCompletionResponse] = []
    async with AsyncClient(target, options=(("grpc.enable_retries", 0),), timeout=LIMIT) as client:
        try:
            async with client.chat.stream(chat, request_id=request_id) as stream:
                async for event in stream:
                    events.append(event)
                    if began is not None and event.HasField("text_delta"):
                        began.set()
        except CallError as error:
            return Reply(events, error)
    return Reply(events)


@contextlib.asynccontextmanager
async def one_attempt(target: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[AsyncClient]:
    """A client on a channel of its own making: it cannot open new connections to search for a completion."""
    options = (("grpc.enable_retries", 0),)
    if credentials is None:
        made = grpc.aio.insecure_channel(target, options)
    else:
        made = grpc.aio.secure_channel(target, credentials, options)
    async with made as channel, AsyncClient(channel=channel, timeout=LIMIT) as client:
        yield client


async def find_completions(target: str, credentials: grpc.ChannelCredentials | None = None) -> None:
    """Check that look-ups reach the one of two gateways that has the completion, at once, and that both have some.

    The client that began a completion has only its id, for half of them; another client has the id that the first one chose.
    """
    gateways = set()
    async with one_attempt(target, credentials) as client, one_attempt(target, credentials) as other:
        for number in range(COMPLETIONS):
            chosen = await client.chat.create("hi", model=MODEL, completion_id=f"mine-{number}")
            generated = await client.chat.create("hi", model=MODEL)
            for looking, answer in ((other, chosen), (client, generated)):
                assert (await looking.chat.get(answer.completion_id)).completion_id == answer.completion_id
                gateways.add(dict(answer.initial_metadata)["x-deltawire-gateway"])
    assert len(gateways) == 2


async def begun(stream: AsyncChatStream) -> None:
    """Read until the first text."""
    async for event in stream:
        if event.HasField("text_delta"):
            return


def openai_tools(recording: str) -> list[dict[str, Any]]:
    """The tools that were offered when the recording was made, as OpenAI writes them."""
    tools: list[dict[str, Any]] = recordings.load(recording).request.get("tools") or []
    return tools


def chat_request(recording: str | None = None, *, choice_count: int | None = None) -> ChatRequest:
    """A request that says hi, with the tools that were offered when the recording was made."""
    return ChatRequest(
        model=MODEL,
        messages=[user("hi")],
        tools=[tool_from_openai(tool) for tool in openai_tools(recording)] if recording else (),
        choice_count=choice_count,
    )


def fold(events: Iterable[StreamChatCompletionResponse]) -> list[dict[str, Any]]:
    """The events with neighbouring pieces of text joined, since the gateway joins them as the caller's speed has it.

    Sequence numbers must be without gaps. What differs from call to call is left out: the completion's id, and times.
    """
    folded: list[StreamChatCompletionResponse] = []
    for number, given in enumerate(events):
        assert given.sequence == number
        event = StreamChatCompletionResponse()
        event.CopyFrom(given)
        event.ClearField("sequence")
        kind = event.WhichOneof("event")
        if kind == "started":
            assert event.started.completion_id.startswith("cmpl-")
            event.started.ClearField("completion_id")
            event.started.ClearField("create_time")
        elif kind == "completed":
            event.completed.ClearField("timings")
        last = folded[-1] if folded else None
        if last and kind == last.WhichOneof("event") and event.choice_index == last.choice_index:
            if kind == "text_delta":
                last.text_delta.text += event.text_delta.text
                continue
            if kind == "reasoning_delta":
                last.reasoning_delta.text += event.reasoning_delta.text
                continue
        folded.append(event)
    return [json_format.MessageToDict(event) for event in folded]


def read_json(text: str) -> list[StreamChatCompletionResponse]:
    """Events from protobuf's JSON, one object after another.

    Times are left out: not every language's JSON writes those as protobuf does. Any other name or value that the API does
    not have is an error.
    """
    decoder = json.JSONDecoder()
    events = []
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        text = text[end:].lstrip()
        value.get("started", {}).pop("createTime", None)
        value.get("completed", {}).pop("timings", None)
        events.append(json_format.ParseDict(value, StreamChatCompletionResponse()))
    return events
