"""Completions of another gateway process, behind a balancer of connections: both clients find it, and leave no connection."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire import (
    Answer,
    AsyncClient,
    CallError,
    Client,
    ClientClosedError,
    StreamInterrupted,
    WrongReplicaError,
)
from deltawire._cli import main
from deltawire._completion import elsewhere
from deltawire._completion.elsewhere import MAX_CONNECTIONS
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_RUNNING,
    CancelChatCompletionResponse,
    GetChatCompletionResponse,
)
from tests.client.proxy import RoundRobin, round_robin
from tests.client.scripted import WAIT, Fail, Replica, saying, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 10
EVENTS = saying("Hel", "lo ", "you")
MISSING = Fail(grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
CANCELLED = CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next connection is made at once."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)


@pytest.fixture
def replicas() -> Iterator[tuple[Replica, Replica]]:
    """Two gateway processes; the first knows completion "one", the second "two"."""
    one, two = Replica("one"), Replica("two")
    with serve(gateway=one), serve(gateway=two):
        yield one, two


@pytest.fixture
def proxy(replicas: tuple[Replica, Replica]) -> Iterator[RoundRobin]:
    """The first connection reaches the first process, the next one the second, and so on."""
    with round_robin(*(each.target for each in replicas)) as proxy:
        yield proxy


@pytest.fixture(params=["blocking", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run something with a client of either kind: `run(target, use)`. What `use` gives back is awaited if it has to be."""

    def blocking(target: str, use: Callable[[Any], Any], **options: Any) -> Any:  # noqa: ANN401
        with Client(target, **options) as client:
            return use(client)

    def asynchronous(target: str, use: Callable[[Any], Any], **options: Any) -> Any:  # noqa: ANN401
        async def main() -> Any:  # noqa: ANN401
            async with AsyncClient(target, **options) as client:
                result = use(client)
                return await result if inspect.isawaitable(result) else result

        return asyncio.run(main())

    return blocking if request.param == "blocking" else asynchronous


def test_get_and_cancel(replicas: tuple[Replica, Replica], proxy: RoundRobin, run: Callable[..., Any]) -> None:
    """Each reaches the process that has the completion; the other connections are closed while the client goes on."""
    for name, replica in zip(("one", "two"), replicas, strict=True):
        found = GetChatCompletionResponse(completion_id=name)
        replica.will(found)
        replica.will(CANCELLED)

        def use(client: Any, name: str = name, found: GetChatCompletionResponse = found) -> Any:  # noqa: ANN401
            if isinstance(client, Client):
                assert client.chat.get(name) == found
                assert client.chat.cancel(name) == CANCELLED
                return proxy.wait_for_open(1)
            return asynchronous(client, name, found)

        async def asynchronous(client: AsyncClient, name: str, found: GetChatCompletionResponse) -> None:
            assert await client.chat.get(name, timeout=60) == found
            assert await client.chat.cancel(name, timeout=60) == CANCELLED
            await asyncio.to_thread(proxy.wait_for_open, 1)

        run(proxy.target, use)
        proxy.wait_for_open(0)


def test_resume(replicas: tuple[Replica, Replica], proxy: RoundRobin, run: Callable[..., Any]) -> None:
    """The stream is read from the process that has it, and its connection is closed with its end."""
    replicas[1].will(*EVENTS)

    def use(client: Any) -> Any:  # noqa: ANN401
        if isinstance(client, Client):
            answer = client.chat.resume("two").final()
            proxy.wait_for_open(1)
            return answer
        return asynchronous(client)

    async def asynchronous(client: AsyncClient) -> Answer:
        answer = await client.chat.resume("two").final()
        await asyncio.to_thread(proxy.wait_for_open, 1)
        return answer

    assert run(proxy.target, use).text == "Hello you"
    assert proxy.made == 2
    # A proxy that chooses by the route chooses again.
    assert [replica.last.metadata["x-deltawire-route"] for replica in replicas] == ["two", "two#1"]


