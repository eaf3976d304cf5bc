"""Assembles tool calls from fragments and gives a verdict on each call.

A model generates tool calls as text. vLLM's parsers convert the text into entries of `delta.tool_calls`, and they differ: ids and
names may be late, repeated, changed, null, empty or missing; a chunk may have several entries; arguments may be verbatim, closed
by the parser after the model was cut off, or missing. This module decides three questions, in this order.

**Which call does an entry belong to?** (`ToolCallAssembler._find`) The first rule that applies:

    its id was seen before              that call
    it has an index                     the newest call with that index, unless the entry contradicts it; else a new call
    it has no index                     the current call (that of the entry before), unless the entry contradicts it; else
                                        a new call

    An entry contradicts a call if it has another name and the call's arguments have begun, or it has another name and an id
    but no index. An entry also contradicts a call if it has another id, with two exceptions, because some engines generate a
    new id for every fragment: an entry without a name contradicts the call only if it has arguments and the call's JSON is
    closed; an entry with the same name does not contradict it if both have arguments and the call's JSON is not closed.
    An entry without id, name and arguments never begins a call.

**How does it change the call?** A call is *settled* when it has a name and its first arguments. From then on, its id and name are
final, as in `ToolCallStarted`, and its arguments are returned as they arrive. Before that, the name may grow, a late id is used,
and arguments without a name are kept. A later name or id does not change a settled call.

**May it be executed?** (`ToolCallAssembler._verdict`) At the end of the answer, the first row that applies:

    it has no name                                           failed: MISSING_NAME
    its name is not one of the offered tools                 failed: UNKNOWN_TOOL
    the choice was cut, and this is the current call,        failed: TRUNCATED
    or it has no arguments, or they are not JSON
    it has no arguments, and the schema requires some        failed: MALFORMED_JSON
    its arguments are not JSON                               failed: MALFORMED_JSON
    they are JSON, but not an object                         failed: NOT_AN_OBJECT
    they fail the check of the tool                          failed: SCHEMA_MISMATCH
    none of these                                            succeeded; missing arguments become "{}"

The engine's id is used verbatim if it is not empty, not too long, and unique in the whole answer, over all choices; otherwise an
id is generated.

Fragments are kept in a list and joined once, for the verdict, so the work is linear in the number of fragments.
"""

from __future__ import annotations

import itertools
import re
import secrets
from typing import TYPE_CHECKING

