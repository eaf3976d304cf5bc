"""The cases: files in `cases/`, completed by what a case need not write."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format, text_format

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2
from tests.conformance.case_pb2 import Case, Cases
from tests.conformance.fold import fold, tidy_result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.conformance.case_pb2 import Step

FOLDER = Path(__file__).parent / "cases"

ID_OF_REQUEST = "{id}"
"""A completion id in a script, and in what is expected of it, that stands for the one of the client's request."""


@functools.cache
def load() -> tuple[Case, ...]:
    """All cases, completed, by name."""
    written = [case for path in sorted(FOLDER.iterdir()) for case in _read(path)]
    return tuple(sorted(map(completed, written), key=lambda case: case.name))


def group(name: str) -> str:
    """The group of a case, by its name."""
    return name.partition("/")[0]


def completed(case: Case) -> Case:
    """The case with the defaults that `case.proto` names. Changes it in place.

    Raises:
        ValueError: The case cannot be played.
    """
    if case.call.WhichOneof("action") is None:
        case.call.stream.SetInParent()
    if case.call.HasField("stream") and case.call.stream.request.WhichOneof("start") is None:
        hi = message_pb2.UserMessage(text="hi")
        case.call.stream.request.chat.model = "model"
        case.call.stream.request.chat.messages.append(message_pb2.ChatMessage(user=hi))
    case.call.name = case.name
    for call in case.calls:
        _number(call.steps, call.resume if call.HasField("resume") else None)
    folded = fold(_read_once(case))
    for result in case.expected:
        result.name = case.name
        if result.HasField("failure") and not result.failure.HasField("partial"):
            result.failure.partial.CopyFrom(folded)
        elif result.HasField("answer") and result.answer.ByteSize() == 0:
            result.answer.CopyFrom(folded)
        tidy_result(result)
    if not (case.name.count("/") == 1 and case.promise and case.calls and case.expected):
        message = f"the case {case.name!r} lacks its group, its promise, its calls or what is expected"
        raise ValueError(message)
    return case


def _read(path: Path) -> Iterable[Case]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".textproto":
        return text_format.Parse(text, Cases()).cases
    return [json_format.Parse(line, Case()) for line in text.splitlines()]


def _number(steps: Iterable[Step], resume: chat_pb.ResumePoint | None) -> None:
    """Give the events the sequence numbers that they do not have."""
    following = resume.last_sequence + 1 if resume is not None and resume.HasField("last_sequence") else 0
    for step in steps:
        kind = step.WhichOneof("step")
        if kind not in ("event", "unknown"):
            continue
        event = getattr(step, kind)
        event.sequence = event.sequence or following
        following = event.sequence + (step.times or 1)


def _read_once(case: Case) -> list[chat_pb.StreamChatCompletionResponse]:
    """The events that a client reads in the calls of a case, each sequence once."""
    read: dict[int, chat_pb.StreamChatCompletionResponse] = {}
    for call in case.calls:
        for step in call.steps:
            if step.HasField("event"):
                for sequence in range(step.event.sequence, step.event.sequence + max(1, step.times)):
                    read.setdefault(sequence, step.event)
    return [event for _, event in sorted(read.items())]
