"""Tool calls: fragments in, complete calls and a verdict on each out.

A model writes its calls as text; vLLM's parsers cut that text into entries of `delta.tool_calls`, each in its own dialect: ids
and names come late, repeated, changed, null, empty or never; several entries share a chunk; arguments come as written, as
JSON that the parser closed for a model that was cut off, or not at all. Three questions are answered here in this order.

**Which call is an entry about?** (`ToolCallAssembler._find`) The first rule that applies decides:

    its id was seen before              that call
    it has an index                     the newest call on that index, unless the entry contradicts it; else a new call
    it has none                         the current call (the one that the last entry was about), unless the entry
                                        contradicts it; else a new call

    An entry contradicts a call by another name once the call's arguments have begun, or, without an index, beside an id.
    It contradicts it by another id than the call has, with these exceptions, since some engines make up a new id for every
    fragment: an entry without a name is about that call unless it brings arguments after the call's JSON was closed; an
    entry that repeats the name is, if it brings arguments after the call's have begun and before they were closed.
    An entry that says nothing at all (no id, no name, no arguments) never begins a call.

**What does it do to that call?** A call is *settled* when it has a name and its first arguments: from then on its id and
name are those that `ToolCallStarted` carries, and its arguments are returned as they come. Until then a name grows, a late
id is taken, and arguments without a name are kept. A later name or id of a settled call changes nothing.

**May it be executed?** (`ToolCallAssembler._verdict`) At the answer's end, the first of these that applies:

    it has no name                                           failed: MISSING_NAME
    its name is not one of the offered tools                 failed: UNKNOWN_TOOL
    the choice was cut, and this is the current call,        failed: TRUNCATED
    or it has no arguments, or they are not JSON
    it has no arguments, and the schema requires some        failed: MALFORMED_JSON
    its arguments are not JSON                               failed: MALFORMED_JSON
    they are JSON, but not an object                         failed: NOT_AN_OBJECT
    its tool has a check, and they do not pass it            failed: SCHEMA_MISMATCH
    none of these                                            succeeded; "{}" stands for arguments that never came

Ids are passed on verbatim if they are not empty, not too long, and unique in the whole answer, over all choices; else one is
generated.

Fragments are kept in a list and joined once, at the verdict: the work is linear in the number of fragments.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from typing import TYPE_CHECKING, NoReturn

import msgspec

from deltawire_server.sansio.characters import mend
from deltawire_server.sansio.events import (
    Event,
    FailureReason,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from deltawire_server.sansio.pieces import split

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Collection, Mapping, Sequence

    from deltawire_server.sansio.characters import Halves
    from deltawire_server.sansio.chunks import ToolEntry

    Check = Callable[[str], tuple[str, str] | None]

MAX_CALLS = 128
"""Per choice: the most tools that the chat API takes in one request; a model that calls more repeats itself."""

MAX_CALL_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""The arguments of one call, and its name twice: what its verdict holds. A gRPC client receives 4 MiB in one message by default;
the rest is for ids, the failure's sentence and place, and the envelope, which together are below 16 KiB."""

MAX_ID_BYTES = 256
"""A longer id of the engine's is replaced."""

_MAX_INDEX = 2**31 - 1
_MAX_SENTENCE = 1024  # characters
_MAX_SHOWN_NAME = 64  # characters
_WHITE = " \t\r\n"


class ToolCallLimitError(ValueError):
    """The answer's calls exceed a limit; it cannot be read on.

    Attributes:
        events: What the entries before it in the same chunk gave.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.events: list[Event] = []


def generate_call_id() -> str:
    """A call id for a call that has none: "call_" and 24 hexadecimal digits, unguessable."""
    return f"call_{secrets.token_hex(12)}"


class CallIds:
    """The call ids of one answer, over all its choices.

    Args:
        generate_id: Makes an id for a call that has none of its own.
    """

    def __init__(self, generate_id: Callable[[], str] = generate_call_id) -> None:
        self._generate_id = generate_id
        self._taken: set[str] = set()

    def settle(self, engine_id: str) -> str:
        """The id of a call from now on: the engine's if it is not empty and still free, else a new one."""
        call_id = engine_id
        while not call_id or call_id in self._taken:
            call_id = self._generate_id()
        self._taken.add(call_id)
        return call_id


MAX_BRACKETS = 100_000
"""Of one call's arguments that are read to see whether they are closed; 10 ms. If there are more, they count as open."""


