"""What a watch returns to its caller, given messages, broken calls and restarts."""

from __future__ import annotations

from typing import TypeAlias

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire import Model, ModelChange, WatchBookmark, WatchEvent
from deltawire._errors import CallError, error_for
from deltawire._failure import Failure
from deltawire._watch.state import WatchState
from deltawire.v1.model_registry_pb2 import MODEL_STATE_UNAVAILABLE, WatchModelsRequest, WatchModelsResponse
from tests.client.scripted import bookmark, changed, model

STATUS = grpc.StatusCode
A, B, C = model("a"), model("b"), model("c")
A_GONE = model("a", state=MODEL_STATE_UNAVAILABLE)
Table: TypeAlias = dict[str, Model]


def error(code: grpc.StatusCode, reason: str = "", retry_after: float | None = None) -> CallError:
    """How a call ended."""
    return error_for(Failure(code, "it failed", reason, retry_after=retry_after))


GONE = error(STATUS.OUT_OF_RANGE, "REVISION_GONE")
LOST = error(STATUS.UNAVAILABLE)


def receive(state: WatchState, *messages: WatchModelsResponse) -> list[WatchEvent]:
    """All that is told because of these messages."""
    return [event for message in messages for event in state.receive(message)]


def begun(*messages: WatchModelsResponse) -> WatchState:
    """A watch from the start that has received these."""
    state = WatchState()
    state.begin()
    receive(state, *messages)
    return state


def test_a_snapshot_and_changes() -> None:
    """In order, as they come; a snapshot's own have no revision, as nobody can go on from its middle."""
    state = WatchState()
    assert state.begin() == WatchModelsRequest(batch_snapshot=True)
    events = receive(
        state, changed("ADDED", A), changed("ADDED", B), bookmark("1"),
        changed("MODIFIED", A_GONE, "2"), changed("REMOVED", B, "3"), changed("ADDED", C, "4"), bookmark("5"),
    )  # fmt: skip
    assert events == [
        ModelChange("ADDED", A, ""),
        ModelChange("ADDED", B, ""),
        WatchBookmark("1"),
        ModelChange("MODIFIED", A_GONE, "2"),
        ModelChange("REMOVED", B, "3"),
        ModelChange("ADDED", C, "4"),
        WatchBookmark("5"),
    ]


@pytest.mark.parametrize("last", [changed("MODIFIED", A_GONE, "2"), bookmark("2")])
def test_a_lost_connection_goes_on_from_the_last_revision(last: WatchModelsResponse) -> None:
    """Of a change or a bookmark, whichever came last; and what comes then is told as it is."""
    state = begun(changed("ADDED", A), bookmark("1"), last)
    assert state.broke(LOST) is not None
    assert state.begin() == WatchModelsRequest(revision="2")
    assert receive(state, changed("ADDED", B, "3"), bookmark("3")) == [ModelChange("ADDED", B, "3"), WatchBookmark("3")]


def test_a_snapshot_that_is_cut_begins_anew() -> None:
    """What it had told is not told again; what has changed since, or is gone again, is."""
    state = begun(changed("ADDED", A), changed("ADDED", B), changed("ADDED", C))
    assert state.broke(LOST) is not None
    assert state.begin() == WatchModelsRequest(batch_snapshot=True)
    assert receive(state, changed("ADDED", A_GONE), changed("ADDED", B), bookmark("7")) == [
        ModelChange("MODIFIED", A_GONE, ""),
        ModelChange("REMOVED", C, ""),
        WatchBookmark("7"),
    ]


def test_a_revision_that_is_gone() -> None:
    """A snapshot at once, told as the differences to what was told; it is taken anew if it is cut as well."""
    state = begun(changed("ADDED", A), changed("ADDED", B), bookmark("1"))
    state.broke(LOST)
    state.begin()
    assert state.broke(GONE) == 0
    assert state.begin() == WatchModelsRequest(batch_snapshot=True)
    assert receive(state, changed("ADDED", A_GONE)) == [ModelChange("MODIFIED", A_GONE, "")]
    assert state.broke(LOST) is not None
    assert state.begin() == WatchModelsRequest(batch_snapshot=True)
    assert receive(state, changed("ADDED", A_GONE), changed("ADDED", C), bookmark("2")) == [
        ModelChange("ADDED", C, ""),
        ModelChange("REMOVED", B, ""),
        WatchBookmark("2"),
    ]
    state.broke(LOST)
    assert state.begin() == WatchModelsRequest(revision="2")