@pytest.mark.parametrize("refusal", [None, MISSING], ids=["WRONG_REPLICA", "COMPLETION_NOT_FOUND"])
def test_a_lost_connection(run: Callable[..., Any], refusal: Fail | None) -> None:
    """The next one reaches the other process, and a third one the first again: each event comes once.

    A process cannot tell who made an id that the caller chose, and says that there is no such completion.
    """
    one, two = Replica("mine"), Replica(refusal=refusal)
    with serve(gateway=one), serve(gateway=two), round_robin(one.target, two.target) as proxy:
        one.will(*EVENTS[:3], WAIT)
        one.will(*EVENTS[3:])
        options: dict[str, Any] = {"model": "llama", "retention": 60, "completion_id": "mine"}

        def use(client: Any) -> Any:  # noqa: ANN401
            if not isinstance(client, Client):
                return asynchronous(client)
            with client.chat.stream("hi", **options) as stream:
                events = [next(stream) for _ in range(3)]
                proxy.cut()
                events += stream
            proxy.wait_for_open(1)
            return events

        async def asynchronous(client: AsyncClient) -> Any:  # noqa: ANN401
            async with client.chat.stream("hi", **options) as stream:
                events = [await anext(stream) for _ in range(3)]
                proxy.cut()
                events += [event async for event in stream]
            await asyncio.to_thread(proxy.wait_for_open, 1)
            return events

        assert run(proxy.target, use) == EVENTS
        assert proxy.made == 3
        assert len(two.calls) == 1


@pytest.mark.parametrize("call", ["get", "cancel", "resume"])
def test_no_connection_reaches_it(proxy: RoundRobin, run: Callable[..., Any], call: str) -> None:
    """The error is that of the last one."""

    def use(client: Any) -> Any:  # noqa: ANN401
        return client.chat.resume("three").final() if call == "resume" else getattr(client.chat, call)("three")

    with pytest.raises(WrongReplicaError):
        run(proxy.target, use)
    assert proxy.made == 1 + MAX_CONNECTIONS
    proxy.wait_for_open(0)


