"""Streams of two gateways that clients in three languages hand over to each other: no character is lost or doubled.

A Go program begins a stream and leaves it, a Java program resumes it and leaves it, and a page in Chromium reads it to its end,
over gRPC-Web through a real Envoy with the shipped configurations.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire.v1.chat_completion_pb2 import (
    ChatRequest,
    Completed,
    GetChatCompletionRequest,
    ResumePoint,
    StreamChatCompletionRequest,
    StreamOptions,
)
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.message_pb2 import AssistantMessage
from deltawire_server.fake_vllm import Chunks, Script
from tests.client.proxy import round_robin
from tests.conformance import client_driver
from tests.conformance.conformance_pb2 import Answer, ClientCase, ClientResult
from tests.polyglot import browser, stubs
from tests.polyglot.browser import serving
from tests.polyglot.calls import MODEL, gateway
from tests.polyglot.programs import LIMIT, run
from tests.polyglot.proxy import envoy, web_configuration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub
    from deltawire_server.fake_vllm import FakeVllm
    from tests.polyglot.proxy import Envoy

    Ask = Callable[[ClientCase], Awaitable[ClientResult]]

pytestmark = pytest.mark.polyglot

HAND_OVERS = int(os.environ.get("HAND_OVERS", "20"))
"""Streams; `make hand-over` has more."""

AT_ONCE = 4
"""Streams that are under way at a time. Each program makes one call at a time."""

SEGMENTS = 8
"""Parts of an answer that are never merged, so that it has at least so many deltas."""

MOST_EVENTS = 4
"""That a program reads before it leaves: all of them together are fewer than the answer has."""

SEARCHED_ROUTES = 9
"""Routes by which a client looks for a completion: its id, and one for each of eight new connections."""

CHARACTERS = 'aé\u0301ß漢字🜁👩\u200d👩\u200d👧🇳🇴ไทยעברית\n\t "\\'
"""Of one to four bytes, some of which people see as one character together, and some that JSON escapes."""

CANCELLED = grpc.StatusCode.CANCELLED.value[0]


@dataclass
class Expected:
    """An answer as the engine sends it, and what the pieces must add up to.

    Attributes:
        script: What the engine sends.
        request: What it is asked.
        choices: Text and reasoning of each choice, by index.
        arguments: The arguments of the tool call in the first choice; empty without one.
    """

    script: Script
    request: ChatRequest
    choices: list[Completed.Choice]
    arguments: str = ""


def answer(number: int, completion_id: str) -> Expected:
    """An answer of two choices, with text and reasoning alternating, in pieces that end between any two code points."""
    draw = random.Random(number)  # noqa: S311 -- the same in each run
    chunk = Chunks()
    choices = [Completed.Choice(index=index, message=AssistantMessage()) for index in range(2)]
    sent: list[dict[str, Any]] = [chunk.role(0), chunk.role(1)]
    for segment in range(SEGMENTS):
        index, is_text = segment % 2, segment >= SEGMENTS // 2
        message = choices[index].message
        for _ in range(draw.randint(12, 20)):
            piece = "".join(draw.choices(CHARACTERS, k=draw.randint(1, 20)))
            if is_text:
                message.text += piece
                sent.append(chunk.text(piece, index))
            else:
                message.reasoning += piece
                sent.append(chunk.reasoning(piece, index))
    arguments = ""
    if number % 3 == 0:
        arguments = json.dumps({"city": "".join(draw.choices(CHARACTERS, k=30))}, ensure_ascii=False)
        sent.append(chunk.call("get_weather"))
        sent += [chunk.arguments(arguments[at : at + 3]) for at in range(0, len(arguments), 3)]
    sent += [chunk.finish("tool_calls" if arguments else "stop", 0), chunk.finish("stop", 1), chunk.usage(7, 42)]
    request = ChatRequest(model=MODEL, completion_id=completion_id, choice_count=2)
    request.messages.add().user.text = "hi"
    request.tools.add(name="get_weather", input_schema='{"type": "object"}')
    # Some are generated while they are handed over; the others have ended before.
    delay = 0.0 if number % 4 == 0 else 0.004
    return Expected(Script.chunks(sent, chunk_delay=delay), request, choices, arguments)


class Program:
    """A client program, which makes one call at a time."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()

    async def call(self, call: ClientCase, then: Callable[[], None] = lambda: None) -> ClientResult:
        """Make a call, when the program is free. `then` is called immediately before."""
        async with self._lock:
            then()
            return await self._ask(call)


