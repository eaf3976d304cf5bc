"""Reads one answer: from the bytes of the engine's event stream to events, up to the last one.

`phases` defines the phases of an answer, its true end, and how it ends. In ENDED, further data is an anomaly, and `finish` and
`stop` return no events.

The reader has no clock. While `in_tail` is true, the engine may send nothing more; the code that reads the body must then wait
only for a short time and call `finish`.

**Order.** Within a chunk: reasoning, text, tool calls. At the end, for each choice by ascending index: the rest of its text, its
verdicts by ascending index, `ChoiceFinished`; then `Completed`.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire_server.errors import Reason
from deltawire_server.sansio import pieces, sse, tool_calls
from deltawire_server.sansio.characters import Halves
from deltawire_server.sansio.chunks import Chunk, Delta, ErrorBody, LooseChunk, MalformedChunkError, Marker
from deltawire_server.sansio.coalesce import logprobs_weight
from deltawire_server.sansio.decode import DONE, decode_chunk
from deltawire_server.sansio.empty_arguments import allows_empty_object
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    Event,
    Fault,
    FinishedChoice,
    ReasoningDelta,
    Refused,
    Started,
    StopReason,
    TextDelta,
    TokenLogprob,
    ToolCallFailed,
    ToolCallSucceeded,
    Usage,
)
from deltawire_server.sansio.phases import Ending, Input, Phase, next_phase
from deltawire_server.sansio.usage import UsageMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from deltawire_server.sansio import chunks

ENDED_BY_ITSELF = frozenset({"stop", "tool_calls"})
"""The finish reasons for an end by the model itself; only then may tool calls be executed."""

STOP_REASONS: Mapping[str, StopReason] = MappingProxyType(
    {
        "stop": StopReason.END_OF_TURN,
        "tool_calls": StopReason.END_OF_TURN,  # END_OF_MESSAGE if there is a call; vLLM has sent it without one
        "length": StopReason.OUT_OF_TOKENS,
        "content_filter": StopReason.CONTENT_FILTER,
        "repetition": StopReason.REPETITION,
        "abort": StopReason.UPSTREAM_INCOMPLETE,
        "error": StopReason.ERROR,
    }
)
"""The stop reason for each finish reason. Any other finish reason is END_OF_TURN, and is counted as an anomaly."""

ENGINE_FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "abort": Fault(Reason.UPSTREAM_ABORTED, "the provider aborted the request"),
        "error": Fault(Reason.UPSTREAM_ERROR, "the provider ended the answer with an error"),
    }
)
"""The finish reasons that are an error of the engine."""

FAULT_STOP_REASONS: Mapping[Reason, StopReason] = MappingProxyType(
    {
        Reason.UPSTREAM_INCOMPLETE: StopReason.UPSTREAM_INCOMPLETE,
        Reason.UPSTREAM_ABORTED: StopReason.UPSTREAM_INCOMPLETE,
        Reason.DURATION_LIMIT_EXCEEDED: StopReason.TIME_LIMIT,
    }
)
"""The stop reason of a choice that a fault cut off; for all other faults it is ERROR."""

MAX_FINISH_REASON_BYTES = 256
"""Limit for a finish reason, which is truncated; real ones are one word."""

MAX_MATCHED_BYTES = 4096
"""Limit for the stop text that the engine reports, so that `Completed` with 128 choices fits into a message."""

MAX_HELD_BYTES = 16 * 1024 * 1024
"""Memory limit for one answer. The arguments of 128 tool calls with 64 KiB each take half of it. `MAX_WHOLE_BYTES` limits the
text."""

JOINED_TOKENS = 256
"""The number of tokens after which their texts are joined: at most 15 KiB of overhead, and each text is copied at most twice."""

ENTRY_BYTES = 64
"""Memory of a fragment of a tool call without its text."""

MAX_WHOLE_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""The default receive limit of gRPC clients minus an envelope."""

LATE = "event after the end"
"""The name of this anomaly."""


_TRUE_ENDS = frozenset({Input.ACCOUNT, Input.DONE, Input.END})
_NO_DELTA = Delta()
_ENDED: Phase = Phase.ENDED  # not a literal, so that the type checker does not narrow `phase` across method calls


