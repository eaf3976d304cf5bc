"""The feed of changes: what each watcher gets, in which order, and how a watch ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire_server.errors import CallerError, Code, DeltawireError, GatewayError, Reason
from deltawire_server.registry.feed import REMOVED_BYTES, SUPERSEDED_BYTES, Feed, Step
from deltawire_server.registry.model import Model
from deltawire_server.registry.store import ChangeKind
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

ADDED, MODIFIED, REMOVED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.REMOVED
A, B, C, D = (Model(name, "p", name) for name in "abcd")


def feed_of(*models: Model, removed_bytes: int = REMOVED_BYTES) -> Feed:
    """A feed with these models."""
    feed = Feed(removed_bytes=removed_bytes)
    for model in models:
        feed.publish(ADDED, model)
    return feed


async def take(steps: AsyncGenerator[Step], count: int) -> list[Step]:
    """The next steps."""
    async with asyncio.timeout(WAIT):
        return [await anext(steps) for _ in range(count)]


async def ended(steps: AsyncGenerator[Step]) -> tuple[list[Step], DeltawireError]:
    """What still comes before a watch fails, and what it fails with."""
    rest: list[Step] = []
    try:
        async with asyncio.timeout(WAIT):
            while True:
                rest.append(await anext(steps))
    except DeltawireError as failure:
        return rest, failure


def changes(steps: Sequence[Step]) -> list[tuple[ChangeKind | None, str]]:
    """The kind and the model of each step; bookmarks have neither."""
    return [(step.kind, step.model.id if step.model else "") for step in steps]


async def test_a_snapshot_a_bookmark_then_changes() -> None:
    """The snapshot has no revisions, since it has to be seen whole; from the bookmark on each step has one of its own."""
    feed = feed_of(A, B)
    async with aclosing(feed.watch()) as steps:
        first = await take(steps, 3)
        assert first == [Step(ADDED, A, ""), Step(ADDED, B, ""), Step(None, None, feed.revision)]
        feed.publish(MODIFIED, A)
        after_one = feed.revision
        assert await take(steps, 1) == [Step(MODIFIED, A, after_one)]
        feed.publish(REMOVED, B)
        assert await take(steps, 1) == [Step(REMOVED, B, feed.revision)]
        assert len({first[-1].revision, after_one, feed.revision}) == 3


async def test_an_empty_snapshot_is_a_bookmark() -> None:
    """The watcher hears at once that there is nothing, and is not left to wonder."""
    feed = Feed()
    async with aclosing(feed.watch()) as steps:
        assert await take(steps, 1) == [Step(None, None, feed.revision)]


async def test_changes_during_a_snapshot_come_after_its_bookmark() -> None:
    """Each once and none lost, however the snapshot and they overlap; the bookmark's state is the snapshot's."""
    feed = feed_of(A, B)
    async with aclosing(feed.watch()) as steps:
        before = feed.revision
        await take(steps, 1)
        feed.publish(REMOVED, A)
        feed.publish(ADDED, C)
        assert changes(await take(steps, 1)) == [(ADDED, "b")]
        feed.publish(MODIFIED, C)
        assert await take(steps, 1) == [Step(None, None, before)]
        feed.publish(ADDED, D)
        assert changes(await take(steps, 4)) == [(REMOVED, "a"), (ADDED, "c"), (MODIFIED, "c"), (ADDED, "d")]
    async with aclosing(feed.watch(before)) as again:
        assert changes(await take(again, 4)) == [(REMOVED, "a"), (ADDED, "c"), (MODIFIED, "c"), (ADDED, "d")]


async def test_the_snapshot_is_taken_when_the_watch_begins() -> None:
    """Not when it was asked for, and not model by model: what comes between is in it or after it, never both."""
    feed = feed_of(A)
    steps = feed.watch()
    feed.publish(ADDED, B)
    async with aclosing(steps):
        await take(steps, 1)
        feed.publish(ADDED, C)
        assert changes(await take(steps, 3)) == [(ADDED, "b"), (None, ""), (ADDED, "c")]


async def test_going_on_from_any_step_repeats_and_misses_nothing() -> None:
    """What was missed, then a bookmark, then what comes; also if nothing was missed."""
    feed = Feed()
    revisions = [feed.revision]
    told = [(ADDED, A), (MODIFIED, A), (ADDED, B)]
    for kind, model in told:
        feed.publish(kind, model)
        revisions.append(feed.revision)
    for place, revision in enumerate(revisions):
        async with aclosing(feed.watch(revision)) as steps:
            missed = [Step(kind, model, at) for (kind, model), at in zip(told, revisions[1:], strict=True)]
            assert await take(steps, len(told) - place) == missed[place:]
            assert await take(steps, 1) == [Step(None, None, feed.revision)]


async def test_a_resumed_watch_has_its_bookmark_where_it_had_caught_up() -> None:
    """Changes that come while it catches up follow the bookmark: under steady changes it would never come else."""
    feed = Feed()
    start = feed.revision
    feed.publish(ADDED, A)
    feed.publish(ADDED, B)
    begun = feed.revision
    async with aclosing(feed.watch(start)) as steps:
        await take(steps, 1)
        feed.publish(ADDED, C)
        assert await take(steps, 3) == [
            Step(ADDED, B, begun),
            Step(None, None, begun),
            Step(ADDED, C, feed.revision),
        ]


async def test_only_the_last_change_of_a_model_is_kept() -> None:
    """Three hundred changes of one model are one entry, which a watcher that did not read gets; the others it gets as well."""
    feed = Feed(superseded_bytes=0)
    start = feed.revision
    feed.publish(ADDED, A)
    between = feed.revision
    for number in range(300):
        feed.publish(MODIFIED, replace(B, annotations={"turn": str(number)}))
    feed.publish(ADDED, C)
    assert feed.entries == 3
    last = replace(B, annotations={"turn": "299"})
    async with aclosing(feed.watch(start)) as steps:
        assert [(step.kind, step.model) for step in await take(steps, 4)] == [
            (ADDED, A),
            (MODIFIED, last),
            (ADDED, C),
            (None, None),
        ]
    async with aclosing(feed.watch(between)) as steps:
        assert changes(await take(steps, 3)) == [(MODIFIED, "b"), (ADDED, "c"), (None, "")]


async def test_what_was_superseded_leaves_no_memory() -> None:
    """Neither the models nor entries without them: the log is rewritten, and its places stay."""
    feed = Feed(superseded_bytes=0)
    models = [replace(A, annotations={"turn": str(number)}) for number in range(10_000)]
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        feed.publish(ADDED, B)
        for model in models:
            feed.publish(MODIFIED, model)
        assert len(feed._log) < 2000
        assert await take(steps, 2) == [
            Step(ADDED, B, feed.revision.partition("-")[0] + "-1"),
            Step(MODIFIED, models[-1], feed.revision),
        ]


async def test_a_model_that_a_watcher_has_not_seen_is_added() -> None:
    """Whatever became of it since it was added; one that the watcher has seen is modified."""
    feed = Feed(superseded_bytes=0)
    start = feed.revision
    feed.publish(ADDED, A)
    seen = feed.revision
    feed.publish(ADDED, B)
    feed.publish(MODIFIED, A)
    feed.publish(MODIFIED, B)
    async with aclosing(feed.watch(start)) as steps:
        assert changes(await take(steps, 2)) == [(ADDED, "a"), (ADDED, "b")]
    async with aclosing(feed.watch(seen)) as steps:
        assert changes(await take(steps, 2)) == [(MODIFIED, "a"), (ADDED, "b")]
    feed.publish(REMOVED, B)
    async with aclosing(feed.watch(seen)) as steps:
        assert changes(await take(steps, 2)) == [(MODIFIED, "a"), (REMOVED, "b")]
    feed.publish(ADDED, B)
    feed.publish(MODIFIED, B)
    async with aclosing(feed.watch(seen)) as steps:
        assert changes(await take(steps, 2)) == [(MODIFIED, "a"), (ADDED, "b")]


@given(
    st.lists(st.one_of(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), st.integers(1, 4)), max_size=40),
    st.sampled_from([0, 1500, 1_000_000]),
)
async def test_whatever_is_merged_the_changes_add_up(actions: list[tuple[str, int] | int], superseded: int) -> None:
    """A watcher that reads now and then, a few steps at a time, knows what there is in the end; what is modified it knew.

    Where nothing was dropped, each change is also news to it.
    """
    feed = Feed(superseded_bytes=superseded)
    exact = superseded > 1500
    there: dict[str, Model] = {}
    known: dict[str, Model] = {}
    revision = feed.revision

    async def read(count: int) -> None:
        nonlocal revision
        async with aclosing(feed.watch(revision)) as steps:
            for _ in range(count):
                (step,) = await take(steps, 1)
                revision = step.revision
                if step.model is None:
                    return
                if step.kind is REMOVED:
                    assert known.pop(step.model.id, None) or not exact
                    continue
                assert step.kind is ADDED or step.model.id in known
                assert not (exact and step.kind is ADDED and step.model.id in known)
                known[step.model.id] = step.model

    for action in actions:
        if isinstance(action, int):
            await read(action)
            continue
        name, number = action
        before = there.pop(name, None)
        if number:
            now = there[name] = Model(name, "p", name, annotations={"n": str(number)})
            if now != before:
                feed.publish(MODIFIED if before else ADDED, now)
        elif before is not None:
            feed.publish(REMOVED, before)
    await read(len(actions) + 1)
    assert known == there


async def test_a_provider_of_20000_models_that_goes_down_and_away_cuts_no_watcher() -> None:
    """Every model changes, again and again, while a watcher reads nothing: it gets each once. Then all are removed."""
    feed = Feed()
    models = [Model(f"vllm/organization/model-{number:05}", "vllm", f"model-{number:05}") for number in range(20_000)]
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for kind in (ADDED, MODIFIED, MODIFIED):
            for model in models:
                feed.publish(kind, model)
        kept = feed.entries - len(models)
        assert 1000 < kept < len(models)
        assert changes(await take(steps, kept)) == [(ADDED, model.id) for model in models[-kept:]]
        assert changes(await take(steps, 20_000)) == [(ADDED, model.id) for model in models]
        for model in models:
            feed.publish(REMOVED, model)
        assert changes(await take(steps, 20_000)) == [(REMOVED, model.id) for model in models]
    assert feed._removed_size < REMOVED_BYTES


async def test_superseded_changes_are_kept_by_their_memory() -> None:
    """Three hundred updates of a model with many notes leave no more than the limit; watchers that read see each."""
    feed = Feed()
    notes = [replace(A, annotations={str(turn): chr(97 + turn % 26) * 65_000}) for turn in range(300)]
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for model in notes:
            feed.publish(MODIFIED, model)
            assert [step.model for step in await take(steps, 1)] == [model]
    assert SUPERSEDED_BYTES - 70_000 < feed._superseded_size <= SUPERSEDED_BYTES
    assert feed.entries == SUPERSEDED_BYTES // 66_000 + 1


async def test_removed_models_are_kept_by_their_memory() -> None:
    """Up to the limit they can be missed; one more, and the oldest is forgotten: a watch from before it cannot go on."""
    notes = {"k": "x" * 1000}
    feed = Feed(removed_bytes=4000)
    revisions = [feed.revision]
    for model in (A, B, C, D):
        feed.publish(REMOVED, replace(model, annotations=notes))
        revisions.append(feed.revision)
    kept = feed.entries
    assert kept in (2, 3)
    async with aclosing(feed.watch(revisions[4 - kept])) as steps:
        assert changes(await take(steps, kept)) == [(REMOVED, each) for each in "abcd"[4 - kept :]]
    rest, failure = await ended(feed.watch(revisions[3 - kept]))
    assert (rest, failure.reason, failure.code) == ([], Reason.REVISION_GONE, Code.OUT_OF_RANGE)
    assert isinstance(failure, CallerError)
    assert "without a revision" in failure.message


async def test_the_last_removed_model_is_kept_whatever_its_size() -> None:
    """A watcher that reads is never cut."""
    feed = Feed(removed_bytes=1)
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for model in (A, B, C):
            feed.publish(REMOVED, model)
            assert changes(await take(steps, 1)) == [(REMOVED, model.id)]


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda _: Feed().revision, id="of another process"),
        pytest.param(lambda feed: feed.revision[:-1] + "2", id="not there yet"),
        pytest.param(lambda feed: feed.revision[:-1], id="no place"),
        pytest.param(lambda feed: feed.revision[:-1] + "-1", id="below the first"),
        pytest.param(lambda feed: feed.revision[:-1] + "\u0661", id="another script's digit"),
        pytest.param(lambda feed: feed.revision[:-1] + "²", id="a digit that is no number"),
        pytest.param(lambda feed: feed.revision[:-1] + "1" * 10_000, id="long"),
        pytest.param(lambda feed: feed.revision + " ", id="a blank"),
        pytest.param(lambda _: "nonsense", id="nonsense"),
        pytest.param(lambda feed: feed.revision + "-2", id="complete after its place"),
        pytest.param(lambda feed: feed.revision + "-0-0", id="three places"),
        pytest.param(lambda feed: feed.revision + "-x", id="complete nowhere"),
        pytest.param(lambda _: "-1", id="no epoch"),
    ],
)
async def test_a_revision_that_leads_nowhere(edit: Callable[[Feed], str]) -> None:
    """Is gone, whatever it is, before any step; and nothing of it is repeated in the message."""
    feed = Feed()
    feed.publish(ADDED, A)
    revision = edit(feed)
    rest, failure = await ended(feed.watch(revision))
    assert (rest, failure.reason) == ([], Reason.REVISION_GONE)
    assert revision not in failure.message


async def test_two_processes_share_no_revision() -> None:
    """Or one would go on in the midst of another's changes."""
    assert len({Feed().revision for _ in range(100)}) == 100


