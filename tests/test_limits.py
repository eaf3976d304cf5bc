"""What one caller may use: counts and rates, of one process and over the workers of a gateway."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deltawire_server import limits
from deltawire_server.errors import GatewayError, Reason
from deltawire_server.limits import Callers, Limits, Share, Table, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the module."""
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    return clock


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Callable[[], Table]]:
    """Opens the table of two workers, as each of them does."""
    tables: list[Table] = []

    def opened() -> Table:
        tables.append(Table(f"{tmp_path}/limits", 2))
        return tables[-1]

    yield opened
    for each in tables:
        each.close()


def refused(share: Share, use: Use | None = None) -> GatewayError:
    """The error of one more, or of one more request."""
    with pytest.raises(GatewayError) as caught:
        share.admit() if use is None else share.take(use)
    assert caught.value.reason is Reason.CALLER_LIMIT_EXCEEDED
    return caught.value


@pytest.mark.parametrize("use", [Use.STREAMS, Use.RETAINED_STREAMS, Use.WATCHES])
def test_a_count(use: Use) -> None:
    """Up to the limit, for each caller; what is given back can be taken again."""
    callers = Callers(Limits(**{use.setting: 2}))
    first, again, other = callers.share("a", "alice"), callers.share("a", "alice"), callers.share("b")
    first.take(use)
    again.take(use)
    error = refused(first, use)
    assert error.metadata == {"caller": "alice", "limit": use.setting, "value": "2"}
    assert error.message.startswith("alice has reached its limit of 2 ")
    assert error.retry_after == limits.RETRY_SECONDS
    other.take(use)
    again.give_back(use)
    first.take(use)
    assert (first.used(use), other.used(use)) == (2, 1)


def test_without_a_limit() -> None:
    """Everything is counted, and nothing refused."""
    share = Callers().share("a")
    for _ in range(1000):
        share.take(Use.STREAMS)
        share.admit()
        share.charge(10**9)
    assert share.used(Use.STREAMS) == 1000


def test_own_limits_replace_the_defaults() -> None:
    """Those that the caller has; 0 removes one. Later defaults are for later calls."""
    callers = Callers(Limits(streams=1, watches=1))
    own = callers.share("a", own={"streams": 0})
    own.take(Use.STREAMS)
    own.take(Use.STREAMS)
    own.take(Use.WATCHES)
    assert "this caller has reached its limit of 1 watches" in refused(own, Use.WATCHES).message
    callers.defaults = Limits(watches=2)
    callers.share("a").take(Use.WATCHES)
    refused(own, Use.WATCHES)


def test_requests_per_minute(clock: Clock) -> None:
    """The budget of a minute at once, then one each second; the error has the exact time until the next one."""
    share = Callers(Limits(requests_per_minute=60)).share("a")
    for _ in range(60):
        share.admit()
    assert refused(share).retry_after == pytest.approx(1)
    clock.now += 0.25
    error = refused(share)
    assert error.retry_after == pytest.approx(0.75)
    assert error.metadata["limit"] == "requests_per_minute"
    clock.now += 0.75
    share.admit()
    refused(share)
    clock.now += 3600
    for _ in range(60):
        share.admit()
    refused(share)


def test_tokens_per_minute(clock: Clock) -> None:
    """An answer may exceed the budget; the caller is then refused until there is some again, and no request is counted."""
    share = Callers(Limits(tokens_per_minute=600, requests_per_minute=1)).share("a")
    share.charge(599)
    share.charge(0)
    share.admit()
    clock.now += 60
    share.charge(1200)
    error = refused(share)
    assert error.metadata["limit"] == "tokens_per_minute"
    assert error.retry_after is not None
    clock.now += error.retry_after - 0.01
    refused(share)
    clock.now += 0.02
    share.admit()


