"""Completions by their ids: whose they are, how long they are known, and what a cancel does."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.completions.info import NOTHING_YET, CompletionInfo, Outcome, Timings
from deltawire_server.completions.records import MAX_MESSAGE, Record, Records
from deltawire_server.errors import CallerError, Code, DeltawireError, GatewayError, Reason
from deltawire_server.sansio.events import Fault, Provenance, StopReason, Usage
from deltawire_server.upstream.base import Attempts
from deltawire_server.upstream.request import Sampling

if TYPE_CHECKING:
    from deltawire_server.completions.retention import RetainedStream


class FakeCompletion:
    """A completion that notes how it was stopped."""

    def __init__(self, completion_id: str = "c") -> None:
        self.head = CompletionInfo(completion_id, "m", "", "p", 1.0, Sampling())
        self.begun = True
        self.attempts = Attempts()
        self.time_limit = 3600.0
        self.stop_reasons: tuple[StopReason, ...] = ()
        self.joined_deltas = 0
        self.log_values = {"model": "m"}
        self.usage = Usage(3, Provenance.LOWER_BOUND, 7)
        self.timings = Timings(1.0)
        self.failure: DeltawireError | None = None
        self.stopped: list[StopReason] = []
        self.faults: list[Fault] = []

    def stop(self, reason: StopReason) -> None:
        """Note it."""
        self.stopped.append(reason)

    def end(self, fault: Fault) -> None:
        """Note it."""
        self.faults.append(fault)


def reason_of(records: Records, caller: str, completion_id: str) -> tuple[type[DeltawireError], Reason]:
    """The error for a completion that cannot be found."""
    with pytest.raises(DeltawireError) as caught:
        records.find(caller, completion_id)
    return type(caught.value), caught.value.reason


def test_generated_ids() -> None:
    """Generated ids are unguessable and unique, and carry the mark of their process."""
    records = Records()
    ids = {records.begin("").completion_id for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("cmpl-[0-9a-f]{32}-[0-9a-f]{8}", each) for each in ids)
    assert len({each[-8:] for each in ids}) == 1
    assert Records().begin("").completion_id[-8:] not in {each[-8:] for each in ids}


def test_ids_belong_to_one_caller() -> None:
    """Two callers may use the same id; an id of another caller is reported as unknown."""
    records = Records()
    mine, yours = records.begin("me", "c"), records.begin("you", "c")
    assert records.find("me", "c") is mine
    assert records.find("you", "c") is yours
    assert reason_of(records, "third", "c") == (CallerError, Reason.COMPLETION_NOT_FOUND)
    assert reason_of(records, "", "c") == (CallerError, Reason.COMPLETION_NOT_FOUND)


def test_an_id_is_in_use_while_running_or_retained() -> None:
    """The id can be used again after the completion has ended and is not retained."""
    records = Records()
    record = records.begin("me", "c")
    with pytest.raises(CallerError, match="is running") as caught:
        records.begin("me", "c")
    assert caught.value.reason is Reason.COMPLETION_ALREADY_EXISTS
    assert caught.value.metadata == {"completion_id": "c"}
    record.stream = object()  # type: ignore[assignment]
    records.end(record, None)
    with pytest.raises(CallerError, match="is retained"):
        records.begin("me", "c")
    records.released(record)
    assert records.find("me", "c") is record
    assert record.stream is None
    again = records.begin("me", "c")
    assert records.find("me", "c") is again


def test_an_id_of_another_process() -> None:
    """An id with the mark of another process is WRONG_REPLICA, unless it is known here."""
    records, other = Records(), Records()
    completion_id = other.begin("me").completion_id
    assert reason_of(records, "me", completion_id) == (GatewayError, Reason.WRONG_REPLICA)
    own = records.begin("me").completion_id
    assert reason_of(records, "you", own) == (CallerError, Reason.COMPLETION_NOT_FOUND)
    assert records.begin("me", completion_id) is records.find("me", completion_id)


def test_the_record_of_an_ended_completion() -> None:
    """A record keeps the outcome and the usage, but not the completion."""
    records = Records()
    record = records.begin("me", "c")
    running = FakeCompletion()
    record.run(running)
    assert (record.ended, record.begun, record.usage) == (False, False, NOTHING_YET)
    outcome = Outcome(Code.CANCELLED, None, "disconnected")
    records.end(record, outcome)
    assert records.find("me", "c") is record
    assert record.running is None
    assert (record.ended, record.begun, record.outcome) == (True, True, outcome)
    assert record.usage is running.usage
    assert record.head is running.head


def test_a_completion_that_never_ran_can_be_looked_up() -> None:
    """A completion whose model was not found has no head and no usage."""
    records = Records()
    record = records.begin("me", "c")
    failure = CallerError(Reason.MODEL_NOT_FOUND, "no such model")
    records.end(record, Outcome.of(failure))
    assert records.find("me", "c").outcome == Outcome(Code.NOT_FOUND, Reason.MODEL_NOT_FOUND, "no such model")
    assert (record.head, record.begun, record.usage) == (None, False, NOTHING_YET)


def test_ended_completions_are_limited_in_number() -> None:
    """At the limit, the completion that ended first is removed first."""
    records = Records(max_remembered=2)
    first, second, third = (records.begin("me", name) for name in "abc")
    for record in (second, first, third):
        records.end(record, None)
    assert reason_of(records, "me", "b") == (CallerError, Reason.COMPLETION_NOT_FOUND)
    assert records.find("me", "a") is first
    assert records.find("me", "c") is third


def test_ended_completions_expire() -> None:
    """Ended completions expire; running and retained ones do not."""
    records = Records(remembered_seconds=0.0)
    running, retained, ended = (records.begin("me", name) for name in "abc")
    retained.stream = object()  # type: ignore[assignment]
    records.end(retained, None)
    records.end(ended, None)
    assert reason_of(records, "me", "c") == (CallerError, Reason.COMPLETION_NOT_FOUND)
    assert records.find("me", "a") is running
    assert records.find("me", "b") is retained


def test_a_stream_released_before_the_end_leaves_the_completion_running() -> None:
    """The completion can be looked up as running until its end."""
    records = Records()
    record = records.begin("me", "c")
    stream: RetainedStream = object()  # type: ignore[assignment]
    record.stream = stream
    records.released(record)
    with pytest.raises(CallerError, match="is running"):
        records.begin("me", "c")
    records.end(record, None)
    assert records.find("me", "c").ended


def test_an_abandoned_completion_frees_its_id() -> None:
    """After the last reader has left, a retry begins a new completion, even before the generation of the first one has stopped."""
    records = Records()
    first = records.begin("me", "c", b"request")
    first.stream = object()  # type: ignore[assignment]
    with pytest.raises(CallerError, match="is running"):
        records.begin("me", "c", b"request")
    records.released(first)
    second = records.begin("me", "c", b"request")
    records.end(first, Outcome(Code.CANCELLED, None, "disconnected"))
    assert records.find("me", "c") is second
    records.end(second, None)
    assert records.find("me", "c") is second


def test_cancel() -> None:
    """A cancel ends a running completion, applies later to one that does not run yet, and has no effect on an ended one."""
    records = Records()
    early, late, over = Record("me", "a"), Record("me", "b"), records.begin("me", "c")
    running = FakeCompletion()
    early.cancel()
    early.run(running)
    assert running.stopped == [StopReason.CANCELLED]
    running = FakeCompletion()
    late.run(running)
    assert running.stopped == []
    late.cancel()
    assert running.stopped == [StopReason.CANCELLED]
    records.end(over, None)
    over.cancel()
    assert records.find("me", "c").outcome is None


def test_failing_a_completion() -> None:
    """A running completion fails at once, others when they begin; all running ones are found."""
    records = Records()
    early, late = records.begin("a"), records.begin("b")
    fault = Fault(Reason.ACCESS_CHANGED, "revoked")
    running = FakeCompletion()
    early.run(running)
    for record in records.kept():
        record.fail(fault)
    assert running.faults == [fault]
    running = FakeCompletion()
    late.run(running)
    assert running.faults == [fault]
    records.end(early, None)
    assert records.kept() == (late,)


LARGE = Sampling(
    stop=tuple(f"{number:60}" for number in range(1000)),
    stop_token_ids=tuple(range(1000, 5000)),
    logit_bias={number: number / 3 for number in range(1000, 5000)},
    bad_words=tuple(f"{number:10}" for number in range(1000)),
)
"""About as much as a request may have."""


def _ended(records: Records, caller: str, sampling: Sampling, outcome: Outcome | None = None) -> Record:
    record = records.begin(caller)
    running = FakeCompletion(record.completion_id)
    running.head = CompletionInfo(record.completion_id, "m" * 300, "", "p", 1.0, sampling)
    record.run(running)
    records.end(record, outcome)
    return record


def test_a_record_is_small() -> None:
    """At the end, a record drops long lists of the sampling and the rest of long messages; it keeps numbers and short lists."""
    records = Records()
    failed = Outcome(Code.INTERNAL, Reason.INTERNAL, "\N{SNOWMAN}" * 100_000)
    record = _ended(records, "me", replace(LARGE, temperature=0.5), failed)
    assert record.head is not None
    assert record.head.sampling == Sampling(temperature=0.5)
    assert record.outcome == Outcome(Code.INTERNAL, Reason.INTERNAL, "\N{SNOWMAN}" * (MAX_MESSAGE // 3))
    short = Sampling(stop=("a", "b"), stop_token_ids=(7,), logit_bias={1: 2.0}, bad_words=("c",))
    kept = _ended(records, "me", short)
    assert kept.head is not None
    assert kept.head.sampling == short
    for name in ("stop", "stop_token_ids", "logit_bias", "bad_words"):
        one = _ended(records, "me", replace(Sampling(), **{name: getattr(LARGE, name)}))
        assert one.head is not None
        assert one.head.sampling == Sampling()


def test_records_are_limited_in_bytes() -> None:
    """The counted bytes are the allocated bytes, and the oldest records are removed at the limit."""
    records = Records(max_bytes=8 * 1024 * 1024)
    failed = Outcome(Code.INTERNAL, Reason.INTERNAL, "x" * 100_000)
    first = _ended(records, "me", LARGE, failed)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        size = records.size
        for number in range(1000):
            sampling = replace(LARGE, stop=(f"{number:1000}",), stop_token_ids=(), logit_bias={}, bad_words=())
            _ended(records, f"caller {number}", sampling, replace(failed, message=f"{number:100000}"))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1.0 <= (records.size - size) / (after - before) <= 1.5
    assert records.find("me", first.completion_id) is first
    for _ in range(2000):
        _ended(records, "me", LARGE, failed)
    assert records.size <= 8 * 1024 * 1024
    assert reason_of(records, "me", first.completion_id) == (CallerError, Reason.COMPLETION_NOT_FOUND)
    records.begin("caller 999", "again")
    before_again = records.size
    again = records.begin("me", "again")
    records.end(again, None)
    records.begin("me", "again")
    assert records.size == before_again


def test_records_newest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the clock stands still or is set back; an id that is used again is there once, and a removed record is not."""
    monkeypatch.setattr("deltawire_server.completions.records.time.time_ns", lambda: 5_000)
    records = Records(max_remembered=2)
    a, b = records.begin("me", "a"), records.begin("you", "b")
    monkeypatch.setattr("deltawire_server.completions.records.time.time_ns", lambda: 0)
    c = records.begin("me", "c")
    assert [a.created, b.created, c.created] == [5, 6, 7]
    assert records.newest() == [c, b, a]
    assert records.newest(7) == [b, a]
    assert records.newest(5) == []
    for record in (a, b):
        records.end(record, None)
    again = records.begin("me", "a")
    assert records.newest() == [again, c, b]
    records.end(c, None)
    records.end(again, None)
    assert records.newest() == [again, c]


