"""Watching models with both clients, against a real gRPC server; `test_watch_state` checks what is returned."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire import (
    AsyncClient,
    CallCancelledError,
    CallInfo,
    Client,
    DeadlineExceededError,
    ModelChange,
    PermissionDeniedError,
    RevisionGoneError,
    WatchBookmark,
    WatchEvent,
)
from deltawire._channel import connection
from deltawire._watch import WatchCalls, WatchState, state
from tests.client.scripted import WAIT, Fail, Gateway, Headers, bookmark, changed, model
from tests.client.test_errors import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deltawire import ModelWatch

STATUS = grpc.StatusCode
TIMEOUT = 10
A, B = model("a"), model("b")
LOST = Fail(STATUS.UNAVAILABLE, trailers=())
GONE = Fail(STATUS.OUT_OF_RANGE, "REVISION_GONE")
DENIED = Fail(STATUS.PERMISSION_DENIED, "PERMISSION_DENIED", metadata={"needs": "read"})
# A watch that goes on, is cut, loses its revision, and ends for good.
SCRIPTS: list[list[Any]] = [
    [changed("ADDED", A), bookmark("1"), LOST],
    [changed("ADDED", B, "2")],
    [GONE],
    [changed("ADDED", B), bookmark("9"), DENIED],
]
TOLD: list[WatchEvent] = [
    ModelChange("ADDED", A, ""),
    WatchBookmark("1"),
    ModelChange("ADDED", B, "2"),
    ModelChange("REMOVED", A, ""),
    WatchBookmark("9"),
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is made at once."""
    monkeypatch.setattr(state, "MAX_PAUSE", 0.0)


@pytest.fixture
def pausing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The next call would not be made in a test's time; set once a watch waits for it."""
    monkeypatch.setattr(state, "MIN_PAUSE", 1000.0)
    monkeypatch.setattr(state, "MAX_PAUSE", 1000.0)
    waits = threading.Event()

    def note(_: logging.LogRecord) -> bool:
        waits.set()
        return True

    logger = logging.getLogger("deltawire")
    logger.addFilter(note)
    yield waits
    logger.removeFilter(note)


def play(gateway: Gateway, *scripts: list[Any]) -> None:
    """Add the scripts of the next calls."""
    for script in scripts:
        gateway.will(*script)


def revisions(gateway: Gateway) -> list[str]:
    """Where each call wanted to go on."""
    return [call.request.revision for call in gateway.calls]


