"""What next after a call has ended: every reason, every code, before the answer has begun and after, and for how long."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire._completion import Resumption
from deltawire._completion.elsewhere import MAX_CONNECTIONS, MAX_PAUSE, MIN_PAUSE
from deltawire._completion.resumption import LOST_CODES, MAX_STARTS, REASONS, End, end_of
from deltawire._failure import Failure
from deltawire.v1.chat_completion_pb2 import (
    ChatRequest,
    ResumePoint,
    StreamChatCompletionRequest,
    StreamOptions,
)
from deltawire.v1.error_reason_pb2 import ErrorReason

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS = grpc.StatusCode
TIMEOUT = 60


def longest(_: float, most: float) -> float:
    """Draws the longest pause."""
    return most


def retained(completion_id: str = "", draw: Callable[[float, float], float] = longest) -> Resumption:
    """A completion that was asked for with `retention`."""
    options = StreamOptions(retention=Duration(seconds=TIMEOUT))
    chat = ChatRequest(model="llama", completion_id=completion_id)
    return Resumption(StreamChatCompletionRequest(chat=chat, options=options), draw=draw)


def failed(reason: str = "", code: grpc.StatusCode = STATUS.UNAVAILABLE, retry_after: float | None = None) -> Failure:
    """A call that ended like this."""
    return Failure(code, "it failed", reason, retry_after=retry_after)


LOST = failed()
MISSING = failed("COMPLETION_NOT_FOUND", STATUS.NOT_FOUND)
EXISTS = failed("COMPLETION_ALREADY_EXISTS", STATUS.ALREADY_EXISTS)
FULL = failed("TOO_MANY_STREAMS", STATUS.RESOURCE_EXHAUSTED)
ELSEWHERE = failed("WRONG_REPLICA", STATUS.FAILED_PRECONDITION)
GONE = failed("COMPLETION_GONE", STATUS.OUT_OF_RANGE)


def next_request(state: Resumption, failure: Failure | None, *, has_begun: bool = False) -> str | None:
    """What the next call after this end asks for, "chat" or "resume"; None if there is no next call."""
    if state.ended(failure, has_begun=has_begun, now=0) is None:
        return None
    return state.begin(0).WhichOneof("start")


def test_every_reason_has_its_meaning() -> None:
    """A new reason has to be thought of here."""
    assert {*REASONS, ErrorReason.ERROR_REASON_UNSPECIFIED} == set(ErrorReason.values())


def test_what_goes_on() -> None:
    """These and no others; whatever says that the completion itself has failed does not."""
    meanings: dict[End, set[str]] = {}
    for reason, end in REASONS.items():
        meanings.setdefault(end, set()).add(ErrorReason.Name(reason).removeprefix("ERROR_REASON_"))
    assert {end: names for end, names in meanings.items() if end is not End.OVER} == {
        End.LOST: {"DRAINING", "SLOW_CALLER"},
        End.REFUSED: {"TOO_MANY_STREAMS", "CALLER_LIMIT_EXCEEDED", "STORE_UNAVAILABLE"},
        End.ELSEWHERE: {"WRONG_REPLICA"},
        End.MISSING: {"COMPLETION_NOT_FOUND"},
        End.EXISTS: {"COMPLETION_ALREADY_EXISTS"},
    }


@pytest.mark.parametrize("code", [code for code in STATUS if code is not STATUS.OK])
def test_without_a_reason_the_code_decides(code: grpc.StatusCode) -> None:
    """And with one that this version does not know; a reason that it knows comes before the code."""
    lost = code in {STATUS.UNAVAILABLE, STATUS.INTERNAL, STATUS.UNKNOWN, STATUS.CANCELLED, STATUS.DEADLINE_EXCEEDED}
    assert (code in LOST_CODES) == lost
    expected = End.LOST if lost else End.OVER
    assert end_of(failed("", code)) is end_of(failed("OF_A_LATER_VERSION", code)) is expected
    assert end_of(failed("UPSTREAM_ERROR", code)) is End.OVER
    assert end_of(failed("DRAINING", code)) is End.LOST


def test_ok_without_the_last_event_is_a_lost_connection() -> None:
    """A proxy may end a call so."""
    assert end_of(None) is End.LOST


def test_what_is_not_retained_does_not_go_on() -> None:
    """There would be nothing to resume; no id is made up."""
    state = Resumption(StreamChatCompletionRequest(chat=ChatRequest(model="llama")))
    assert (state.is_retained, state.completion_id) == (False, "")
    state.begin(0)
    assert state.ended(LOST, has_begun=True, now=0) is None


def test_an_id_is_made_up() -> None:
    """Unguessable, another one each time, of characters that the API allows; a caller's own is kept."""
    made = [retained().completion_id for _ in range(2)]
    assert made[0] != made[1]
    assert all(re.fullmatch(r"own-[0-9a-f]{32}", each) for each in made)
    state = retained()
    assert state.begin(0).chat.completion_id == state.completion_id
    assert retained("mine").begin(0).chat.completion_id == "mine"


