"""The contract of completions as functions that raise: what a caller may rely on, whatever the provider does.

The nine points stand in the comment on `StreamChatCompletionResponse`. A check is pure: it gets a request, all messages, and
how the call ended, from either side of the wire.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import grpc

from tests.support import fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deltawire.v1 import chat_completion_pb2 as chat_pb
    from tests.support.fields import Asked, Call, Choice, Completed, Details, End, Response

MAX_MESSAGE_BYTES = 4_194_304
"""What a gRPC client receives by default, of one message."""

_ABOUT_A_CHOICE = frozenset({"text_delta", "reasoning_delta", "tool_call_delta", "choice_finished"})
_ABOUT_THE_ANSWER = frozenset({"started", "usage_update", "heartbeat", "completed"})
_KINDS = _ABOUT_A_CHOICE | _ABOUT_THE_ANSWER | {"notice"}
_REFUSED_RESUMES = ("COMPLETION_", "WRONG_REPLICA", "INVALID_", "DRAINING")
_CODES = {code.name: code.value[0] for code in grpc.StatusCode}


class ContractError(AssertionError):
    """A promise was broken; the message says which."""


@dataclass(frozen=True)
class Ending:
    """How a call ended.

    Attributes:
        code: The status code's name.
        message: The status message.
        trailers: The trailing metadata.
        initial: The initial metadata; empty if none came.
        by_caller: Whether the caller ended it, by a cancel, a deadline or by closing its connection. Then messages may be
            missing at the end, and there is no reason.
    """

    code: str = "OK"
    message: str = ""
    trailers: Sequence[tuple[str, str | bytes]] = ()
    initial: Sequence[tuple[str, str | bytes]] = ()
    by_caller: bool = False

    @property
    def details(self) -> Details:
        """What the trailers say."""
        return fields.details(self.trailers)

    @property
    def outcome(self) -> str:
        """Either "OK", or code and reason, "ABORTED/UPSTREAM_ERROR"."""
        return "OK" if self.code == "OK" else f"{self.code}/{self.details.reason}"


def check_stream(request: chat_pb.StreamChatCompletionRequest, responses: Sequence[Response], ending: Ending) -> None:
    """Check a whole stream.

    Args:
        request: What was asked.
        responses: All messages, in order.
        ending: How the call ended.

    Raises:
        ContractError: A promise was broken.
    """
    asked = fields.stream_asked(request)
    _check_numbers(asked, responses)
    stream = _Stream(asked)
    for response in responses:
        stream.take(response)
    if ending.by_caller:
        return
    begun = stream.started or (asked.resumed and bool(responses))
    if ending.code == "OK":
        if stream.completed is None:
            # A caller that resumes after the last message of all has received `completed` already.
            if not (asked.resumed and not responses):
                _fail(7, f"the call ended OK without completed, after {_shown(responses)}")
        elif stream.completed.has_error:
            _fail(7, f"the call ended OK, but completed has the error {stream.completed.error_reason}")
    else:
        # A caller that resumes after the last message of all receives the stream's status alone.
        status_only = asked.resumed and not ending.details.reason.startswith(_REFUSED_RESUMES)
        _check_failure(ending, refused=not begun and not status_only)
        _check_completed_error(stream.completed, ending, begun=begun)


def check_whole(
    request: chat_pb.CreateChatCompletionRequest, response: chat_pb.CreateChatCompletionResponse | None, ending: Ending
) -> None:
    """Check a call of CreateChatCompletion; `response` is `None` if it failed.

    Raises:
        ContractError: A promise was broken.
    """
    if ending.by_caller:
        return
    if ending.code != "OK":
        # A fault after the engine has begun is ABORTED here too; everything else counts as refused.
        _check_failure(ending, refused=ending.code != "ABORTED")
        return
    if response is None or not response.HasField("completed") or not response.HasField("started"):
        _fail(7, "the call ended OK without a completed answer")
    completed = fields.completed_of(response.completed)
    if completed.has_error:
        _fail(7, f"the call ended OK, but completed has the error {completed.error_reason}")
    asked = fields.chat_asked(request.chat)
    _check_completed(completed)
    for choice in completed.choices:
        for call_id, name, arguments in choice.calls:
            _check_succeeded(asked, call_id, name, arguments)


def check_failure(ending: Ending) -> None:
    """Check the status of any other call that failed before anything was sent.

    Raises:
        ContractError: A promise was broken.
    """
    if ending.code != "OK" and not ending.by_caller:
        _check_failure(ending, refused=True)


@dataclass
class _ChoiceSeen:
    """What has come of a choice."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    begun: dict[int, Call] = field(default_factory=dict)
    fragments: dict[int, list[str]] = field(default_factory=dict)
    verdicts: list[Call] = field(default_factory=list)
    end: End | None = None


