"""Which worker has an id, and how a process learns which worker it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from deltawire_server.completions.records import Records, mark_of
from deltawire_server.errors import DeltawireError, Reason
from deltawire_server.processes.worker_process import METRICS_VARIABLE, VARIABLE, WorkerProcess

FIRST = WorkerProcess(0, 4, 0, "ab12", "/run/x", ["127.0.0.1:5"], control=7)


def test_it_goes_through_the_environment_once() -> None:
    """The process's own children do not get it. The directory of the metrics stays, because prometheus-client reads it again."""
    environ = {"A": "b", **FIRST.variables()}
    assert WorkerProcess.taken_from(environ) == FIRST
    assert environ == {"A": "b", METRICS_VARIABLE: f"{FIRST.folder}/metrics"}
    assert WorkerProcess.taken_from(environ) is None
    assert VARIABLE in FIRST.variables()


@pytest.mark.parametrize("number", range(4))
def test_a_generated_id_names_its_worker(number: int) -> None:
    """At all of them, and whichever incarnation generated it."""
    process = replace(FIRST, number=number, incarnation=300)
    completion_id = Records(mark=process.mark, seat=process.seat).begin("me").completion_id
    assert mark_of(completion_id) == process.mark == f"ab12{number:02x}2c"
    assert {replace(FIRST, number=each).number_for("me", completion_id) for each in range(4)} == {number}


def test_ids_of_callers_are_spread_and_found() -> None:
    """Every worker names the same one. Callers' ids may look generated, and name a worker that does not exist."""
    ids = [f"id-{each}" for each in range(1000)] + [f"cmpl-{'0' * 32}-ab12ff00", f"cmpl-{'0' * 32}-00000000"]
    for each in ids:
        assert len({replace(FIRST, number=number).number_for("me", each) for number in range(4)}) == 1
    counts = Counter(FIRST.number_for("me", each) for each in ids)
    assert min(counts.values()) > 200
    assert FIRST.number_for("me", "") == 0


def test_what_an_earlier_worker_had_is_lost() -> None:
    """Ids of another gateway are still another's."""
    second = replace(FIRST, incarnation=1)
    lost = Records(mark=FIRST.mark, seat=FIRST.seat).begin("me").completion_id
    records = Records(mark=second.mark, seat=second.seat)
    reasons = {}
    for completion_id in (lost, lost.replace("-ab12", "-cd34"), records.begin("you").completion_id):
        with pytest.raises(DeltawireError) as caught:
            records.find("me", completion_id)
        reasons[completion_id] = caught.value.reason
    assert list(reasons.values()) == [Reason.COMPLETION_GONE, Reason.WRONG_REPLICA, Reason.COMPLETION_NOT_FOUND]
    assert records.begin("me", lost) is records.find("me", lost)
