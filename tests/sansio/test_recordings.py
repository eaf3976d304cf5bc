"""What a real vLLM sent, read in every way in which bytes can arrive, against the golden files and an independent reading."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deltawire_server.errors import Reason
from deltawire_server.sansio.coalesce import Coalescer
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    Event,
    FailureReason,
    Provenance,
    ReasoningDelta,
    Refused,
    Started,
    StopReason,
    TextDelta,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from tests.support import chop, golden, recordings
from tests.support.tool_call_events import check_calls

ROOT = Path(__file__).parents[2]
NAMES = recordings.names()
RECORDED = [name for name in NAMES if not name.startswith("w-")]
"""Without the streams that were written by hand, which no simple reader understands."""
SHORT = [
    "c-keepalive-long-prefill",
    "fail-midstream-500-after-role",
    "p-mistral-noarg",
    "text-stop",
    "text-unicode-token-ids",
    "tool-noarg",
]


def _golden(recording: recordings.Recording) -> bytes:
    assert recording.golden_path.exists(), f"{recording.golden_path.name} is missing: run `make golden` and read it"
    return recording.golden_path.read_bytes()


# --- the golden files


@pytest.mark.parametrize("name", NAMES)
def test_gives_its_golden_events_however_it_is_cut(name: str) -> None:
    """Whole, byte by byte, cut at random and around each event's end, the same bytes give the golden list."""
    recording = recordings.load(name)
    expected = _golden(recording)
    events = recording.read()
    assert golden.dump(events) == expected
    assert recording.read(chop.byte_by_byte(recording.data)) == events
    for pieces in [*chop.at_random(recording.data), *chop.around_event_ends(recording.data)]:
        assert recording.read(pieces) == events, [len(piece) for piece in pieces]


@pytest.mark.parametrize("name", SHORT)
def test_gives_its_golden_events_cut_in_two_anywhere(name: str) -> None:
    """Six short streams with text, a call, characters of several bytes, comments and an error: no boundary matters."""
    _cut_everywhere(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHORT])
def test_gives_its_golden_events_cut_in_two_anywhere_all(name: str) -> None:
    """Every boundary of every other stream."""
    _cut_everywhere(name)


def _cut_everywhere(name: str) -> None:
    recording = recordings.load(name)
    events = recording.read()
    assert golden.dump(events) == _golden(recording)
    for pieces in chop.at_every_boundary(recording.data):
        assert recording.read(pieces) == events, len(pieces[0])


@pytest.mark.parametrize("name", NAMES)
def test_gives_the_same_assembled_without_the_pieces(name: str) -> None:
    """Without pieces of calls the list is the golden one minus `ToolCallStarted` and `ToolCallArguments`."""
    recording = recordings.load(name)
    returned = [event for event in recording.read() if not isinstance(event, ToolCallStarted | ToolCallArguments)]
    assert recording.read(incremental=False) == returned


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_told_in_order_and_add_up(name: str) -> None:
    """Pieces add up to the text of the verdict, joined or not, however the bytes are cut; assembled, the verdicts are the same."""
    recording = recordings.load(name)
    calls = check_calls(recording.read(incremental=False), incremental=False)
    for pieces in (None, chop.byte_by_byte(recording.data), *chop.at_random(recording.data)):
        events = recording.read(pieces)
        assert check_calls(events, incremental=True) == calls
        coalescer = Coalescer()
        coalescer.receive(events)
        assert check_calls(coalescer.take(), incremental=True) == calls


def test_every_golden_file_belongs_to_a_recording() -> None:
    """A recording that goes takes its golden file with it."""
    kept = {path.name.removesuffix(".events.jsonl") for path in recordings.TRANSCRIPTS.glob("*.events.jsonl")}
    assert kept <= set(NAMES)


def test_every_recording_says_how_it_was_asked_for() -> None:
    """Each stream has its request's body beside it, without which its events are not determined."""
    missing = [name for name in NAMES if not (recordings.TRANSCRIPTS / f"{name}.request.json").exists()]
    assert not missing


