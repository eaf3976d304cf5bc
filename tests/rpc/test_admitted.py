"""Ending calls whose caller is no longer admitted: with a reason, unless the client was first, and a few at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.rpc.admitted import Admitted

if TYPE_CHECKING:
    from deltawire_server.completions.records import Record
    from tests.support.workers import MakeWorker

MANY = 100


async def waiting(admitted: Admitted, owner: str) -> None:
    """A call that never ends."""
    with admitted.entered(owner, "/m"):
        await asyncio.Event().wait()


async def ticks(ending: asyncio.Task[None]) -> int:
    """How often another task gets its turn until this one has ended."""
    count = 0
    while not ending.done():
        count += 1
        await asyncio.sleep(0)
    return count


async def test_calls_end_with_a_reason() -> None:
    """Those that are not admitted, once each, also if they are ended twice; a call that is over is not touched."""
    admitted = Admitted()
    with admitted.entered("gone", "/m"):
        pass
    calls = {owner: asyncio.create_task(waiting(admitted, owner)) for owner in ("gone", "stays")}
    await asyncio.sleep(0)
    for _ in range(2):
        await admitted.end(lambda owner, method, _: (owner, method) == ("stays", "/m"))
    with pytest.raises(GatewayError) as caught:
        await calls["gone"]
    assert (caught.value.reason, caught.value.retry_after) == (Reason.ACCESS_CHANGED, None)
    assert not calls["stays"].done()
    calls["stays"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls["stays"]


async def test_a_client_that_cancels_too() -> None:
    """Its cancel is what the call ends with."""
    admitted = Admitted()
    call = asyncio.create_task(waiting(admitted, "gone"))
    await asyncio.sleep(0)
    ending = asyncio.create_task(admitted.end(lambda *_: False))
    call.cancel()
    await ending
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_stream_that_has_begun_is_left_to_its_completion() -> None:
    """Its last message has to come."""
    admitted = Admitted()

    async def streaming() -> None:
        with admitted.entered("gone", "/m", lambda: True):
            await asyncio.sleep(0.01)

    call = asyncio.create_task(streaming())
    await asyncio.sleep(0)
    await admitted.end(lambda *_: False)
    await call


async def test_others_get_their_turn_while_calls_end() -> None:
    """Between any two: what ends at once, ends in one turn of the event loop."""
    admitted = Admitted()
    calls = [asyncio.create_task(waiting(admitted, "gone")) for _ in range(MANY)]
    await asyncio.sleep(0)
    assert await ticks(asyncio.create_task(admitted.end(lambda *_: False))) >= MANY
    assert {type(result) for result in await asyncio.gather(*calls, return_exceptions=True)} == {GatewayError}


async def test_others_get_their_turn_while_completions_end(make_worker: MakeWorker) -> None:
    """The same, of completions; those of callers who still may call go on."""
    async with make_worker() as worker:
        records: list[Record] = [worker._records.begin("gone") for _ in range(MANY)]
        stays = worker._records.begin("stays")
        assert await ticks(asyncio.create_task(worker.end_revoked(lambda owner, _: owner == "stays"))) >= MANY
        assert all(record._fault for record in records)
        assert stays._fault is None
