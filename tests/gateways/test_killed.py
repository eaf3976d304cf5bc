"""A gateway is killed while everybody writes: what it had done stays done, the others go on, and so do its watchers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.gateways.storm import Judge, Storm, changes_after, in_database, last_revision
from tests.gateways.support import SERVED, client_watch, connected, following, raw_watch, registered
from tests.support.gateway import until

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways

BEFORE = 100
"""Calls that have ended when it is killed."""

UNANSWERED = 5
"""Calls that are with it then."""


async def test_a_gateway_that_is_killed(start_gateways: StartGateways, database_url: str) -> None:
    """Killed in the middle of a storm and started again in it, at its old address.

    The other one goes on, and its watch tells all. A call that was cut was done as a whole or not at all; all others are
    told what is true. The client's watch on the killed one goes on by itself with the next one, which knows nothing of its
    revision, and tells what it has missed, each change once: they add up to what the database has.
    """
    one, two = await start_gateways("one", "two")
    first = await last_revision(database_url)
    storm = Storm([one, two], seed=2)
    async with following(client_watch(one.client)) as watch_one, following(raw_watch(two.stub)) as watch_two:
        blowing = asyncio.create_task(storm.blow(300))
        await storm.until(BEFORE)
        # Paused first, so that some calls have reached it and are not answered.
        one.process.pause()
        await until(lambda: storm.under_way[one.process] >= UNANSWERED)
        await asyncio.sleep(0.1)
        one.process.kill()
        storm.gateways = [two]
        await blowing
        storm.gateways = [one, two]
        await asyncio.gather(storm.blow(200), asyncio.to_thread(one.process.start))
        await two.client.models.register("the-last", provider_model_id=SERVED[0])
        async with connected(one.process) as again:
            await watch_one.until_told("the-last")
            listed = await again.models()
            await watch_one.until(lambda: watch_one.models == listed)
            await watch_two.until(lambda: watch_two.models == listed)
            assert listed == await two.models()
    *changes, _ = await changes_after(database_url, first)

    assert any(call.unknown for call in storm.calls), "nothing was under way when it was killed"
    Judge(first, changes, storm.calls).check()
    assert registered(listed) == await in_database(database_url)