class _Brackets:
    """Reads JSON text in pieces, only far enough to see whether its outermost object or list has been closed."""

    __slots__ = ("_brackets", "_carry", "_depth", "_in_string", "closed", "pieces")

    _STRING = re.compile(r'"[^"]*"?')
    _OTHER = re.compile(r"[^\[\]{}]+")

    def __init__(self) -> None:
        self.pieces = 0
        self.closed = False
        self._brackets = 0
        self._depth = 0
        self._in_string = False
        self._carry = ""  # a backslash at the end of a piece, which escapes the first character of the next

    def receive(self, piece: str) -> None:
        self.pieces += 1
        # A quote where the string goes on, so that it is one like others.
        text = ('"' if self._in_string else "") + self._carry + piece
        backslashes = len(text) - len(text.rstrip("\\"))
        self._carry = "\\" * (backslashes % 2)
        text = text.removesuffix(self._carry).replace("\\\\", "").replace('\\"', "")
        self._in_string = text.count('"') % 2 == 1
        brackets = self._OTHER.sub("", self._STRING.sub("", text))
        for bracket in itertools.islice(brackets, MAX_BRACKETS - self._brackets):
            self._depth += 1 if bracket in "{[" else -1
            self.closed = self.closed or self._depth <= 0
        self._brackets += min(len(brackets), MAX_BRACKETS - self._brackets)


class _Call:
    """One call while it is being written."""

    __slots__ = ("_brackets", "arguments", "call_id", "engine_id", "index", "name", "settled", "size")

    def __init__(self, index: int) -> None:
        self.index = index
        self.engine_id = ""
        self.call_id = ""
        self.name = ""
        self.settled = False  # whether call_id and name are final
        self.arguments: list[str] = []
        self.size = 0  # bytes of the arguments, and of the name twice
        self._brackets = _Brackets()

    def take_name(self, name: str) -> None:
        """A name that extends the present one replaces it, another is its next piece."""
        if name.startswith(self.name):
            self.name = name
        else:
            self.name += name

    def is_closed(self) -> bool:
        """Whether the arguments have opened an object or list and closed it again. Each fragment is read once, if ever."""
        for fragment in itertools.islice(self.arguments, self._brackets.pieces, None):
            self._brackets.receive(fragment)
        return self._brackets.closed

    def contradicted_by(self, call_id: str, index: int | None, name: str, arguments: str) -> bool:
        """Whether an entry with these, on this call's index or without one, cannot be about it."""
        if name not in ("", self.name) and (self.settled or (call_id and index is None)):
            return True
        if not (call_id and self.engine_id):
            return False
        if name:
            return name != self.name or not self.arguments or not arguments or self.is_closed()
        return bool(arguments.strip(_WHITE)) and self.is_closed()


