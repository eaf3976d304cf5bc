"""Registrations, updates and removals from all sides at once: nothing is lost, doubled, reordered or half done."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deltawire_server.registry.store import ChangeKind
from tests.gateways.storm import Judge, Storm, changes_after, in_database, last_revision
from tests.gateways.support import SERVED, client_watch, following, raw_watch, registered

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways

LAST = "the-last"
"""Registered when all else is done: a watch that has told of it has told everything."""


COUNT = 1000


async def test_all_agree_after_a_storm(start_gateways: StartGateways, database_url: str) -> None:
    """Two gateways, a thousand writes at both, for names that are other models' and with etags that are old.

    Every call is told what was true at some moment while it was under way, and every change is what a call asked for: one
    that was refused has left nothing. Every watch tells every change once and in one order, the same at both gateways, and
    what it tells adds up to what both gateways list, which is what the database has.
    """
    one, two = await start_gateways("one", "two")
    first = await last_revision(database_url)
    storm = Storm([one, two], seed=1)
    async with (
        following(raw_watch(one.stub)) as raw_one,
        following(raw_watch(two.stub)) as raw_two,
        following(client_watch(one.client)) as client_one,
        following(client_watch(two.client)) as client_two,
    ):
        await storm.blow(COUNT)
        watches = (raw_one, raw_two, client_one, client_two)
        last = await one.client.models.register(LAST, provider_model_id=SERVED[0])
        # Not the registration itself, after which what it leads to may be told to be gone.
        last = await one.client.models.update(last, aliases=["the-end"])
        for watch in watches:
            await watch.until_told(LAST, last.etag)
    *changes, _, _ = history = await changes_after(database_url, first)

    assert not any(call.unknown for call in storm.calls)
    Judge(first, changes, storm.calls).check()
    # All of it was tried: else this would prove little.
    ends = Counter(call.reason for call in storm.calls)
    assert all(ends[each] > COUNT / 50 for each in ("", "MODEL_ALREADY_EXISTS", "MODEL_NOT_FOUND", "ETAG_MISMATCH"))
    assert {change.kind for change in changes} == set(ChangeKind)

    for watch in watches:
        assert watch.changes == raw_one.changes
        etags = [int(etag[1:]) for change, _, etag in watch.changes if etag and change != "REMOVED"]
        assert etags == [change.revision for change in history if change.kind is not ChangeKind.REMOVED]
    listed = await one.models()
    assert listed == await two.models()
    for watch in watches:
        assert watch.models == listed
    assert await in_database(database_url) == registered(listed)
