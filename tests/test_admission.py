"""The places of a process and its fair queue."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from deltawire_server.admission import Admission, Place
from deltawire_server.errors import GatewayError, Reason
from deltawire_server.limits import Callers, Limits, Share, Use

ALONE = Share("alone")


async def waiting(admission: Admission, share: Share, deadline: float | None = None) -> asyncio.Task[Place]:
    """A call that waits in the queue."""

    async def wait() -> Place:
        place = admission.place()
        await place.wait(share, deadline)
        return place

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


async def full(admission: Admission) -> Place:
    """Take the only place."""
    place = admission.place()
    await place.wait(ALONE)
    return place


async def reason_of(task: asyncio.Task[Place]) -> Reason:
    """Why a call was refused."""
    with pytest.raises(GatewayError) as caught:
        await task
    return caught.value.reason


async def test_without_a_queue() -> None:
    """A call is refused at once, and counted nowhere."""
    admission = Admission(1)
    place = await full(admission)
    share = Share("a")
    assert await reason_of(await waiting(admission, share)) is Reason.TOO_MANY_STREAMS
    assert (share.used(Use.STREAMS), ALONE.used(Use.STREAMS), admission.active) == (0, 1, 1)
    place.release()
    assert (ALONE.used(Use.STREAMS), admission.active) == (0, 0)


async def test_callers_get_places_in_turn() -> None:
    """One each, however many calls of one wait; those of one caller in order."""
    admission = Admission(1, 100)
    place = await full(admission)
    noisy = [await waiting(admission, Share("noisy")) for _ in range(10)]
    quiet = [await waiting(admission, Share(name)) for name in ("a", "b")]
    assert admission.queued == 12
    order: list[asyncio.Task[Place]] = []
    for task in [*noisy, *quiet]:
        task.add_done_callback(order.append)
    while len(order) < 12:
        place.release()
        done, _ = await asyncio.wait(
            [task for task in [*noisy, *quiet] if task not in order], return_when="FIRST_COMPLETED"
        )
        (task,) = done
        place = task.result()
        assert admission.active == 1
    assert order == [noisy[0], *quiet, *noisy[1:]]
    assert admission.queued == 0
    assert place.waited > 0


async def test_a_caller_with_fewer_places_goes_first() -> None:
    """Also if it came later."""
    admission = Admission(2, 100)
    places = [admission.place(), admission.place()]
    await places[0].wait(Share("noisy"))
    await places[1].wait(Share("noisy"))
    noisy = [await waiting(admission, Share("noisy")) for _ in range(2)]
    quiet = [await waiting(admission, Share("quiet")) for _ in range(2)]
    places[0].release()
    held = await quiet[0]
    places[1].release()
    assert (await noisy[0]).taken
    assert not quiet[1].done()
    held.release()
    (await quiet[1]).release()
    (await noisy[0]).release()
    (await noisy[1]).release()


async def test_a_full_queue_is_shared() -> None:
    """The caller with the most calls loses its last one to a caller with fewer; a caller with as many is refused."""
    admission = Admission(1, 4)
    place = await full(admission)
    noisy = [await waiting(admission, Share("noisy")) for _ in range(4)]
    assert await reason_of(await waiting(admission, Share("noisy"))) is Reason.TOO_MANY_STREAMS
    quiet = [await waiting(admission, Share("quiet")) for _ in range(2)]
    assert await reason_of(noisy[3]) is Reason.TOO_MANY_STREAMS
    assert await reason_of(noisy[2]) is Reason.TOO_MANY_STREAMS
    assert await reason_of(await waiting(admission, Share("quiet"))) is Reason.TOO_MANY_STREAMS
    assert admission.queued == 4
    place.release()
    (await noisy[0]).release()
    (await quiet[0]).release()
    (await noisy[1]).release()
    (await quiet[1]).release()


async def test_a_caller_s_part_of_the_queue() -> None:
    """`queued` refuses further calls of one caller."""
    admission = Admission(1, 4)
    place = await full(admission)
    callers = Callers(Limits(queued=1))
    first = await waiting(admission, callers.share("a"))
    assert await reason_of(await waiting(admission, callers.share("a"))) is Reason.CALLER_LIMIT_EXCEEDED
    other = await waiting(admission, callers.share("b"))
    place.release()
    (await first).release()
    (await other).release()


async def test_queued_calls_count_among_the_streams_of_the_caller() -> None:
    """So that they are refused before they wait."""
    admission = Admission(1, 4)
    place = await full(admission)
    callers = Callers(Limits(streams=1))
    first = await waiting(admission, callers.share("a"))
    assert await reason_of(await waiting(admission, callers.share("a"))) is Reason.CALLER_LIMIT_EXCEEDED
    place.release()
    (await first).release()
    assert callers.share("a").used(Use.STREAMS) == 0


async def test_a_canceled_call_leaves() -> None:
    """At once, also if it is its turn in the same moment; then the next one gets the place."""
    admission = Admission(1, 4)
    place = await full(admission)
    share = Share("a")
    first, second, third = [await waiting(admission, share) for _ in range(3)]
    first.cancel()
    await asyncio.wait([first])
    assert admission.queued == 2
    place.release()
    second.cancel()
    assert (await third).taken
    assert second.cancelled()
    assert (admission.active, admission.queued, share.used(Use.STREAMS)) == (1, 0, 1)
    (await third).release()
    assert (admission.active, share.used(Use.STREAMS)) == (0, 0)


async def test_the_time_is_up() -> None:
    """Then the call is refused."""
    admission = Admission(1, 4, 0.001)
    place = await full(admission)
    assert await reason_of(await waiting(admission, Share("a"))) is Reason.TOO_MANY_STREAMS
    assert admission.queued == 0
    place.release()


async def test_a_deadline_that_will_pass() -> None:
    """The call is refused at once, as soon as it is known how fast the queue moves."""
    admission = Admission(1, 9)
    place = await full(admission)
    admission._interval = 2.0
    calls = [await waiting(admission, Share(name), 10.0) for name in "abc"]
    with pytest.raises(GatewayError) as caught:
        await (await waiting(admission, Share("d"), 5.0))
    assert caught.value.retry_after == pytest.approx(6.0)
    calls.append(await waiting(admission, Share("d"), 7.0))
    place.release()
    for call in calls:
        (await call).release()
    assert admission._interval < 2.0


async def test_close_refuses_those_that_wait() -> None:
    """And those that would wait."""
    admission = Admission(1, 9)
    place = await full(admission)
    calls = [await waiting(admission, Share(name)) for name in "aab"]
    admission.close(GatewayError(Reason.DRAINING, "closing"))
    for call in [*calls, await waiting(admission, Share("c"))]:
        assert await reason_of(call) is Reason.DRAINING
    assert (admission.queued, admission.active) == (0, 1)
    place.release()


async def test_one_noisy_caller_of_fifty() -> None:
    """It sends ten times as much, and gets what each of the others gets: Jain's index is above 0.98."""
    admission = Admission(4, 256)
    served: Counter[str] = Counter()

    async def caller(name: str) -> None:
        while sum(served.values()) < 5000:
            with admission.place() as place:
                await place.wait(Share(name))
                served[name] += sum(served.values()) < 5000  # not while the queue empties at the end
                await asyncio.sleep(0)

    names = [f"caller {number}" for number in range(49)]
    await asyncio.gather(*(caller(name) for name in names), *(caller("noisy") for _ in range(10)))
    counts = [served[name] for name in names]
    assert jain(counts) > 0.98
    assert served["noisy"] <= 1.02 * sum(counts) / len(counts)


def jain(counts: list[int]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has all."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


@pytest.mark.parametrize("how", ["canceled", "refused"])
async def test_a_call_that_leaves_in_the_moment_of_its_turn(how: str) -> None:
    """The place goes to the next call, and is counted once: the task of the one that left has not run since."""
    admission = Admission(1, 9)
    place = await full(admission)
    leaving, next_call = [await waiting(admission, Share(name)) for name in "ab"]
    if how == "canceled":
        leaving.cancel()
    else:
        admission._refuse(admission._waiting["a"][0])
    place.release()
    taken = await next_call
    if how == "canceled":
        with pytest.raises(asyncio.CancelledError):
            await leaving
    else:
        assert await reason_of(leaving) is Reason.TOO_MANY_STREAMS
    assert (admission.active, admission.queued) == (1, 0)
    taken.release()
    assert (admission.active, admission.queued) == (0, 0)