@pytest.mark.parametrize("end", [LOST, None, failed("DRAINING", STATUS.ABORTED)])
def test_a_lost_connection(end: Failure | None) -> None:
    """It goes on after the last event; from the first if none has come."""
    state = retained("mine")
    assert state.begin(0).WhichOneof("start") == "chat"
    assert state.ended(end, has_begun=False, now=0) is not None
    assert state.begin(0) == StreamChatCompletionRequest(resume=ResumePoint(completion_id="mine"))
    for sequence in (0, 1, 2):
        state.received(sequence, 0)
    assert state.ended(end, has_begun=True, now=0) is not None
    resume = ResumePoint(completion_id="mine", last_sequence=2)
    assert state.begin(0) == StreamChatCompletionRequest(resume=resume)
    assert (state.last_sequence, state.calls) == (2, 3)


def test_event_0_is_an_event() -> None:
    """After it is not the same as from the first."""
    state = retained("mine")
    state.begin(0)
    state.received(0, 0)
    state.ended(LOST, has_begun=True, now=0)
    assert state.begin(0).resume.HasField("last_sequence")


def test_a_completion_that_is_missing_is_started_again() -> None:
    """With the same request and id, so often and no more, as long as nothing of the answer has come."""
    state = retained()
    started = [state.begin(0)]
    while (following := next_request(state, LOST)) is not None:
        assert following == "resume"
        if next_request(state, MISSING) is None:
            break
        started.append(state._request)
    assert len(started) == MAX_STARTS
    assert all(each == started[0] for each in started)


def test_heartbeats_alone_are_started_again_from_0() -> None:
    """They say nothing of the answer, and the new stream counts anew."""
    state = retained("mine")
    state.begin(0)
    state.received(0, 0)
    assert next_request(state, LOST) == "resume"
    assert next_request(state, MISSING) == "chat"
    assert next_request(state, LOST) == "resume"
    assert state.last_sequence is None


def test_an_answer_that_had_begun_is_never_started_again() -> None:
    """What was read would not fit what came then; it is only looked for on other connections."""
    state = retained("mine")
    state.begin(0)
    assert next_request(state, LOST, has_begun=True) == "resume"
    assert not state.moves
    for _ in range(MAX_CONNECTIONS):
        assert next_request(state, MISSING, has_begun=True) == "resume"
        assert state.moves
    assert next_request(state, MISSING, has_begun=True) is None


def test_another_process_has_it() -> None:
    """It is resumed on a new connection, so often and no more, until something new comes; a lost one keeps its connection."""
    state = Resumption(StreamChatCompletionRequest(resume=ResumePoint(completion_id="mine")), 10 * TIMEOUT)
    state.begin(0)
    for _ in range(2):
        for _ in range(MAX_CONNECTIONS):
            assert (next_request(state, ELSEWHERE), state.moves) == ("resume", True)
            assert (next_request(state, LOST), state.moves) == ("resume", False)
        state.received(0, 0)
    for _ in range(MAX_CONNECTIONS):
        assert next_request(state, ELSEWHERE) == "resume"
    assert (next_request(state, ELSEWHERE), state.moves) == (None, False)


def test_another_process_cannot_be_reached() -> None:
    """Nothing can be resumed that has not begun, and a channel of the caller's own is the only connection."""
    state = retained()
    state.begin(0)
    assert next_request(state, ELSEWHERE) is None
    resume = StreamChatCompletionRequest(resume=ResumePoint(completion_id="mine"))
    state = Resumption(resume, TIMEOUT, connections=0)
    state.begin(0)
    assert (next_request(state, ELSEWHERE), state.moves) == (None, False)


