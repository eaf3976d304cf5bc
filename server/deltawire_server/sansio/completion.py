"""One answer: the bytes of vLLM's event stream in, its events out, to the last one.

    WAITING ── a chunk with a choice ──▶ OPEN ── [DONE], an error, or `finish` ──▶ ENDED: Completed
       └────── an error, [DONE], nonsense, or `finish` ───────────────────────────▶ ENDED: Refused

What decides that an answer is whole is a finish reason for every choice that was asked for: neither HTTP's 200 nor
`[DONE]` says so, since vLLM sends both around its errors too. A chunk without choices carries usage wherever it comes, and
never begins or ends anything. Within a chunk the order is reasoning, text, tool calls, finish.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire_server.errors import Reason
from deltawire_server.sansio import chunks, sse, tool_calls
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    Event,
    Fault,
    FinishedChoice,
    Provenance,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

ENDED_BY_ITSELF = frozenset({"stop", "tool_calls"})
"""The engine's words for an end that the model chose; only then may its calls be executed."""

STOP_REASONS: Mapping[str, StopReason] = MappingProxyType(
    {
        "stop": StopReason.END_OF_TURN,
        "tool_calls": StopReason.END_OF_TURN,  # END_OF_MESSAGE if there is a call; vLLM has said it without one
        "length": StopReason.OUT_OF_TOKENS,
        "content_filter": StopReason.CONTENT_FILTER,
        "repetition": StopReason.REPETITION,
        "abort": StopReason.UPSTREAM_INCOMPLETE,
        "error": StopReason.ERROR,
    }
)
"""What each of the engine's finish reasons means. A word that is not here is kept, counted, and taken for END_OF_TURN."""

FAULT_STOP_REASONS: Mapping[Reason, StopReason] = MappingProxyType(
    {
        Reason.UPSTREAM_INCOMPLETE: StopReason.UPSTREAM_INCOMPLETE,
        Reason.UPSTREAM_ABORTED: StopReason.UPSTREAM_INCOMPLETE,
        Reason.DURATION_LIMIT_EXCEEDED: StopReason.TIME_LIMIT,
    }
)
"""How a choice ended that a fault cut off; every other fault is ERROR."""


_STATUS = re.compile(r"[1-5][0-9]{2}")
"""What an error's code has to be: an HTTP status. Any other is as good as none."""


class Phase(enum.Enum):
    """How far an answer has come."""

    WAITING = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()


_NO_DELTA = chunks.Delta()
_ENDED: Phase = Phase.ENDED  # not a literal, so that a type checker sees that methods change `phase`


class Limits:
    """What an answer may take. Each default gives its reason where it is defined.

    Args:
        max_event_bytes: One event of the stream.
        max_calls: Tool calls of one choice.
        max_call_bytes: Name and arguments of one call.
    """

    __slots__ = ("max_call_bytes", "max_calls", "max_event_bytes")

    def __init__(
        self,
        *,
        max_event_bytes: int = sse.MAX_EVENT_BYTES,
        max_calls: int = tool_calls.MAX_CALLS,
        max_call_bytes: int = tool_calls.MAX_CALL_BYTES,
    ) -> None:
        self.max_event_bytes = max_event_bytes
        self.max_calls = max_calls
        self.max_call_bytes = max_call_bytes


class _Choice:
    """One choice while it is being generated."""

    def __init__(self, index: int, calls: tool_calls.ToolCallAssembler) -> None:
        self.index = index
        self.calls = calls
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.succeeded: list[ToolCallSucceeded] = []
        self.failed: list[ToolCallFailed] = []
        self.finished: ChoiceFinished | None = None
        self.figures: chunks.UsageFigures | None = None  # the running ones with the most tokens