async def test_a_watcher_that_misses_dropped_changes_is_cut_and_no_other() -> None:
    """A watcher that takes nothing while very much is removed; one that takes each change loses none of them."""
    feed = Feed(removed_bytes=1)
    async with aclosing(feed.watch()) as slow, aclosing(feed.watch()) as quick:
        await take(slow, 1)
        await take(quick, 1)
        for model in (A, B):
            feed.publish(REMOVED, model)
            assert changes(await take(quick, 1)) == [(REMOVED, model.id)]
        rest, failure = await ended(slow)
        assert (rest, failure.reason, failure.code) == ([], Reason.SLOW_WATCHER, Code.RESOURCE_EXHAUSTED)
        assert isinstance(failure, GatewayError)
        assert failure.metadata == {"limit_bytes": "1"}
        assert failure.message.startswith("since the last message of this watch, more models were removed")
        assert "without a revision" in failure.message
        feed.publish(ADDED, D)
        assert changes(await take(quick, 1)) == [(ADDED, "d")]


async def test_who_misses_something_during_its_snapshot_still_gets_it_whole() -> None:
    """And is cut after it: what it lacks then is not known any more."""
    feed = feed_of(A, B, removed_bytes=1)
    async with aclosing(feed.watch()) as steps:
        begun = feed.revision
        await take(steps, 1)
        feed.publish(REMOVED, C)
        feed.publish(REMOVED, D)
        rest, failure = await ended(steps)
    assert rest == [Step(ADDED, B, ""), Step(None, None, begun)]
    assert failure.reason is Reason.SLOW_WATCHER


