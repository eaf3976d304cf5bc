"""One answer: the bytes of the engine's event stream in, its events out, to the last one.

**Phases.** An answer is whole at its *true end*, and not before. The engine says twice that a choice has ended: with a finish
reason, after which some engines and relays still send output of that choice, and with the true end of the answer: an account
of usage without choices that comes when every choice has a finish reason, `[DONE]`, or the end of the body. So verdicts on tool
calls and `ChoiceFinished` wait for the true end, and what comes until then is part of its choice.

    WAITING   no choice has come
    OPEN      a choice has come, and one that was asked for lacks a finish reason
    TAIL      every choice that was asked for has a finish reason; the true end has not come
    ENDED     `Refused` or `Completed` was returned

**Inputs and transitions** (`TRANSITIONS` decides; a pair without an entry raises `TransitionError`):

    input                                           WAITING     OPEN       TAIL
    CHOICES    a chunk with choices                 OPEN        OPEN       TAIL
    FINISHED   the last finish reason came with it  -           TAIL       -
    ACCOUNT    a chunk with usage, without choices  WAITING     OPEN       WHOLE
    NOTHING    a chunk with neither                 WAITING     OPEN       TAIL
    DONE       `[DONE]`                             REFUSED     FAULTED    WHOLE
    BROKEN     an error event, or an event that     REFUSED     FAULTED    FAULTED
               cannot be read
    END        `finish()`: the body has ended       REFUSED     FAULTED    WHOLE
    FAULT      `finish(fault)`: silence, a reset,   REFUSED     FAULTED    WHOLE
               a time limit, a shutdown
    STOP       `stop(reason)`                       STOPPED     STOPPED    WHOLE

REFUSED, FAULTED, WHOLE and STOPPED lead to ENDED, where nothing is possible: further data is an anomaly, and `finish` and `stop`
return nothing. REFUSED is one `Refused`. The others end in `Completed`: FAULTED with the fault, WHOLE and STOPPED without
one, unless the engine gave "abort" or "error" as a choice's finish reason.

This class has no clock. While `in_tail` is true the engine may send nothing more, so the code that reads the body waits only
for a short time and then calls `finish`.

**Order.** Within a chunk: reasoning, text, tool calls. At the end, for each choice by ascending index: what is left of its
text, its verdicts by ascending index, `ChoiceFinished`; then `Completed`.
"""

from __future__ import annotations

import enum
import functools
from collections import Counter
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
from deltawire_server.sansio.usage import UsageMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from deltawire_server.sansio import chunks

ENDED_BY_ITSELF = frozenset({"stop", "tool_calls"})
"""The engine's words for an end that the model chose; only then may its calls be executed."""

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
"""What each of the engine's finish reasons means. A word that is not here is kept, counted, and taken for END_OF_TURN."""

ENGINE_FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "abort": Fault(Reason.UPSTREAM_ABORTED, "the provider aborted the request"),
        "error": Fault(Reason.UPSTREAM_ERROR, "the provider ended the answer with an error"),
    }
)
"""The finish reasons that are themselves a failure."""

FAULT_STOP_REASONS: Mapping[Reason, StopReason] = MappingProxyType(
    {
        Reason.UPSTREAM_INCOMPLETE: StopReason.UPSTREAM_INCOMPLETE,
        Reason.UPSTREAM_ABORTED: StopReason.UPSTREAM_INCOMPLETE,
        Reason.DURATION_LIMIT_EXCEEDED: StopReason.TIME_LIMIT,
    }
)
"""How a choice ended that a fault cut off; every other fault is ERROR."""

MAX_WORD_BYTES = 256
"""Of a finish reason: real ones are one word. The rest is cut off."""

MAX_MATCHED_BYTES = 4096
"""Of the stop text that the engine names. With 128 choices, `Completed` still fits into a message."""

MAX_HELD_BYTES = 16 * 1024 * 1024
"""Of one answer. The arguments of 128 tool calls with 64 KiB each take half of it; what a text takes is bounded by
`MAX_WHOLE_BYTES`."""

JOINED_TOKENS = 256
"""After so many tokens their texts are joined: 15 KiB at most are wasted, and no text is copied more than twice."""