def test_the_timeout_covers_all_connections(
    proxy: RoundRobin, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause that would outlast it is not begun."""
    monkeypatch.setattr(elsewhere, "MIN_PAUSE", 1000.0)
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 1000.0)
    with pytest.raises(WrongReplicaError):
        run(proxy.target, lambda client: client.chat.get("two", timeout=60))
    assert proxy.made == 1


def test_the_timeout_of_a_later_connection(
    replicas: tuple[Replica, Replica], proxy: RoundRobin, run: Callable[..., Any]
) -> None:
    """It is what the earlier ones have left."""
    replicas[1].will(WAIT, GetChatCompletionResponse())
    with pytest.raises(CallError) as caught:
        run(proxy.target, lambda client: client.chat.get("two", timeout=1))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("call", ["get", "cancel", "resume"])
def test_a_channel_of_your_own(proxy: RoundRobin, call: str) -> None:
    """The client cannot make another one: the error is raised unchanged."""
    with grpc.insecure_channel(proxy.target) as channel:
        chat = Client(channel=channel).chat
        with pytest.raises(WrongReplicaError):
            chat.resume("two").final() if call == "resume" else getattr(chat, call)("two")
    assert proxy.made == 1


async def test_an_asynchronous_channel_of_your_own(proxy: RoundRobin) -> None:
    """The same with asyncio."""
    async with grpc.aio.insecure_channel(proxy.target) as channel:
        chat = AsyncClient(channel=channel).chat
        with pytest.raises(WrongReplicaError):
            await chat.get("two")
        with pytest.raises(WrongReplicaError):
            await chat.resume("two").final()
    assert proxy.made == 1


def test_a_soft_cancel(replicas: tuple[Replica, Replica], proxy: RoundRobin, run: Callable[..., Any]) -> None:
    """It goes over the connection that the stream has found, and finds one itself once the stream has closed that."""
    replicas[1].known.add("cmpl-1")
    replicas[1].will(*EVENTS[:2], WAIT)
    for _ in range(2):
        replicas[1].will(CANCELLED)

    def use(client: Any) -> Any:  # noqa: ANN401
        if not isinstance(client, Client):
            return asynchronous(client)
        with client.chat.resume("two") as stream:
            next(stream)
            assert (stream.cancel_softly(), proxy.made) == (CANCELLED, 2)
            # As if the stream ended between choosing its connection and using it.
            stream._connection.close()
            assert stream.cancel_softly() == CANCELLED
        return None

    async def asynchronous(client: AsyncClient) -> None:
        async with client.chat.resume("two") as stream:
            await anext(stream)
            assert (await stream.cancel_softly(), proxy.made) == (CANCELLED, 2)
            await stream._connection._channel.close()
            assert await stream.cancel_softly() == CANCELLED

    run(proxy.target, use)
    proxy.wait_for_open(0)


def test_a_soft_cancel_after_the_client_was_closed(replicas: tuple[Replica, Replica], proxy: RoundRobin) -> None:
    """There is no other connection to try."""
    replicas[0].will(*EVENTS[:2], WAIT)
    client = Client(proxy.target)
    stream = client.chat.resume("one")
    next(stream)
    client.close()
    with pytest.raises(ClientClosedError):
        stream.cancel_softly()


async def test_a_soft_cancel_after_the_asynchronous_client_was_closed(
    replicas: tuple[Replica, Replica], proxy: RoundRobin
) -> None:
    """The same with asyncio."""
    replicas[0].will(*EVENTS[:2], WAIT)
    client = AsyncClient(proxy.target)
    stream = client.chat.resume("one")
    await anext(stream)
    await client.close()
    with pytest.raises(ClientClosedError):
        await stream.cancel_softly()


@pytest.mark.parametrize("end", ["cancel", "close", "broken", "leave"])
def test_however_a_stream_ends(
    replicas: tuple[Replica, Replica], proxy: RoundRobin, run: Callable[..., Any], end: str
) -> None:
    """Its own connection is closed."""
    replicas[1].will(*EVENTS[:2], *([EVENTS[3]] if end == "broken" else []), WAIT)

    def use(client: Any) -> Any:  # noqa: ANN401
        if not isinstance(client, Client):
            return asynchronous(client)
        with client.chat.resume("two") as stream:
            next(stream)
            if end == "cancel":
                stream.cancel()
            elif end == "close":
                client.close()
            if end != "leave":
                with pytest.raises(Exception, match=r"closed|cancelled|broke the rules"):
                    stream.final()
        return proxy.wait_for_open(0 if end == "close" else 1)

    async def asynchronous(client: AsyncClient) -> None:
        async with client.chat.resume("two") as stream:
            await anext(stream)
            if end == "cancel":
                stream.cancel()
            elif end == "close":
                await client.close()
            if end != "leave":
                with pytest.raises(Exception, match=r"closed|cancelled|broke the rules"):
                    await stream.final()
        await asyncio.to_thread(proxy.wait_for_open, 0 if end == "close" else 1)

    run(proxy.target, use)
    proxy.wait_for_open(0)


def waiting(proxy: RoundRobin, replica: Replica) -> None:
    """Wait until the first call was refused."""
    assert replica.arrived.wait(LIMIT)
    assert replica.last.ended.wait(LIMIT)
    proxy.wait_for_open(1)


@pytest.mark.parametrize("call", ["get", "resume"])
def test_closing_the_client_ends_the_search(
    replicas: tuple[Replica, Replica], proxy: RoundRobin, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """In a pause too: no further connection is made."""
    monkeypatch.setattr(elsewhere, "MIN_PAUSE", 50.0)
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 50.0)
    with Client(proxy.target) as client, ThreadPoolExecutor(1) as pool:
        stream = client.chat.resume("two") if call == "resume" else None
        searching = pool.submit(stream.final) if stream else pool.submit(client.chat.get, "two")
        waiting(proxy, replicas[0])
        client.close()
        with pytest.raises(ClientClosedError):
            searching.result(LIMIT)
    assert proxy.made == 1


async def test_closing_the_asynchronous_client_ends_the_search(
    replicas: tuple[Replica, Replica], proxy: RoundRobin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with asyncio."""
    monkeypatch.setattr(elsewhere, "MIN_PAUSE", 50.0)
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 50.0)
    async with AsyncClient(proxy.target) as client:
        searches = [asyncio.create_task(client.chat.get("two")), asyncio.create_task(client.chat.resume("two").final())]
        await asyncio.to_thread(waiting, proxy, replicas[0])
        await client.close()
        for each in searches:
            with pytest.raises(ClientClosedError):
                await each
    assert proxy.made == 1