from deltawire_server.sansio.characters import mend
from deltawire_server.sansio.events import (
    Event,
    FailureReason,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from deltawire_server.sansio.json_object import WHITE, find_problem
from deltawire_server.sansio.pieces import split

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Collection, Mapping, Sequence

    from deltawire_server.sansio.characters import Halves
    from deltawire_server.sansio.chunks import ToolEntry

    Check = Callable[[str], tuple[str, str] | None]

MAX_CALLS = 128
"""Limit per choice: the largest number of tools in one request of the chat API. A model with more calls is in a loop."""

MAX_CALL_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""Limit for the arguments of one call and twice its name, the content of its verdict. A gRPC client receives 4 MiB in one message
by default; the rest is for the ids, the failure's message and path, and the envelope, which together are below 16 KiB."""

MAX_ID_BYTES = 256
"""Limit for an id of the engine; a longer one is replaced."""

_MAX_INDEX = 2**31 - 1
_MAX_MESSAGE = 1024  # characters
_MAX_QUOTED_NAME = 64  # characters


class ToolCallLimitError(ValueError):
    """The calls of an answer exceed a limit; the rest of the answer cannot be read.

    Attributes:
        events: The events of the entries before it in the same chunk.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.events: list[Event] = []


def generate_call_id() -> str:
    """Generate a call id: "call_" and 24 random hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


class CallIds:
    """The call ids of one answer, over all choices.

    Args:
        generate_id: Generates an id for a call without one.
    """

    def __init__(self, generate_id: Callable[[], str] = generate_call_id) -> None:
        self._generate_id = generate_id
        self._taken: set[str] = set()

    def settle(self, engine_id: str) -> str:
        """Choose the final id of a call: the engine's if it is not empty and not used yet, else a generated one."""
        call_id = engine_id
        while not call_id or call_id in self._taken:
            call_id = self._generate_id()
        self._taken.add(call_id)
        return call_id


MAX_BRACKETS = 100_000
"""Limit for the brackets of one call's arguments that are checked for the end, 10 ms. With more, they count as open."""


class _Brackets:
    """Scans JSON text in pieces for the end of its outermost object or list."""

    __slots__ = ("_brackets", "_carry", "_depth", "_in_string", "closed", "pieces")

    _STRING = re.compile(r'"[^"]*"?')
    _OTHER = re.compile(r"[^\[\]{}]+")

    def __init__(self) -> None:
        self.pieces = 0
        self.closed = False
        self._brackets = 0
        self._depth = 0
        self._in_string = False
        self._carry = ""  # a backslash at the end of a piece, which escapes the first character of the next one

    def receive(self, piece: str) -> None:
        self.pieces += 1
        # If the string continues, begin with a quote so that the pattern matches it.
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
    """One call while it is being generated."""

    __slots__ = ("_brackets", "arguments", "call_id", "engine_id", "index", "name", "settled", "size")

    def __init__(self, index: int) -> None:
        self.index = index
        self.engine_id = ""
        self.call_id = ""
        self.name = ""
        self.settled = False  # whether call_id and name are final
        self.arguments: list[str] = []
        self.size = 0  # bytes of the arguments and twice the name
        self._brackets = _Brackets()

    def take_name(self, name: str) -> None:
        """Take a name: it replaces the current one if it begins with it, else it is appended."""
        if name.startswith(self.name):
            self.name = name
        else:
            self.name += name

    def is_closed(self) -> bool:
        """Whether the outermost object or list of the arguments is closed. Scans each fragment at most once."""
        for fragment in itertools.islice(self.arguments, self._brackets.pieces, None):
            self._brackets.receive(fragment)
        return self._brackets.closed

    def contradicted_by(self, call_id: str, index: int | None, name: str, arguments: str) -> bool:
        """Whether an entry with these values, with this call's index or none, cannot belong to this call."""
        if name not in ("", self.name) and (self.settled or (call_id and index is None)):
            return True
        if not (call_id and self.engine_id):
            return False
        if name:
            return name != self.name or not self.arguments or not arguments or self.is_closed()
        return bool(arguments.strip(WHITE)) and self.is_closed()


class ToolCallAssembler:
    """Assembles the calls of one choice and gives a verdict on each.

    Args:
        choice: The index of the choice.
        offered: The names of the tools of the request.
        ids: The call ids of the whole answer.
        halves: Repairs arguments that arrive in pieces.
        anomalies: Counts anomalies that were repaired or ignored.
        allows_empty: Returns whether the schema of an offered tool, by its name, allows an empty object.
        checks: By tool name, a check of the arguments in addition to being a JSON object. It takes their text and returns a
            JSON Pointer to the invalid value and a message, or `None`. An exception of a check is a bug and is not caught.
        incremental: Whether `receive` returns events while the arguments are generated; the verdicts do not depend on it.
        max_calls: Limit for the number of calls.
        max_call_bytes: Limit for the bytes of one call's arguments and twice its name, in UTF-8.
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
        self._calls: dict[int, _Call] = {}  # by the index in events
        self._by_engine_index: dict[int, _Call] = {}  # the newest call for each index of the engine
        self._by_engine_id: dict[str, _Call] = {}
        self._current: _Call | None = None

    def receive(self, entries: Sequence[ToolEntry]) -> list[Event]:
        """Take the entries of one chunk.

        Returns:
            With `incremental`, `ToolCallStarted` and `ToolCallArguments`; otherwise none. `finish` returns the verdicts.

        Raises:
            ToolCallLimitError: There are too many calls, or one is too large; call `finish(cut=True)`.
        """
        events: list[Event] = []
        for entry in entries:
            name = (entry.function.name or "") if entry.function else ""
            arguments = (entry.function.arguments or "") if entry.function else ""
            try:
                self._receive_entry(entry, name, arguments, events)
            except ToolCallLimitError as error:
                error.events = events
                raise
        return events

    def _receive_entry(self, entry: ToolEntry, name: str, arguments: str, events: list[Event]) -> None:
        call = self._find(entry, name, arguments)
        if call is None:
            return
        self._current = call
        if name:
            self._take_name(call, name, events)
        if arguments:
            self._take_arguments(call, arguments, events)

    def finish(self, *, cut: bool) -> list[Event]:
        """Give the verdict on every call at the end of the answer. No method may be called afterwards.

        Args:
            cut: Whether the choice was cut off. If so, the current call is TRUNCATED even if its arguments are valid, because
                some of vLLM's parsers close truncated JSON.

        Returns:
            `ToolCallSucceeded` or `ToolCallFailed` for each call by ascending index. With `incremental`, a `ToolCallStarted`
            precedes it for each named call without one.
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
        """The call that an entry belongs to, which may be a new one; `None` if the entry is empty."""
        call_id = entry.id or ""
        if call_id and (found := self._by_engine_id.get(call_id)) is not None:
            return found
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
        """Begin a new call, with the engine's index if it is free, else with the highest index plus 1."""
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
            self._emit(call, "".join(call.arguments), events)

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
            self._emit(call, fragment, events)

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

    def _emit(self, call: _Call, fragment: str, events: list[Event]) -> None:
        if self._incremental:
            events.extend(ToolCallArguments(self._choice, call.index, call.call_id, piece) for piece in split(fragment))

    def _verdict(self, call: _Call, *, cut: bool, current: bool) -> ToolCallSucceeded | ToolCallFailed:
        raw = "".join(call.arguments)
        given = bool(raw.strip(WHITE))
        problem = find_problem(raw) if given else None
        offset = None if problem is None else problem.byte_offset
        path: str | None = None
        reason: FailureReason
        if not call.name:
            reason, message = FailureReason.MISSING_NAME, "the model never named the tool"
        elif call.name not in self._offered:
            quoted = call.name if len(call.name) <= _MAX_QUOTED_NAME else call.name[:_MAX_QUOTED_NAME] + "…"
            reason, message = FailureReason.UNKNOWN_TOOL, f"{quoted!r} is not one of the request's tools"
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
            path, message = _enclosing(mismatch[0]), mismatch[1][:_MAX_MESSAGE]
        return ToolCallFailed(self._choice, call.index, call.call_id, call.name, reason, message, raw, offset, path)


def _size(text: str) -> int:
    """Length in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _enclosing(path: str) -> str:
    """A JSON Pointer; if it is too long, a pointer to an enclosing value."""
    return path if len(path) <= _MAX_MESSAGE else path[:_MAX_MESSAGE].rpartition("/")[0]