async def test_silence_is_told_by_bookmarks() -> None:
    """One after each silence, all of the same revision since nothing changes; then the changes go on from there."""
    feed = Feed(bookmark_seconds=0.001)
    async with aclosing(feed.watch()) as steps:
        assert await take(steps, 3) == [Step(None, None, feed.revision)] * 3
        feed.publish(ADDED, A)
        assert await take(steps, 2) == [Step(ADDED, A, feed.revision), Step(None, None, feed.revision)]


async def test_no_bookmark_while_there_is_something_to_tell() -> None:
    """Only silence needs one: a change says as well that the watch goes on, and where."""
    feed = Feed()
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for model in (A, B, C, D) * 25:
            feed.publish(MODIFIED, model)
            assert await take(steps, 1) == [Step(MODIFIED, model, feed.revision)]


async def test_a_watcher_that_waits_is_woken_by_a_change() -> None:
    """All of those that wait, and each once."""
    feed = Feed()
    watches = [feed.watch() for _ in range(5)]
    for steps in watches:
        await take(steps, 1)
    waiting = [asyncio.create_task(take(steps, 1)) for steps in watches]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    feed.publish(ADDED, A)
    async with asyncio.timeout(WAIT):
        assert await asyncio.gather(*waiting) == [[Step(ADDED, A, feed.revision)]] * 5
    for steps in watches:
        await steps.aclose()


