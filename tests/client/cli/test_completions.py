"""Completions by their ids: cancelled, looked up, resumed; and the tokens of a prompt."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from deltawire import ChatRequest, user
from deltawire._completion import elsewhere
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_COMPLETED,
    COMPLETION_STATE_FAILED,
    COMPLETION_STATE_RUNNING,
    USAGE_PROVENANCE_ESTIMATED,
    USAGE_PROVENANCE_LOWER_BOUND,
    CancelChatCompletionRequest,
    CancelChatCompletionResponse,
    Completed,
    CompletionSummary,
    CountTokensResponse,
    GetChatCompletionRequest,
    GetChatCompletionResponse,
    ListChatCompletionsRequest,
    ListChatCompletionsResponse,
    ResumePoint,
    Started,
    StopReason,
    Usage,
)
from deltawire.v1.error_reason_pb2 import ErrorReason
from tests.client.cli.support import CALL, Run, Terminal
from tests.client.scripted import (
    Fail,
    Gateway,
    call_piece,
    called,
    choice,
    completed,
    finished,
    notice,
    numbered,
    saying,
    started,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

STATUS = grpc.StatusCode
SO_FAR = Usage(prompt_tokens=3, completion_tokens=5, provenance=USAGE_PROVENANCE_LOWER_BOUND)
LOST = Fail(STATUS.INTERNAL, trailers=())
MISSING = Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND", "there is no completion of this id here")


@pytest.mark.parametrize(
    ("met", "line"),
    [
        (
            CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING, usage=SO_FAR),
            "mine is cancelled; 3 + 5 tokens (lower bound)\n",
        ),
        (
            CancelChatCompletionResponse(
                state=COMPLETION_STATE_COMPLETED,
                usage=Usage(completion_tokens=2, provenance=USAGE_PROVENANCE_ESTIMATED),
            ),
            "mine had ended before: completed; 2 tokens (estimated)\n",
        ),
    ],
)
def test_cancel(gateway: Gateway, run: Run, met: CancelChatCompletionResponse, line: str) -> None:
    """What it met, and what it had cost."""
    gateway.will(met)
    assert run("cancel", "mine") == (0, line, "")
    assert gateway.last.request == CancelChatCompletionRequest(completion_id="mine")


def test_another_callers(gateway: Gateway, run: Run) -> None:
    """Operators name whose completion they mean; the error of a look-up has no message."""
    gateway.will(CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING))
    assert run("cancel", "c", "--caller", "ann")[0] == 0
    assert gateway.last.request == CancelChatCompletionRequest(completion_id="c", caller="ann")
    error = Completed.Error(code=3, reason=ErrorReason.ERROR_REASON_UPSTREAM_REJECTED)
    gateway.will(GetChatCompletionResponse(completion_id="c", state=COMPLETION_STATE_FAILED, error=error))
    status, out, _ = run("get", "c", "--caller", "ann")
    assert (status, gateway.last.request) == (0, GetChatCompletionRequest(completion_id="c", caller="ann"))
    assert "error:      UPSTREAM_REJECTED\n" in out


def test_list(gateway: Gateway, run: Run) -> None:
    """All pages in one table: how each ended, and what is not known; a worker that did not answer is a note."""
    created = Timestamp(seconds=1_795_867_200)
    running = CompletionSummary(state=COMPLETION_STATE_RUNNING, usage=SO_FAR, create_time=created)
    whole = CompletionSummary(
        completion_id="c",
        caller="ann",
        model="llama",
        state=COMPLETION_STATE_COMPLETED,
        stop_reasons=[StopReason.STOP_REASON_OUT_OF_TOKENS] * 2,
        usage=SO_FAR,
        create_time=created,
    )
    reason = ErrorReason.ERROR_REASON_MODEL_NOT_FOUND
    failed = CompletionSummary(state=COMPLETION_STATE_FAILED, error_code=5, error_reason=reason, create_time=created)
    canceled = CompletionSummary(state=COMPLETION_STATE_FAILED, error_code=1, create_time=created)
    gateway.will(
        ListChatCompletionsResponse(completions=[running, whole], next_page_token="2", unreachable_workers=[1])
    )
    gateway.will(ListChatCompletionsResponse(completions=[failed, canceled], unreachable_workers=[1, 3]))
    status, out, err = run("completions", "list")
    head, *rows = [[cell for cell in line.split("  ") if cell] for line in out.splitlines()]
    assert status == 0
    assert [each.strip() for each in head] == ["ID", "CALLER", "STATE", "END", "MODEL", "USAGE", "CREATED (UTC)"]
    assert [[cell.strip() for cell in row[:5]] for row in rows] == [
        ["-", "-", "running", "-", "-"],
        ["c", "ann", "completed", "OUT_OF_TOKENS", "llama"],
        ["-", "-", "failed", "MODEL_NOT_FOUND", "-"],
        ["-", "-", "failed", "CANCELLED", "-"],
    ]
    assert rows[0][-1].strip() == created.ToDatetime().isoformat(" ")
    assert err == "note: no answer from the gateway's workers 1, 3: their completions are missing\n"


def test_filters_of_a_list(gateway: Gateway, run: Run) -> None:
    """Each reaches its field; a time without a zone is in UTC."""
    gateway.will(ListChatCompletionsResponse(completions=[CompletionSummary(completion_id="c")]))
    filters = ("--caller", "ann", "--model", "llama", "--provider", "vllm", "--state", "ended", "--since", "2026-11-28")
    status, out, _ = run("completions", "list", *filters, "--json")
    assert (status, json.loads(out)) == (0, {"completionId": "c"})
    since = Timestamp()
    since.FromDatetime(datetime(2026, 11, 28, tzinfo=UTC))
    assert gateway.last.request == ListChatCompletionsRequest(
        caller="ann",
        model="llama",
        provider_id="vllm",
        states=[COMPLETION_STATE_COMPLETED, COMPLETION_STATE_FAILED],
        create_time_from=since,
    )
    status, _, err = run("completions", "list", "--since", "noon")
    assert (status, "noon is not a time" in err) == (2, True)


def test_cancel_in_json(gateway: Gateway, run: Run) -> None:
    """The message itself."""
    gateway.will(CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING))
    status, out, _ = run("cancel", "mine", "--json")
    assert (status, json.loads(out)) == (0, {"state": "COMPLETION_STATE_RUNNING"})


def test_a_completion_that_there_is_not(gateway: Gateway, run: Run) -> None:
    """It is a failed call."""
    for command in ("cancel", "get", "resume"):
        gateway.will(MISSING)
        status, out, err = run(command, "mine")
        assert (status, out) == (1, "")
        assert err.startswith("error: NOT_FOUND (COMPLETION_NOT_FOUND): there is no completion of this id here\n")


BEGAN = Started(completion_id="mine", model="vllm/llama", create_time=Timestamp(seconds=0))
RUNNING = GetChatCompletionResponse(
    completion_id="mine", state=COMPLETION_STATE_RUNNING, started=BEGAN, usage=SO_FAR, last_sequence=4
)
ENDED = GetChatCompletionResponse(
    completion_id="mine",
    state=COMPLETION_STATE_COMPLETED,
    started=BEGAN,
    usage=SO_FAR,
    completed=Completed(choices=[choice(0, "Hel\x1blo", "CANCELLED", calls=[CALL]), choice(1, "ho")]),
    expire_time=Timestamp(seconds=60),
)
FAILED = GetChatCompletionResponse(
    completion_id="mine",
    state=COMPLETION_STATE_FAILED,
    error=Completed.Error(code=10, reason=ErrorReason.ERROR_REASON_UPSTREAM_ERROR, message="it\nbroke"),
)
GIVEN_UP = GetChatCompletionResponse(
    completion_id="mine",
    state=COMPLETION_STATE_FAILED,
    error=Completed.Error(code=STATUS.CANCELLED.value[0], message="the caller gave up"),
)
OVERDUE = GetChatCompletionResponse(
    completion_id="mine",
    state=COMPLETION_STATE_FAILED,
    error=Completed.Error(code=STATUS.DEADLINE_EXCEEDED.value[0], message="too late"),
)


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        (
            RUNNING,
            [
                "id:         mine",
                "state:      running",
                "model:      vllm/llama",
                "began:      1970-01-01T00:00:00Z",
                "usage:      3 + 5 tokens (lower bound)",
                "sequence:   4 is the last event",
            ],
        ),
        (
            ENDED,
            [
                "id:         mine",
                "state:      completed",
                "model:      vllm/llama",
                "began:      1970-01-01T00:00:00Z",
                "usage:      3 + 5 tokens (lower bound)",
                "ended:      choice 0 with CANCELLED",
                "ended:      choice 1 with END_OF_TURN",
                "kept until: 1970-01-01T00:01:00Z",
                "--- choice 0",
                "Hel␛lo",
                'tool call: get_weather({"city": "Köln"})',
                "--- choice 1",
                "ho",
            ],
        ),
        (FAILED, ["id:         mine", "state:      failed", "error:      UPSTREAM_ERROR: it broke"]),
        (GIVEN_UP, ["id:         mine", "state:      failed", "error:      CANCELLED: the caller gave up"]),
        (OVERDUE, ["id:         mine", "state:      failed", "error:      DEADLINE_EXCEEDED: too late"]),
    ],
)
def test_get(
    gateway: Gateway,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    found: GetChatCompletionResponse,
    lines: Sequence[str],
) -> None:
    """What is known, a line each, then the result; a model does not steer the terminal here either."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    gateway.will(found)
    assert run("get", "mine")[0] == 0
    assert terminal.getvalue().splitlines() == lines