def test_nothing_names_the_folder_the_recordings_came_from() -> None:
    """The repository is whole: no file reads from beside it."""
    outside = b"../" + b"shared"
    folders = [ROOT / name for name in ("client", "protos", "server", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    texts = [path for path in files if not {"node_modules", "__pycache__"} & set(path.parts)]
    assert len(texts) > 300
    assert [str(path) for path in texts if outside in path.read_bytes()] == []


# --- what each recording was made to show, written by hand


@dataclass(frozen=True)
class CompletionView:
    """How one choice should end."""

    reason: StopReason
    word: str
    succeeded: int = 0
    failed: tuple[FailureReason, ...] = ()
    executable: bool = False


@dataclass(frozen=True)
class Ended:
    """How an answer should end."""

    choices: tuple[CompletionView, ...]
    provenance: Provenance = Provenance.ESTIMATED
    fault: Reason | None = None
    code: int = 0


def _called(succeeded: int = 1, word: str = "tool_calls") -> CompletionView:
    return CompletionView(StopReason.END_OF_MESSAGE, word, succeeded, executable=True)


def _failed(reason: FailureReason) -> CompletionView:
    return CompletionView(StopReason.END_OF_MESSAGE, "tool_calls", failed=(reason,))


_TURN = CompletionView(StopReason.END_OF_TURN, "stop")
_LENGTH = CompletionView(StopReason.OUT_OF_TOKENS, "length")
_CUT_CALL = CompletionView(StopReason.OUT_OF_TOKENS, "length", failed=(FailureReason.TRUNCATED,))
_LOST = CompletionView(StopReason.UPSTREAM_INCOMPLETE, "")
_LOST_CALL = CompletionView(StopReason.UPSTREAM_INCOMPLETE, "", failed=(FailureReason.TRUNCATED,))
_BROKEN = CompletionView(StopReason.ERROR, "")

TEXTS = [
    "c-request-id", "cont-tool-cut-20", "json-schema", "p-llama3-json-text-before", "p-pythonic-text-before", "so-choice",
    "text-greedy", "text-stream-interval-5", "text-tools-none", "text-unicode", "text-unicode-token-ids",
]  # fmt: skip
CUT_TEXTS = [
    "echo-prefix", "err-guided-json", "err-priority", "fields-accepted", "hdr-request-id", "kv-prompt-token-ids",
    "return-prompt-text", "text-length", "text-logprobs", "text-tools-auto",
]  # fmt: skip
ONE_CALL = [
    "p-deepseek-v3-one", "p-deepseek-v3-text-before", "p-deepseek-v31-one", "p-deepseek-v4-one", "p-ernie45-noarg",
    "p-granite-20b-fc-one", "p-granite-one", "p-hunyuan-a13b-one", "p-internlm-noarg", "p-internlm-one", "p-jamba-one",
    "p-jamba-text-before", "p-kimi-k2-one", "p-kimi-k2-text-before", "p-lfm2-noarg", "p-llama3-json-one",
    "p-minimax-m2-one", "p-mistral-noarg", "p-mistral-one", "p-mistral-text-before", "p-olmo3-one", "p-pythonic-one",
    "p-qwen3-coder-noarg", "p-qwen3-coder-one", "p-step3p5-one", "p-xlam-one", "tool-nested", "tool-noarg",
    "tool-parallel-false", "tool-required-one", "tool-strict-auto", "tool-text-before",
]  # fmt: skip
TWO_CALLS = [
    "p-granite-two",
    "p-llama3-json-two",
    "p-qwen3-coder-two",
    "p-xlam-two",
    "tool-stream-interval-8",
    "tool-two",
]
CUT_CALLS = [
    "p-deepseek-v3-truncated", "p-minimax-m2-truncated", "p-mistral-truncated", "p-pythonic-truncated",
    "p-qwen3-coder-truncated", "tool-truncated",
]  # fmt: skip

EXPECTED_ENDS: dict[str, Ended] = {
    **dict.fromkeys(TEXTS, Ended((_TURN,))),
    **dict.fromkeys(CUT_TEXTS, Ended((_LENGTH,))),
    **dict.fromkeys(ONE_CALL, Ended((_called(),))),
    **dict.fromkeys(TWO_CALLS, Ended((_called(2),))),
    **dict.fromkeys(CUT_CALLS, Ended((_CUT_CALL,))),
    "text-stop": Ended((CompletionView(StopReason.STOP_SEQUENCE, "stop"),)),
    "tool-named": Ended((_called(word="stop"),)),
    "tool-malformed": Ended((_failed(FailureReason.MALFORMED_JSON),)),
    "tool-unknown-name": Ended((_failed(FailureReason.UNKNOWN_TOOL),)),
    # Those that were asked for with usage.
    "c-keepalive-long-prefill": Ended((_LENGTH,), Provenance.EXACT),
    "c-qwen3-tool": Ended((_called(),), Provenance.EXACT),
    "r-deepseek-r1-never-closed": Ended((_LENGTH,), Provenance.EXACT),
    "r-deepseek-r1-text": Ended((_TURN,), Provenance.EXACT),
    "r-deepseek-r1-tool": Ended((_called(),), Provenance.EXACT),
    "r-granite-text": Ended((_TURN,), Provenance.EXACT),
    "r-mistral-tool": Ended((_called(),), Provenance.EXACT),
    "r-qwen3-text": Ended((_TURN,), Provenance.EXACT),
    "r-qwen3-tool": Ended((_called(),), Provenance.EXACT),
    "text-n2": Ended((_TURN, _LENGTH), Provenance.EXACT),
    "text-usage": Ended((_LENGTH,), Provenance.EXACT),
    "tool-n2": Ended((_called(2), _called(2)), Provenance.EXACT),
    "tool-one": Ended((_called(),), Provenance.EXACT),
    # Those that were asked for with running usage, as every request of the gateway's is.
    "cu-text": Ended((_TURN,), Provenance.EXACT),
    "cu-text-length": Ended((_LENGTH,), Provenance.EXACT),
    "cu-text-n2": Ended((_TURN, _LENGTH), Provenance.EXACT),
    "cu-reasoning": Ended((_TURN,), Provenance.EXACT),
    "cu-reasoning-tool": Ended((_called(),), Provenance.EXACT),
    "cu-tool-one": Ended((_called(),), Provenance.EXACT),
    "cu-tool-two": Ended((_called(2),), Provenance.EXACT),
    "cu-cut": Ended((_LOST,), Provenance.LOWER_BOUND, Reason.UPSTREAM_INCOMPLETE),
    "cu-cut-tool": Ended((_LOST_CALL,), Provenance.LOWER_BOUND, Reason.UPSTREAM_INCOMPLETE),
    # Written by hand.
    "w-arguments-after-finish": Ended((_called(),), Provenance.EXACT),
    "w-empty-data-lines": Ended((_TURN,), Provenance.EXACT),
    "w-logprob-null": Ended((_TURN,), Provenance.EXACT),
    "w-surrogate-pair-over-two-chunks": Ended((_TURN,), Provenance.EXACT),
    "w-text-after-finish": Ended((_TURN,), Provenance.EXACT),
    "w-usage-counts-null": Ended((_TURN,)),
    # Failures; the last three never began.
    "cancel-mid-stream": Ended((_LOST,), fault=Reason.UPSTREAM_INCOMPLETE),
    "fail-apiserver-sigkill": Ended((_LOST,), fault=Reason.UPSTREAM_INCOMPLETE),
    "fail-enginecore-sigkill": Ended((_BROKEN,), fault=Reason.UPSTREAM_ERROR, code=500),
    "fail-midstream-500-after-role": Ended((_BROKEN,), fault=Reason.UPSTREAM_ERROR, code=500),
    "err-bad-regex": Ended((), fault=Reason.UPSTREAM_ERROR, code=400),
    "err-top-logprobs-large": Ended((), fault=Reason.UPSTREAM_ERROR, code=400),
    "c-chat-while-asleep": Ended((), fault=Reason.UPSTREAM_UNAVAILABLE),
}


@pytest.mark.parametrize("name", sorted(EXPECTED_ENDS))
def test_is_told_as_it_was_made(name: str) -> None:
    """Stop reason, the engine's word, verdicts, permission to execute, provenance and fault are what the recording shows."""
    events = recordings.load(name).read()
    expected = EXPECTED_ENDS[name]
    last = events[-1]
    if not expected.choices:
        assert isinstance(last, Refused)
        assert len(events) == 1
        assert (last.fault.reason, last.fault.upstream_code) == (expected.fault, expected.code)
        return
    assert isinstance(last, Completed)
    returned = tuple(
        CompletionView(
            choice.stop_reason,
            choice.engine_finish_reason,
            len(choice.tool_calls),
            tuple(call.reason for call in choice.failed_tool_calls),
            choice.tool_calls_executable,
        )
        for choice in last.choices
    )
    assert returned == expected.choices
    assert last.usage.provenance is expected.provenance
    assert (last.fault and last.fault.reason) == expected.fault
    assert (last.fault.upstream_code if last.fault else 0) == expected.code


def test_the_matched_stop_text_is_named() -> None:
    """The stop text that ended the answer is one of the caller's, and named."""
    events = recordings.load("text-stop").read()
    assert [event.matched_stop for event in events if isinstance(event, ChoiceFinished)] == ["vast"]
    assert isinstance(events[-1], Completed)
    assert events[-1].choices[0].matched_stop == "vast"


def test_markup_of_a_call_is_text_if_no_tool_was_to_be_used() -> None:
    """With tool choice "none" the model's attempt at a call is its text, and no call comes of it."""
    last = recordings.load("text-tools-none").read()[-1]
    assert isinstance(last, Completed)
    assert last.choices[0].text.startswith('<tool_call>\n{"name": "get_weather"')


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w-empty-data-lines", "Hi!"),
        ("w-logprob-null", "Hi you."),
        ("w-surrogate-pair-over-two-chunks", "ok 😀 bye"),
        ("w-text-after-finish", "Bonjour"),
        ("w-usage-counts-null", "Hi"),
    ],
)
def test_text_of_unusual_streams_is_whole(name: str, text: str) -> None:
    """Nothing of it is lost or broken."""
    last = recordings.load(name).read()[-1]
    assert isinstance(last, Completed)
    assert last.choices[0].text == text


