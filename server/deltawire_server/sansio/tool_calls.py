"""The tool-call buffering machine: fragments in, whole and judged calls out.

A model writes its calls as text; vLLM's parsers cut that text into entries of `delta.tool_calls`, each a dialect of its
own: ids and names come late, repeated, null, empty or never; several entries share a chunk; arguments come as written, as
JSON closed for a model that was cut off, or not at all. Three questions are answered here, one after the other.

**Which call is an entry about?** (`ToolCallAssembler._find`) The first rule that fits decides:

    its id was seen before              that call
    it has an index                     the newest call on that index, if the entry does not contradict it; else a new call
    it has none                         the current call, the one that the last entry was about, if the entry does not
                                        contradict it; else a new call

    An entry contradicts a call by another id than the call has, or by another name once the call's arguments have begun.
    Without an index, another name beside a new id contradicts it too.
    An entry that says nothing at all (no id, no name, no arguments) never begins a call.

**What does it do to that call?** (`TRANSITIONS`) An entry is taken as a NAME, then as ARGUMENTS, or if it has neither, as
EMPTY; END comes once, with the choice's end, and nothing after it:

    state       NAME                    ARGUMENTS               EMPTY       END
    NAMELESS    NAMED                   ANONYMOUS               -           JUDGED: MISSING_NAME
    NAMED       - (repeat, or grows)    OPEN: id and name       -           JUDGED
                                        are settled
    ANONYMOUS   OPEN: what came is      -                       -           JUDGED: MISSING_NAME
                released
    OPEN        - (a repeat)            -                       -           JUDGED

**May it be run?** (`ToolCallAssembler._judge`) JUDGED means that the first of these applies:

    it has no name                                           failed: MISSING_NAME
    its name is none of the offered tools'                   failed: UNKNOWN_TOOL
    the answer was cut, and this is the current call,        failed: TRUNCATED
    or it has no arguments, or they are not JSON
    its arguments are not JSON                               failed: MALFORMED_JSON
    they are, but no object                                  failed: NOT_AN_OBJECT
    its tool has a check, and they do not pass it            failed: SCHEMA_MISMATCH
    none of these                                            succeeded; "{}" stands for arguments that never came

A call's id is settled together with its name, so that `ToolCallStarted` says the same as the verdict; an engine's id that
comes after that still finds the call but does not rename it. Ids are taken over to the letter if they are not empty and
unique in the whole answer, over all choices; else one is minted.

Fragments are kept in a list and joined once, at the verdict: the work is linear in the number of fragments.
"""

from __future__ import annotations