def test_a_snapshot_cannot_be_gone() -> None:
    """A gateway that says so is not asked again and again."""
    assert begun().broke(GONE) is None


def test_a_revision_of_an_earlier_watch() -> None:
    """Nobody knows what the caller knows, so changes are passed on as the gateway calls them."""
    state = WatchState("7")
    assert state.begin() == WatchModelsRequest(revision="7")
    assert receive(state, changed("MODIFIED", A, "8"), changed("REMOVED", B, "9"), bookmark("9")) == [
        ModelChange("MODIFIED", A, "8"),
        ModelChange("REMOVED", B, "9"),
        WatchBookmark("9"),
    ]
    state.broke(LOST)
    assert state.begin() == WatchModelsRequest(revision="9")
    # Of the models from before, those that are gone could not be told.
    assert state.broke(GONE) is None


def test_what_is_known_from_an_earlier_watch() -> None:
    """It makes up for a revision that is gone, and for none."""
    for revision in "7", "":
        state = WatchState(revision, known=[A, B])
        if state.begin().revision:
            assert state.broke(GONE) == 0
            state.begin()
        assert receive(state, changed("ADDED", A_GONE), changed("ADDED", C), bookmark("9")) == [
            ModelChange("MODIFIED", A_GONE, ""),
            ModelChange("ADDED", C, ""),
            ModelChange("REMOVED", B, ""),
            WatchBookmark("9"),
        ]


def test_no_news_is_not_told() -> None:
    """A change that was told already, or that undoes what was never told; the revision is taken all the same."""
    state = begun(changed("ADDED", A), bookmark("1"))
    assert receive(state, changed("MODIFIED", A, "2"), changed("REMOVED", C, "3")) == []
    state.broke(LOST)
    assert state.begin() == WatchModelsRequest(revision="3")
    # By another name than it has for the caller.
    assert receive(state, changed("MODIFIED", B, "4")) == [ModelChange("ADDED", B, "4")]
    assert receive(state, changed("ADDED", A_GONE, "5")) == [ModelChange("MODIFIED", A_GONE, "5")]


def test_kinds_of_a_later_version_are_skipped() -> None:
    """They are no change that this version knows; the next call goes on after them."""
    state = begun(bookmark("1"))
    later = WatchModelsResponse(change=9, model=A, revision="2")  # type: ignore[arg-type]
    assert receive(state, later) == []
    state.broke(LOST)
    assert state.begin() == WatchModelsRequest(revision="2")


def test_the_caller_may_do_with_a_model_what_it_likes() -> None:
    """What was told is compared with what comes, not with what the caller made of it."""
    given_ = Model(id="b")
    state = WatchState(known=[given_])
    given_.aliases.append("mine")
    state.begin()
    (event,) = receive(state, changed("ADDED", Model(id="a")))
    assert isinstance(event, ModelChange)
    event.model.aliases.append("mine")
    assert receive(state, changed("ADDED", Model(id="a")), changed("ADDED", Model(id="b")), bookmark("1")) == [
        WatchBookmark("1")
    ]


@pytest.mark.parametrize(
    "passing",
    [
        None,
        error(STATUS.UNAVAILABLE),
        error(STATUS.UNAVAILABLE, "DRAINING"),
        error(STATUS.ABORTED, "DRAINING"),
        error(STATUS.RESOURCE_EXHAUSTED, "SLOW_WATCHER"),
        error(STATUS.DEADLINE_EXCEEDED, "DURATION_LIMIT_EXCEEDED"),
        error(STATUS.INTERNAL),
        error(STATUS.UNKNOWN),
    ],
    ids=str,
)
def test_what_passes(passing: CallError | None) -> None:
    """The watch goes on after a pause, from where it was."""
    state = begun(bookmark("1"))
    pause = state.broke(passing)
    assert pause is not None
    assert pause >= 0.1
    assert state.begin() == WatchModelsRequest(revision="1")