def test_what_somebody_else_asked_cannot_be_started_again() -> None:
    """There is no request; but a lost connection is resumed, after what the caller had."""
    resume = StreamChatCompletionRequest(resume=ResumePoint(completion_id="mine", last_sequence=4))
    state = Resumption(resume, TIMEOUT)
    assert (state.completion_id, state.last_sequence, state.is_retained) == ("mine", 4, True)
    assert state.begin(0) == resume
    assert next_request(state, LOST) == "resume"
    assert next_request(state, MISSING) is None


def test_an_id_that_is_taken() -> None:
    """By our own call, whose beginning was lost, or by somebody else's: that is never read."""
    ours = retained()
    ours.begin(0)
    assert next_request(ours, EXISTS) == "resume"
    theirs = retained("mine")
    theirs.begin(0)
    assert next_request(theirs, EXISTS) is None
    again = retained("mine")
    again.begin(0)
    assert next_request(again, LOST) == "resume"
    assert next_request(again, MISSING) == "chat"
    assert next_request(again, EXISTS) == "resume"
    assert next_request(again, EXISTS) is None


def test_a_gateway_that_is_full() -> None:
    """A new completion is refused, as without `retention`; one that is there is waited for."""
    state = retained()
    state.begin(0)
    assert next_request(state, FULL) is None
    state = retained()
    state.begin(0)
    assert next_request(state, LOST) == "resume"
    assert next_request(state, FULL) == "resume"


@pytest.mark.parametrize(
    "end",
    [GONE, failed("UPSTREAM_UNAVAILABLE"), failed("INTERNAL"), Failure(STATUS.CANCELLED, "closed", is_closed=True)],
)
@pytest.mark.parametrize("has_begun", [False, True])
def test_what_trying_again_does_not_mend(end: Failure, has_begun: bool) -> None:
    """Neither on the first call nor on one that resumes."""
    state = retained()
    state.begin(0)
    assert next_request(state, end, has_begun=has_begun) is None
    state = retained()
    state.begin(0)
    assert next_request(state, LOST, has_begun=has_begun) == "resume"
    assert next_request(state, end, has_begun=has_begun) is None


def pauses(state: Resumption, count: int) -> list[float]:
    """So many pauses after one another."""
    return [pause for _ in range(count) if (pause := state.ended(LOST, has_begun=True, now=0)) is not None]


def test_pauses() -> None:
    """They double up to a limit, and begin anew with what is news; each is drawn from its upper half."""
    state = retained()
    state.begin(0)
    assert pauses(state, 6) == [MIN_PAUSE, 2 * MIN_PAUSE, 4 * MIN_PAUSE, 8 * MIN_PAUSE, 16 * MIN_PAUSE, MAX_PAUSE]
    state.received(0, 0)
    assert pauses(state, 1) == [MIN_PAUSE]
    drawn: list[tuple[float, float]] = []

    def note(least: float, most: float) -> float:
        drawn.append((least, most))
        return least

    state = retained(draw=note)
    state.begin(0)
    assert pauses(state, 2) == [MIN_PAUSE / 2, MIN_PAUSE]
    assert drawn == [(MIN_PAUSE / 2, MIN_PAUSE), (MIN_PAUSE, 2 * MIN_PAUSE)]


def test_a_pause_that_the_gateway_asks_for() -> None:
    """The longer one is kept."""
    state = retained()
    state.begin(0)
    assert state.ended(failed(retry_after=9), has_begun=True, now=0) == 9
    assert state.ended(failed(retry_after=0.01), has_begun=True, now=0) == 2 * MIN_PAUSE


def test_how_long_it_resumes() -> None:
    """Counted from the beginning, then from the last news; a pause that would outlast it is not begun."""
    state = retained()
    state.begin(100)
    assert state.ended(LOST, has_begun=False, now=100 + TIMEOUT - 1) is not None
    state.begin(150)
    assert state.ended(LOST, has_begun=False, now=100 + TIMEOUT) is None
    state.received(0, 200)
    assert state.ended(LOST, has_begun=True, now=200 + TIMEOUT - 1) is not None
    assert state.ended(failed(retry_after=1.1), has_begun=True, now=200 + TIMEOUT - 1) is None
