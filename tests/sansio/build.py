"""Streams in few words: what vLLM sends, and the events that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    Fault,
    FinishedChoice,
    Provenance,
    Started,
    StopReason,
    ToolCallFailed,
    ToolCallSucceeded,
    Usage,
)
from deltawire_server.sansio.reader import CompletionReader
from tests.support.recordings import counting_ids

if TYPE_CHECKING:
    from collections.abc import Collection

    from deltawire_server.sansio.events import Event
    from deltawire_server.sansio.reader import Limits
    from deltawire_server.sansio.tool_calls import Check

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
STARTED = Started("up", "m")
FIRST_CALL = "<generated-0>"
OFFERED = ("f", "g", "brave_search", "get_weather")


def data(payload: Json) -> bytes:
    """An event with this payload."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def chunk(*parts: Json, usage: Json | None = None) -> bytes:
    """A chunk of these choices' parts."""
    payload: Json = {"id": "up", "model": "m", "choices": list(parts)}
    if usage is not None:
        payload["usage"] = usage
    return data(payload)


def part(delta: Json | None = None, *, choice: int = 0, finish: str | None = None, **fields: Any) -> Json:  # noqa: ANN401 (JSON)
    """One choice's share of a chunk."""
    return {"index": choice, "delta": delta or {}, "finish_reason": finish, **fields}


def text(content: str, *, choice: int = 0, finish: str | None = None, **fields: Any) -> bytes:  # noqa: ANN401 (JSON)
    """A chunk with text."""
    return chunk(part({"content": content}, choice=choice, finish=finish, **fields))


def calls(*entries: Json, choice: int = 0, finish: str | None = None, content: str | None = None) -> bytes:
    """A chunk with tool entries."""
    delta: Json = {"tool_calls": list(entries)}
    if content is not None:
        delta["content"] = content
    return chunk(part(delta, choice=choice, finish=finish))


def entry(
    arguments: str | None = None, *, index: int | None = 0, call_id: str | None = None, name: str | None = None
) -> Json:
    """A tool entry; what is `None` is null."""
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


def end(finish: str, *, choice: int = 0, **fields: Any) -> bytes:  # noqa: ANN401 (JSON)
    """A chunk that only finishes a choice."""
    return chunk(part({}, choice=choice, finish=finish, **fields))


def figures(prompt: int, completion: int, *, cached: int | None = None, reasoning: int | None = None) -> Json:
    """An account of tokens in vLLM's words."""
    account: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if cached is not None:
        account["prompt_tokens_details"] = {"cached_tokens": cached}
    if reasoning is not None:
        account["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return account


def error(message: str = "broken", *, code: int = 500, kind: str = "InternalServerError") -> bytes:
    """An error event."""
    return data({"error": {"message": message, "type": kind, "param": None, "code": code}})


def reader(
    *,
    choice_count: int = 1,
    offered: Collection[str] | Mapping[str, str] = OFFERED,
    stop: Collection[str] = (),
    stop_token_ids: Collection[int] = (),
    incremental: bool = False,
    checks: Mapping[str, Check] | None = None,
    keep_logprobs: bool = False,
    limits: Limits | None = None,
) -> CompletionReader:
    """A reader whose generated ids are the same in every run."""
    return CompletionReader(
        choice_count=choice_count,
        offered_tools=dict.fromkeys(offered, "") | (dict(offered) if isinstance(offered, Mapping) else {}),
        stop=stop,
        stop_token_ids=stop_token_ids,
        incremental=incremental,
        argument_checks=checks,
        whole=keep_logprobs,
        limits=limits,
        generate_id=counting_ids(),
    )


def read(
    *pieces: bytes,
    choice_count: int = 1,
    offered: Collection[str] | Mapping[str, str] = OFFERED,
    stop: Collection[str] = (),
    stop_token_ids: Collection[int] = (),
    incremental: bool = False,
    checks: Mapping[str, Check] | None = None,
    limits: Limits | None = None,
) -> list[Event]:
    """The events of a body."""
    reading = reader(
        choice_count=choice_count,
        offered=offered,
        stop=stop,
        stop_token_ids=stop_token_ids,
        incremental=incremental,
        checks=checks,
        limits=limits,
    )
    events = [event for piece in pieces for event in reading.receive(piece)]
    return events + reading.finish()


def ending(
    reason: StopReason,
    word: str,
    *,
    text: str = "",
    reasoning: str = "",
    succeeded: tuple[ToolCallSucceeded, ...] = (),
    failed: tuple[ToolCallFailed, ...] = (),
    executable: bool = False,
    chunks: int = 0,
    fault: Fault | None = None,
    usage: Usage | None = None,
    matched: str | int | None = None,
) -> list[Event]:
    """How an answer of one choice ends: the verdicts, the choice's end, the answer's. `chunks` had output."""
    whole = FinishedChoice(0, text, reasoning, succeeded, failed, reason, word, executable, matched)
    verdicts: list[ToolCallSucceeded | ToolCallFailed] = [*succeeded, *failed]
    return [
        *sorted(verdicts, key=lambda call: call.index),
        ChoiceFinished(0, reason, word, executable, matched),
        Completed(usage or Usage(chunks, Provenance.ESTIMATED), (whole,), fault),
    ]