def test_an_id_of_any_caller() -> None:
    """A generated one alone; another one with the caller's name, of which several callers may have had it."""
    records = Records(mark="ab120000", seat="ab1200")
    made = records.begin("ann-1", label="ann")
    old, new = (records.begin(owner, "c", label="ann") for owner in ("ann-1", "ann-2"))
    assert records.find_any(made.completion_id) is made
    assert records.find_any(made.completion_id, "ann") is made
    assert records.find_any("c", "ann") is new
    records.end(new, None)
    assert records.find_any("c", "ann") is new
    assert old in records.newest()
    for completion_id, label, reason, message in (
        ("c", "", Reason.COMPLETION_NOT_FOUND, "set caller"),
        ("c", "bob", Reason.COMPLETION_NOT_FOUND, "bob has no completion 'c' here"),
        ("c", "{0.real}", Reason.COMPLETION_NOT_FOUND, "{0.real} has no completion 'c' here"),
        (made.completion_id, "bob", Reason.COMPLETION_NOT_FOUND, "bob has no completion"),
        (f"cmpl-{'0' * 32}-ab120099", "", Reason.COMPLETION_GONE, "has ended"),
        (f"cmpl-{'0' * 32}-cd340000", "", Reason.WRONG_REPLICA, "another gateway process"),
    ):
        with pytest.raises(DeltawireError, match=re.escape(message)) as caught:
            records.find_any(completion_id, label)
        assert caught.value.reason is reason
