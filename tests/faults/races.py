"""Races between what the upstream sends and the limits of the gateway, provoked by moving the event loop's clock.

A call waits while the upstream stands at a gate. Then two things happen, a chosen number of loop iterations apart: the gate
opens, and the clock jumps over a limit. Client, gateway and upstream share one loop, so a distance always gives the same
interleaving, and the distances together give all of them: before, in the same iteration, after.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults.fault import (
    ABORTED_ERROR,
    ABORTED_INCOMPLETE,
    ABORTED_MALFORMED,
    ABORTED_TIMEOUT,
    FAILED,
    MALFORMED,
    OK,
    REJECTED,
    TIMEOUT,
    UNAVAILABLE,
)
from tests.faults.faults import MARK
from tests.faults.lab import HANG_SECONDS, HEARTBEAT_SECONDS, LONG_LIMIT_SECONDS, TAIL_SECONDS, CallKind, Result
from tests.faults.script import HEAD, PLACES, Phase, event, events_of, framed, text
from tests.faults.upstream import Close, Gate, Plan, Reset, Send, response

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.fault import Outcomes
    from tests.faults.lab import Lab, Seen
    from tests.faults.upstream import Step

SOFT_SECONDS = 30.0
"""The soft time limit of calls that have one: above what a call needs, below the provider's limits."""

DISTANCES = range(-8, 25)
"""Loop iterations from opening the gate to the clock's jump; below 0 the clock goes first. The upstream needs about five to
write, the gateway a few more to read."""


class Clock:
    """The running loop's clock, which can be moved forward: timers that are due then run in the next iteration."""

    def __init__(self) -> None:
        self.offset = 0.0

    def advance(self, seconds: float) -> None:
        """Move it."""
        self.offset += seconds


@contextmanager
def moved_clock() -> Iterator[Clock]:
    """Take the loop's clock over; afterwards it stays where it was moved to, since timers are set by it."""
    loop: Any = asyncio.get_running_loop()
    clock, real = Clock(), loop.time
    loop.time = lambda: real() + clock.offset
    yield clock


def _error(code: int) -> bytes:
    return event(json.dumps({"error": {"message": MARK, "code": code}}).encode())


@dataclass(frozen=True)
class Arrival:
    """What the upstream sends when the limit passes.

    Attributes:
        name: Unique.
        steps: What it does; after a head, unless `with_head`.
        before: The outcomes if nothing was sent before it.
        during: The outcomes in the middle of the answer.
        finished: The outcomes after the finish reason; empty if it is not tried there.
        with_head: Whether the steps have a head of their own, so that they can only come first.
    """

    name: str
    steps: Sequence[Step]
    before: Outcomes
    during: Outcomes = frozenset()
    finished: Outcomes = frozenset()
    with_head: bool = False


_GZIP = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n" + gzip.compress(
    b"data: {}\n\n"
)

ARRIVALS = (
    Arrival("error-400", (Send(framed(_error(400))),), REJECTED, ABORTED_ERROR, ABORTED_ERROR),
    Arrival("error-500", (Send(framed(_error(500))),), FAILED, ABORTED_ERROR, ABORTED_ERROR),
    Arrival("garbage", (Send(framed(event(b"{not json"))),), MALFORMED, ABORTED_MALFORMED, ABORTED_MALFORMED),
    Arrival("eof", (Close(),), UNAVAILABLE, ABORTED_INCOMPLETE, OK),
    Arrival("reset", (Reset(),), UNAVAILABLE, ABORTED_INCOMPLETE, OK),
    Arrival("body-ends", (Send(b"0\r\n\r\n"),), UNAVAILABLE, ABORTED_INCOMPLETE, OK),
    Arrival(
        "late-text",
        (Send(framed(event(text("late")))), Close()),
        ABORTED_INCOMPLETE | ABORTED_TIMEOUT,
        ABORTED_INCOMPLETE,
        OK,
    ),
    Arrival("status-500", (Send(response("500 No", b'{"detail":"no"}')),), FAILED, with_head=True),
    Arrival("status-503", (Send(response("503 No", b"")),), UNAVAILABLE, with_head=True),
    Arrival("html", (Send(response("200 OK", b"<html>", content_type="text/html")),), MALFORMED, with_head=True),
    Arrival("gzip", (Send(_GZIP), Close()), MALFORMED, with_head=True),
)