@dataclass(slots=True, kw_only=True)
class Limits:
    """The limits for an answer. The reason for each default is at its definition.

    Args:
        max_event_bytes: Size of one event of the stream.
        max_calls: Number of tool calls of one choice.
        max_call_bytes: Size of one call: its arguments and twice its name. Capped at `tool_calls.MAX_CALL_BYTES`.
        max_held_bytes: Memory for the answer: the content for `Completed`, and the arguments of the calls.
        max_completed_bytes: Size of the content in `Completed`. For a larger answer, `Completed` has no messages.
        max_whole_bytes: The same if only `Completed` is sent. A larger answer ends with ANSWER_TOO_LARGE.
    """

    max_event_bytes: int = sse.MAX_EVENT_BYTES
    max_calls: int = tool_calls.MAX_CALLS
    max_call_bytes: int = tool_calls.MAX_CALL_BYTES
    max_held_bytes: int = MAX_HELD_BYTES
    max_completed_bytes: int = MAX_WHOLE_BYTES
    max_whole_bytes: int = MAX_WHOLE_BYTES

    def __post_init__(self) -> None:
        self.max_call_bytes = min(self.max_call_bytes, tool_calls.MAX_CALL_BYTES)


class _Text:
    """A text that grows by tokens. A string takes 50 bytes besides its characters, so tokens are joined periodically."""

    __slots__ = ("_joined", "_tokens")

    def __init__(self) -> None:
        self._joined: list[str] = []
        self._tokens: list[str] = []

    def write(self, text: str) -> None:
        """Append a text."""
        self._tokens.append(text)
        if len(self._tokens) == JOINED_TOKENS:
            self._joined.append("".join(self._tokens))
            self._tokens.clear()

    def whole(self) -> str:
        """The whole text."""
        return "".join([*self._joined, *self._tokens])


@dataclass(slots=True)
class _Choice:
    """One choice while it is being generated."""

    index: int
    calls: tool_calls.ToolCallAssembler
    text: _Text = field(default_factory=_Text)
    reasoning: _Text = field(default_factory=_Text)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""  # the last one
    matched: str | int | None = None  # the `stop_reason` of the same chunk
    late_calls: bool = False  # whether tool entries followed it


