"""Which replica is asked: the choice alone, on a clock that the tests turn."""

from __future__ import annotations

import pytest

from deltawire_server.upstream.replicas import ASIDE_SECONDS, Replica, Replicas


class Clock:
    """Shows the time it is told to."""

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


def first(replicas: Replicas) -> Replica:
    """Whom the next call goes to."""
    return next(replicas.by_load())


def order(replicas: Replicas) -> str:
    """Whom a call asks that nobody answers."""
    return "".join(replica.root for replica in replicas.by_load())


def test_equals_take_turns(replicas: Replicas) -> None:
    """With nothing under way, calls one after another go round."""
    assert [first(replicas).root for _ in range(7)] == [*"abcabca"]


def test_the_fewest_streams(replicas: Replicas) -> None:
    """Each call goes where the least is under way, whoever's turn it is."""
    a, b, c = replicas.all
    with a.stream(), a.stream(), c.stream():
        assert first(replicas) is b
        with b.stream(), b.stream():
            assert first(replicas) is c
    assert [replica.streams for replica in replicas.all] == [0, 0, 0]


def test_a_call_that_fails_is_no_longer_counted(replicas: Replicas) -> None:
    """Else a replica would look busy for ever."""
    with pytest.raises(ZeroDivisionError), replicas.all[0].stream():
        _ = 1 / 0
    assert replicas.all[0].streams == 0


def test_each_is_tried_once(replicas: Replicas) -> None:
    """Whatever the state, then there is no other."""
    assert order(replicas) == "abc"
    replicas.failed(replicas.all[1])
    assert order(replicas) == "acb"


def test_one_that_failed_is_set_aside(replicas: Replicas, clock: Clock) -> None:
    """Until its time is over, however busy the others are."""
    a, b, c = replicas.all
    replicas.failed(a)
    with b.stream(), c.stream():
        assert order(replicas) == "bca"
        clock.now += ASIDE_SECONDS
        assert first(replicas) is a


def test_if_all_failed_they_are_asked_all_the_same(replicas: Replicas) -> None:
    """One may be back, and there is nobody else: then streams count again."""
    for replica in replicas.all:
        replicas.failed(replica)
    with replicas.all[0].stream():
        assert order(replicas) == "bca"


def test_one_that_answers_is_back_at_once(replicas: Replicas) -> None:
    """It was asked as the last one left, and is well."""
    a, b, c = replicas.all
    replicas.failed(a)
    replicas.answered(a)
    with b.stream(), c.stream():
        assert first(replicas) is a


def test_the_next_is_chosen_by_what_is_known_then(replicas: Replicas) -> None:
    """While one call waits for a replica in vain, others find out about the rest."""
    a, b, c = replicas.all
    turns = replicas.by_load()
    assert next(turns) is a
    replicas.failed(b)
    assert next(turns) is c


def test_in_order(replicas: Replicas, clock: Clock) -> None:
    """The same first one each time, busy or not, and those set aside last."""
    a, b, c = replicas.all
    with a.stream():
        assert replicas.in_order() == (a, b, c)
    replicas.failed(a)
    assert replicas.in_order() == (b, c, a)
    clock.now += ASIDE_SECONDS
    assert replicas.in_order() == (a, b, c)


def test_addresses() -> None:
    """What people see is where chat and listings are."""
    assert Replica("http://h/prefix").base_url == "http://h/prefix/v1"