def test_a_probability_that_is_null_is_not_known() -> None:
    """The token's entry is there, and so are its alternatives."""
    last = recordings.load("w-logprob-null").read(keep_logprobs=True)[-1]
    assert isinstance(last, Completed)
    returned = [(token.logprob, [other.logprob for other in token.alternatives]) for token in last.choices[0].logprobs]
    assert returned == [(-0.1, [-0.1]), (None, [None, -3.0]), (-0.2, [])]


def test_arguments_after_the_finish_reason_are_the_calls() -> None:
    """Never `{}` in their place."""
    last = recordings.load("w-arguments-after-finish").read()[-1]
    assert isinstance(last, Completed)
    assert [call.arguments for call in last.choices[0].tool_calls] == ['{"city":"Oslo"}']


def test_a_call_that_the_engine_never_gave_arguments_has_none() -> None:
    """A parser that sends no argument entry for a call without arguments: the turn ended by itself, so they are `{}`."""
    last = recordings.load("p-internlm-noarg").read()[-1]
    assert isinstance(last, Completed)
    assert [call.arguments for call in last.choices[0].tool_calls] == ["{}"]


# --- against an independent reading of the same lines


@dataclass
class Raw:
    """A stream read without the program: line by line, with the standard library's JSON."""

    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    reasoning: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    arguments: dict[tuple[int, int], str] = field(default_factory=lambda: defaultdict(str))
    call_ids: dict[tuple[int, int], str] = field(default_factory=dict)
    tool_names: dict[tuple[int, int], str] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    choices: set[int] = field(default_factory=set)
    outputs: int = 0
    usage: dict[str, Any] | None = None
    figures: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    ids: set[str] = field(default_factory=set)