@dataclass(frozen=True)
class Limit:
    """A limit of the gateway's that passes.

    Attributes:
        name: Unique.
        phase: Where the upstream stands.
        seconds: How far the clock jumps.
        passed: The outcomes if the limit comes first.
        chat: Fields of the request.
        kinds: The calls that have it.
        stop_reason: Of every choice, if the limit ends the answer OK.
    """

    name: str
    phase: Phase
    seconds: float
    passed: Outcomes
    chat: dict[str, Any] = field(default_factory=dict, hash=False)
    kinds: Sequence[CallKind] = tuple(CallKind)
    stop_reason: str = ""


_SOFT = {"soft_time_limit": {"seconds": round(SOFT_SECONDS)}}

LIMITS = (
    Limit("first_event_timeout", Phase.FIRST, LONG_LIMIT_SECONDS, TIMEOUT),
    Limit("soft_time_limit-first", Phase.FIRST, SOFT_SECONDS, OK, _SOFT, stop_reason="TIME_LIMIT"),
    Limit("soft_time_limit", Phase.TOOL, SOFT_SECONDS, OK, _SOFT, stop_reason="TIME_LIMIT"),
    Limit("silence_timeout", Phase.TOOL, LONG_LIMIT_SECONDS, ABORTED_TIMEOUT),
    Limit("tail", Phase.FINISHED, TAIL_SECONDS, OK),
    Limit("heartbeat", Phase.TEXT, HEARTBEAT_SECONDS, frozenset(), kinds=(CallKind.RETAINED,)),
    Limit("heartbeat-finished", Phase.FINISHED, HEARTBEAT_SECONDS, frozenset(), kinds=(CallKind.RETAINED,)),
)


@dataclass(frozen=True)
class Race:
    """An arrival and a limit, so many loop iterations apart."""

    arrival: Arrival
    limit: Limit
    kind: CallKind
    distance: int

    def __str__(self) -> str:
        return f"{self.arrival.name} / {self.limit.name} / {self.kind.value} at {self.distance:+d}"

    @property
    def allowed(self) -> Outcomes:
        """What may come of it: the arrival's outcome or the limit's, and no other."""
        phase = self.limit.phase
        arrived = (
            self.arrival.before
            if phase is Phase.FIRST
            else self.arrival.finished
            if phase is Phase.FINISHED
            else self.arrival.during
        )
        return arrived | self.limit.passed


def races(distances: Sequence[int] = DISTANCES) -> list[Race]:
    """All of them at these distances."""
    return [
        Race(arrival, limit, kind, distance)
        for limit in LIMITS
        for arrival in ARRIVALS
        if limit.phase is Phase.FIRST or not arrival.with_head
        for kind in limit.kinds
        for distance in distances
    ]


def race_sample() -> list[Race]:
    """A fixed part: every arrival at every limit, with the kinds of calls and the distances in turn."""
    return [race for number, race in enumerate(races()) if number % 23 == 0]


async def run_race(lab: Lab, clock: Clock, race: Race) -> Result[Race]:
    """Run a race. Only one at a time: all timers of the loop see the jump."""
    arrival, limit = race.arrival, race.limit
    place = PLACES[limit.phase]
    begun: list[Step] = [] if arrival.with_head else [Send(HEAD), *map(Send, map(framed, events_of()[:place]))]
    plan = Plan([*begun, Gate(), *arrival.steps])
    lab.hang_seconds = HANG_SECONDS + limit.seconds
    calling = asyncio.create_task(lab.call(plan, race.kind, **limit.chat))
    await plan.at_gate.wait()
    # The gateway reads what was sent, and sets its timers by it.
    await _iterations(20)
    if race.distance < 0:
        clock.advance(limit.seconds)
        await _iterations(-race.distance)
        plan.gate.set()
    else:
        plan.gate.set()
        await _iterations(race.distance)
        clock.advance(limit.seconds)
    seen = await calling
    problems = list(seen.broken)
    if seen.outcome not in race.allowed:
        problems.append(f"it ended {seen.outcome}, allowed is {' or '.join(sorted(race.allowed))}")
    if seen.outcome == "OK":
        problems.extend(_ended_as(seen, limit))
    return Result(race, seen.outcome, problems)


async def _iterations(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _ended_as(seen: Seen, limit: Limit) -> list[str]:
    """What is wrong with an answer that ended OK: it has choices, and they were ended by the limit."""
    if not seen.stop_reasons:
        return ["it ended OK and empty"]
    if limit.stop_reason and set(seen.stop_reasons) != {limit.stop_reason}:
        return [f"it ended OK with {seen.stop_reasons}"]
    return []