async def test_closing_ends_every_watch_at_once() -> None:
    """In whatever it is: waiting, in its snapshot, with changes to come; and those that only now begin."""
    feed = feed_of(A, B)
    start = feed.revision
    waiting, in_snapshot, behind = feed.watch(start), feed.watch(), feed.watch(start)
    for steps in (waiting, in_snapshot, behind):
        await take(steps, 1)
    end = asyncio.create_task(ended(waiting))
    await asyncio.sleep(0)
    feed.publish(MODIFIED, A)
    assert changes(await take(behind, 1)) == [(MODIFIED, "a")]
    feed.publish(MODIFIED, B)
    feed.close()
    results = [await end]
    results += [await ended(steps) for steps in (in_snapshot, behind, feed.watch(), feed.watch(start))]
    for rest, failure in results:
        assert rest == []
        assert (failure.reason, failure.code, failure.retry_after) == (Reason.DRAINING, Code.UNAVAILABLE, 0.0)
        assert isinstance(failure, GatewayError)


async def test_leaving_a_watch_leaves_nothing() -> None:
    """Neither while it waits nor between its steps; the others go on."""
    feed = Feed()
    left, stays = feed.watch(), feed.watch()
    await take(left, 1)
    await take(stays, 1)
    waiting = asyncio.create_task(take(left, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await left.aclose()
    feed.publish(ADDED, A)
    assert changes(await take(stays, 1)) == [(ADDED, "a")]
    await stays.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_interruption_ends_the_watches_there_are() -> None:
    """Each at its next step, also one that waits; whoever comes again, from where it was, is let in and misses nothing."""
    feed = Feed()
    async with aclosing(feed.watch()) as steps:
        (bookmark,) = await take(steps, 1)
        waiting = asyncio.create_task(anext(steps))
        await asyncio.sleep(0)
        feed.interrupt()
        with pytest.raises(GatewayError) as caught:
            await waiting
    assert (caught.value.reason, caught.value.code) == (Reason.ACCESS_CHANGED, Code.ABORTED)
    feed.publish(ADDED, A)
    async with aclosing(feed.watch(bookmark.revision)) as steps:
        assert changes(await take(steps, 2)) == [(ADDED, "a"), (None, "")]