import enum
import json
import re
import secrets
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from deltawire_server.sansio.events import (
    Event,
    FailureReason,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from deltawire_server.sansio.chunks import ToolEntry

    Check = Callable[[str], tuple[str, str] | None]

MAX_CALLS = 128
"""Per choice: the most tools that the chat API takes in one request; a model that calls more has lost its way."""

MAX_CALL_BYTES = 4 * 1024 * 1024
"""Name and arguments of one call: what a client in another language receives in one message by default."""

_MAX_INDEX = 2**31 - 1


class ToolCallLimitError(ValueError):
    """The answer's calls exceed a limit; it cannot be read on.

    Attributes:
        events: What the entries before it in the same chunk gave.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.events: list[Event] = []


class State(enum.Enum):
    """How far a call has come."""

    NAMELESS = enum.auto()
    NAMED = enum.auto()
    ANONYMOUS = enum.auto()
    OPEN = enum.auto()
    JUDGED = enum.auto()


class Kind(enum.Enum):
    """What comes for a call."""

    NAME = enum.auto()
    ARGUMENTS = enum.auto()
    EMPTY = enum.auto()
    END = enum.auto()


TRANSITIONS: Mapping[tuple[State, Kind], State] = MappingProxyType(
    {
        (State.NAMELESS, Kind.NAME): State.NAMED,
        (State.NAMELESS, Kind.ARGUMENTS): State.ANONYMOUS,
        (State.NAMELESS, Kind.EMPTY): State.NAMELESS,
        (State.NAMELESS, Kind.END): State.JUDGED,
        (State.NAMED, Kind.NAME): State.NAMED,
        (State.NAMED, Kind.ARGUMENTS): State.OPEN,
        (State.NAMED, Kind.EMPTY): State.NAMED,
        (State.NAMED, Kind.END): State.JUDGED,
        (State.ANONYMOUS, Kind.NAME): State.OPEN,
        (State.ANONYMOUS, Kind.ARGUMENTS): State.ANONYMOUS,
        (State.ANONYMOUS, Kind.EMPTY): State.ANONYMOUS,
        (State.ANONYMOUS, Kind.END): State.JUDGED,
        (State.OPEN, Kind.NAME): State.OPEN,
        (State.OPEN, Kind.ARGUMENTS): State.OPEN,
        (State.OPEN, Kind.EMPTY): State.OPEN,
        (State.OPEN, Kind.END): State.JUDGED,
    }
)
"""Where each kind leads from each state; what is not here cannot come."""


class TransitionError(RuntimeError):
    """Something came for a call that cannot come in its state: a defect of this program, not of the model."""


def mint_call_id() -> str:
    """A call id that no engine gave: "call_" and 24 hexadecimal digits, unguessable."""
    return f"call_{secrets.token_hex(12)}"


class CallIds:
    """The call ids of one answer, over all its choices.

    Args:
        mint: Makes an id for a call that has none of its own.
    """

    def __init__(self, mint: Callable[[], str] = mint_call_id) -> None:
        self._mint = mint
        self._taken: set[str] = set()

    def settle(self, engine_id: str) -> str:
        """The id that a call is told by from now on: the engine's if it is not empty and still free, else a new one."""
        call_id = engine_id
        while not call_id or call_id in self._taken:
            call_id = self._mint()
        self._taken.add(call_id)
        return call_id


class _Call:
    """One call while it is being written."""

    __slots__ = ("arguments", "call_id", "engine_id", "index", "name", "size", "state")

    def __init__(self, index: int) -> None:
        self.index = index
        self.engine_id = ""
        self.call_id = ""  # set when settled
        self.name = ""
        self.arguments: list[str] = []
        self.size = 0  # bytes of name and arguments
        self.state = State.NAMELESS

    def advance(self, kind: Kind) -> None:
        try:
            self.state = TRANSITIONS[self.state, kind]
        except KeyError:
            raise TransitionError(
                f"call {self.index} ({self.name or 'unnamed'}): {kind.name} cannot come in state {self.state.name}"
            ) from None

    def take_name(self, name: str) -> None:
        """A name that extends what is there replaces it, another is its next piece."""
        if name.startswith(self.name):
            self.name = name
        else:
            self.name += name


class ToolCallAssembler:
    """Puts together the calls of one choice and judges them.

    Args:
        choice: The choice's index.
        offered: The names of the tools that the model was given.
        ids: The call ids of the whole answer.
        checks: By the tool's name, what arguments have to pass besides being a JSON object: given their text, a check returns
            a JSON Pointer to what is wrong and a sentence, or `None`. What it raises goes through: it is a defect.
        incremental: Whether `receive` tells of calls while they are written; the verdicts are the same either way.
        max_calls: The most calls.
        max_call_bytes: The most bytes of one call's name and arguments, in UTF-8.
    """

    def __init__(
        self,
        choice: int,
        offered: Collection[str],
        ids: CallIds,
        *,
        checks: Mapping[str, Check] | None = None,
        incremental: bool = False,
        max_calls: int = MAX_CALLS,
        max_call_bytes: int = MAX_CALL_BYTES,
    ) -> None:
        self._choice = choice
        self._offered = offered
        self._ids = ids
        self._checks = checks or {}
        self._incremental = incremental
        self._max_calls = max_calls
        self._max_call_bytes = max_call_bytes
        self._calls: dict[int, _Call] = {}  # by the index that we tell
        self._by_engine_index: dict[int, _Call] = {}  # the newest call on each of the engine's indexes
        self._by_engine_id: dict[str, _Call] = {}
        self._current: _Call | None = None
        self._finished = False
        self.late_entries = 0
        """Entries that came after the verdicts and changed nothing."""

    def receive(self, entries: Sequence[ToolEntry]) -> list[Event]:
        """Take the entries of one chunk.

        Returns:
            With `incremental`, `ToolCallStarted` and `ToolCallArguments`; else nothing. The verdicts come from `finish`.

        Raises:
            ToolCallLimitError: Too many calls, or one too large; call `finish(cut=True)` for what came.
        """
        events: list[Event] = []
        if self._finished:
            self.late_entries += len(entries)
            return events
        try:
            self._receive_entries(entries, events)
        except ToolCallLimitError as error:
            error.events = events
            raise
        return events

    def _receive_entries(self, entries: Sequence[ToolEntry], events: list[Event]) -> None:
        for entry in entries:
            name = (entry.function.name or "") if entry.function else ""
            arguments = (entry.function.arguments or "") if entry.function else ""
            call = self._find(entry, name, says_something=bool(entry.id or name or arguments))
            if call is None:
                continue
            self._current = call
            if name:
                self._take_name(call, name, events)
            if arguments:
                self._take_arguments(call, arguments, events)
            if not name and not arguments:
                call.advance(Kind.EMPTY)

    def finish(self, *, cut: bool) -> list[Event]:
        """Judge every call; the choice has ended.

        Args:
            cut: Whether the answer was cut off instead of ending by itself. Then the current call is TRUNCATED even if
                it parses: some of vLLM's parsers close cut JSON by themselves.

        Returns:
            `ToolCallSucceeded` or `ToolCallFailed` for each call by ascending index, with `incremental` after a
            `ToolCallStarted` for each named call that had none yet. Nothing the second time.
        """
        events: list[Event] = []
        if self._finished:
            return events
        self._finished = True
        for _, call in sorted(self._calls.items()):
            if call.state is State.NAMED:
                self._settle(call, events)
            call.call_id = call.call_id or self._ids.settle(call.engine_id)
            call.advance(Kind.END)
            events.append(self._judge(call, cut=cut, current=call is self._current))
        return events

    def _find(self, entry: ToolEntry, name: str, *, says_something: bool) -> _Call | None:
        """The call that an entry is about; a new one if it is about none that there is, `None` if it says nothing."""
        known = self._by_engine_id.get(entry.id) if entry.id else None
        if known is not None:
            return known
        index = entry.index if entry.index is not None and 0 <= entry.index <= _MAX_INDEX else None
        call = self._current if index is None else self._by_engine_index.get(index)
        if call is not None:
            other_id = bool(entry.id and call.engine_id)
            other_name = name not in ("", call.name) and (call.state is State.OPEN or bool(entry.id and index is None))
            if other_id or other_name:
                call = None
        if call is None and says_something:
            call = self._begin(index)
        if call is not None and entry.id:
            call.engine_id = entry.id
            self._by_engine_id[entry.id] = call
        return call

    def _begin(self, index: int | None) -> _Call:
        """A new call, told by the engine's index if that is free, else by the next after the highest."""
        if len(self._calls) >= self._max_calls:
            raise ToolCallLimitError(f"the answer has more than {self._max_calls} tool calls")
        told = index if index is not None and index not in self._calls else max(self._calls, default=-1) + 1
        call = self._calls[told] = _Call(told)
        if index is not None:
            self._by_engine_index[index] = call
        return call

    def _grow(self, call: _Call, text: str) -> None:
        call.size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if call.size > self._max_call_bytes:
            raise ToolCallLimitError(f"tool call {call.index} is larger than {self._max_call_bytes} bytes")

    def _take_name(self, call: _Call, name: str, events: list[Event]) -> None:
        before = call.state
        call.advance(Kind.NAME)
        if before is not State.OPEN and name != call.name:  # else a repeat, of which nothing is kept
            self._grow(call, name)
            call.take_name(name)
        if before is State.ANONYMOUS:
            self._settle(call, events)
            self._tell_arguments(call, "".join(call.arguments), events)

    def _take_arguments(self, call: _Call, fragment: str, events: list[Event]) -> None:
        self._grow(call, fragment)
        before = call.state
        call.advance(Kind.ARGUMENTS)
        call.arguments.append(fragment)
        if before is State.NAMED:
            self._settle(call, events)
        if call.state is State.OPEN:
            self._tell_arguments(call, fragment, events)

    def _settle(self, call: _Call, events: list[Event]) -> None:
        call.call_id = self._ids.settle(call.engine_id)
        if self._incremental:
            events.append(ToolCallStarted(self._choice, call.index, call.call_id, call.name))

    def _tell_arguments(self, call: _Call, fragment: str, events: list[Event]) -> None:
        if self._incremental:
            events.append(ToolCallArguments(self._choice, call.index, call.call_id, fragment))

    def _judge(self, call: _Call, *, cut: bool, current: bool) -> Event:
        raw = "".join(call.arguments)
        given = bool(raw.strip(" \t\r\n"))
        problem = find_problem(raw) if given else None
        offset = None if problem is None else problem.byte_offset
        path: str | None = None
        reason: FailureReason
        if not call.name:
            reason, message = FailureReason.MISSING_NAME, "the model never named the tool"
        elif call.name not in self._offered:
            reason, message = FailureReason.UNKNOWN_TOOL, f"{call.name!r} is not one of the request's tools"
        elif cut and (current or not given or (problem and problem.reason is FailureReason.MALFORMED_JSON)):
            reason, message = FailureReason.TRUNCATED, "the answer was cut off before the call was whole"
        elif problem:
            reason, message = problem.reason, problem.message
        else:
            arguments = raw if given else "{}"
            check = self._checks.get(call.name)
            mismatch = check(arguments) if check is not None else None
            if mismatch is None:
                return ToolCallSucceeded(self._choice, call.index, call.call_id, call.name, arguments)
            reason = FailureReason.SCHEMA_MISMATCH
            path, message = mismatch
        return ToolCallFailed(self._choice, call.index, call.call_id, call.name, reason, message, raw, offset, path)


class Problem:
    """Why a text is not a JSON object, and where parsing stopped."""

    __slots__ = ("byte_offset", "message", "reason")

    def __init__(self, reason: FailureReason, message: str, byte_offset: int | None) -> None:
        self.reason = reason
        self.message = message
        self.byte_offset = byte_offset


def find_problem(text: str) -> Problem | None:
    """What keeps a text from being one JSON object, by the strict grammar: no NaN, nothing after it.

    The last of several equal keys wins, as in every common parser. Numbers of any size are allowed: they are not computed.

    Returns:
        `None` if it is one; then the text can be passed on as it is.
    """
    try:
        value = json.loads(text, parse_int=_unread, parse_float=_unread, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        return _malformed(text, error.msg, error.pos)
    except _ConstantError as error:
        return _malformed(text, f"{error} is not JSON", _constant_position(text))
    except RecursionError:
        return Problem(FailureReason.MALFORMED_JSON, "the arguments are nested too deeply to be parsed", None)
    if not isinstance(value, dict):
        return Problem(FailureReason.NOT_AN_OBJECT, "the arguments are JSON, but not an object", None)
    return None


class _ConstantError(Exception):
    """NaN or an infinity, which Python's parser takes and JSON does not have."""


def _unread(_: str) -> int:
    return 0


def _refuse(constant: str) -> NoReturn:
    raise _ConstantError(constant)


_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<constant>NaN|-?Infinity)')


def _constant_position(text: str) -> int:
    """Where the first such constant stands outside of strings; the parser does not tell."""
    return next(match.start() for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])


def _malformed(text: str, message: str, position: int) -> Problem:
    offset = len(text[:position].encode("utf-8", "surrogatepass"))
    return Problem(FailureReason.MALFORMED_JSON, f"the arguments are not JSON: {message}", offset)