def test_get_in_json(gateway: Gateway, run: Run) -> None:
    """The message itself."""
    gateway.will(RUNNING)
    status, out, _ = run("get", "mine", "--json")
    assert (status, json.loads(out)["lastSequence"]) == (0, "4")


def test_resume(gateway: Gateway, run: Run) -> None:
    """From its beginning, or after an event, as events too; it is printed like an answer."""
    events = saying("Hel", "lo")
    gateway.will(*events)
    assert run("resume", "mine") == (0, "Hello\n", "")
    assert gateway.last.request.resume == ResumePoint(completion_id="mine")
    gateway.will(*events[2:])
    assert run("resume", "mine", "--after", "1", "--retention", "5") == (0, "lo\n", "")
    assert gateway.last.request.resume == ResumePoint(completion_id="mine", last_sequence=1)
    gateway.will(*events[2:])
    status, out, _ = run("resume", "mine", "--after", "1", "--json")
    assert (status, len(out.splitlines())) == (0, len(events) - 2)


def test_resume_after_the_last_event(gateway: Gateway, run: Run) -> None:
    """Nothing comes, which is no failure: it is said on standard error, with where its end can be seen."""
    note = "note: nothing comes after 4: the answer had ended there; deltawire get mine says how\n"
    for form in ([], ["--json"]):
        gateway.will()
        assert run("resume", "mine", "--after", "4", *form) == (0, "", note)
        assert gateway.last.request.resume == ResumePoint(completion_id="mine", last_sequence=4)


