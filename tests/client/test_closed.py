"""Calls of a client that is closed: before the call, or during it. There is one error for all, in both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio

from deltawire import AsyncClient, CallCancelledError, Client, ClientClosedError
from deltawire.v1.model_registry_pb2 import ListModelsResponse, ListProvidersResponse
from tests.client.scripted import WAIT, Gateway, bookmark, changed, model, saying
from tests.client.test_resuming import gateway_has

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

LIMIT = 10
EVENTS = saying("Hel", "lo")


class OnCalls(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Lets every call through. gRPC makes an intercepted method anew for each call."""

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Go on."""
        return continuation(details, request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Go on."""
        return continuation(details, request)


class OnUnary(aio.UnaryUnaryClientInterceptor):
    """The asyncio kind."""

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Go on."""
        return await continuation(details, request)


class OnStream(aio.UnaryStreamClientInterceptor):
    """The asyncio kind, for streams."""

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401
        """Go on."""
        return await continuation(details, request)


# Every way to make a call, and to read all that it gives.
CALLS: dict[str, Callable[[Any], Any]] = {
    "chat.create": lambda client: client.chat.create("hi"),
    "chat.stream": lambda client: client.chat.stream("hi"),
    "chat.stream, retained": lambda client: client.chat.stream("hi", retention=60),
    "chat.resume": lambda client: client.chat.resume("mine"),
    "chat.get": lambda client: client.chat.get("mine"),
    "chat.cancel": lambda client: client.chat.cancel("mine"),
    "chat.count_tokens": lambda client: client.chat.count_tokens("hi"),
    "chat.run_tools": lambda client: client.chat.run_tools("hi", tools=[]),
    "models.list": lambda client: client.models.list(),
    "models.get": lambda client: client.models.get("llama"),
    "models.register": lambda client: client.models.register("llama"),
    "models.update": lambda client: client.models.update("llama", aliases=["l"]),
    "models.unregister": lambda client: client.models.unregister("llama"),
    "models.refresh": lambda client: client.models.refresh(),
    "models.watch": lambda client: client.models.watch(),
    "providers.list": lambda client: client.providers.list(),
    "providers.health": lambda client: client.providers.health("vllm"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def use(call: Callable[[Client], Any], client: Client) -> None:
    """Make a call, and read what is to be read."""
    result = call(client)
    if hasattr(result, "__next__"):
        list(result)


async def use_async(call: Callable[[AsyncClient], Any], client: AsyncClient) -> None:
    """The same, awaited."""
    result = call(client)
    if hasattr(result, "__anext__"):
        async for _ in result:
            pass
    else:
        await result


@every_call
@pytest.mark.parametrize("interceptors", [(), (OnCalls(),)], ids=["plain", "intercepted"])
@pytest.mark.parametrize("own", [False, True], ids=["client", "channel"])
def test_before_the_call(
    gateway: Gateway, call: Callable[[Client], Any], interceptors: Sequence[OnCalls], own: bool
) -> None:
    """Nothing of gRPC's own comes through, and an intercepted call does not end the process."""
    channel = grpc.insecure_channel(gateway.target)
    client = Client(gateway.target, channel=channel if own else None, interceptors=interceptors)
    client.close()
    channel.close()
    with pytest.raises(ClientClosedError, match="the client was closed") as caught:
        use(call, client)
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert caught.value.request_id
    assert gateway.calls == []


@every_call
@pytest.mark.parametrize("interceptors", [(), (OnUnary(), OnStream())], ids=["plain", "intercepted"])
async def test_before_the_call_with_asyncio(
    gateway: Gateway, call: Callable[[AsyncClient], Any], interceptors: Sequence[aio.ClientInterceptor]
) -> None:
    """The same error."""
    client = AsyncClient(gateway.target, interceptors=interceptors)
    await client.close()
    with pytest.raises(ClientClosedError, match="the client was closed"):
        await use_async(call, client)
    channel = aio.insecure_channel(gateway.target, interceptors=interceptors)
    client = AsyncClient(channel=channel)
    await channel.close()
    with pytest.raises(ClientClosedError, match="the client was closed"):
        await use_async(call, client)
    assert gateway.calls == []


@every_call
@pytest.mark.parametrize("own", [False, True], ids=["client", "channel"])
def test_during_the_call(gateway: Gateway, call: Callable[[Client], Any], own: bool) -> None:
    """A waiting task gets the same error."""
    gateway.will(WAIT)
    channel = grpc.insecure_channel(gateway.target)
    client = Client(gateway.target, channel=channel if own else None)

    def close() -> None:
        assert gateway.arrived.wait(LIMIT)
        (channel if own else client).close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(ClientClosedError):
        use(call, client)
    closing.join()
    channel.close()