class CompletionReader:
    """Reads one answer.

    Args:
        choice_count: How many choices were asked for.
        offered_tools: The names of the tools that the model was given.
        stop: The caller's stop texts.
        stop_token_ids: The caller's stop tokens.
        incremental: Whether to tell of tool calls while they are written.
        argument_checks: By the tool's name, what a call's arguments have to pass; see `ToolCallAssembler`.
        keep_logprobs: Whether `Completed` repeats the log-probabilities; costs their memory.
        limits: What the answer may take.
        mint: Makes ids for calls that have none.
    """

    def __init__(
        self,
        *,
        choice_count: int = 1,
        offered_tools: Collection[str] = (),
        stop: Collection[str] = (),
        stop_token_ids: Collection[int] = (),
        incremental: bool = False,
        argument_checks: Mapping[str, tool_calls.Check] | None = None,
        keep_logprobs: bool = False,
        limits: Limits | None = None,
        mint: Callable[[], str] = tool_calls.mint_call_id,
    ) -> None:
        self._choice_count = choice_count
        self._offered_tools = frozenset(offered_tools)
        self._stops: frozenset[str | int] = frozenset(stop) | frozenset(stop_token_ids)
        self._incremental = incremental
        self._argument_checks = argument_checks
        self._keep_logprobs = keep_logprobs
        self._limits = limits or Limits()
        self._sse = sse.SSEDecoder(max_event_bytes=self._limits.max_event_bytes)
        self._call_ids = tool_calls.CallIds(mint)
        self._choices: dict[int, _Choice] = {}
        self._exact: chunks.UsageFigures | None = None
        self._overtaken: chunks.UsageFigures | None = None  # the largest account that more output followed
        self._output_chunks = 0
        self._pending_fault: Fault | None = None
        self.phase = Phase.WAITING
        """How far the answer has come; once ENDED, there is nothing more to read."""
        self.event_count = 0
        """Data events read so far, `[DONE]` included; comments are none."""
        self.oddities: Counter[str] = Counter()
        """What came that no vLLM should send and that was got over, for the log."""

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes of the body.

        Returns:
            What happened, in order; ends with `Refused` or `Completed` if the answer ended. Nothing after that.
        """
        events: list[Event] = []
        if self.ended:
            return events
        too_large: sse.EventTooLargeError | None = None
        try:
            payloads = self._sse.receive(data)
        except sse.EventTooLargeError as error:
            payloads, too_large = error.payloads, error
        try:
            for payload in payloads:
                self.event_count += 1
                if payload == chunks.DONE:
                    self._end(self._verdict_of_done(), events)
                else:
                    self._receive_chunk(chunks.decode_chunk(payload), events)
                if self.phase is _ENDED:
                    break
        except (chunks.MalformedChunkError, tool_calls.ToolCallLimitError) as error:
            self._end(Fault(Reason.UPSTREAM_MALFORMED, str(error)), events)
        if too_large is not None and not self.ended:
            self._end(Fault(Reason.UPSTREAM_MALFORMED, str(too_large)), events)
        return events

    def finish(self, fault: Fault | None = None) -> list[Event]:
        """Say that no more bytes come.

        Args:
            fault: Why, if whoever read gave up: a silence, a time limit. `None` if the body ended, in whatever way; an
                answer is whole all the same if every choice has finished.

        Returns:
            What is left to tell, ending with `Refused` or `Completed`; nothing if the answer had ended already.
        """
        events: list[Event] = []
        if not self.ended:
            self._end(fault or self._verdict_of_end(), events)
        return events

    def stop(self, reason: StopReason) -> list[Event]:
        """Say that whoever asked wants no more: what has come is the answer, and that is no fault.

        Args:
            reason: How the choices ended that the engine has not finished. All that were asked for are told, also those of
                which nothing came.

        Returns:
            What is left to tell, ending with `Completed`; nothing if the answer had ended already.
        """
        events: list[Event] = []
        if self.ended:
            return events
        if self.phase is Phase.WAITING:
            self.phase = Phase.OPEN
            events.append(Started("", ""))
        for index in range(self._choice_count):
            choice = self._choices.get(index) or self._begin_choice(index)
            if choice.finished is None:
                self._cut_choice(choice, reason, events)
        self._end(None, events)
        return events

    @property
    def ended(self) -> bool:
        """Whether `Refused` or `Completed` was told."""
        return self.phase is Phase.ENDED

    @property
    def usage(self) -> Usage:
        """What is known of the tokens used so far."""
        running = [choice.figures for choice in self._choices.values() if choice.figures is not None]
        accounts = [account for account in (self._overtaken, *running, self._exact) if account is not None]
        if not accounts:
            return Usage(self._output_chunks, Provenance.ESTIMATED)
        cached = [count for count in map(_cached_tokens, accounts) if count is not None]
        if self._exact is not None:
            return Usage(
                self._exact.completion_tokens or 0,
                Provenance.EXACT,
                self._exact.prompt_tokens,
                cached[-1] if cached else None,
                _reasoning_tokens(self._exact),
            )
        reasoning = [count for count in map(_reasoning_tokens, running) if count is not None]
        floor = self._overtaken.completion_tokens or 0 if self._overtaken is not None else 0
        return Usage(
            max(floor, sum(account.completion_tokens or 0 for account in running)),
            Provenance.LOWER_BOUND,
            max(account.prompt_tokens for account in accounts),
            cached[-1] if cached else None,
            sum(reasoning) if reasoning else None,
        )

    def _receive_chunk(self, chunk: chunks.Chunk | chunks.ErrorBody, events: list[Event]) -> None:
        if isinstance(chunk, chunks.ErrorBody):
            self._end(_fault_of(chunk), events)
        elif chunk.choices:
            if self.phase is Phase.WAITING:
                self.phase = Phase.OPEN
                events.append(Started(chunk.id or "", chunk.model or ""))
            if self._exact is not None:
                # More output follows, so that account was not the final one: at least that much was used.
                if self._overtaken is None or _exceeds(self._exact, self._overtaken):
                    self._overtaken = self._exact
                self._exact = None
            for part in chunk.choices:
                self._receive_part(part, chunk.usage, events)
        elif chunk.usage is not None:
            self._exact = chunk.usage
        else:
            self.oddities["chunk without choices or usage"] += 1

    def _receive_part(self, part: chunks.Choice, usage: chunks.UsageFigures | None, events: list[Event]) -> None:
        """One choice's share of a chunk: figures, reasoning, text, tool calls, finish. Once per token."""
        choice = self._choices.get(part.index or 0) or self._begin_choice(part.index or 0)
        if usage is not None and (choice.figures is None or _exceeds(usage, choice.figures)):
            choice.figures = usage
        delta = part.delta or _NO_DELTA
        reasoning = delta.reasoning or delta.reasoning_content
        text = delta.content
        if reasoning or text or delta.tool_calls:
            self._output_chunks += 1
        tokens: tuple[TokenLogprob, ...] = ()
        if part.logprobs is not None:
            tokens = _tokens(part.logprobs)
            if self._keep_logprobs:
                choice.logprobs.extend(tokens)
        if reasoning:
            choice.reasoning.append(reasoning)
            events.append(ReasoningDelta(choice.index, reasoning, tokens))
            tokens = ()
        if text or tokens:
            choice.text.append(text or "")
            events.append(TextDelta(choice.index, text or "", tokens))
        if delta.tool_calls:
            self._receive_entries(choice, delta.tool_calls, events)
        if part.finish_reason:
            if choice.finished is None:
                self._finish_choice(choice, part.finish_reason, part.stop_reason, events)
            else:
                self.oddities["second finish reason"] += 1

    def _receive_entries(self, choice: _Choice, entries: list[chunks.ToolEntry], events: list[Event]) -> None:
        try:
            events.extend(choice.calls.receive(entries))
        except tool_calls.ToolCallLimitError as error:
            events.extend(error.events)
            raise

    def _begin_choice(self, index: int) -> _Choice:
        if not 0 <= index < self._choice_count:
            raise chunks.MalformedChunkError(f"choice {index} came in an answer of {self._choice_count}")
        calls = tool_calls.ToolCallAssembler(
            index,
            self._offered_tools,
            self._call_ids,
            checks=self._argument_checks,
            incremental=self._incremental,
            max_calls=self._limits.max_calls,
            max_call_bytes=self._limits.max_call_bytes,
        )
        choice = self._choices[index] = _Choice(index, calls)
        return choice

    def _finish_choice(self, choice: _Choice, word: str, matched: str | int | None, events: list[Event]) -> None:
        """A choice ended with a finish reason of the engine's."""
        reason = STOP_REASONS.get(word)
        if reason is None:
            self.oddities[f"finish reason {word!r}"] += 1
            reason = StopReason.END_OF_TURN
        self._judge_calls(choice, events, cut=word not in ENDED_BY_ITSELF and word in STOP_REASONS)
        if word in ENDED_BY_ITSELF:
            if choice.succeeded or choice.failed:
                reason = StopReason.END_OF_MESSAGE
            elif matched is not None and matched in self._stops:
                reason = StopReason.STOP_SEQUENCE
        if word == "abort":
            self._pending_fault = Fault(Reason.UPSTREAM_ABORTED, "the provider aborted the request")
        elif word == "error":
            self._pending_fault = Fault(Reason.UPSTREAM_ERROR, "the provider ended the answer with an error")
        executable = word in ENDED_BY_ITSELF and bool(choice.succeeded) and not choice.failed
        choice.finished = ChoiceFinished(choice.index, reason, word, executable, matched)
        events.append(choice.finished)

    def _cut_choice(self, choice: _Choice, reason: StopReason, events: list[Event]) -> ChoiceFinished:
        """A choice ended without a finish reason of the engine's."""
        self._judge_calls(choice, events, cut=True)
        choice.finished = ChoiceFinished(choice.index, reason, "")
        events.append(choice.finished)
        return choice.finished

    def _judge_calls(self, choice: _Choice, events: list[Event], *, cut: bool) -> None:
        for event in choice.calls.finish(cut=cut):
            if isinstance(event, ToolCallSucceeded):
                choice.succeeded.append(event)
            elif isinstance(event, ToolCallFailed):
                choice.failed.append(event)
            events.append(event)

    def _verdict_of_done(self) -> Fault | None:
        if self.phase is Phase.WAITING:
            return Fault(Reason.UPSTREAM_MALFORMED, "the stream ended without a choice")
        return self._verdict_of_end()

    def _verdict_of_end(self) -> Fault | None:
        """What is wrong with an answer that ends here."""
        if self.phase is Phase.WAITING:
            return Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered")
        finished = sum(choice.finished is not None for choice in self._choices.values())
        if finished < self._choice_count:
            missing = self._choice_count - finished
            return Fault(
                Reason.UPSTREAM_INCOMPLETE,
                f"the stream ended without a finish reason for {missing} of {self._choice_count} choices",
            )
        return self._pending_fault

    def _end(self, fault: Fault | None, events: list[Event]) -> None:
        if self.phase is Phase.WAITING and fault is not None:
            events.append(Refused(fault))
        else:
            stop_reason = FAULT_STOP_REASONS.get(fault.reason, StopReason.ERROR) if fault else StopReason.ERROR
            whole: list[FinishedChoice] = []
            for _, choice in sorted(self._choices.items()):
                finished = choice.finished or self._cut_choice(choice, stop_reason, events)
                whole.append(_whole(choice, finished))
                if choice.calls.late_entries:
                    self.oddities["tool entry after the finish"] += choice.calls.late_entries
            events.append(Completed(self.usage, tuple(whole), fault))
        self.phase = Phase.ENDED


def _fault_of(error: chunks.ErrorBody) -> Fault:
    text = str(error.code)
    code = int(text) if _STATUS.fullmatch(text) else 0
    param = error.param if isinstance(error.param, str) else ""
    return Fault(
        Reason.UPSTREAM_ERROR, error.message or "the provider reported an error", code, error.type or "", param
    )


def _whole(choice: _Choice, finished: ChoiceFinished) -> FinishedChoice:
    return FinishedChoice(
        choice.index,
        "".join(choice.text),
        "".join(choice.reasoning),
        tuple(choice.succeeded),
        tuple(choice.failed),
        finished.stop_reason,
        finished.engine_finish_reason,
        finished.tool_calls_executable,
        finished.matched_stop,
        tuple(choice.logprobs),
    )


def _exceeds(figures: chunks.UsageFigures, others: chunks.UsageFigures) -> bool:
    """Whether figures are at least as large as earlier ones; for every token, so nothing more than it takes."""
    return (figures.completion_tokens or 0) >= (others.completion_tokens or 0)


def _reasoning_tokens(usage: chunks.UsageFigures) -> int | None:
    return usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None


def _cached_tokens(usage: chunks.UsageFigures) -> int | None:
    return usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None


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