class ToolCallAssembler:
    """Assembles the calls of one choice and gives a verdict on each.

    Args:
        choice: The choice's index.
        offered: The names of the tools that the model was given.
        ids: The call ids of the whole answer.
        halves: Mends arguments that come in pieces.
        anomalies: Counts what was wrong and did not matter.
        allows_empty: Given an offered tool's name, whether its schema allows an empty object of arguments.
        checks: By the tool's name, what arguments have to pass besides being a JSON object: given their text, a check returns
            a JSON Pointer to what is wrong and a sentence, or `None`. An exception that it raises is a defect and is not caught.
        incremental: Whether `receive` returns events of calls while they are written; the verdicts are the same either way.
        max_calls: The most calls.
        max_call_bytes: The most bytes of one call's arguments and twice its name, in UTF-8.
    """

    def __init__(
        self,
        choice: int,
        offered: Collection[str],
        ids: CallIds,
        halves: Halves,
        anomalies: Counter[str],
        *,
        allows_empty: Callable[[str], bool],
        checks: Mapping[str, Check] | None = None,
        incremental: bool = False,
        max_calls: int = MAX_CALLS,
        max_call_bytes: int = MAX_CALL_BYTES,
    ) -> None:
        self._choice = choice
        self._offered = offered
        self._ids = ids
        self._halves = halves
        self._anomalies = anomalies
        self._allows_empty = allows_empty
        self._checks = checks or {}
        self._incremental = incremental
        self._max_calls = max_calls
        self._max_call_bytes = max_call_bytes
        self._calls: dict[int, _Call] = {}  # by the index under which they are returned
        self._by_engine_index: dict[int, _Call] = {}  # the newest call on each of the engine's indexes
        self._by_engine_id: dict[str, _Call] = {}
        self._current: _Call | None = None

    def receive(self, entries: Sequence[ToolEntry]) -> list[Event]:
        """Take the entries of one chunk.

        Returns:
            With `incremental`, `ToolCallStarted` and `ToolCallArguments`; else nothing. The verdicts come from `finish`.

        Raises:
            ToolCallLimitError: Too many calls, or one too large; call `finish(cut=True)` for what came.
        """
        events: list[Event] = []
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
            call = self._find(entry, name, arguments)
            if call is None:
                continue
            self._current = call
            if name:
                self._take_name(call, name, events)
            if arguments:
                self._take_arguments(call, arguments, events)

    def finish(self, *, cut: bool) -> list[Event]:
        """Give the verdict on every call; the answer has ended. Nothing may be called afterwards.

        Args:
            cut: Whether the choice was cut off instead of ending by itself. Then the current call is TRUNCATED even if
                it parses: some of vLLM's parsers close cut JSON by themselves.

        Returns:
            `ToolCallSucceeded` or `ToolCallFailed` for each call by ascending index, with `incremental` after a
            `ToolCallStarted` for each named call that had none yet.
        """
        events: list[Event] = []
        for _, call in sorted(self._calls.items()):
            if rest := self._halves.finish(call):
                self._keep_arguments(call, rest, events)
            if call.name and not call.settled:
                self._settle(call, events)
            call.call_id = call.call_id or self._ids.settle(self._usable_id(call))
            events.append(self._verdict(call, cut=cut, current=call is self._current))
        return events

    def _find(self, entry: ToolEntry, name: str, arguments: str) -> _Call | None:
        """The call that an entry is about; a new one if it is about none that there is, `None` if it says nothing."""
        call_id = entry.id or ""
        if call_id and (known := self._by_engine_id.get(call_id)) is not None:
            return known
        index = entry.index if entry.index is not None and 0 <= entry.index <= _MAX_INDEX else None
        call = self._current if index is None else self._by_engine_index.get(index)
        if call is not None and call.contradicted_by(call_id, index, name, arguments):
            call = None
        if call is None:
            if not (call_id or name or arguments):
                return None
            call = self._begin(index)
        if call_id and not call.engine_id:
            call.engine_id = call_id
            self._by_engine_id[call_id] = call
        elif call_id:
            self._anomalies["another id for the same tool call"] += 1
        return call

    def _begin(self, index: int | None) -> _Call:
        """A new call, under the engine's index if that is free, else under the next after the highest."""
        if len(self._calls) >= self._max_calls:
            raise ToolCallLimitError(f"the answer has more than {self._max_calls} tool calls")
        own = index if index is not None and index not in self._calls else max(self._calls, default=-1) + 1
        call = self._calls[own] = _Call(own)
        if index is not None:
            self._by_engine_index[index] = call
        return call

    def _grow(self, call: _Call, size: int) -> None:
        call.size += size
        if call.size > self._max_call_bytes:
            raise ToolCallLimitError(f"tool call {call.index} is larger than {self._max_call_bytes} bytes")

    def _take_name(self, call: _Call, name: str, events: list[Event]) -> None:
        if call.settled or name == call.name:
            return
        self._grow(call, 2 * _size(name))
        call.take_name(name)
        if call.arguments:
            self._settle(call, events)
            self._pass_on(call, "".join(call.arguments), events)

    def _take_arguments(self, call: _Call, fragment: str, events: list[Event]) -> None:
        if self._halves.pending or not fragment.isascii():
            fragment = self._halves.receive(call, fragment)
            if not fragment:
                return
        self._grow(call, _size(fragment))
        self._keep_arguments(call, fragment, events)

    def _keep_arguments(self, call: _Call, fragment: str, events: list[Event]) -> None:
        call.arguments.append(fragment)
        if call.name and not call.settled:
            self._settle(call, events)
        if call.settled:
            self._pass_on(call, fragment, events)

    def _settle(self, call: _Call, events: list[Event]) -> None:
        call.settled = True
        call.name = mend(call.name, self._anomalies)
        call.call_id = self._ids.settle(self._usable_id(call))
        if self._incremental:
            events.append(ToolCallStarted(self._choice, call.index, call.call_id, call.name))

    def _usable_id(self, call: _Call) -> str:
        if len(call.engine_id.encode()) <= MAX_ID_BYTES:
            return call.engine_id
        self._anomalies["tool call id too long"] += 1
        return ""

    def _pass_on(self, call: _Call, fragment: str, events: list[Event]) -> None:
        if self._incremental:
            events.extend(ToolCallArguments(self._choice, call.index, call.call_id, piece) for piece in split(fragment))

    def _verdict(self, call: _Call, *, cut: bool, current: bool) -> ToolCallSucceeded | ToolCallFailed:
        raw = "".join(call.arguments)
        given = bool(raw.strip(_WHITE))
        problem = find_problem(raw) if given else None
        offset = None if problem is None else problem.byte_offset
        path: str | None = None
        reason: FailureReason
        if not call.name:
            reason, message = FailureReason.MISSING_NAME, "the model never named the tool"
        elif call.name not in self._offered:
            shown = call.name if len(call.name) <= _MAX_SHOWN_NAME else call.name[:_MAX_SHOWN_NAME] + "…"
            reason, message = FailureReason.UNKNOWN_TOOL, f"{shown!r} is not one of the request's tools"
        elif cut and (current or not given or (problem and problem.reason is FailureReason.MALFORMED_JSON)):
            reason, message = FailureReason.TRUNCATED, "the answer was cut off before the call was whole"
        elif not given and not self._allows_empty(call.name):
            reason = FailureReason.MALFORMED_JSON
            message = "the model gave no arguments, and the tool's schema requires some"
        elif problem:
            reason, message = problem.reason, problem.message
        else:
            arguments = raw if given else "{}"
            check = self._checks.get(call.name)
            mismatch = check(arguments) if check is not None else None
            if mismatch is None:
                return ToolCallSucceeded(self._choice, call.index, call.call_id, call.name, arguments)
            reason = FailureReason.SCHEMA_MISMATCH
            path, message = _enclosing(mismatch[0]), mismatch[1][:_MAX_SENTENCE]
        return ToolCallFailed(self._choice, call.index, call.call_id, call.name, reason, message, raw, offset, path)


