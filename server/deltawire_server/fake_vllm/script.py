"""The answer to one chat request, with its pace and its fault.

    Script.generated(tokens=50)                        generated for the request
    Script.recording("tool-one.sse")                   the recorded bytes of a real vLLM
    Script.chunks([chunk.role(), gate, b": hm"])       given piece by piece
    Script.answer(b"...", status=503), Script.error(…) one body, not streamed

All take the parameters of `Knobs`; `but` changes them afterwards.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

import msgspec

from deltawire_server.fake_vllm.wire import DONE, error_body, event

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from os import PathLike

End = Literal["clean", "no_done", "eof", "cut", "reset", "hang"]

EVENT_STREAM = "text/event-stream; charset=utf-8"


class Knobs(TypedDict, total=False):
    """How an answer is sent. Durations are in seconds; the defaults are those of a normal answer.

    Attributes:
        headers_delay: Delay before the status line.
        header_pause: Delay after each line of the status line and headers: a slow server.
        header_bytes: Apply `end` after this number of bytes of the status line and headers, which may be 0, and send no body.
        first_delay: Delay between the headers and the first chunk: a long prefill.
        chunk_delay: Mean time from one chunk to the next; for generated answers, from one token to the next. 0: no delay.
        chunks_per_write: Without `chunk_delay`, the number of HTTP chunks written at once.
        keep_alive: Interval of comment lines during a delay. 0: none.
        after: Apply `end` after this number of HTTP chunks. `None`: after the last one.
        end: How the answer ends.
            `clean`: a valid end of the HTTP response.
            `no_done`: the same, but without `[DONE]`.
            `eof`: the connection is closed between two HTTP chunks, without the last chunk.
            `cut`: the connection is closed within an HTTP chunk.
            `reset`: the connection is reset (RST).
            `hang`: no more data is sent, and the connection stays open.
        status: The HTTP status.
        content_type: The Content-Type header.
        headers: Further headers.
    """

    headers_delay: float
    header_pause: float
    header_bytes: int | None
    first_delay: float
    chunk_delay: float
    chunks_per_write: int
    keep_alive: float
    after: int | None
    end: End
    status: int
    content_type: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """An answer to one chat request. Create it with one of the class methods and pass it to `FakeVllm.play`.

    Attributes:
        pieces: The body's HTTP chunks; an `asyncio.Event` pauses until it is set. `None`: generated.
        chunked: Whether to send the pieces as HTTP chunks, or as one body with a `content-length`.
        tokens: Length of a generated answer.
        tool_call: Whether to generate a tool call even if the request does not require one.

    The other attributes are those of `Knobs`.
    """

    pieces: tuple[bytes | asyncio.Event, ...] | None = None
    chunked: bool = True
    tokens: int = 24
    tool_call: bool = False
    headers_delay: float = 0.0
    header_pause: float = 0.0
    header_bytes: int | None = None
    first_delay: float = 0.0
    chunk_delay: float = 0.0
    chunks_per_write: int = 1
    keep_alive: float = 0.0
    after: int | None = None
    end: End = "clean"
    status: int = 200
    content_type: str = EVENT_STREAM
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def generated(
        cls, *, tokens: int = 24, tokens_per_second: float = 0.0, tool_call: bool = False, **knobs: Unpack[Knobs]
    ) -> Self:
        """Generate a text, or a tool call if the request requires one.

        Args:
            tokens: Number of tokens of each choice, unless the request's `max_tokens` is lower. With `tool_call`, the number of
                pieces of the arguments, at least two.
            tokens_per_second: Pace of each choice; 0 for no limit. It sets `chunk_delay`.
            tool_call: Call the first tool, with an argument `text` of `tokens` pieces.
            **knobs: See `Knobs`.
        """
        if tokens_per_second:
            knobs["chunk_delay"] = 1 / tokens_per_second
        return cls(tokens=tokens, tool_call=tool_call, **knobs)

    @classmethod
    def recording(
        cls,
        path: str | PathLike[str],
        *,
        chop: Callable[[bytes], Iterable[bytes]] | None = None,
        **knobs: Unpack[Knobs],
    ) -> Self:
        """Play a recorded body verbatim, with the status and the content type of its `.meta.json` if it has one.

        Args:
            path: A `.sse` file, or a `.body` file, which is sent with a `content-length`.
            chop: Splits a `.sse` file into HTTP chunks. By default, they are the recorded ones, or the SSE events.
            **knobs: See `Knobs`.

        Raises:
            OSError: The file cannot be read.
        """
        path = Path(path)
        body = path.read_bytes()
        beside = path.with_suffix(".meta.json")
        meta = json.loads(beside.read_bytes()) if beside.exists() else {}
        streamed = path.suffix == ".sse"
        knobs.setdefault("status", meta.get("status", 200))
        recorded = dict(line.split(": ", 1) for line in meta.get("headers", ()) if ": " in line)
        knobs.setdefault("content_type", recorded.get("content-type", EVENT_STREAM if streamed else "application/json"))
        if not streamed:
            return cls(pieces=(body,), chunked=False, **knobs)
        if chop is not None:
            pieces = tuple(chop(body))
        elif sum(sizes := meta.get("http_chunk_sizes", ())) == len(body):
            pieces = _cut(body, sizes)
        else:
            pieces = tuple(part + b"\n\n" for part in body.removesuffix(b"\n\n").split(b"\n\n"))
        return cls(pieces=pieces, **knobs)

    @classmethod
    def chunks(cls, pieces: Iterable[dict[str, Any] | bytes | asyncio.Event], **knobs: Unpack[Knobs]) -> Self:
        """Play the given pieces.

        Args:
            pieces: A dict is sent as an SSE event (`Chunks` creates the usual ones), bytes verbatim, each as one HTTP chunk; an
                `asyncio.Event` pauses until it is set. If there is a dict, `[DONE]` is appended unless it is there.
            **knobs: See `Knobs`.
        """
        given = tuple(pieces)
        played = [event(piece) if isinstance(piece, dict) else piece for piece in given]
        if DONE not in played and any(isinstance(piece, dict) for piece in given):
            played.append(DONE)
        return cls(pieces=tuple(played), **knobs)

    @classmethod
    def answer(cls, body: bytes | dict[str, Any], **knobs: Unpack[Knobs]) -> Self:
        """Answer with one body and its `content-length`; JSON unless `content_type` is given."""
        knobs.setdefault("content_type", "application/json")
        return cls(pieces=(body if isinstance(body, bytes) else msgspec.json.encode(body),), chunked=False, **knobs)

    @classmethod
    def error(
        cls,
        code: int,
        message: str,
        kind: str = "InternalServerError",
        param: str | None = None,
        **knobs: Unpack[Knobs],
    ) -> Self:
        """Answer with an error in vLLM's format and this HTTP status; see `wire.error_body`."""
        knobs["status"] = code
        return cls.answer(error_body(code, message, kind, param), **knobs)

    def but(self, **knobs: Unpack[Knobs]) -> Self:
        """A copy with some parameters changed."""
        return dataclasses.replace(self, **knobs)

    def trimmed(self) -> Sequence[bytes | asyncio.Event]:
        """The pieces to play: without `[DONE]` at the end, however it is split, if `end` is `no_done`."""
        pieces = list(self.pieces or ())
        if self.end != "no_done":
            return pieces
        text = b"".join(piece for piece in pieces if isinstance(piece, bytes))
        excess = len(text) - len(text.removesuffix(DONE))
        for place in reversed(range(len(pieces))):
            piece = pieces[place]
            if isinstance(piece, bytes) and excess:
                kept = max(0, len(piece) - excess)
                excess -= len(piece) - kept
                pieces[place] = piece[:kept]
        return [piece for piece in pieces if piece]


def _cut(body: bytes, sizes: Iterable[int]) -> tuple[bytes, ...]:
    """Cut a body into pieces of the given sizes."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(body[start : start + size])
        start += size
    return tuple(pieces)
