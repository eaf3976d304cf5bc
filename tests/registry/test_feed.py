"""The feed: the order of the steps of a watch, and how a watch ends."""

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
    """The next steps of a watch."""
    async with asyncio.timeout(WAIT):
        return [await anext(steps) for _ in range(count)]


async def ended(steps: AsyncGenerator[Step]) -> tuple[list[Step], DeltawireError]:
    """The remaining steps of a watch that fails, and its error."""
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
    """The steps of a snapshot have no revision, because it must be received completely; all later steps have one."""
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
    """A watcher learns at once that there are no models."""
    feed = Feed()
    async with aclosing(feed.watch()) as steps:
        assert await take(steps, 1) == [Step(None, None, feed.revision)]


async def test_changes_during_a_snapshot_come_after_its_bookmark() -> None:
    """Each change comes once; the bookmark has the revision of the snapshot."""
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
    """Changes before the first step are in the snapshot, later ones after it."""
    feed = feed_of(A)
    steps = feed.watch()
    feed.publish(ADDED, B)
    async with aclosing(steps):
        await take(steps, 1)
        feed.publish(ADDED, C)
        assert changes(await take(steps, 3)) == [(ADDED, "b"), (None, ""), (ADDED, "c")]


async def test_resuming_at_any_revision() -> None:
    """The missed changes, then a bookmark; also if no change was missed."""
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


async def test_a_resumed_watch_has_its_bookmark_after_the_changes_before_it_began() -> None:
    """Later changes follow the bookmark; otherwise, frequent changes would delay it forever."""
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
    """Three hundred changes of one model are one entry; the entries of other models are kept."""
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


async def test_superseded_changes_use_no_memory() -> None:
    """Dropped entries are removed from the log, and the places of the others do not change."""
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
    """A model that was added after the watcher's revision is ADDED, others are MODIFIED."""
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
async def test_steps_lead_to_the_current_models(actions: list[tuple[str, int] | int], superseded: int) -> None:
    """A watcher that sometimes reads a few steps has the current models in the end; MODIFIED is always of a model that it has.

    If no entry was dropped, each step makes a difference.
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


async def test_changes_of_all_models_of_a_large_provider_end_no_watch() -> None:
    """Every model changes several times while a watcher does not read: it receives each once. Then all are removed."""
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


async def test_the_memory_of_superseded_changes_is_limited() -> None:
    """Three hundred updates of a large model use no more than the limit; a watcher that reads receives each."""
    feed = Feed()
    notes = [replace(A, annotations={str(turn): chr(97 + turn % 26) * 65_000}) for turn in range(300)]
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for model in notes:
            feed.publish(MODIFIED, model)
            assert [step.model for step in await take(steps, 1)] == [model]
    assert SUPERSEDED_BYTES - 70_000 < feed._superseded_size <= SUPERSEDED_BYTES
    assert feed.entries == SUPERSEDED_BYTES // 66_000 + 1


async def test_the_memory_of_removed_models_is_limited() -> None:
    """Above the limit, the oldest is dropped, and a watch cannot resume before it."""
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


async def test_the_last_removed_model_is_always_kept() -> None:
    """So a watcher that reads each change is never ended."""
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
async def test_an_invalid_revision(edit: Callable[[Feed], str]) -> None:
    """The error is REVISION_GONE before any step, and does not repeat the revision."""
    feed = Feed()
    feed.publish(ADDED, A)
    revision = edit(feed)
    rest, failure = await ended(feed.watch(revision))
    assert (rest, failure.reason) == ([], Reason.REVISION_GONE)
    assert revision not in failure.message


async def test_revisions_of_two_processes_differ() -> None:
    """Otherwise a watch would resume between the changes of another process."""
    assert len({Feed().revision for _ in range(100)}) == 100


async def test_a_watcher_that_misses_dropped_changes_ends_and_no_other() -> None:
    """A watcher that does not read while many models are removed is ended; one that reads each change is not."""
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


async def test_a_watcher_that_misses_changes_during_its_snapshot_receives_all_of_it() -> None:
    """The watch ends after the snapshot."""
    feed = feed_of(A, B, removed_bytes=1)
    async with aclosing(feed.watch()) as steps:
        begun = feed.revision
        await take(steps, 1)
        feed.publish(REMOVED, C)
        feed.publish(REMOVED, D)
        rest, failure = await ended(steps)
    assert rest == [Step(ADDED, B, ""), Step(None, None, begun)]
    assert failure.reason is Reason.SLOW_WATCHER


async def test_bookmarks_without_changes() -> None:
    """One after each interval, with the same revision; later changes follow."""
    feed = Feed(bookmark_seconds=0.001)
    async with aclosing(feed.watch()) as steps:
        assert await take(steps, 3) == [Step(None, None, feed.revision)] * 3
        feed.publish(ADDED, A)
        assert await take(steps, 2) == [Step(ADDED, A, feed.revision), Step(None, None, feed.revision)]


async def test_no_bookmarks_between_changes() -> None:
    """Changes also show that the watch works."""
    feed = Feed()
    async with aclosing(feed.watch()) as steps:
        await take(steps, 1)
        for model in (A, B, C, D) * 25:
            feed.publish(MODIFIED, model)
            assert await take(steps, 1) == [Step(MODIFIED, model, feed.revision)]


async def test_a_change_wakes_all_waiting_watchers() -> None:
    """Each receives it once."""
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
    """While it waits, in its snapshot, or with changes to come; also a watch that begins later."""
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


async def test_a_closed_watch_leaves_no_task() -> None:
    """Neither while it waits nor between steps; other watches continue."""
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


async def test_a_revision_of_another_scope_is_gone() -> None:
    """The watcher has other models then; within its scope it resumes."""
    feed = Feed()
    async with aclosing(feed.watch(scope="a")) as steps:
        (bookmark,) = await take(steps, 1)
    for scope in ("", "b"):
        with pytest.raises(CallerError) as caught:
            await take(feed.watch(bookmark.revision, scope), 1)
        assert caught.value.reason is Reason.REVISION_GONE
    with pytest.raises(CallerError):
        await take(feed.watch(feed.revision, "a"), 1)
    async with aclosing(feed.watch(bookmark.revision, "a")) as steps:
        assert changes(await take(steps, 1)) == [(None, "")]


async def test_an_interruption_ends_all_watches() -> None:
    """Each ends at its next step, also while it waits. It can be resumed at its revision without missing a change."""
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