def test_a_stream_that_goes_on(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The break is noted on standard error; if it cannot go on, how to get the rest is said."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)
    events = saying("Hel", "lo")
    gateway.will(*events[:2], LOST)
    gateway.will(*events[2:])
    status, out, err = run("chat", "--model", "llama", "--retention", "60", "--completion-id", "mine", "hi")
    assert (status, out) == (0, "Hello\n")
    assert err == "note: stream cmpl-1 broke off and goes on in 0.0 s: INTERNAL: it failed\n"
    gateway.will(*events[:2], LOST)
    for _ in range(1 + elsewhere.MAX_CONNECTIONS):
        gateway.will(Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA"))
    status, out, err = run("chat", "--model", "llama", "--retention", "60", "hi")
    assert (status, out) == (1, "Hel\n")
    assert "note: for the rest: deltawire resume cmpl-1 --after 1\nerror: FAILED_PRECONDITION (WRONG_REPLICA)" in err
    gateway.will(*[Fail(STATUS.DEADLINE_EXCEEDED, "DURATION_LIMIT_EXCEEDED")])
    status, _, err = run("chat", "--model", "llama", "--retention", "60", "--completion-id", "mine", "hi")
    assert (status, err.startswith("note: for the rest: deltawire resume mine\nerror: ")) == (1, True)


@pytest.mark.parametrize("command", ["resume", "get", "cancel"])
def test_a_completion_of_another_process(
    gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The search is noted once, however many connections it takes, and nothing of a stream that broke off."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)
    for _ in range(1 + elsewhere.MAX_CONNECTIONS):
        gateway.will(Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA", "another process has it"))
    error = "FAILED_PRECONDITION (WRONG_REPLICA): another process has it"
    notes = f"note: trying up to 8 new connections: {error}\nerror: {error}\n  request id: mine\n"
    assert run(command, "its-id", "--request-id", "mine") == (1, "", notes)


def test_a_stream_that_has_not_begun(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not break off, and the note does not say so."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)
    gateway.will(LOST)
    gateway.will(*saying("hi"))
    status, _, err = run("chat", "--retention", "60", "--completion-id", "mine", "hi")
    note = "note: stream mine has not begun and is requested again in 0.0 s: INTERNAL: it failed\n"
    assert (status, err) == (0, note)


def test_count_tokens(gateway: Gateway, run: Run) -> None:
    """The number alone, so that a script can use it; how many there may be is said beside it."""
    gateway.will(CountTokensResponse(prompt_tokens=12))
    assert run("count-tokens", "--model", "llama", "--system", "be kind", "hi") == (0, "12\n", "")
    assert [message.WhichOneof("role") for message in gateway.last.request.chat.messages] == ["system", "user"]
    gateway.will(CountTokensResponse(prompt_tokens=12, max_context_tokens=4096, model="vllm/llama"))
    expected = (0, "12\n", "note: vllm/llama takes 4096, with the answer\n")
    assert run("count-tokens", "--request", "-", stdin='{"model": "llama"}') == expected
    assert gateway.last.request.chat == ChatRequest(model="llama")
    gateway.will(CountTokensResponse(prompt_tokens=12))
    assert run("count-tokens", "--model", "llama", "--json", "hi")[:2] == (0, '{"promptTokens": 12}\n')


def test_count_tokens_without_a_model(gateway: Gateway, run: Run) -> None:
    """The gateway finds the only one, as for a chat; at a terminal there is nothing to count without a prompt."""
    gateway.will(CountTokensResponse(prompt_tokens=12))
    assert run("count-tokens", stdin="from a pipe")[0] == 0
    assert gateway.last.request.chat == ChatRequest(messages=[user("from a pipe")])
    assert run("count-tokens", stdin=[]) == (2, "", "error: there is no prompt\n")


def test_what_is_told_beside_the_answer(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices on standard error, after the answer; calls while they are written only at a terminal, dimmed."""
    events = numbered(
        started(), notice("another\nreplica answers"), notice("it may be ignored", "chat.priority"), text("Let me look."),
        call_piece(), call_piece(fragment='{"city":'), call_piece(fragment='"K\x1b"}'), called(CALL),
        finished(reason="END_OF_MESSAGE"), completed(choice(said="Let me look.", calls=[CALL])),
    )  # fmt: skip
    arguments: Sequence[Any] = ("chat", "--model", "llama", "--tool-calls", "incremental", "hi")
    notes = "note: another replica answers\nnote: it may be ignored (chat.priority)\n"
    said = 'Let me look.\ntool call: get_weather({"city": "Köln"})\n'
    gateway.will(*events)
    status, out, err = run(*arguments)
    assert (status, out) == (0, said)
    assert err.startswith(notes)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gateway.will(*events)
    assert run(*arguments)[1] == said
    assert terminal.getvalue().startswith(f'\x1b[2mget_weather {{"city":"K␛"}}\x1b[0m\n{notes}')
