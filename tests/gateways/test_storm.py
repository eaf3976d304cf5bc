"""Concurrent registrations, updates and removals: none is lost, repeated, reordered or partial."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deltawire_server.registry.store import ChangeKind
from tests.gateways.storm import Checker, Storm, changes_after, in_database, last_revision
from tests.gateways.support import SERVED, client_watch, following, raw_watch, registered

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways

LAST = "the-last"
"""Registered last: a watch that has reported it has reported every change."""


COUNT = 1000


async def test_gateways_agree_after_concurrent_writes(start_gateways: StartGateways, database_url: str) -> None:
    """Two gateways get a thousand writes, some with names of other models and with old etags.

    The result of every call is correct at some moment during the call, and every change was requested by a call; a refused call
    changes nothing. Every watch reports every change once, in the same order at both gateways, and its models are those that both
    gateways list and the database has.
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
        await storm.run(COUNT)
        watches = (raw_one, raw_two, client_one, client_two)
        last = await one.client.models.register(LAST, provider_model_id=SERVED[0])
        # Not the registration itself, after which its target may be reported as removed.
        last = await one.client.models.update(last, aliases=["the-end"])
        for watch in watches:
            await watch.until_present(LAST, last.etag)
    *changes, _, _ = history = await changes_after(database_url, first)

    assert not any(call.unknown for call in storm.calls)
    Checker(first, changes, storm.calls).check()
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