def _read_raw(data: bytes) -> Raw:
    raw = Raw()
    for line in data.split(b"\n\n")[:-1]:
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raw.error = event["error"]
            continue
        raw.ids.add(event["id"])
        if not event["choices"]:
            raw.usage = event["usage"]
        for choice in event["choices"]:
            _read_raw_choice(raw, choice)
            if event.get("usage"):
                raw.figures[choice["index"]] = event["usage"]
    return raw


def _read_raw_choice(raw: Raw, choice: dict[str, Any]) -> None:
    index, delta = choice["index"], choice["delta"]
    raw.choices.add(index)
    raw.text[index] += delta.get("content") or ""
    raw.reasoning[index] += delta.get("reasoning") or ""
    entries = delta.get("tool_calls") or []
    raw.outputs += bool(delta.get("content") or delta.get("reasoning") or entries)
    for entry in entries:
        key = index, entry["index"]
        function = entry["function"]
        raw.arguments[key] += function.get("arguments") or ""
        if entry.get("id"):
            raw.call_ids[key] = entry["id"]
        if function.get("name"):
            raw.tool_names[key] = function["name"]
    raw.logprobs += (choice.get("logprobs") or {}).get("content") or []
    if choice["finish_reason"]:
        raw.words[index] = choice["finish_reason"]