def test_cancelled_while_the_next_connection_is_made(replicas: tuple[Replica, Replica], proxy: RoundRobin) -> None:
    """Another thread may still see the old connection: the new one is closed as well."""
    replicas[1].will(*EVENTS[:2], WAIT)
    with Client(proxy.target) as client:
        stream = client.chat.resume("two")
        call = stream._call

        def slowly() -> None:
            call()
            stream._stopped.set()
            stream._cancelled()

        stream._call = slowly  # type: ignore[method-assign]
        with pytest.raises(CallError):
            stream.final()
        proxy.wait_for_open(1)


def test_interceptors_and_options_are_for_every_connection(
    replicas: tuple[Replica, Replica], proxy: RoundRobin
) -> None:
    """A new connection differs in nothing else."""
    seen = threading.Semaphore(0)

    class Counts(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
            seen.release()
            return continuation(details, request)

    replicas[1].will(GetChatCompletionResponse())
    with Client(proxy.target, interceptors=[Counts()], options=[("grpc.primary_user_agent", "mine")]) as client:
        client.chat.get("two", request_id="r1")
    assert seen.acquire(blocking=False)
    assert seen.acquire(blocking=False)
    first, second = (replica.last.metadata for replica in replicas)
    assert first["user-agent"] == second["user-agent"]
    assert "mine" in str(first["user-agent"])
    assert first["x-request-id"] == second["x-request-id"] == "r1"


def test_the_command(replicas: tuple[Replica, Replica], proxy: RoundRobin, capsys: pytest.CaptureFixture[str]) -> None:
    """`get` and `resume` inherit it."""
    replicas[1].will(GetChatCompletionResponse(completion_id="two"))
    assert main(["get", "--target", proxy.target, "--json", "two"]) == 0
    assert capsys.readouterr().out == '{"completionId": "two"}\n'
    replicas[1].will(*EVENTS)
    with contextlib.suppress(IndexError):
        # The next connection is to reach the first process again.
        assert main(["resume", "--target", proxy.target, "two"]) == 0
    assert capsys.readouterr().out == "Hello you\n"


def test_an_answer_that_was_begun_is_interrupted(run: Callable[..., Any]) -> None:
    """When no connection reaches its process: the error has what came."""
    one, two = Replica("mine"), Replica()
    with serve(gateway=one), serve(gateway=two), round_robin(one.target, two.target) as proxy:
        one.will(*EVENTS[:2], one.known.clear, Fail(grpc.StatusCode.INTERNAL, trailers=()))
        options = {"model": "llama", "retention": 60, "completion_id": "mine"}
        with pytest.raises(StreamInterrupted) as caught:
            run(proxy.target, lambda client: client.chat.stream("hi", **options).final())
        assert caught.value.reason == "WRONG_REPLICA"
        assert caught.value.answer is not None
        assert caught.value.answer.text == "Hel"
        assert proxy.made == 1 + MAX_CONNECTIONS