@every_call
async def test_during_the_call_with_asyncio(gateway: Gateway, call: Callable[[AsyncClient], Any]) -> None:
    """It is not cancelled itself."""
    gateway.will(WAIT)
    client = AsyncClient(gateway.target)
    waiting = asyncio.create_task(use_async(call, client))
    assert await asyncio.to_thread(gateway.arrived.wait, LIMIT)
    await client.close()
    with pytest.raises(ClientClosedError):
        await waiting


def answers(gateway: Gateway) -> None:
    """Scripts for one of each call that is read bit by bit: its first event, and no end."""
    gateway.will(*EVENTS[:2], WAIT)
    gateway.will(changed("ADDED", model("llama"), "1"), bookmark("2"), WAIT)
    gateway.will(ListModelsResponse(models=[model("llama")], next_page_token="2"))


def test_between_two_reads(gateway: Gateway) -> None:
    """Streams, watches and listings; the error is the same each time, and has what came."""
    answers(gateway)
    client = Client(gateway.target)
    # One after the other: the scripts are played in the order in which calls arrive.
    stream = client.chat.stream("hi")
    next(stream)
    watch = client.models.watch()
    next(watch)
    listing = client.models.list()
    next(listing)
    reading: list[Any] = [stream, watch, listing]
    client.close()
    for each in reading:
        for _ in range(2):
            with pytest.raises(ClientClosedError):
                list(each)
    with pytest.raises(ClientClosedError):
        stream.final()
    stream.cancel()
    watch.cancel()


async def test_between_two_reads_with_asyncio(gateway: Gateway) -> None:
    """The same."""
    answers(gateway)
    client = AsyncClient(gateway.target)
    stream = client.chat.stream("hi")
    await anext(stream)
    watch = client.models.watch()
    await anext(watch)
    listing = client.models.list()
    await anext(listing)
    reading: Sequence[AsyncIterator[Any]] = (stream, watch, listing)
    await client.close()
    for each in reading:
        for _ in range(2):
            with pytest.raises(ClientClosedError):
                [_ async for _ in each]
    stream.cancel()
    watch.cancel()


def test_what_was_over_stays_as_it_was(gateway: Gateway) -> None:
    """Closing the client changes neither an answer nor a cancel; closing it twice changes nothing."""
    gateway.will(*EVENTS)
    gateway.will(WAIT)
    gateway.will(ListProvidersResponse())
    client = Client(gateway.target)
    whole = client.chat.stream("hi")
    assert whole.final().text == "Hello"
    cancelled = client.chat.stream("hi")
    gateway_has(gateway, 2)
    cancelled.cancel()
    assert client.providers.list() == ()
    client.close()
    client.close()
    assert whole.final().text == "Hello"
    with pytest.raises(CallCancelledError) as caught:
        cancelled.final()
    assert not isinstance(caught.value, ClientClosedError)


@pytest.mark.parametrize("call", [CALLS["models.get"], CALLS["chat.stream"], CALLS["models.watch"]])
def test_an_interceptors_own_error(gateway: Gateway, call: Callable[[Client], Any]) -> None:
    """Only what gRPC says of a closed channel becomes the client's own error."""

    class Refuses(OnCalls):
        def intercept_unary_unary(self, *_: Any) -> Any:  # noqa: ANN401
            raise ValueError("not today")

        def intercept_unary_stream(self, *_: Any) -> Any:  # noqa: ANN401
            raise ValueError("not today")

    with Client(gateway.target, interceptors=[Refuses()]) as client, pytest.raises(ValueError, match="not today"):
        use(call, client)


def test_a_client_that_is_closed_while_it_is_used() -> None:
    """By many threads at once, with interceptors: no crash, and no other error."""
    program = """
import threading, grpc
from deltawire import Client, ClientClosedError, UnavailableError
from tests.client.test_closed import OnCalls
for _ in range(30):
    client = Client("127.0.0.1:1", interceptors=[OnCalls()], options=[("grpc.enable_retries", 0)])
    def use():
        while True:
            try:
                client.models.get("x")
            except UnavailableError:
                continue
            except ClientClosedError:
                return
    threads = [threading.Thread(target=use) for _ in range(3)]
    for each in threads: each.start()
    client.close()
    for each in threads: each.join()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), time.monotonic() - began