@pytest.mark.parametrize(
    "lasting",
    [
        error(STATUS.UNAUTHENTICATED, "UNAUTHENTICATED"),
        error(STATUS.PERMISSION_DENIED, "PERMISSION_DENIED"),
        error(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST"),
        error(STATUS.UNIMPLEMENTED),
        error(STATUS.CANCELLED),
        error(STATUS.INTERNAL, "INTERNAL"),
    ],
    ids=str,
)
def test_what_lasts(lasting: CallError) -> None:
    """The watch is over."""
    assert begun(bookmark("1")).broke(lasting) is None


def test_pauses_grow_until_something_comes() -> None:
    """From a tenth of a second to ten; between the longest and the shortest, chance decides."""
    longest = WatchState(draw=lambda _, high: high)
    assert [longest.broke(LOST) for _ in range(8)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])
    longest.receive(changed("ADDED", A))
    assert longest.broke(LOST) == pytest.approx(0.2)
    shortest = WatchState(draw=lambda low, _: low)
    assert [shortest.broke(LOST) for _ in range(8)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])


def test_the_gateway_may_ask_for_a_longer_pause() -> None:
    """But not for less than the pause that is due."""
    state = WatchState(draw=lambda _, high: high)
    assert state.broke(error(STATUS.UNAVAILABLE, "DRAINING", retry_after=30)) == 30
    assert state.broke(error(STATUS.UNAVAILABLE, "DRAINING", retry_after=0)) == pytest.approx(0.4)


def tell(table: Table, event: WatchEvent) -> None:
    """Do to a caller's table what an event says, and hold that it was news."""
    if isinstance(event, WatchBookmark):
        return
    match event.change:
        case "ADDED":
            assert event.model.id not in table
        case "MODIFIED":
            assert table[event.model.id] != event.model
    if event.change == "REMOVED":
        del table[event.model.id]
    else:
        table[event.model.id] = event.model


class History:
    """A gateway's registry, with all that ever happened to it; a revision is how much had."""

    def __init__(self) -> None:
        self.changes: list[WatchModelsResponse] = []

    def happen(self, name: str, root: str) -> None:
        """A model appears or changes; without a root, it goes."""
        before = self.table().get(name)
        after = Model(id=name, engine_root=root)
        revision = str(len(self.changes) + 1)
        if root and after != before:
            self.changes.append(changed("MODIFIED" if before else "ADDED", after, revision))
        elif before and not root:
            self.changes.append(changed("REMOVED", before, revision))

    def table(self) -> Table:
        """The models that there are."""
        table: Table = {}
        for change in self.changes:
            if change.change == WatchModelsResponse.CHANGE_REMOVED:
                del table[change.model.id]
            else:
                table[change.model.id] = change.model
        return table

    def answer(self, request: WatchModelsRequest) -> list[WatchModelsResponse]:
        """All that a call is sent, were it never cut."""
        now = bookmark(str(len(self.changes)))
        if request.revision:
            return [*self.changes[int(request.revision) :], now]
        return [*(changed("ADDED", each) for each in self.table().values()), now]


HAPPENING = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["", "x", "y"])), max_size=6)
ROUNDS = st.lists(st.tuples(HAPPENING, st.booleans(), st.integers(0, 8)), max_size=8)


@given(ROUNDS)
def test_each_change_is_told_once_whatever_happens(rounds: list[tuple[list[tuple[str, str]], bool, int]]) -> None:
    """However calls are cut and revisions lost, what was told is news each time and adds up to what there is."""
    history, state = History(), WatchState(draw=lambda low, _: low)
    table: Table = {}
    for happening, gone, count in rounds:
        for name, root in happening:
            history.happen(name, root)
        request = state.begin()
        if gone and request.revision:
            assert state.broke(GONE) == 0
            request = state.begin()
        for event in receive(state, *history.answer(request)[:count]):
            tell(table, event)
        assert state.broke(LOST) is not None
    for event in receive(state, *history.answer(state.begin())):
        tell(table, event)
    assert table == history.table()


def test_models_of_a_snapshot_in_one_message() -> None:
    """Are events of their own; a new snapshot returns only what is different."""
    state = WatchState()
    state.begin()
    several = WatchModelsResponse(change=WatchModelsResponse.CHANGE_ADDED, models=[A, B])
    assert receive(state, several, bookmark("1")) == [
        ModelChange("ADDED", A, ""),
        ModelChange("ADDED", B, ""),
        WatchBookmark("1"),
    ]
    assert state.broke(GONE) == 0.0
    assert state.begin() == WatchModelsRequest(batch_snapshot=True)
    fewer = WatchModelsResponse(change=WatchModelsResponse.CHANGE_ADDED, models=[A_GONE])
    assert receive(state, fewer, bookmark("2")) == [
        ModelChange("MODIFIED", A_GONE, ""),
        ModelChange("REMOVED", B, ""),
        WatchBookmark("2"),
    ]