class CompletionReader:
    """Reads one answer.

    Args:
        choice_count: Number of choices that the request has.
        offered_tools: The tools of the request: by name, the JSON Schema of the arguments as JSON text, empty for none.
        stop: The caller's stop texts.
        stop_token_ids: The caller's stop tokens.
        incremental: Whether to return events for tool calls while their arguments are generated.
        argument_checks: By tool name, the check of a call's arguments; see `ToolCallAssembler`.
        whole: Whether only `Completed` is sent. If so, it has the log-probabilities too, and an answer that is too large for it
            ends with ANSWER_TOO_LARGE.
        limits: The limits for the answer.
        generate_id: Generates an id for a call without one.
    """

    def __init__(
        self,
        *,
        choice_count: int = 1,
        offered_tools: Mapping[str, str] = MappingProxyType({}),
        stop: Collection[str] = (),
        stop_token_ids: Collection[int] = (),
        incremental: bool = False,
        argument_checks: Mapping[str, tool_calls.Check] | None = None,
        whole: bool = False,
        limits: Limits | None = None,
        generate_id: Callable[[], str] = tool_calls.generate_call_id,
    ) -> None:
        self._choice_count = choice_count
        self._unfinished = choice_count
        self._offered_tools = offered_tools
        self._allows_empty = functools.cache(lambda name: allows_empty_object(offered_tools[name]))
        self._stops: frozenset[str | int] = frozenset(stop) | frozenset(stop_token_ids)
        self._incremental = incremental
        self._argument_checks = argument_checks
        self._whole = whole
        self._limits = limits or Limits()
        self._sse = sse.SSEDecoder(max_event_bytes=self._limits.max_event_bytes)
        self._call_ids = tool_calls.CallIds(generate_id)
        self._choices: dict[int, _Choice] = {}
        self._reads_on = True  # whether to decode further events; after a true end, only to count them
        self._awaits_done = False  # whether a usage report ended the answer; `[DONE]` usually follows it
        self.phase = Phase.WAITING
        """The phase of the answer; in ENDED, stop reading."""
        self.event_count = 0
        """Number of events with data up to the end; comments and events without data are not counted."""
        self.anomalies: Counter[str] = Counter()
        """Anomalies in the stream that were repaired or ignored, with counts, for the log. Complete at the end of the body."""
        self._kept = 0  # memory of the content for `Completed` without calls, in bytes
        self._calls_held = 0  # memory of the calls' fragments, in bytes
        self._content_size = 0  # a lower bound of the content's size in `Completed`, in bytes
        self._omits = False  # whether `Completed` has no messages because they are too large
        self._usage = UsageMeter(self.anomalies)
        self._halves = Halves(self.anomalies)

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes of the body.

        Returns:
            The new events, in order; the last one is `Refused` or `Completed` if the answer ended. No events after that.
        """
        events: list[Event] = []
        if not self._reads_on:
            return events
        try:
            payloads = self._sse.receive(data)
        except sse.EventTooLargeError as error:
            self._take(error.payloads, events)
            if self.phase is _ENDED:
                self.anomalies[LATE] += 1
            else:
                self._advance(Input.BROKEN, events, Fault(Reason.UPSTREAM_MALFORMED, str(error)))
            self._reads_on = False
        else:
            self._take(payloads, events)
        if self.phase is not _ENDED:
            self._check_size(events)
        return events

    def finish(self, fault: Fault | None = None) -> list[Event]:
        """End the body.

        Args:
            fault: The cause, if reading stopped before the end of the body: a reset, a timeout, a time limit, a shutdown. In
                TAIL it has no effect, because the answer is complete.

        Returns:
            The remaining events, the last one `Refused` or `Completed`; none if the answer had already ended.
        """
        events: list[Event] = []
        if self.phase is not _ENDED:
            # The blank line after the last event may be missing. A truncated event is not JSON.
            self._take([payload for payload in self._sse.finish() if _is_complete(payload)], events)
        if self.phase is not _ENDED:
            self._advance(Input.END if fault is None else Input.FAULT, events, fault)
        self._reads_on = False
        return events

    def stop(self, reason: StopReason) -> list[Event]:
        """End the answer for the caller, without a fault.

        Args:
            reason: The stop reason of the choices without a finish reason. In OPEN and WAITING, the answer has all requested
                choices, including those without any output.

        Returns:
            The remaining events, the last one `Completed`; none if the answer had already ended.
        """
        events: list[Event] = []
        if self.phase is not _ENDED:
            self._advance(Input.STOP, events, cut_as=reason)
        self._reads_on = False
        return events

    @property
    def ended(self) -> bool:
        """Whether `Refused` or `Completed` was returned."""
        return self.phase is Phase.ENDED

    @property
    def in_tail(self) -> bool:
        """Whether only the true end is missing: wait a short time for it, then call `finish`."""
        return self.phase is Phase.TAIL

    @property
    def held(self) -> int:
        """Memory that this reader holds for the answer, in bytes."""
        return self._kept + self._calls_held

    @property
    def usage(self) -> Usage:
        """The usage so far."""
        return self._usage.usage

    def _take(self, payloads: Iterable[bytes], events: list[Event]) -> None:
        try:
            for payload in payloads:
                if self.phase is _ENDED:
                    if self._reads_on:
                        self._count_late(payload.strip())
                elif len(payload) > pieces.PIECE_CHARACTERS:
                    self._receive_large(payload, events)
                else:
                    self._receive_payload(payload, events)
        except (MalformedChunkError, tool_calls.ToolCallLimitError) as error:
            self._advance(Input.BROKEN, events, Fault(Reason.UPSTREAM_MALFORMED, str(error)))

    def _count_late(self, payload: bytes) -> None:
        if payload == DONE and self._awaits_done:
            self._awaits_done = False
        elif payload:
            self.anomalies[LATE] += 1

    def _receive_large(self, payload: bytes, events: list[Event]) -> None:
        """Process an event that may give deltas too large for a message; smaller events cannot."""
        large: list[Event] = []
        try:
            self._receive_payload(payload, large)
        finally:
            events.extend(pieces.divide(large))

    def _receive_payload(self, payload: bytes, events: list[Event]) -> None:
        """Process one event of the stream. Once per token."""
        chunk = decode_chunk(payload)
        if not isinstance(chunk, Chunk):
            self._receive_other(chunk, events)
            return
        self.event_count += 1
        loose = bool(self._halves.pending)
        if isinstance(chunk, LooseChunk):
            loose = True
            self.anomalies.update(chunk.anomalies)
        if chunk.choices:
            # No lookup in OPEN and TAIL, where the phase does not change: this runs once per token.
            if self.phase is Phase.WAITING:
                self._advance(Input.CHOICES, events)
                events.append(Started(chunk.id or "", chunk.model or ""))
            if self._usage.final is not None:
                self._usage.continue_after_account()
            for part in chunk.choices:
                self._receive_part(part, chunk.usage, events, loose)
            if not self._unfinished and self.phase is Phase.OPEN:
                self._advance(Input.FINISHED, events)
        elif chunk.usage is not None:
            self._usage.receive_account(chunk.usage)
            self._advance(Input.ACCOUNT, events)
        else:
            self.anomalies["chunk without choices or usage"] += 1
            self._advance(Input.NOTHING, events)

    def _receive_other(self, event: ErrorBody | Marker, events: list[Event]) -> None:
        if event is Marker.NOTHING:
            return
        self.event_count += 1
        if isinstance(event, ErrorBody):
            message = event.message or "the provider reported an error"
            fault = Fault(Reason.UPSTREAM_ERROR, message, event.code, event.type, event.param)
            self._advance(Input.BROKEN, events, fault)
        else:
            self._advance(Input.DONE, events)

    def _receive_part(
        self,
        part: chunks.Choice,
        usage: chunks.UsageFigures | None,
        events: list[Event],
        loose: bool,
    ) -> None:
        """Process the part of a chunk for one choice: usage, reasoning, text, tool calls, finish reason. Once per token."""
        choice = self._choices.get(part.index or 0) or self._begin_choice(part.index or 0)
        if usage is not None:
            self._usage.receive_running(choice.index, usage)
        delta = part.delta or _NO_DELTA
        reasoning = delta.reasoning or delta.reasoning_content
        text = delta.content
        if reasoning or text or delta.tool_calls:
            self._usage.output_chunks += 1
        if loose:
            reasoning = self._halves.receive((choice.index, ReasoningDelta), reasoning or "")
            text = self._halves.receive((choice.index, TextDelta), text or "")
        tokens: tuple[TokenLogprob, ...] = ()
        if part.logprobs is not None:
            tokens = _tokens(part.logprobs)
            if self._whole:
                choice.logprobs.extend(tokens)
                self._content_size += pieces.logprobs_size(tokens)
                self._kept += logprobs_weight(tokens)
        if reasoning:
            self._keep(choice.reasoning, reasoning)
            events.append(ReasoningDelta(choice.index, reasoning, tokens))
            tokens = ()
        if text or tokens:
            self._keep(choice.text, text or "")
            events.append(TextDelta(choice.index, text or "", tokens))
        if delta.tool_calls:
            choice.late_calls = bool(choice.finish_reason)
            self._receive_entries(choice, delta.tool_calls, events)
        if part.finish_reason:
            self._receive_finish(choice, part.finish_reason, part.stop_reason)

    def _keep(self, kept: _Text, text: str) -> None:
        """Keep a text for `Completed`. Once per token."""
        self._content_size += len(text)
        if not self._omits:
            kept.write(text)
            self._kept += _memory(text)

    def _check_size(self, events: list[Event]) -> None:
        """Apply the size limits: drop the content for `Completed`, or end the answer with ANSWER_TOO_LARGE."""
        limits = self._limits
        limit = limits.max_whole_bytes if self._whole else limits.max_completed_bytes
        message = ""
        if self._content_size > limit and not self._omits:
            self.forget()
            if self._whole:
                message = f"the answer has more than {limit} bytes, too many for one message: stream it"
        if self.held > limits.max_held_bytes:
            self.forget()
            message = (
                f"the answer takes more than {limits.max_held_bytes} bytes of memory, mostly for tool calls: reduce"
                " choice_count or max_tokens"
            )
        if message:
            self._advance(Input.BROKEN, events, Fault(Reason.ANSWER_TOO_LARGE, message))

    def forget(self) -> None:
        """Drop the content for `Completed`, which then has no messages. Tool calls without a verdict are kept."""
        self._omits = True
        self._kept = 0
        for choice in self._choices.values():
            choice.text, choice.reasoning, choice.logprobs = _Text(), _Text(), []

    def _receive_entries(self, choice: _Choice, entries: list[chunks.ToolEntry], events: list[Event]) -> None:
        for entry in entries:
            if entry.function is not None and entry.function.arguments:
                self._content_size += len(entry.function.arguments)
                self._calls_held += _memory(entry.function.arguments) + ENTRY_BYTES
        try:
            events.extend(choice.calls.receive(entries))
        except tool_calls.ToolCallLimitError as error:
            events.extend(error.events)
            raise

    def _receive_finish(self, choice: _Choice, finish_reason: str, matched: str | int | None) -> None:
        """Record a finish reason with the `stop_reason` of its chunk. The last one counts."""
        if not choice.finish_reason:
            self._unfinished -= 1
        elif finish_reason != choice.finish_reason:
            self.anomalies["second finish reason"] += 1
        choice.finish_reason, choice.matched, choice.late_calls = finish_reason, matched, False

    def _begin_choice(self, index: int) -> _Choice:
        if not 0 <= index < self._choice_count:
            raise MalformedChunkError(f"choice {index} came in an answer of {self._choice_count}")
        calls = tool_calls.ToolCallAssembler(
            index,
            self._offered_tools,
            self._call_ids,
            self._halves,
            self.anomalies,
            allows_empty=self._allows_empty,
            checks=self._argument_checks,
            incremental=self._incremental,
            max_calls=self._limits.max_calls,
            max_call_bytes=self._limits.max_call_bytes,
        )
        choice = self._choices[index] = _Choice(index, calls)
        return choice

    def _advance(
        self,
        what: Input,
        events: list[Event],
        fault: Fault | None = None,
        cut_as: StopReason = StopReason.ERROR,
    ) -> None:
        """Perform the transition for an input.

        Args:
            what: The input.
            events: Receives the last events if this ends the answer.
            fault: The fault; by default, an answer that ends too early is incomplete.
            cut_as: The stop reason of the choices without a finish reason, if there is no fault.
        """
        target = next_phase(self.phase, what)
        if isinstance(target, Phase):
            self.phase = target
            return
        if target is Ending.REFUSED:
            events.append(Refused(fault or self._incomplete(what)))
        else:
            if target is Ending.FAULTED:
                fault = fault or self._incomplete(what)
                cut_as = FAULT_STOP_REASONS.get(fault.reason, StopReason.ERROR)
            else:
                fault = None
            self._complete(target, events, fault, cut_as, trusted=target is Ending.WHOLE and what in _TRUE_ENDS)
        self.phase = Phase.ENDED
        self._reads_on = target is Ending.WHOLE
        self._awaits_done = what is Input.ACCOUNT

    def _incomplete(self, what: Input) -> Fault:
        """The fault of an answer that ends before every choice has a finish reason."""
        if self.phase is Phase.WAITING:
            if what is Input.DONE:
                return Fault(Reason.UPSTREAM_MALFORMED, "the stream ended without a choice")
            return Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered")
        missing = f"{self._unfinished} of {self._choice_count}"
        return Fault(Reason.UPSTREAM_INCOMPLETE, f"the stream ended without a finish reason for {missing} choices")

    def _complete(
        self, ending: Ending, events: list[Event], fault: Fault | None, cut_as: StopReason, *, trusted: bool
    ) -> None:
        """End every choice and the answer."""
        if self.phase is Phase.WAITING:
            events.append(Started("", ""))
        if ending is Ending.STOPPED:
            for index in range(self._choice_count):
                if index not in self._choices:
                    self._begin_choice(index)
        choices = [choice for _, choice in sorted(self._choices.items())]
        if fault is None:
            fault = next(
                (ENGINE_FAULTS[choice.finish_reason] for choice in choices if choice.finish_reason in ENGINE_FAULTS),
                None,
            )
        whole = [self._finish_choice(choice, events, cut_as, trusted=trusted, ok=fault is None) for choice in choices]
        completed = Completed(self.usage, tuple(whole), fault)
        events.append(completed.without_messages() if self._omits else completed)

    def _finish_choice(
        self, choice: _Choice, events: list[Event], cut_as: StopReason, *, trusted: bool, ok: bool
    ) -> FinishedChoice:
        """End a choice: append the rest of its text, its verdicts and its `ChoiceFinished`.

        Args:
            choice: The choice.
            events: Receives the events.
            cut_as: The stop reason if it has no finish reason.
            trusted: Whether this is the true end, so that tool entries after the finish reason are complete too.
            ok: Whether the answer ends without a fault; otherwise no call may be executed.

        Returns:
            The whole choice.
        """
        if rest := self._halves.finish((choice.index, ReasoningDelta)):
            self._keep(choice.reasoning, rest)
            events.append(ReasoningDelta(choice.index, rest))
        if rest := self._halves.finish((choice.index, TextDelta)):
            self._keep(choice.text, rest)
            events.append(TextDelta(choice.index, rest))
        finish_reason = choice.finish_reason
        by_itself = finish_reason in ENDED_BY_ITSELF
        cut = (
            not finish_reason
            or (finish_reason in STOP_REASONS and not by_itself)
            or (choice.late_calls and not trusted)
        )
        verdicts = choice.calls.finish(cut=cut)
        events.extend(verdicts)
        succeeded = tuple(event for event in verdicts if isinstance(event, ToolCallSucceeded))
        failed = tuple(event for event in verdicts if isinstance(event, ToolCallFailed))
        matched = choice.matched
        reason = STOP_REASONS.get(finish_reason, StopReason.END_OF_TURN) if finish_reason else cut_as
        if by_itself and (succeeded or failed):
            reason = StopReason.END_OF_MESSAGE
        elif by_itself and matched is not None and matched in self._stops:
            reason = StopReason.STOP_SEQUENCE
        truncated = _truncate(finish_reason, MAX_FINISH_REASON_BYTES)
        if finish_reason and finish_reason not in STOP_REASONS:
            self.anomalies[f"finish reason {truncated!r}"] += 1
        if isinstance(matched, str) and matched != _truncate(matched, MAX_MATCHED_BYTES):
            self.anomalies["stop reason too long"] += 1
            matched = None
        executable = ok and by_itself and bool(succeeded) and not failed
        events.append(ChoiceFinished(choice.index, reason, truncated, executable, matched))
        return FinishedChoice(
            choice.index,
            choice.text.whole(),
            choice.reasoning.whole(),
            succeeded,
            failed,
            reason,
            truncated,
            executable,
            matched,
            tuple(choice.logprobs),
        )


def _memory(text: str) -> int:
    """Upper limit of the memory of a text as part of a longer one, in bytes."""
    return len(text) if text.isascii() else 4 * len(text)


def _truncate(text: str, limit: int) -> str:
    """The beginning of a text, at most `limit` bytes in UTF-8."""
    return text.encode()[:limit].decode(errors="ignore")


def _is_complete(payload: bytes) -> bool:
    """Whether the last event, whose blank line is missing, is complete."""
    try:
        decode_chunk(payload)
    except MalformedChunkError:
        return False
    return True


def _tokens(logprobs: chunks.Logprobs) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            entry.token,
            entry.logprob,
            bytes(entry.bytes or ()),
            tuple(Alternative(top.token, top.logprob, bytes(top.bytes or ())) for top in entry.top_logprobs or ()),
        )
        for entry in logprobs.content or ()
    )