@dataclass(frozen=True)
class Lab:
    """The programs, in the order in which they have a stream, and what they call."""

    vllm: FakeVllm
    gateways: tuple[str, str]
    proxy: Envoy
    stub: ChatCompletionAsyncStub
    go: Program
    java: Program
    page: Program

    async def hand_over(self, number: int) -> None:
        """Hand a stream over twice, and compare the pieces with the answer.

        Of two streams, the first goes through Envoy, which routes by the id. The other one begins at a gateway, and the
        Java program reaches the gateways in turn: so the second of these is searched for. Its id has the form of those that
        gateways generate, so that the other gateway answers WRONG_REPLICA.
        """
        is_direct, owner = number % 2 == 1, number // 2 % 2
        expected = answer(number, await self._searchable_id() if is_direct else f"mine-{os.urandom(16).hex()}")
        options = StreamOptions(usage_updates=number % 5 == 0)
        options.retention.FromSeconds(int(LIMIT))
        request = StreamChatCompletionRequest(chat=expected.request, options=options)
        with round_robin(*self.gateways) as balancer:
            targets = (self.gateways[owner], balancer.target) if is_direct else (self.proxy.target,) * 2
            counts = (1 + number % MOST_EVENTS, 1 + number // MOST_EVENTS % MOST_EVENTS)

            def play() -> None:
                self.vllm.play(expected.script)

            begun = await self.go.call(_case(targets[0], request, counts[0]), play)
            request = _resume(expected.request.completion_id, counts[0])
            resumed = await self.java.call(_case(targets[1], request, counts[1]))
            for result in (begun, resumed):
                assert result.failure.code == CANCELLED, result
            assert balancer.made == (1 + owner if is_direct else 0)
        request = _resume(expected.request.completion_id, sum(counts))
        ended = await self.page.call(_case(f"http://{self.proxy.web}", request))
        assert ended.HasField("answer"), ended
        check([begun.failure.partial, resumed.failure.partial, ended.answer], expected)

    async def _searchable_id(self) -> str:
        """An id for which the page's search cannot miss: Envoy draws a gateway for each route, once in 512 always the same."""
        while True:
            completion_id = f"cmpl-{os.urandom(16).hex()}-00000000"
            found = set()
            for moved in range(SEARCHED_ROUTES):
                route = f"{completion_id}#{moved}" if moved else completion_id
                asked = self.stub.GetChatCompletion(
                    GetChatCompletionRequest(completion_id=completion_id), metadata=(("x-deltawire-route", route),)
                )
                assert await asked.code() is grpc.StatusCode.FAILED_PRECONDITION
                headers = (*await asked.initial_metadata(), *await asked.trailing_metadata())
                found.add(dict(headers)["x-deltawire-gateway"])
                if len(found) == 2:
                    return completion_id


def _case(target: str, request: StreamChatCompletionRequest, events: int | None = None) -> ClientCase:
    """A call that ends with the stream, or after this many events."""
    stream = ClientCase.Stream(request=request, cancel_after_events=events)
    return ClientCase(target=target, timeout=Duration(seconds=int(LIMIT)), stream=stream)


def _resume(completion_id: str, read: int) -> StreamChatCompletionRequest:
    """What goes on with a stream of which so many events were read."""
    point = ResumePoint(completion_id=completion_id, last_sequence=read - 1)
    return StreamChatCompletionRequest(resume=point)


def check(pieces: list[Answer], expected: Expected) -> None:
    """Put the pieces together and compare them with the answer."""
    whole = {index: Completed.Choice(index=index, message=AssistantMessage()) for index in range(2)}
    for piece in pieces:
        for choice in piece.choices:
            given = whole[choice.index].message
            given.text += choice.message.text
            given.reasoning += choice.message.reasoning
            given.tool_calls.extend(choice.message.tool_calls)
            assert not choice.failed_tool_calls
    calls = [call for choice in whole.values() for call in choice.message.tool_calls]
    assert [call.arguments for call in calls] == [expected.arguments] * bool(expected.arguments)
    for choice in whole.values():
        choice.message.ClearField("tool_calls")
    assert [*whole.values()] == expected.choices
    assert pieces[-1].usage.completion_tokens == 42


@pytest.fixture
async def lab(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[Lab]:
    """The programs, built and started, two gateways, and what is between them."""
    languages = ("go", "java", "typescript")
    builds = (asyncio.to_thread(client_driver.build, language, tmp_path / language) for language in languages)
    go, java, _ = await asyncio.gather(*builds)
    # The last event of a stream would repeat all of it, so that the last piece would be the whole answer.
    flags = ("--set", "server.max_completed_bytes=1024")
    async with (
        gateway(vllm, tmp_path, *flags) as (_, first),
        gateway(vllm, tmp_path, *flags) as (_, second),
        _page(tmp_path, first, second) as (page, proxy),
        grpc.aio.insecure_channel(proxy.target) as channel,
        client_driver.Program(go, LIMIT) as go_program,
        client_driver.Program(java, LIMIT) as java_program,
    ):
        programs = map(Program, (go_program.exchange, java_program.exchange, page))
        yield Lab(vllm, (first, second), proxy, ChatCompletionStub(channel), *programs)


@asynccontextmanager
async def _page(folder: Path, first: str, second: str) -> AsyncIterator[tuple[Ask, Envoy]]:
    """A page that makes calls, and the Envoy in front of the gateways."""
    pages = folder / "pages"
    bundle = (str(stubs.LANGUAGES / "typescript/node_modules/.bin/esbuild"), str(folder / "typescript/out/page.js"))
    made = await run(*bundle, "--bundle", f"--outfile={pages}/page.js", "--log-level=warning", home=folder)
    assert (made.status, made.err) == (0, "")
    (pages / "index.html").write_text('<!doctype html><title>page</title><script src="page.js"></script>')
    with serving(pages) as origin:
        web = web_configuration(re.escape(origin))
        async with envoy(folder, first, second, web=web) as proxy, browser.page(folder, origin) as page:

            async def ask(call: ClientCase) -> ClientResult:
                result = await page.call("call", base64.b64encode(call.SerializeToString()).decode())
                return ClientResult.FromString(base64.b64decode(result))

            yield ask, proxy


async def test_streams_go_from_language_to_language(lab: Lab) -> None:
    """From Go to Java to a browser, with the route that Envoy knows, and where each connection reaches the next gateway."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with limit:
            await lab.hand_over(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(HAND_OVERS):
            tasks.create_task(one(number))
    # The engine was asked once for each: a resume never generates again.
    assert len(lab.vllm.chats) == HAND_OVERS