def test_it_goes_on(gateway: Gateway, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Over a lost connection, an end without a reason and a lost revision, until trying again does not mend it."""
    play(gateway, *SCRIPTS)
    with client.models.watch() as watch:
        assert watch.revision == ""
        seen = []
        for expected in TOLD:
            seen.append(next(watch))
            assert watch.revision == expected.revision
        assert seen == TOLD
        with pytest.raises(PermissionDeniedError) as caught:
            next(watch)
        with pytest.raises(PermissionDeniedError):
            next(watch)
    assert caught.value.metadata == {"needs": "read"}
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert watch.revision == "9"
    assert revisions(gateway) == ["", "1", "2", ""]
    assert [record.getMessage() for record in caplog.records] == [
        "the watch broke off and goes on in 0.0 s: UNAVAILABLE: it failed",
        "the watch broke off and goes on in 0.0 s: OK: the call ended",
        "the watch broke off and goes on in 0.0 s: OUT_OF_RANGE (REVISION_GONE): it failed",
    ]


async def test_it_goes_on_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """In the same way."""
    play(gateway, *SCRIPTS)
    async with async_client.models.watch() as watch:
        seen = []
        for expected in TOLD:
            seen.append(await anext(watch))
            assert watch.revision == expected.revision
        assert seen == TOLD
        with pytest.raises(PermissionDeniedError) as caught:
            await anext(watch)
        with pytest.raises(PermissionDeniedError):
            await anext(watch)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert revisions(gateway) == ["", "1", "2", ""]


def test_from_a_stored_revision(gateway: Gateway, client: Client) -> None:
    """With what is known, a lost revision is mended; without, the caller has to begin anew."""
    play(gateway, [GONE], [bookmark("9"), WAIT], [GONE])
    with client.models.watch("5", known=[A]) as watch:
        assert watch.revision == "5"
        assert [next(watch), next(watch)] == [ModelChange("REMOVED", A, ""), WatchBookmark("9")]
    with client.models.watch("5") as watch, pytest.raises(RevisionGoneError):
        next(watch)
    assert revisions(gateway) == ["5", "", "5"]


async def test_from_a_stored_revision_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """In the same way."""
    play(gateway, [GONE], [bookmark("9"), WAIT], [GONE])
    async with async_client.models.watch("5", known=[A]) as watch:
        assert [await anext(watch), await anext(watch)] == [ModelChange("REMOVED", A, ""), WatchBookmark("9")]
    async with async_client.models.watch("5") as watch:
        with pytest.raises(RevisionGoneError):
            await anext(watch)


def test_each_call_has_its_id(gateway: Gateway, client: Client) -> None:
    """The gateway's own word once something has come; what came beside it is in `info`."""
    info = CallInfo()
    play(gateway, [Headers((("x-request-id", "first"),)), bookmark("1"), LOST])
    play(gateway, [Headers((("x-request-id", "second"),)), bookmark("2"), WAIT])
    with client.models.watch(info=info, request_id="mine") as watch:
        assert watch.request_id == "mine"
        next(watch)
        assert watch.request_id == "first"
        next(watch)
        assert watch.request_id == info.request_id == "second"
    assert [call.metadata["x-request-id"] for call in gateway.calls] == ["mine", "mine"]


def test_leaving_the_block_ends_the_call(gateway: Gateway, client: Client) -> None:
    """On both sides; what had come and was not read is not told any more."""
    gateway.will(changed("ADDED", A), bookmark("1"), WAIT)
    with client.models.watch() as watch:
        for event in watch:
            assert event == ModelChange("ADDED", A, "")
            break
    assert gateway.last.ended.wait(TIMEOUT)
    with pytest.raises(CallCancelledError):
        next(watch)


async def test_leaving_the_block_ends_the_call_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """In the same way."""
    gateway.will(changed("ADDED", A), bookmark("1"), WAIT)
    async with async_client.models.watch() as watch:
        async for event in watch:
            assert event == ModelChange("ADDED", A, "")
            break
    assert await asyncio.to_thread(gateway.last.ended.wait, TIMEOUT)
    with pytest.raises(CallCancelledError):
        await anext(watch)


def test_another_thread_may_cancel(gateway: Gateway, client: Client) -> None:
    """A reader gets the error."""
    gateway.will(bookmark("1"), WAIT)
    with client.models.watch() as watch, ThreadPoolExecutor(1) as pool:
        next(watch)
        reader = pool.submit(next, watch)
        watch.cancel()
        with pytest.raises(CallCancelledError):
            reader.result(TIMEOUT)
    assert len(gateway.calls) == 1


class CancelsTheSecond(grpc.UnaryStreamClientInterceptor):
    """Cancels a watch just when its second call is made, as another thread might."""

    def __init__(self) -> None:
        self.watch: ModelWatch | None = None
        self.calls: list[Any] = []

    def _through(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:  # noqa: ANN401
        if self.calls:
            assert self.watch is not None
            self.watch.cancel()
        self.calls.append(continuation(details, request))
        return self.calls[-1]

    intercept_unary_stream = _through  # type: ignore[assignment]


def test_cancelling_just_when_a_call_is_made(gateway: Gateway) -> None:
    """That call is cancelled too, and none is left behind."""
    play(gateway, [LOST], [WAIT])
    interceptor = CancelsTheSecond()
    with Client(gateway.target, interceptors=[interceptor]) as client:
        interceptor.watch = client.models.watch()
        with pytest.raises(CallCancelledError):
            next(interceptor.watch)
        assert [call.cancelled() for call in interceptor.calls] == [False, True]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_pause_can_be_ended(gateway: Gateway, client: Client, pausing: threading.Event, how: str) -> None:
    """By cancelling the watch or closing the client; no further call is made."""
    gateway.will(LOST)
    watch = client.models.watch()
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(next, watch)
        assert pausing.wait(TIMEOUT)
        watch.cancel() if how == "cancel" else client.close()
        with pytest.raises(CallCancelledError):
            reader.result(TIMEOUT)
    assert len(gateway.calls) == 1


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_pause_can_be_ended_with_asyncio(
    gateway: Gateway, async_client: AsyncClient, pausing: threading.Event, how: str
) -> None:
    """In the same way; a waiting task is not canceled."""
    gateway.will(LOST)
    watch = async_client.models.watch()
    reader = asyncio.create_task(anext(watch))
    assert await asyncio.to_thread(pausing.wait, TIMEOUT)
    if how == "cancel":
        watch.cancel()
    else:
        await async_client.close()
    with pytest.raises(CallCancelledError):
        await reader
    assert not reader.cancelled()
    assert len(gateway.calls) == 1


async def test_another_task_may_cancel(gateway: Gateway, async_client: AsyncClient) -> None:
    """A reader gets the error, and its task is not canceled."""
    gateway.will(bookmark("1"), WAIT)
    watch = async_client.models.watch()
    await anext(watch)
    reader = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    watch.cancel()
    with pytest.raises(CallCancelledError):
        await reader
    assert not reader.cancelled()


async def test_cancelling_the_task_ends_the_watch(gateway: Gateway, async_client: AsyncClient) -> None:
    """The cancellation goes on as asyncio wants it, and the watch knows that it is over."""
    gateway.will(bookmark("1"), WAIT)
    watch = async_client.models.watch()
    await anext(watch)
    reader = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await asyncio.to_thread(gateway.last.ended.wait, TIMEOUT)
    with pytest.raises(CallCancelledError):
        await anext(watch)


async def test_cancelling_the_task_in_a_pause(
    gateway: Gateway, async_client: AsyncClient, pausing: threading.Event
) -> None:
    """So it is while the watch waits for its next call."""
    gateway.will(LOST)
    watch = async_client.models.watch()
    reader = asyncio.create_task(anext(watch))
    assert await asyncio.to_thread(pausing.wait, TIMEOUT)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    with pytest.raises(CallCancelledError):
        await anext(watch)
    assert len(gateway.calls) == 1


def test_a_timeout(gateway: Gateway, client: Client) -> None:
    """It is the whole watch's, not each call's."""
    play(gateway, [bookmark("1"), LOST], [bookmark("2"), WAIT])
    with client.models.watch(timeout=1) as watch:
        assert [next(watch), next(watch)] == [WatchBookmark("1"), WatchBookmark("2")]
        with pytest.raises(DeadlineExceededError) as caught:
            next(watch)
    assert caught.value.code is STATUS.DEADLINE_EXCEEDED


async def test_a_timeout_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """In the same way."""
    gateway.will(bookmark("1"), WAIT)
    async with async_client.models.watch(timeout=1) as watch:
        assert await anext(watch) == WatchBookmark("1")
        with pytest.raises(DeadlineExceededError):
            await anext(watch)


def test_a_timeout_that_passes_while_nobody_is_there() -> None:
    """It ends the watch, and the error says what the trouble was; what would have ended it anyway stays what it is."""
    _, defaults = connection("127.0.0.1:1", {}, own_channel=False)
    for fail, kind in (LOST, DeadlineExceededError), (DENIED, PermissionDeniedError):
        calls = WatchCalls(defaults, WatchState(), "", {"timeout": 1e-9, "request_id": "mine"})
        calls._begin()
        assert calls._end(Failed(fail.code, fail.trailing())) is None
        with pytest.raises(kind) as caught:
            calls._event()
        assert caught.value.request_id == "mine"
        if kind is DeadlineExceededError:
            assert caught.value.message == "the watch's timeout passed; its last call ended with UNAVAILABLE: it failed"


def test_pauses_end_with_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for longer than they said."""
    monkeypatch.setattr(state, "MIN_PAUSE", 1000.0)
    monkeypatch.setattr(state, "MAX_PAUSE", 1000.0)
    _, defaults = connection("127.0.0.1:1", {}, own_channel=False)
    calls = WatchCalls(defaults, WatchState(), "", {"timeout": 50})
    calls._begin()
    pause = calls._end(Failed(LOST.code))
    assert pause is not None
    assert 0 < pause <= 50


def test_the_clients_own_timeout_is_not_for_watches() -> None:
    """It suits calls that come back; a watch goes on."""
    _, defaults = connection("127.0.0.1:1", {"timeout": 5}, own_channel=False)
    calls = WatchCalls(defaults, WatchState(), "", {})
    calls._begin()
    assert calls._outgoing.arguments["timeout"] is None