ENTRY_BYTES = 64
"""Memory that a fragment of a tool call takes besides its text."""

MAX_WHOLE_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""The default limit of gRPC clients, less an envelope."""

LATE = "event after the end"
"""What an anomaly of this kind is called."""


class Phase(enum.Enum):
    """How far an answer has come."""

    WAITING = enum.auto()
    OPEN = enum.auto()
    TAIL = enum.auto()
    ENDED = enum.auto()


class Input(enum.Enum):
    """What can happen to an answer."""

    CHOICES = enum.auto()
    FINISHED = enum.auto()
    ACCOUNT = enum.auto()
    NOTHING = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()
    END = enum.auto()
    FAULT = enum.auto()
    STOP = enum.auto()


class Ending(enum.Enum):
    """How an answer ends; each leads to `Phase.ENDED`."""

    REFUSED = enum.auto()
    FAULTED = enum.auto()
    WHOLE = enum.auto()
    STOPPED = enum.auto()


TRANSITIONS: Mapping[tuple[Phase, Input], Phase | Ending] = MappingProxyType(
    {
        (Phase.WAITING, Input.CHOICES): Phase.OPEN,
        (Phase.WAITING, Input.ACCOUNT): Phase.WAITING,
        (Phase.WAITING, Input.NOTHING): Phase.WAITING,
        (Phase.WAITING, Input.DONE): Ending.REFUSED,
        (Phase.WAITING, Input.BROKEN): Ending.REFUSED,
        (Phase.WAITING, Input.END): Ending.REFUSED,
        (Phase.WAITING, Input.FAULT): Ending.REFUSED,
        (Phase.WAITING, Input.STOP): Ending.STOPPED,
        (Phase.OPEN, Input.CHOICES): Phase.OPEN,
        (Phase.OPEN, Input.FINISHED): Phase.TAIL,
        (Phase.OPEN, Input.ACCOUNT): Phase.OPEN,
        (Phase.OPEN, Input.NOTHING): Phase.OPEN,
        (Phase.OPEN, Input.DONE): Ending.FAULTED,
        (Phase.OPEN, Input.BROKEN): Ending.FAULTED,
        (Phase.OPEN, Input.END): Ending.FAULTED,
        (Phase.OPEN, Input.FAULT): Ending.FAULTED,
        (Phase.OPEN, Input.STOP): Ending.STOPPED,
        (Phase.TAIL, Input.CHOICES): Phase.TAIL,
        (Phase.TAIL, Input.ACCOUNT): Ending.WHOLE,
        (Phase.TAIL, Input.NOTHING): Phase.TAIL,
        (Phase.TAIL, Input.DONE): Ending.WHOLE,
        (Phase.TAIL, Input.BROKEN): Ending.FAULTED,
        (Phase.TAIL, Input.END): Ending.WHOLE,
        (Phase.TAIL, Input.FAULT): Ending.WHOLE,
        (Phase.TAIL, Input.STOP): Ending.WHOLE,
    }
)
"""Where each input leads from each phase; what is not here is impossible."""

_TRUE_ENDS = frozenset({Input.ACCOUNT, Input.DONE, Input.END})
_NO_DELTA = Delta()
_ENDED: Phase = Phase.ENDED  # not a literal, so that a type checker sees that methods change `phase`


class TransitionError(RuntimeError):
    """An input came in a phase in which it is impossible: a defect of this program, not of the engine."""


class Limits:
    """What an answer may take. Each default gives its reason where it is defined.

    Args:
        max_event_bytes: One event of the stream.
        max_calls: Tool calls of one choice.
        max_call_bytes: One call: its arguments, and its name twice. At most `tool_calls.MAX_CALL_BYTES`; more has no effect.
        max_held_bytes: Memory that the reader may hold of the answer: what `Completed` repeats, and the calls' arguments.
        max_completed_bytes: What `Completed` may repeat. If an answer has more, its `Completed` has no messages.
        max_whole_bytes: The same, if `Completed` is all that is sent. An answer with more is broken off.
    """

    __slots__ = (
        "max_call_bytes",
        "max_calls",
        "max_completed_bytes",
        "max_event_bytes",
        "max_held_bytes",
        "max_whole_bytes",
    )

    def __init__(
        self,
        *,
        max_event_bytes: int = sse.MAX_EVENT_BYTES,
        max_calls: int = tool_calls.MAX_CALLS,
        max_call_bytes: int = tool_calls.MAX_CALL_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_completed_bytes: int = MAX_WHOLE_BYTES,
        max_whole_bytes: int = MAX_WHOLE_BYTES,
    ) -> None:
        self.max_completed_bytes = max_completed_bytes
        self.max_event_bytes = max_event_bytes
        self.max_held_bytes = max_held_bytes
        self.max_whole_bytes = max_whole_bytes
        self.max_calls = max_calls
        self.max_call_bytes = min(max_call_bytes, tool_calls.MAX_CALL_BYTES)


class _Text:
    """A text that grows by tokens. Each of them takes 50 bytes besides its characters, so they are joined now and then."""

    __slots__ = ("_joined", "_tokens")

    def __init__(self) -> None:
        self._joined: list[str] = []
        self._tokens: list[str] = []

    def write(self, text: str) -> None:
        """Add to its end."""
        self._tokens.append(text)
        if len(self._tokens) == JOINED_TOKENS:
            self._joined.append("".join(self._tokens))
            self._tokens.clear()

    def whole(self) -> str:
        """All of it."""
        return "".join([*self._joined, *self._tokens])


class _Choice:
    """One choice while it is being generated."""

    __slots__ = ("calls", "index", "late_calls", "logprobs", "matched", "reasoning", "text", "word")

    def __init__(self, index: int, calls: tool_calls.ToolCallAssembler) -> None:
        self.index = index
        self.calls = calls
        self.text = _Text()
        self.reasoning = _Text()
        self.logprobs: list[TokenLogprob] = []
        self.word = ""  # the last finish reason
        self.matched: str | int | None = None  # the stop reason beside it
        self.late_calls = False  # whether tool entries came after it


class CompletionReader:
    """Reads one answer.

    Args:
        choice_count: How many choices were asked for.
        offered_tools: The tools that the model was given: by name the JSON Schema of the arguments, as JSON text; empty for none.
        stop: The caller's stop texts.
        stop_token_ids: The caller's stop tokens.
        incremental: Whether to return events of tool calls while they are written.
        argument_checks: By the tool's name, the check for a call's arguments; see `ToolCallAssembler`.
        whole: Whether `Completed` is all that is sent: it repeats the log-probabilities too, and an answer with more than it may
            repeat is broken off.
        limits: What the answer may take.
        generate_id: Makes ids for calls that have none.
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
        self._reads_on = True  # whether further events matter, after a true end only to be counted
        self._awaits_done = False  # whether the answer ended with an account, which `[DONE]` usually follows
        self.phase = Phase.WAITING
        """How far the answer has come; once ENDED, there is nothing more to read."""
        self.event_count = 0
        """Events with data read up to the end; comments and events without data are not counted."""
        self.anomalies: Counter[str] = Counter()
        """What no engine should send and did not matter, with counts, for the log. Complete when the body has ended."""
        self._kept = 0  # bytes of memory of what `Completed` is going to repeat, without calls
        self._calls_held = 0  # bytes of memory of the calls' fragments
        self._said = 0  # what `Completed` would repeat: about its bytes on the wire, and not more
        self._omits = False  # whether that is too much, so that it repeats nothing
        self._usage = UsageMeter(self.anomalies)
        self._halves = Halves(self.anomalies)

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes of the body.

        Returns:
            What happened, in order; ends with `Refused` or `Completed` if the answer ended. Nothing after that.
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
        """Say that no more bytes come.

        Args:
            fault: Why, if reading stopped before the end of the body: a reset, a silence, a time limit, a shutdown. In TAIL it
                has no effect: the answer is whole.

        Returns:
            The remaining events, ending with `Refused` or `Completed`; nothing if the answer had ended already.
        """
        events: list[Event] = []
        if self.phase is not _ENDED:
            # The blank line after the last event may be missing. An event that was cut off is not JSON.
            self._take([payload for payload in self._sse.finish() if _is_complete(payload)], events)
        if self.phase is not _ENDED:
            self._advance(Input.END if fault is None else Input.FAULT, events, fault)
        self._reads_on = False
        return events

    def stop(self, reason: StopReason) -> list[Event]:
        """Say that the caller wants no more: what has come is the answer, and that is no fault.

        Args:
            reason: How the choices ended that have no finish reason. In OPEN and WAITING, all choices that were asked for are
                in the answer, also those of which nothing came.

        Returns:
            The remaining events, ending with `Completed`; nothing if the answer had ended already.
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
        """Whether only the true end is missing: wait for it a short time, then call `finish`."""
        return self.phase is Phase.TAIL

    @property
    def held(self) -> int:
        """Bytes of memory that this holds of the answer."""
        return self._kept + self._calls_held

    @property
    def usage(self) -> Usage:
        """What is known of the tokens used so far."""
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
        """An event that can hold more than fits into a message, as a smaller one cannot."""
        large: list[Event] = []
        try:
            self._receive_payload(payload, large)
        finally:
            events.extend(pieces.divide(large))

    def _receive_payload(self, payload: bytes, events: list[Event]) -> None:
        """One event of the stream. Once per token."""
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
            # In OPEN and TAIL the phase stays, so there is no look-up: this runs once per token.
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
        """One choice's share of a chunk: figures, reasoning, text, tool calls, finish reason. Once per token."""
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
                self._said += pieces.logprobs_size(tokens)
                self._kept += logprobs_weight(tokens)
        if reasoning:
            self._keep(choice.reasoning, reasoning)
            events.append(ReasoningDelta(choice.index, reasoning, tokens))
            tokens = ()
        if text or tokens:
            self._keep(choice.text, text or "")
            events.append(TextDelta(choice.index, text or "", tokens))
        if delta.tool_calls:
            choice.late_calls = bool(choice.word)
            self._receive_entries(choice, delta.tool_calls, events)
        if part.finish_reason:
            self._receive_finish(choice, part.finish_reason, part.stop_reason)

    def _keep(self, kept: _Text, text: str) -> None:
        """Keep a text for `Completed`. Once per token."""
        self._said += len(text)
        if not self._omits:
            kept.write(text)
            self._kept += _memory(text)

    def _check_size(self, events: list[Event]) -> None:
        """Forget what `Completed` cannot repeat, or break the answer off if it must repeat all or holds too much."""
        limits = self._limits
        limit = limits.max_whole_bytes if self._whole else limits.max_completed_bytes
        message = ""
        if self._said > limit and not self._omits:
            self.forget()
            if self._whole:
                message = f"the answer has more than {limit} bytes, too many for one message: stream it"
        if self.held > limits.max_held_bytes:
            self.forget()
            message = (
                f"the answer takes more than {limits.max_held_bytes} bytes of memory, its tool calls above all: ask for less of"
                " it, by choice_count or max_tokens"
            )
        if message:
            self._advance(Input.BROKEN, events, Fault(Reason.ANSWER_TOO_LARGE, message))

    def forget(self) -> None:
        """Forget what was kept for `Completed`, which repeats nothing then; tool calls that have no verdict yet are kept."""
        self._omits = True
        self._kept = 0
        for choice in self._choices.values():
            choice.text, choice.reasoning, choice.logprobs = _Text(), _Text(), []

    def _receive_entries(self, choice: _Choice, entries: list[chunks.ToolEntry], events: list[Event]) -> None:
        for entry in entries:
            if entry.function is not None and entry.function.arguments:
                self._said += len(entry.function.arguments)
                self._calls_held += _memory(entry.function.arguments) + ENTRY_BYTES
        try:
            events.extend(choice.calls.receive(entries))
        except tool_calls.ToolCallLimitError as error:
            events.extend(error.events)
            raise

    def _receive_finish(self, choice: _Choice, word: str, matched: str | int | None) -> None:
        """The last finish reason is the one that counts, with the stop reason beside it."""
        if not choice.word:
            self._unfinished -= 1
        elif word != choice.word:
            self.anomalies["second finish reason"] += 1
        choice.word, choice.matched, choice.late_calls = word, matched, False

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
        """Do what the table says.

        Args:
            what: What happened.
            events: Takes the last events if this ends the answer.
            fault: What is wrong; by default an answer that ends too early is incomplete.
            cut_as: How the choices ended that have no finish reason, if there is no fault.
        """
        target = TRANSITIONS.get((self.phase, what))
        if target is None:
            raise TransitionError(f"{what.name} is impossible in phase {self.phase.name}")
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
        """What is wrong with an answer that ends before every choice has a finish reason."""
        if self.phase is Phase.WAITING:
            if what is Input.DONE:
                return Fault(Reason.UPSTREAM_MALFORMED, "the stream ended without a choice")
            return Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered")
        missing = f"{self._unfinished} of {self._choice_count}"
        return Fault(Reason.UPSTREAM_INCOMPLETE, f"the stream ended without a finish reason for {missing} choices")

    def _complete(
        self, ending: Ending, events: list[Event], fault: Fault | None, cut_as: StopReason, *, trusted: bool
    ) -> None:
        """End every choice, and with them the answer."""
        if self.phase is Phase.WAITING:
            events.append(Started("", ""))
        if ending is Ending.STOPPED:
            for index in range(self._choice_count):
                if index not in self._choices:
                    self._begin_choice(index)
        choices = [choice for _, choice in sorted(self._choices.items())]
        if fault is None:
            fault = next((ENGINE_FAULTS[choice.word] for choice in choices if choice.word in ENGINE_FAULTS), None)
        whole = [self._finish_choice(choice, events, cut_as, trusted=trusted, ok=fault is None) for choice in choices]
        completed = Completed(self.usage, tuple(whole), fault)
        events.append(completed.without_messages() if self._omits else completed)

    def _finish_choice(
        self, choice: _Choice, events: list[Event], cut_as: StopReason, *, trusted: bool, ok: bool
    ) -> FinishedChoice:
        """The rest of a choice's text, its verdicts, its end.

        Args:
            choice: Which one.
            events: Takes the events.
            cut_as: How it ended if it has no finish reason.
            trusted: Whether this is the true end, so that tool entries after the finish reason are complete too.
            ok: Whether the answer ends without a fault; else no call may be executed.
        """
        if rest := self._halves.finish((choice.index, ReasoningDelta)):
            self._keep(choice.reasoning, rest)
            events.append(ReasoningDelta(choice.index, rest))
        if rest := self._halves.finish((choice.index, TextDelta)):
            self._keep(choice.text, rest)
            events.append(TextDelta(choice.index, rest))
        word = choice.word
        by_itself = word in ENDED_BY_ITSELF
        cut = not word or (word in STOP_REASONS and not by_itself) or (choice.late_calls and not trusted)
        verdicts = choice.calls.finish(cut=cut)
        events.extend(verdicts)
        succeeded = tuple(event for event in verdicts if isinstance(event, ToolCallSucceeded))
        failed = tuple(event for event in verdicts if isinstance(event, ToolCallFailed))
        matched = choice.matched
        reason = STOP_REASONS.get(word, StopReason.END_OF_TURN) if word else cut_as
        if by_itself and (succeeded or failed):
            reason = StopReason.END_OF_MESSAGE
        elif by_itself and matched is not None and matched in self._stops:
            reason = StopReason.STOP_SEQUENCE
        shown = _cut(word, MAX_WORD_BYTES)
        if word and word not in STOP_REASONS:
            self.anomalies[f"finish reason {shown!r}"] += 1
        if isinstance(matched, str) and matched != _cut(matched, MAX_MATCHED_BYTES):
            self.anomalies["stop reason too long"] += 1
            matched = None
        executable = ok and by_itself and bool(succeeded) and not failed
        events.append(ChoiceFinished(choice.index, reason, shown, executable, matched))
        return FinishedChoice(
            choice.index,
            choice.text.whole(),
            choice.reasoning.whole(),
            succeeded,
            failed,
            reason,
            shown,
            executable,
            matched,
            tuple(choice.logprobs),
        )


def _memory(text: str) -> int:
    """At most so many bytes of memory a text takes as part of a longer one."""
    return len(text) if text.isascii() else 4 * len(text)


def _cut(text: str, limit: int) -> str:
    """The beginning of a text, at most so many bytes in UTF-8."""
    return text.encode()[:limit].decode(errors="ignore")


def _is_complete(payload: bytes) -> bool:
    """Whether an event whose blank line is missing is there to its end."""
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