@pytest.mark.parametrize("name", RECORDED)
def test_loses_and_invents_nothing(name: str) -> None:
    """Text, reasoning, arguments, ids, names, finish reasons, log-probabilities and usage are those of the recorded lines."""
    recording = recordings.load(name)
    raw = _read_raw(recording.data)
    events = recording.read(keep_logprobs=True)
    last = events[-1]
    if isinstance(last, Refused):
        assert len(events) == 1
        assert not raw.choices
        assert last.fault.message == (raw.error["message"] if raw.error else last.fault.message)
        return
    assert isinstance(last, Completed)
    assert isinstance(events[0], Started)
    assert {events[0].upstream_id} == raw.ids
    assert {choice.index for choice in last.choices} == raw.choices
    for choice in last.choices:
        assert choice.text == raw.text[choice.index] == _joined(events, choice.index, TextDelta)
        assert choice.reasoning == raw.reasoning[choice.index] == _joined(events, choice.index, ReasoningDelta)
        assert choice.engine_finish_reason == raw.words.get(choice.index, "")
    verdicts = [event for event in events if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
    assert {(call.choice, call.index) for call in verdicts} == set(raw.arguments)
    assert len(verdicts) == len(raw.arguments)
    for call in verdicts:
        key = call.choice, call.index
        assert (call.call_id, call.tool_name) == (raw.call_ids[key], raw.tool_names[key])
        fragments = "".join(
            event.fragment
            for event in events
            if isinstance(event, ToolCallArguments) and (event.choice, event.index) == key
        )
        assert fragments == raw.arguments[key]
        returned = call.arguments if isinstance(call, ToolCallSucceeded) else call.raw_arguments
        assert returned == raw.arguments[key] or (returned == "{}" and not raw.arguments[key])
        if isinstance(call, ToolCallSucceeded):
            assert isinstance(json.loads(returned), dict)
    told_tokens = [
        token for event in events if isinstance(event, TextDelta | ReasoningDelta) for token in event.logprobs
    ]
    assert [(token.token, token.logprob, len(token.alternatives)) for token in told_tokens] == [
        (token["token"], token["logprob"], len(token["top_logprobs"])) for token in raw.logprobs
    ]
    assert [token for choice in last.choices for token in choice.logprobs] == told_tokens
    if raw.usage is not None:
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
            raw.usage["prompt_tokens"],
            raw.usage["completion_tokens"],
        )
    elif raw.figures:
        # The engine's figures only grow, so each choice's last one is its largest.
        assert last.usage.completion_tokens == sum(figures["completion_tokens"] for figures in raw.figures.values())
        assert {last.usage.prompt_tokens} == {figures["prompt_tokens"] for figures in raw.figures.values()}
    else:
        assert last.usage.completion_tokens == raw.outputs


def _joined(events: list[Event], choice: int, kind: type[TextDelta | ReasoningDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind) and event.choice == choice)


# --- the tools themselves


def test_choppings_lose_nothing() -> None:
    """Every way of cutting gives the same bytes when joined, and really cuts."""
    data = b"data: 1\n\ndata: 2\n\n"
    ways = [chop.whole(data), chop.byte_by_byte(data), *chop.at_random(data), *chop.at_every_boundary(data)]
    ways += chop.around_event_ends(data)
    assert all(b"".join(way) == data for way in ways)
    assert len(list(chop.at_every_boundary(data))) == len(data) - 1
    assert len(list(chop.at_random(data))) == 20
    assert [len(way) for way in chop.around_event_ends(data)] == [3, 3, 3, 2, 2, 2, 2, 11]
    assert list(chop.at_random(data)) == list(chop.at_random(data))


def test_a_stale_golden_file_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` names what is missing, changed or left over, changes nothing and fails; without it, it is written."""
    for suffix in (".sse", ".request.json"):
        (tmp_path / f"text-stop{suffix}").write_bytes((recordings.TRANSCRIPTS / f"text-stop{suffix}").read_bytes())
    (tmp_path / "removed.events.jsonl").write_bytes(b"")
    monkeypatch.setattr(recordings, "TRANSCRIPTS", tmp_path)
    assert golden.main(["--check"]) == 1
    assert capsys.readouterr().out == "stale: text-stop.events.jsonl\nstale: removed.events.jsonl\n"
    assert not (tmp_path / "text-stop.events.jsonl").exists()
    assert golden.main([]) == 0
    assert capsys.readouterr().out == "written: text-stop.events.jsonl\nremoved: removed.events.jsonl\n"
    assert golden.main(["--check"]) == 0
