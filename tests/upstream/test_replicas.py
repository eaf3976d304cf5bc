"""Which replica is asked: the choice alone, on a clock that the tests set."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Code, Reason
from deltawire_server.upstream.policy import ACTIONS, MAX_ATTEMPTS, Action
from deltawire_server.upstream.replicas import (
    EJECT_SECONDS,
    MAX_EJECT_SECONDS,
    MIN_SHARE,
    RAMP_SECONDS,
    Attempt,
    Replica,
    Replicas,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """Shows the time that it is set to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock."""
    return Clock()


@pytest.fixture
def replicas(clock: Clock) -> Replicas:
    """Three: a, b and c."""
    return Replicas(["a", "b", "c"], clock)


def fail(replicas: Replicas, replica: Replica) -> float:
    """Have a call at a replica fail; for how many seconds that ejected it."""
    with replicas.attempt(replica) as attempt:
        return attempt.failed(Reason.UPSTREAM_UNAVAILABLE)


def answer(replicas: Replicas, replica: Replica) -> None:
    """Have a call at a replica answered."""
    with replicas.attempt(replica) as attempt:
        attempt.answered()


def chosen(replicas: Replicas, count: int) -> str:
    """The replicas that calls one after another go to."""
    return "".join(replicas.choose().root for _ in range(count))


def test_equals_take_turns(replicas: Replicas) -> None:
    """With no call under way, calls one after another go round."""
    assert chosen(replicas, 7) == "abcabca"


def test_the_fewest_streams(replicas: Replicas) -> None:
    """Each call goes where the fewest are under way, whatever the turn."""
    a, b, c = replicas.all
    with replicas.attempt(a), replicas.attempt(a), replicas.attempt(c):
        assert replicas.choose() is b
        with replicas.attempt(b), replicas.attempt(b):
            assert replicas.choose() is c
    assert [replica.streams for replica in replicas.all] == [0, 0, 0]


def test_one_that_was_busy_does_not_catch_up(replicas: Replicas) -> None:
    """Once it has as few streams as the others, it gets about as many calls as they do."""
    a, *_ = replicas.all
    with replicas.attempt(a):
        assert chosen(replicas, 20) == "bc" * 10
    assert min(Counter(chosen(replicas, 30)).values()) >= 9


def test_a_call_that_raises_is_no_longer_counted(replicas: Replicas) -> None:
    """Otherwise a replica would look busy for ever."""
    with pytest.raises(ZeroDivisionError), replicas.attempt(replicas.all[0]):
        _ = 1 / 0
    assert replicas.all[0].streams == 0


def test_one_that_fails_is_ejected_and_returns_slowly(replicas: Replicas, clock: Clock) -> None:
    """Ejected, on probation with one call at a time, returning, available."""
    a, b, c = replicas.all
    assert fail(replicas, a) == EJECT_SECONDS
    assert (a.state, a.failures) == (State.EJECTED, 1)
    with contextlib.ExitStack() as calls:
        for replica in (b, c) * 5:
            calls.enter_context(replicas.attempt(replica))
        assert chosen(replicas, 4) == "bcbc"
        clock.now += EJECT_SECONDS
        assert a.state is State.PROBATION
        assert replicas.choose() is a
        with replicas.attempt(a) as probe:
            assert chosen(replicas, 2) == "bc"
            probe.answered()
            assert (a.state, a.share) == (State.RETURNING, MIN_SHARE)
    clock.now += RAMP_SECONDS / 2
    assert a.share == pytest.approx((1 + MIN_SHARE) / 2)
    clock.now += RAMP_SECONDS / 2
    assert (a.state, a.share) == (State.AVAILABLE, 1.0)


def test_the_share_of_one_that_returns_grows(replicas: Replicas, clock: Clock) -> None:
    """Also of calls one after another, that have no streams to count."""
    a, *_ = replicas.all
    fail(replicas, a)
    clock.now += EJECT_SECONDS
    answer(replicas, a)
    shares = []
    for _ in range(3):
        shares.append(chosen(replicas, 420).count("a") / 420)
        clock.now += RAMP_SECONDS / 2
    # A tenth of what each of the others gets, then about a half, then all of it.
    assert shares == pytest.approx([0.1 / 2.1, 0.55 / 2.55, 1 / 3], abs=0.01)


def test_ejections_grow_until_it_answers_for_long_enough(replicas: Replicas, clock: Clock) -> None:
    """Twice as long each time, up to a minute; after a whole ramp without failure the next one is short again."""
    a, *_ = replicas.all
    seconds = []
    for _ in range(6):
        seconds.append(fail(replicas, a))
        clock.now += seconds[-1]
    assert seconds == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    answer(replicas, a)
    clock.now += RAMP_SECONDS - 1
    assert fail(replicas, a) == MAX_EJECT_SECONDS
    clock.now += MAX_EJECT_SECONDS
    answer(replicas, a)
    clock.now += RAMP_SECONDS
    assert fail(replicas, a) == EJECT_SECONDS


def test_calls_from_before_an_ejection_say_nothing(replicas: Replicas, clock: Clock) -> None:
    """Fifty calls that fail together are one failure; and one that went out earlier does not end the ejection."""
    a, *_ = replicas.all
    with contextlib.ExitStack() as calls:
        early: list[Attempt] = [calls.enter_context(replicas.attempt(a)) for _ in range(50)]
        assert [attempt.failed(Reason.UPSTREAM_UNAVAILABLE) for attempt in early[:48]] == [EJECT_SECONDS] + [0.0] * 47
        early[48].answered()
        assert replicas.in_order()[-1] is a
        clock.now += EJECT_SECONDS
        assert early[49].failed(Reason.UPSTREAM_UNAVAILABLE) == 0.0
        assert a.state is State.PROBATION
    assert a.failures == 49


def test_the_last_one_is_never_ejected(replicas: Replicas, clock: Clock) -> None:
    """The one that was ejected first is tried at once instead; as soon as it answers, the last one can be ejected."""
    a, b, c = replicas.all
    fail(replicas, a)
    clock.now += 1
    fail(replicas, b)
    assert fail(replicas, c) == 0.0
    assert [replica.state for replica in replicas.all] == [State.PROBATION, State.EJECTED, State.AVAILABLE]
    assert fail(replicas, c) == 0.0  # one on probation does not count
    clock.now += 1
    assert fail(replicas, a) == 2 * EJECT_SECONDS
    assert replicas.choose() is c
    assert fail(replicas, c) == 0.0
    assert b.state is State.PROBATION
    answer(replicas, b)
    assert fail(replicas, c) == EJECT_SECONDS
    assert replicas.choose() is b


def test_an_only_one_is_never_ejected(clock: Clock) -> None:
    """There is no other."""
    replicas = Replicas(["a"], clock)
    assert fail(replicas, replicas.all[0]) == 0.0
    assert replicas.choose().state is State.AVAILABLE


def test_without_a_better_choice_the_least_recently_ejected(replicas: Replicas, clock: Clock) -> None:
    """For the second attempt of a call: in turn, and one that answers is back at once."""
    a, b, c = replicas.all
    for replica in (b, a):
        fail(replicas, replica)
        clock.now += 1
    assert replicas.choose([c]) is b
    fail(replicas, b)
    assert replicas.choose([c]) is a
    answer(replicas, a)
    assert a.state is State.RETURNING


def test_one_on_probation_with_a_call_comes_after_the_available(replicas: Replicas, clock: Clock) -> None:
    """It may take minutes to the first event."""
    a, *_ = replicas.all
    fail(replicas, a)
    clock.now += EJECT_SECONDS
    with replicas.attempt(a):
        assert set(chosen(replicas, 10)) == {"b", "c"}
    assert replicas.choose() is a  # the call left without an answer


def test_in_order(replicas: Replicas, clock: Clock) -> None:
    """The same first one each time, busy or not, and the ejected ones last."""
    a, b, c = replicas.all
    with replicas.attempt(a):
        assert replicas.in_order() == (a, b, c)
    fail(replicas, a)
    assert replicas.in_order() == (b, c, a)
    clock.now += EJECT_SECONDS
    assert replicas.in_order() == (a, b, c)


def test_addresses() -> None:
    """What people see is where chat and listings are."""
    assert Replica("http://h/prefix").base_url == "http://h/prefix/v1"


def test_the_policy_has_a_row_for_every_reason() -> None:
    """A new reason needs a decision; and only what can pass by itself or lies with one replica is repeated."""
    assert ACTIONS.keys() == {*Reason}
    repeated = {reason for reason, action in ACTIONS.items() if action.repeat}
    assert repeated == {
        Reason.UPSTREAM_UNAVAILABLE,
        Reason.UPSTREAM_OVERLOADED,
        Reason.UPSTREAM_MALFORMED,
        Reason.PROVIDER_MISCONFIGURED,
    }
    for reason, action in ACTIONS.items():
        assert not action.repeat or action.eject
        assert not (action.answer and (action.repeat or action.eject))
        if action.answer:
            assert reason.code not in (Code.UNAVAILABLE, Code.INTERNAL, Code.RESOURCE_EXHAUSTED)
    assert ACTIONS[Reason.UPSTREAM_ERROR] == Action(eject=True, eject_after_start=True)
    assert ACTIONS[Reason.UPSTREAM_TIMEOUT] == Action(eject=True, eject_after_start=True)


def simulate(outcome: Callable[[str, float], Reason | None], seconds: float, at_once: int = 30) -> Counter[str]:
    """Run callers that call without pause, each answer taking a second and each failure 10 ms.

    Args:
        outcome: Of a call at a replica at a time from 0: why it fails, or `None`.
        seconds: How long.
        at_once: How many callers.

    Returns:
        How many calls each replica answered, by its name; failed calls as "failed", second attempts as "repeated".
    """
    clock = Clock()
    replicas = Replicas(["a", "b", "c"], clock)
    begin, counts, numbers = clock.now, Counter[str](), itertools.count()
    events: list[tuple[float, int, Callable[[], None]]] = []

    def ask(asked: tuple[Replica, ...] = ()) -> None:
        replica = replicas.choose(asked)
        held = contextlib.ExitStack()
        attempt = held.enter_context(replicas.attempt(replica))
        reason = outcome(replica.root, clock.now - begin)

        def end() -> None:
            if reason is None:
                attempt.answered()
                counts[replica.root] += 1
            elif ACTIONS[reason].eject:
                attempt.failed(reason)
            held.close()
            if reason is not None and ACTIONS[reason].repeat and len(asked) + 1 < MAX_ATTEMPTS:
                counts["repeated"] += 1
                ask((*asked, replica))
                return
            counts["failed"] += reason is not None
            ask()

        # With a little difference between callers, as in production: otherwise all of them end and begin at once.
        number = next(numbers)
        heapq.heappush(events, (clock.now + (1.0 if reason is None else 0.01) + number % 7 * 1e-3, number, end))

    for _ in range(at_once):
        ask()
    while events[0][0] < begin + seconds:
        clock.now, _, end = heapq.heappop(events)
        end()
    return counts


@pytest.mark.parametrize("reason", [reason for reason, action in ACTIONS.items() if action.eject])
def test_a_replica_that_fails_fast_does_not_eat_the_load(reason: Reason) -> None:
    """200 seconds of 30 calls at a time, one of three replicas failing all of its calls within 10 ms.

    By the fewest streams alone it would get most calls. What may be repeated costs no call at all; what may not costs the
    calls that are under way when it begins to fail, and one for each time that it is tried again.
    """
    counts = simulate(lambda root, now: reason if root == "b" and now > 20 else None, 200)
    answered = counts["a"] + counts["c"]
    assert answered > 5_700
    assert abs(counts["a"] - counts["c"]) < 0.01 * answered
    tries = counts["repeated"] if ACTIONS[reason].repeat else counts["failed"]
    assert tries + counts["failed"] * ACTIONS[reason].repeat < 40
    assert counts["repeated"] == 0 or counts["failed"] == 0


def test_a_replica_that_is_repaired_gets_its_share_back() -> None:
    """Within a minute and a ramp of being repaired."""
    counts = simulate(lambda root, now: Reason.UPSTREAM_UNAVAILABLE if root == "b" and 100 < now < 200 else None, 300)
    assert counts["failed"] == 0
    late = simulate(lambda root, now: Reason.UPSTREAM_UNAVAILABLE if root == "b" and 100 < now < 200 else None, 400)
    late.subtract(counts)
    assert late["b"] == pytest.approx(late["a"], rel=0.02) == pytest.approx(late["c"], rel=0.02)


def test_all_replicas_that_fail_are_asked_no_more_than_twice_a_call() -> None:
    """The load of a fault that all have is at most doubled, and they are found again within a minute."""
    counts = simulate(lambda _, now: Reason.UPSTREAM_UNAVAILABLE if now < 20 else None, 140)
    assert counts["repeated"] <= counts["failed"] + 30
    assert counts["a"] + counts["b"] + counts["c"] > 0.9 * 30 * 120
    assert min(counts[root] for root in "abc") > 200


def test_calls_that_are_refused_for_their_own_sake_eject_no_replica() -> None:
    """The load stays even."""
    counts = simulate(lambda _, now: Reason.UPSTREAM_REJECTED if int(now * 10) % 3 == 0 else None, 60)
    assert counts["repeated"] == 0
    answered = [counts[root] for root in "abc"]
    assert max(answered) - min(answered) < 0.05 * max(answered)
