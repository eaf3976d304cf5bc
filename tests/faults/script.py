"""The answer that the upstream gives where no fault changes it, and the ways to change it.

It has reasoning, text, and two tool calls, the first in fragments; each chunk has running usage figures, as the gateway
asks for. A fault is inserted at a `Phase`; `Shape` has the answer cut in two there.
"""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.upstream import Send, Step

Chunk = dict[str, Any]
"""The JSON of one event."""

Change = Callable[["Shape"], list[Step]]
"""Makes the steps of an answer with a fault from one without."""


class Phase(enum.Enum):
    """Where in the answer the fault is."""

    WHOLE = "the whole answer"
    HEAD = "before the head"
    FIRST = "before the first event"
    REASONING = "in reasoning"
    TEXT = "in text"
    TOOL = "in a tool call"
    FINISHED = "after finish"
    USAGE = "after usage"
    DONE = "after [DONE]"


def chunk(delta: Chunk | None = None, finish: str | None = None, **choice: object) -> Chunk:
    """A chunk of choice 0."""
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **choice}]}


def text(content: object) -> Chunk:
    """A chunk of text."""
    return chunk({"content": content})


def reasoning(content: object) -> Chunk:
    """A chunk of reasoning."""
    return chunk({"reasoning": content})


def call(index: int, arguments: object, *, call_id: str = "", name: str = "") -> Chunk:
    """A chunk of a tool call."""
    function: Chunk = {"arguments": arguments}
    entry: Chunk = {"index": index, "function": function}
    if call_id:
        entry |= {"id": call_id, "type": "function"}
    if name:
        function["name"] = name
    return chunk({"tool_calls": [entry]})


def figures(prompt: object, completion: object) -> Chunk:
    """The chunk with the usage of the whole answer."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}}


DONE = b"[DONE]"
FINISH = chunk(finish="tool_calls")
USAGE = figures(7, 9)
ROLE = chunk({"role": "assistant", "content": ""})
REASONING = (reasoning("Let me"), reasoning(" think."))
TEXT = (text("Hel"), text("lo ☃ "), text("😀."))
CALLS = (
    call(0, "", call_id="call_a", name="get_weather"),
    call(0, '{"city"'),
    call(0, ': "Oslo"}'),
    call(1, '{"city": "Rom"}', call_id="call_b", name="get_weather"),
)
CHUNKS: tuple[Chunk, ...] = (ROLE, *REASONING, *TEXT, *CALLS, FINISH, USAGE)
"""All chunks, in order; `[DONE]` follows."""

PLACES = {
    Phase.FIRST: 0,
    Phase.REASONING: 2,
    Phase.TEXT: 4,
    Phase.TOOL: 8,
    Phase.FINISHED: len(CHUNKS) - 1,
    Phase.USAGE: len(CHUNKS),
    Phase.DONE: len(CHUNKS) + 1,
}
"""How many events come before the fault."""


def phase_after(number: int) -> Phase:
    """The phase in which the answer is after so many events."""
    # The first event, which only names the role, begins the answer.
    return max((phase for phase in PLACES if PLACES[phase] <= max(number, 2 * bool(number))), key=PLACES.__getitem__)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Said:
    """What a caller must have received of an answer that ends OK.

    Attributes:
        text: All of it.
        reasoning: All of it.
        calls: Name and arguments of each call that SUCCEEDED, in order; arguments are compared as JSON.
        executable: Whether the calls may be executed.
    """

    text: str = "Hello ☃ 😀."
    reasoning: str = "Let me think."
    calls: tuple[tuple[str, str], ...] = (("get_weather", '{"city": "Oslo"}'), ("get_weather", '{"city": "Rom"}'))
    executable: bool = True


def event(payload: Chunk | bytes) -> bytes:
    """One server-sent event."""
    if not isinstance(payload, bytes):
        payload = json.dumps(
            {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "fake", **payload}
        ).encode()
    return b"data: " + payload + b"\n\n"


def framed(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def events_of(chunks: Sequence[Chunk | bytes] = CHUNKS) -> list[bytes]:
    """The events of an answer, `[DONE]` included, with running usage figures."""
    events = []
    for number, each in enumerate(chunks):
        payload = copy.copy(each)
        if isinstance(payload, dict) and payload.get("choices"):
            payload.setdefault("usage", {"prompt_tokens": 7, "completion_tokens": number, "total_tokens": 7 + number})
        events.append(event(payload))
    return [*events, event(DONE)]


@dataclass(frozen=True)
class Shape:
    """The answer, cut at the fault's place.

    Attributes:
        before: The events before it.
        after: The events after it.
    """

    before: Sequence[bytes]
    after: Sequence[bytes]

    @classmethod
    def at(cls, place: Phase | int) -> Shape:
        """Cut the answer after so many events, or at a phase; at `WHOLE` and `HEAD` everything comes after."""
        events = events_of()
        number = PLACES.get(place, 0) if isinstance(place, Phase) else place
        return cls(events[:number], events[number:])

    @property
    def begun(self) -> list[Step]:
        """CompletionInfo and the events before the fault."""
        return [Send(HEAD), *sent(self.before)]

    @property
    def ended(self) -> list[Step]:
        """The events after the fault, and the end of the body."""
        return [*sent(self.after), Send(END)]


def sent(events: Sequence[bytes]) -> list[Step]:
    """Each event as an HTTP chunk of its own."""
    return [Send(framed(each)) for each in events]


def insert(*events: Chunk | bytes) -> Change:
    """Whole events between the others; bytes are the data of one."""
    return lambda shape: [*shape.begun, *sent([event(each) for each in events]), *shape.ended]


def insert_bytes(data: bytes) -> Change:
    """Bytes of the body between the others, in an HTTP chunk of their own."""
    return lambda shape: [*shape.begun, Send(framed(data)), *shape.ended]


def then(*steps: Step) -> Change:
    """The events before the fault, then these steps instead of the rest."""
    return lambda shape: [*shape.begun, *steps]


def instead(*steps: Step) -> Change:
    """These steps instead of the whole answer, its head too."""
    return lambda _: list(steps)


def rewritten(chunks: Sequence[Chunk | bytes]) -> Change:
    """The answer made of other chunks."""
    return lambda _: [Send(HEAD), *sent(events_of(chunks)), Send(END)]


def body(change: Callable[[bytes], bytes]) -> Change:
    """The bytes of the body changed as a whole, in one HTTP chunk."""
    return lambda shape: [Send(HEAD), Send(framed(change(b"".join([*shape.before, *shape.after])))), Send(END)]


def head(lines: str, *, keep: bool = True) -> Change:
    """Another head before a body without framing, which the end of the connection ends.

    Args:
        lines: Status line and headers, with line feeds between them; ``{length}`` is the length of the events before the fault.
        keep: Whether the events after the fault are sent, too.
    """

    def change(shape: Shape) -> list[Step]:
        start = b"".join(shape.before)
        first = lines.format(length=len(start), whole=len(start) + len(b"".join(shape.after))).replace("\n", "\r\n")
        return [Send(first.encode("latin-1") + b"\r\n\r\n"), Send(start), *(map(Send, shape.after) if keep else ())]

    return change


def followed(change: Change, *steps: Step) -> Change:
    """A change, then further steps."""
    return lambda shape: [*change(shape), *steps]


WHOLE: tuple[Step, ...] = (*Shape.at(Phase.DONE).begun, Send(END))
"""The steps of the answer without a fault."""