def _size(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _enclosing(path: str) -> str:
    """A JSON Pointer, or if it is too long, the longest beginning of it that is one: what it names holds the place."""
    return path if len(path) <= _MAX_SENTENCE else path[:_MAX_SENTENCE].rpartition("/")[0]


class Problem:
    """Why a text is not a JSON object, and where parsing stopped."""

    __slots__ = ("byte_offset", "message", "reason")

    def __init__(self, reason: FailureReason, message: str, byte_offset: int | None) -> None:
        self.reason = reason
        self.message = message
        self.byte_offset = byte_offset


_TOO_DEEP = Problem(FailureReason.MALFORMED_JSON, "the arguments are nested too deeply to be parsed", None)


def find_problem(text: str) -> Problem | None:
    """What keeps a text from being one JSON object, by the strict grammar: no NaN, nothing after it.

    The last of several equal keys wins, as in every common parser. Numbers of any size are allowed: they are not computed.

    Returns:
        `None` if it is one; then the text can be passed on unchanged.
    """
    try:
        _SYNTAX.decode(text)
    except RecursionError:
        return _TOO_DEEP
    except ValueError as error:
        # It is stricter than the grammar in one thing, halves of surrogate pairs; and what it says is for programmers.
        problem = _read(text) if len(text) <= MAX_EXPLAINED else _read_large(text, error)
        if problem is not None:
            return problem
    if not text.lstrip(_WHITE).startswith("{"):
        return Problem(FailureReason.NOT_AN_OBJECT, "the arguments are JSON, but not an object", None)
    return None


_SYNTAX = msgspec.json.Decoder(msgspec.Raw)
"""Reads the whole text and makes nothing of it: at most 20 ms for 4 MiB, for which `json.loads` can take 700 ms and 90 MiB."""

MAX_EXPLAINED = 64 * 1024
"""Characters of arguments that are not JSON for which the error is the one of Python's parser, which makes objects of them."""

_HALVES = re.compile("[\ud800-\udfff]")
_ESCAPED_HALVES = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_POSITION = re.compile(r" \(byte (\d+)\)$")


def _read_large(text: str, error: ValueError) -> Problem | None:
    """What keeps a large text from being JSON, given the error of `_SYNTAX`; `None` if only halves of pairs do."""
    mended = text
    if isinstance(error, UnicodeEncodeError):
        mended = _HALVES.sub("\uffff", mended)
    if "\\u" in mended:
        mended = _ESCAPED_HALVES.sub(r"\\u0000", mended)
    if mended is not text:  # places have not changed: each character has become one of the same length
        try:
            _SYNTAX.decode(mended)
        except RecursionError:
            return _TOO_DEEP
        except ValueError as second:
            error = second
        else:
            return None
    message = str(error).removeprefix("JSON is malformed: ")
    position = _POSITION.search(message)
    offset = int(position[1]) if position else len(mended.encode())
    return Problem(FailureReason.MALFORMED_JSON, f"the arguments are not JSON: {_POSITION.sub('', message)}", offset)


def _read(text: str) -> Problem | None:
    try:
        json.loads(text, parse_int=_unread, parse_float=_unread, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        return _malformed(text, error.msg, error.pos)
    except _ConstantError as error:
        return _malformed(text, f"{error} is not JSON", _constant_position(text))
    except RecursionError:
        return _TOO_DEEP
    return None


class _ConstantError(Exception):
    """NaN or an infinity, which Python's parser takes and JSON does not have."""


def _unread(_: str) -> int:
    return 0


def _refuse(constant: str) -> NoReturn:
    raise _ConstantError(constant)


_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<constant>NaN|-?Infinity)')


def _constant_position(text: str) -> int:
    """Where the first such constant stands outside of strings; the parser does not say."""
    return next(match.start() for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])


def _malformed(text: str, message: str, position: int) -> Problem:
    offset = len(text[:position].encode("utf-8", "surrogatepass"))
    return Problem(FailureReason.MALFORMED_JSON, f"the arguments are not JSON: {message}", offset)