class _Stream:
    """Takes messages in order and checks each against those before it."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        # A stream that is resumed in the middle has lost its first part.
        self._from_start = not asked.first_sequence
        self.started = False
        self.completed: Completed | None = None
        self.choices: dict[int, _ChoiceSeen] = {}

    def take(self, response: Response) -> None:
        kind = fields.kind(response)
        if self.completed is not None:
            _fail(7, f"{kind or 'an empty message'} came after completed")
        if kind not in _KINDS:
            _fail(0, f"message {fields.sequence(response)} has no event that is known")
        size = response.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            _fail(0, f"{kind} has {size} bytes: a client receives at most {MAX_MESSAGE_BYTES} by default")
        self._check_order(kind)
        self._check_choice(kind, fields.choice(response))
        if kind in _ABOUT_A_CHOICE:
            self._take_of_choice(kind, response, self.choices.setdefault(fields.choice(response) or 0, _ChoiceSeen()))
        elif kind == "completed":
            self.completed = fields.completed(response)
            _check_completed(self.completed)
            self._check_against_deltas(self.completed)

    def _check_order(self, kind: str) -> None:
        asked = self._asked
        if kind == "heartbeat":
            if not (asked.heartbeats or asked.resumed):
                _fail(0, "a heartbeat came and none was asked for")
            if not self.started and self._from_start and not (asked.early_heartbeats or asked.resumed):
                _fail(1, "a heartbeat came before started")
        elif kind == "usage_update" and not (asked.usage_updates or asked.resumed):
            _fail(0, "a usage update came and none was asked for")
        elif kind == "started":
            if self.started or not self._from_start:
                _fail(1, "started came twice")
            self.started = True
        elif not self.started and self._from_start:
            _fail(1, f"{kind} came before started")

    @staticmethod
    def _check_choice(kind: str, choice: int | None) -> None:
        if kind in _ABOUT_A_CHOICE and choice is None:
            _fail(0, f"{kind} names no choice")
        if kind in _ABOUT_THE_ANSWER and choice is not None:
            _fail(0, f"{kind} names a choice")

    def _take_of_choice(self, kind: str, response: Response, seen: _ChoiceSeen) -> None:
        if seen.end is not None:
            _fail(4, f"{kind} came after the choice's choice_finished")
        if kind in ("text_delta", "reasoning_delta"):
            if seen.verdicts:
                _fail(4, f"{kind} came after a verdict of its choice")
            piece = fields.text(response) if kind == "text_delta" else fields.reasoning(response)
            if not piece and not fields.has_logprobs(response):
                _fail(2, f"an empty {kind} came")
            (seen.text if kind == "text_delta" else seen.reasoning).append(piece)
        elif kind == "tool_call_delta":
            self._take_call(fields.call(response), seen)
        else:
            seen.end = fields.finished(response)
            _check_end(seen.end, [call.status for call in seen.verdicts] if self._from_start else None)

    def _take_call(self, call: Call, seen: _ChoiceSeen) -> None:
        if call.status in ("STARTED", "IN_PROGRESS"):
            if not (self._asked.incremental or self._asked.resumed):
                _fail(4, f"{call.status} came, but only verdicts were asked for")
            if seen.verdicts:
                _fail(4, f"{call.status} came after a verdict of its choice")
            if call.status == "STARTED":
                if call.index in seen.begun:
                    _fail(4, f"call {call.index} was STARTED twice")
                seen.begun[call.index] = call
                seen.fragments[call.index] = []
                return
            if call.index not in seen.begun and self._from_start:
                _fail(4, f"a fragment of call {call.index} came before STARTED")
            if not call.fragment:
                _fail(4, f"an empty fragment of call {call.index} came")
            seen.fragments.setdefault(call.index, []).append(call.fragment)
            return
        if call.status not in ("SUCCEEDED", "FAILED"):
            _fail(4, f"call {call.index} is {call.status}")
        if seen.verdicts and call.index <= seen.verdicts[-1].index:
            _fail(4, f"the verdict on call {call.index} came after that on call {seen.verdicts[-1].index}")
        self._check_verdict(call, seen)
        seen.verdicts.append(call)

    def _check_verdict(self, call: Call, seen: _ChoiceSeen) -> None:
        if call.status == "SUCCEEDED":
            _check_succeeded(self._asked, call.call_id, call.name, call.arguments)
        elif call.failure in ("", "UNSPECIFIED"):
            _fail(5, f"call {call.index} FAILED without a reason")
        if not self._from_start:
            return
        if self._asked.incremental and call.name and call.index not in seen.begun:
            _fail(4, f"call {call.index} has a verdict, and was never STARTED")
        if call.index in seen.begun:
            begun = seen.begun[call.index]
            if (begun.call_id, begun.name) != (call.call_id, call.name):
                _fail(4, f"call {call.index} was STARTED as {begun.name!r} and ended as {call.name!r}")
            whole = "".join(seen.fragments[call.index])
            # A call without arguments SUCCEEDED as "{}".
            if whole != call.arguments and not (call.status == "SUCCEEDED" and not whole.strip()):
                _fail(
                    4, f"the fragments of call {call.index} are {whole[:200]!r}, its verdict {call.arguments[:200]!r}"
                )

    def _check_against_deltas(self, completed: Completed) -> None:
        if not self._from_start:
            return
        if [choice.index for choice in completed.choices] != sorted(self.choices):
            _fail(7, f"completed has choices {[c.index for c in completed.choices]}, seen were {sorted(self.choices)}")
        for choice in completed.choices:
            seen = self.choices[choice.index]
            if seen.end is None:
                _fail(7, f"choice {choice.index} has no choice_finished")
            if seen.end != choice.end:
                _fail(7, f"choice_finished says {seen.end}, completed {choice.end}")
            if not completed.messages_omitted:
                _check_message(choice, seen)


def _check_message(choice: Choice, seen: _ChoiceSeen) -> None:
    if "".join(seen.text) != choice.text:
        _fail(2, f"the deltas' text is {''.join(seen.text)[-200:]!r}, completed's {choice.text[-200:]!r}")
    if "".join(seen.reasoning) != choice.reasoning:
        _fail(
            2, f"the deltas' reasoning is {''.join(seen.reasoning)[-200:]!r}, completed's {choice.reasoning[-200:]!r}"
        )
    succeeded = tuple((v.call_id, v.name, v.arguments) for v in seen.verdicts if v.status == "SUCCEEDED")
    if succeeded != choice.calls:
        _fail(4, f"the calls that SUCCEEDED are {succeeded}, completed has {choice.calls}")
    if tuple(verdict for verdict in seen.verdicts if verdict.status == "FAILED") != choice.failed:
        _fail(5, "the calls that FAILED are not those in completed")


def _check_numbers(asked: Asked, responses: Iterable[Response]) -> None:
    for number, response in enumerate(responses, asked.first_sequence):
        if fields.sequence(response) != number:
            _fail(0, f"sequence is {fields.sequence(response)} where {number} is next")


def _check_completed(completed: Completed) -> None:
    if completed.usage == "UNSPECIFIED":
        _fail(9, "completed has no usage")
    indexes = [choice.index for choice in completed.choices]
    if indexes != sorted(set(indexes)):
        _fail(7, f"completed has choices {indexes}")
    for choice in completed.choices:
        statuses = ["SUCCEEDED"] * len(choice.calls) + ["FAILED"] * len(choice.failed)
        _check_end(choice.end, None if completed.messages_omitted else statuses)
        if choice.end.executable and completed.has_error:
            _fail(6, f"calls are executable in an answer that ended with {completed.error_reason}")


def _check_end(end: End, verdicts: Sequence[str] | None) -> None:
    """How a choice ended, beside the verdicts on its calls; `None` if they are not known."""
    if end.stop_reason == "UNSPECIFIED":
        _fail(7, "a choice ended without a stop reason")
    if not end.executable:
        return
    if end.engine_word not in ("stop", "tool_calls"):
        _fail(6, f"calls are executable, but the engine's finish reason is {end.engine_word!r}")
    if verdicts is not None and set(verdicts) != {"SUCCEEDED"}:
        _fail(6, f"calls are executable, but the verdicts are {list(verdicts)}")


def _check_succeeded(asked: Asked, call_id: str, name: str, arguments: str) -> None:
    if not call_id:
        _fail(4, f"the call of {name!r} has no id")
    if not asked.resumed and name not in asked.tools:
        _fail(4, f"the call of {name!r} SUCCEEDED, but the request has no such tool")
    try:
        value = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        _fail(4, f"the call of {name!r} SUCCEEDED with arguments that are not JSON: {error}")
    if not isinstance(value, dict):
        _fail(4, f"the call of {name!r} SUCCEEDED with arguments that are no object")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _check_completed_error(completed: Completed | None, ending: Ending, *, begun: bool) -> None:
    reason = ending.details.reason
    if begun and reason.startswith("UPSTREAM_") and ending.code != "ABORTED":
        _fail(7, f"{reason} after started is {ending.code}, not ABORTED")
    if completed is None:
        # A caller that does not read leaves no room for it, and a defect may be in what writes it.
        if begun and reason not in ("SLOW_CALLER", "INTERNAL"):
            _fail(7, f"{ending.outcome} after started, without completed")
    elif not completed.has_error:
        _fail(7, f"the call ended with {ending.outcome}, but completed has no error")
    elif (completed.error_code, completed.error_reason) != (_CODES[ending.code], reason):
        _fail(
            7, f"completed has the error {completed.error_reason} ({completed.error_code}), the call {ending.outcome}"
        )


def _check_failure(ending: Ending, *, refused: bool) -> None:
    """The status of a failed call; `refused` if nothing was sent before it."""
    details = ending.details
    if not details.reason:
        _fail(0, f"{ending.code} ({ending.message!r}) has no reason")
    if details.domain != fields.DOMAIN:
        _fail(0, f"the domain is {details.domain!r}")
    if details.code != _CODES[ending.code]:
        _fail(0, f"the status is {ending.code}, its details have code {details.code}")
    if details.reason_trailer != details.reason:
        _fail(0, f"the reason is {details.reason}, in the plain trailer {details.reason_trailer!r}")
    if not details.request_id or details.request_id != details.request_id_trailer:
        _fail(0, f"the request id is {details.request_id!r}, in the plain trailer {details.request_id_trailer!r}")
    if refused and ending.code == "ABORTED" and details.reason.startswith("UPSTREAM_"):
        _fail(1, f"{ending.outcome} before started")
    if refused and ending.initial:
        _fail(1, f"{ending.outcome} before started came after initial metadata")
    expected = str(-1 if details.retry_ms is None else details.retry_ms)
    if refused and details.pushback != expected:
        _fail(1, f"{fields.PUSHBACK_TRAILER} of {ending.outcome} is {details.pushback!r}, not {expected!r}")


def _shown(responses: Sequence[Response]) -> str:
    return ", ".join(fields.kind(each) for each in responses[-3:]) or "no message"


def _fail(point: int, message: str) -> NoReturn:
    """Point 0 is what every message of the API promises."""
    raise ContractError(f"contract {point}: {message}" if point else message)
