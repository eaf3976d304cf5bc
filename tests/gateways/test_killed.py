"""A gateway is killed during concurrent writes: its completed writes persist, and other gateways and its watchers continue."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.gateways.storm import Checker, Storm, changes_after, in_database, last_revision
from tests.gateways.support import SERVED, client_watch, connected, following, raw_watch, registered
from tests.support.gateway import until

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways

BEFORE = 100
"""The number of calls that have ended before the kill."""

UNANSWERED = 5
"""The number of its running calls at the kill."""


async def test_a_gateway_that_is_killed(start_gateways: StartGateways, database_url: str) -> None:
    """A gateway is killed during concurrent writes and restarted at the same address.

    The other gateway continues, and its watch reports every change. An interrupted call was applied fully or not at all; the
    results of all others are correct. The client's watch on the killed gateway resumes at the next process, which does not know
    its revision, and reports each missed change once: the models are those of the database.
    """
    one, two = await start_gateways("one", "two")
    first = await last_revision(database_url)
    storm = Storm([one, two], seed=2)
    async with following(client_watch(one.client)) as watch_one, following(raw_watch(two.stub)) as watch_two:
        blowing = asyncio.create_task(storm.run(300))
        await storm.until(BEFORE)
        # Paused first, so that some calls have reached it and are not answered.
        one.process.pause()
        await until(lambda: storm.under_way[one.process] >= UNANSWERED)
        await asyncio.sleep(0.1)
        one.process.kill()
        storm.gateways = [two]
        await blowing
        storm.gateways = [one, two]
        await asyncio.gather(storm.run(200), asyncio.to_thread(one.process.start))
        await two.client.models.register("the-last", provider_model_id=SERVED[0])
        async with connected(one.process) as again:
            await watch_one.until_present("the-last")
            listed = await again.models()
            await watch_one.until(lambda: watch_one.models == listed)
            await watch_two.until(lambda: watch_two.models == listed)
            assert listed == await two.models()
    *changes, _ = await changes_after(database_url, first)

    assert any(call.unknown for call in storm.calls), "nothing was under way when it was killed"
    Checker(first, changes, storm.calls).check()
    assert registered(listed) == await in_database(database_url)