def test_a_limit_that_is_raised_shortens_the_wait(clock: Clock) -> None:
    """What was used is kept as tokens, not as time."""
    callers = Callers(Limits(tokens_per_minute=1000))
    callers.share("a").charge(1_000_000)
    assert refused(callers.share("a")).retry_after == pytest.approx(59_940, abs=1)
    callers.defaults = Limits(tokens_per_minute=500_000)
    assert refused(callers.share("a")).retry_after == pytest.approx(60, abs=1)
    callers.defaults = Limits(tokens_per_minute=2_000_000)
    callers.share("a").admit()
    callers.defaults = Limits(tokens_per_minute=500_000)
    clock.now += 61
    callers.share("a").admit()


def test_callers_that_use_nothing_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """But none whose budget has not recovered, or that a call still counts for."""
    monkeypatch.setattr(limits, "MAX_IDLE", 10)
    callers = Callers(Limits(requests_per_minute=1))
    callers.share("busy").admit()
    running = callers.share("running")
    running.take(Use.STREAMS)
    for number in range(50):
        callers.share(f"idle {number}")
    assert len(callers._rows) < 25
    refused(callers.share("busy"))
    assert callers.share("running").used(Use.STREAMS) == 1
    clock.now += 60
    callers.share("busy").admit()


def test_workers_count_together(table: Callable[[], Table]) -> None:
    """Counts, requests and tokens; callers do not disturb each other."""
    both = [Callers(Limits(streams=2, requests_per_minute=2), table(), number) for number in (0, 1)]
    here, there = (callers.share("a") for callers in both)
    here.take(Use.STREAMS)
    there.take(Use.STREAMS)
    refused(here, Use.STREAMS)
    refused(there, Use.STREAMS)
    here.admit()
    there.admit()
    refused(here)
    for number in range(100):
        both[number % 2].share(f"other {number}").take(Use.STREAMS)
    assert here.used(Use.STREAMS) == 2
    here.give_back(Use.STREAMS)
    there.take(Use.STREAMS)


def test_a_worker_that_has_ended_gives_back(table: Callable[[], Table]) -> None:
    """Its counts are cleared, those of its sibling and the rates are not."""
    parent = table()
    here, there = (Callers(Limits(streams=2, requests_per_minute=1), table(), number).share("a") for number in (0, 1))
    here.take(Use.STREAMS)
    there.take(Use.STREAMS)
    there.admit()
    parent.clear(1)
    assert here.used(Use.STREAMS) == 1
    here.take(Use.STREAMS)
    refused(here)


def test_a_full_table(table: Callable[[], Table], monkeypatch: pytest.MonkeyPatch) -> None:
    """Further callers are counted by each worker alone."""
    monkeypatch.setattr(limits, "ROWS", 2)
    both = [Callers(Limits(streams=1), table(), number) for number in (0, 1)]
    for key in ("a", "b", "c"):
        both[0].share(key).take(Use.STREAMS)
    refused(both[1].share("a"), Use.STREAMS)
    refused(both[1].share("b"), Use.STREAMS)
    both[1].share("c").take(Use.STREAMS)


def test_a_table_that_is_almost_full(table: Callable[[], Table], monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller gets one of a few rows, or none: the others are not looked at, because all workers wait meanwhile."""
    monkeypatch.setattr(limits, "ROWS", 100)
    monkeypatch.setattr(limits, "STEPS", 2)
    opened = table()
    rows = [opened.row(f"caller {number}", 0) for number in range(300)]
    assert 50 < sum(row is not None for row in rows) <= 100


_TAKE = """
import sys
from deltawire_server.errors import GatewayError
from deltawire_server.limits import Callers, Limits, Table, Use
share = Callers(Limits(streams=1000, requests_per_minute=1000), Table(sys.argv[1], 4), int(sys.argv[2])).share("a")
taken = 0
for _ in range(1000):
    try:
        share.admit()
        share.take(Use.STREAMS)
        taken += 1
    except GatewayError:
        pass
print(taken)
"""


def test_processes_at_the_same_time(tmp_path: Path) -> None:
    """Four that take all they can get exactly the limit together."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _TAKE, f"{tmp_path}/limits", str(number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(4)
    ]
    taken = [int(worker.communicate()[0]) for worker in workers]
    # A minute's budget, and what was refilled meanwhile.
    assert sum(taken) == 1000
