"""The table of faults of an upstream. `fault` describes an entry."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from tests.faults.fault import (
    ABORTED_ERROR,
    ABORTED_INCOMPLETE,
    ABORTED_MALFORMED,
    AFTER,
    ANYWHERE,
    BROKEN_OFF,
    ENDLESS,
    FAILED,
    HARMLESS,
    IN_BODY,
    INVALID,
    MALFORMED,
    MISCONFIGURED,
    OK,
    OVERLOADED,
    REJECTED,
    SILENT,
    TOO_LARGE,
    UNAVAILABLE,
    UNFRAMED,
    Allowed,
    Fault,
)
from tests.faults.script import (
    CALLS,
    CHUNKS,
    DONE,
    END,
    FINISH,
    HEAD,
    REASONING,
    ROLE,
    TEXT,
    USAGE,
    WHOLE,
    Phase,
    Said,
    body,
    call,
    chunk,
    event,
    events_of,
    figures,
    followed,
    framed,
    head,
    insert,
    insert_bytes,
    instead,
    reasoning,
    rewritten,
    text,
    then,
)
from tests.faults.upstream import Close, Flood, Gate, Reset, Send, Stall, response

if TYPE_CHECKING:
    from tests.faults.fault import Outcomes
    from tests.faults.script import Change, Chunk, Shape
    from tests.faults.upstream import Step


def _no_calls(said: str, thought: str = "Let me think.") -> Said:
    return Said(said, thought, calls=(), executable=False)


MARK = "xyzzy-reason"
"""A text of the upstream's own that must reach the caller."""

BODIES: dict[str, tuple[bytes, str]] = {
    "openai": (json.dumps({"error": {"message": MARK, "type": "BadRequest", "code": 400}}).encode(), MARK),
    "detail": (json.dumps({"detail": MARK}).encode(), MARK),
    "code-details": (json.dumps({"code": 400, "details": MARK}).encode(), MARK),
    "plain": (MARK.encode(), MARK),
    "html": (f"<html><body>{MARK}</body></html>".encode(), ""),
    "empty": (b"", ""),
    "nested": (b'{"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
}
"""The bodies that errors come with, and what of them the caller must be able to read."""

STATUSES: dict[str, Outcomes] = {
    "400 Bad Request": REJECTED,
    "401 Unauthorized": MISCONFIGURED,
    "403 Forbidden": MISCONFIGURED,
    "404 Not Found": MISCONFIGURED,
    "405 Method Not Allowed": MISCONFIGURED,
    "413 Content Too Large": REJECTED,
    "422 Unprocessable Entity": REJECTED,
    "429 Too Many Requests": OVERLOADED,
    "500 Internal Server Error": FAILED,
    "501 Not Implemented": FAILED,
    "502 Bad Gateway": UNAVAILABLE,
    "503 Service Unavailable": UNAVAILABLE,
    "504 Gateway Timeout": UNAVAILABLE,
    "529 Odd": FAILED,
}

REPORTED = REJECTED | FAILED | UNAVAILABLE | OVERLOADED
"""The outcomes whose message must carry the upstream's own words; others are the operator's affair."""


def _statuses() -> list[Fault]:
    return [
        Fault(
            f"status-{status[:3]}-{shape}",
            (Phase.HEAD,),
            instead(Send(response(status, content))),
            Allowed(before=outcomes),
            says=says if outcomes <= REPORTED else "",
        )
        for status, outcomes in STATUSES.items()
        for shape, (content, says) in BODIES.items()
        # Every body with the commonest statuses, every status with the commonest bodies.
        if status[:3] in ("400", "500", "503") or shape in ("openai", "empty")
    ]


def _redirects() -> list[Fault]:
    location = "location: /v1/elsewhere"
    return [
        Fault(
            f"redirect-{status[:3]}",
            (Phase.HEAD,),
            instead(Send(response(status, b"", location))),
            Allowed(before=MISCONFIGURED),
        )
        for status in (
            "301 Moved Permanently",
            "302 Found",
            "303 See Other",
            "307 Temporary Redirect",
            "308 Permanent Redirect",
        )
    ]


def _error(**fields: object) -> Chunk:
    return {"error": {"message": MARK, "type": "Failure", "param": None, **fields}}


ERROR_EVENTS: dict[str, tuple[Any, Outcomes, str]] = {
    "400": (_error(code=400), REJECTED, MARK),
    "429": (_error(code=429), OVERLOADED, MARK),
    "500": (_error(code=500), FAILED, MARK),
    "503": (_error(code=503), UNAVAILABLE, MARK),
    "no-code": (_error(), FAILED, MARK),
    "text-code": (_error(code="overloaded"), FAILED, MARK),
    "text": ({"error": MARK}, FAILED, MARK),
    "bare": ({"object": "error", "message": MARK, "code": 500}, FAILED, MARK),
    "detail": ({"detail": MARK}, FAILED | MALFORMED, MARK),
    "code-details": ({"code": 400, "details": MARK}, REJECTED | FAILED | MALFORMED, MARK),
    "nested": (BODIES["nested"][0], FAILED | MALFORMED, ""),
}
"""Error events: the data, the outcomes before the first event, and what the message must hold."""


def _error_events() -> list[Fault]:
    faults = [
        Fault(
            f"error-event-{shape}",
            IN_BODY,
            # A vLLM ends its body after an error, with [DONE].
            _error_then_done(data),
            _reported(before),
            says=says,
        )
        for shape, (data, before, says) in ERROR_EVENTS.items()
    ]
    named = b"event: error\ndata: " + json.dumps(_error(code=500)).encode() + b"\n\n"
    faults.append(
        Fault(
            "error-event-named", IN_BODY, insert_bytes(named), Allowed(FAILED, ABORTED_ERROR, ABORTED_ERROR), says=MARK
        )
    )
    faults.append(
        Fault(
            "error-event-kept-open",
            IN_BODY,
            then(Send(framed(event(_error(code=500)))), Stall()),
            Allowed(FAILED, ABORTED_ERROR, ABORTED_ERROR),
            says=MARK,
        )
    )
    return faults


def _reported(before: Outcomes) -> Allowed:
    """The ends after an error event; one of unknown form may count as invalid."""
    during = ABORTED_ERROR | ABORTED_MALFORMED if before >= MALFORMED else ABORTED_ERROR
    return Allowed(before, during, during)


def _error_then_done(data: Chunk | bytes) -> Change:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    error = b"data: " + raw + b"\n\n"
    return then(Send(framed(error)), Send(framed(event(DONE))), Send(END))


def _short(shape: Shape) -> list[Step]:
    """Content-Length ends the body at the fault's place, in the middle of what is sent."""
    return head("HTTP/1.1 200 OK\ncontent-type: text/event-stream\ncontent-length: {length}")(shape)


_STREAM = "content-type: text/event-stream"
_LONG = f"HTTP/1.1 200 OK\n{_STREAM}\ncontent-length: 1000000"

CONNECTION = (
    Fault("refused", (Phase.HEAD,), instead(), Allowed(before=UNAVAILABLE), provider="gone"),
    Fault("reset", ANYWHERE, lambda shape: [*(shape.begun if shape.before else ()), Reset()], BROKEN_OFF),
    Fault("eof-no-head", (Phase.HEAD,), instead(Close()), BROKEN_OFF),
    Fault("eof-in-head", (Phase.HEAD,), instead(Send(HEAD[:30]), Close()), Allowed(before=UNAVAILABLE | MALFORMED)),
    Fault("eof", IN_BODY, then(Close()), BROKEN_OFF),
    Fault("eof-in-event", IN_BODY, then(Send(framed(b'data: {"cho')), Close()), BROKEN_OFF),
    Fault("eof-in-chunk", IN_BODY, then(Send(b"ff\r\ndata: {"), Close()), BROKEN_OFF),
    Fault("body-ends", IN_BODY, then(Send(END)), BROKEN_OFF),
    Fault("silence-no-head", (Phase.HEAD,), instead(Stall()), SILENT, provider="short"),
    Fault("silence", IN_BODY, then(Stall()), SILENT, provider="short"),
    Fault("comments-for-ever", IN_BODY, then(Flood(framed(b": ping\n\n"), pause=0.02)), SILENT, provider="short"),
    Fault("empty-data-for-ever", IN_BODY, then(Flood(framed(b"data: \n\n"), pause=0.02)), SILENT, provider="short"),
    Fault(
        "head-drips-for-ever",
        (Phase.HEAD,),
        instead(Send(HEAD[:40]), Flood(b"x", pause=0.02)),
        SILENT,
        provider="short",
    ),
)

NOT_A_STREAM = (
    Fault(
        "html", (Phase.HEAD,), instead(Send(response("200 OK", b"<html>hi</html>", content_type="text/html"))), INVALID
    ),
    Fault(
        "json",
        (Phase.HEAD,),
        instead(Send(response("200 OK", json.dumps({"id": "c", "choices": []}).encode()))),
        INVALID,
    ),
    Fault("json-array", (Phase.HEAD,), instead(Send(response("200 OK", b"[1,2]"))), INVALID),
    Fault(
        "html-as-stream",
        (Phase.FIRST,),
        then(Send(framed(b"<html>\n\n<body>hi</body>\n\n</html>\n")), Send(END)),
        Allowed(MALFORMED | UNAVAILABLE),
    ),
    Fault("not-http-ssh", (Phase.HEAD,), instead(Send(b"SSH-2.0-OpenSSH_9.2p1\r\n"), Close()), INVALID),
    Fault(
        "not-http-tls",
        (Phase.HEAD,),
        instead(Send(b"\x15\x03\x01\x00\x02\x02\x46"), Close()),
        Allowed(MALFORMED | MISCONFIGURED),
    ),
    Fault("not-http-kept-open", (Phase.HEAD,), instead(Send(b"220 smtp.example.com ESMTP\r\n"), Stall()), INVALID),
    Fault("bad-status-line", (Phase.HEAD,), instead(Send(b"HTTP/1.1 abc OK\r\n\r\n"), Close()), INVALID),
    Fault(
        "bad-header-line", (Phase.HEAD,), instead(Send(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"), Close()), INVALID
    ),
    Fault("bad-header-name", (Phase.HEAD,), instead(Send(b"HTTP/1.1 200 OK\r\nx y: z\r\n\r\n"), Close()), INVALID),
    Fault("nul-in-header", (Phase.HEAD,), instead(Send(b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n"), Close()), INVALID),
    Fault(
        "huge-header",
        (Phase.HEAD,),
        instead(Send(b"HTTP/1.1 200 OK\r\nx: "), Flood(b"x" * 16384, limit=20_000_000)),
        INVALID,
    ),
    Fault(
        "too-many-headers",
        (Phase.HEAD,),
        instead(Send(b"HTTP/1.1 200 OK\r\n"), Flood(b"x: y\r\n" * 1000, limit=20_000_000)),
        INVALID,
    ),
    Fault(
        "gzip",
        (Phase.HEAD,),
        instead(
            Send(f"HTTP/1.1 200 OK\r\n{_STREAM}\r\ncontent-encoding: gzip\r\n\r\n".encode()),
            Send(gzip.compress(b"".join(events_of()))),
            Close(),
        ),
        INVALID,
    ),
    Fault(
        "gzip-in-name-only",
        (Phase.HEAD,),
        head(f"HTTP/1.1 200 OK\n{_STREAM}\ncontent-encoding: gzip\nconnection: close"),
        INVALID,
    ),
    Fault(
        "early-hints", (Phase.HEAD,), instead(Send(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"), *WHOLE), HARMLESS
    ),
)

CONTENT = (
    Fault("garbage-json", IN_BODY, insert(b"{not json"), INVALID),
    Fault("garbage-bytes", IN_BODY, insert(bytes([0, 255, 254, 128, 7])), INVALID),
    Fault("garbage-list", IN_BODY, insert(b"[1, 2, 3]"), INVALID),
    Fault("garbage-choices", IN_BODY, insert(b'{"choices": 5}'), INVALID),
    Fault("garbage-nested", IN_BODY, insert(b'{"choices":' + b"[" * 100_000), INVALID),
    Fault("unknown-lines", IN_BODY, insert_bytes(b"retry: 10\nid: 7\nwhat is this\n\n"), HARMLESS),
    Fault("endless-line", IN_BODY, then(Flood(framed(b"x" * 65536))), ENDLESS, most_bytes=24_000_000),
    Fault(
        "endless-data",
        IN_BODY,
        then(Send(framed(b'data: {"choices":"')), Flood(framed(b"x" * 65536))),
        ENDLESS,
        most_bytes=24_000_000,
    ),
    Fault("comment", IN_BODY, insert_bytes(b": ping\n\n"), HARMLESS),
    Fault("empty-data", IN_BODY, insert_bytes(b"data:\n\ndata: \n\ndata\n\n"), HARMLESS),
    Fault("done-early", IN_BODY, then(Send(framed(event(DONE))), Send(END)), Allowed(MALFORMED, ABORTED_INCOMPLETE)),
    Fault(
        "done-early-stall",
        IN_BODY,
        then(Send(framed(event(DONE))), Stall()),
        Allowed(MALFORMED, ABORTED_INCOMPLETE),
    ),
    Fault("no-done", (Phase.USAGE,), then(Send(END)), HARMLESS),
    Fault("done-twice", AFTER, insert(DONE), HARMLESS),
    Fault("done-with-space", (Phase.USAGE,), then(Send(framed(b"data: [DONE] \n\n")), Send(END)), HARMLESS),
    Fault("done-with-spaces", (Phase.USAGE,), then(Send(framed(b"data:   [DONE]\t\n\n")), Send(END)), HARMLESS),
    Fault("output-after-end", AFTER, insert(text("late"), call(0, "late")), HARMLESS),
    Fault(
        "no-blank-line",
        (Phase.USAGE, Phase.DONE),
        lambda shape: [*shape.begun[:-1], Send(framed(shape.before[-1][:-1])), Send(END)],
        HARMLESS,
    ),
    Fault(
        "no-blank-line-after-finish",
        (Phase.FINISHED,),
        lambda shape: [*shape.begun[:-1], Send(framed(shape.before[-1][:-2])), Send(END)],
        HARMLESS,
    ),
    Fault("crlf", (Phase.WHOLE,), body(lambda data: data.replace(b"\n", b"\r\n")), HARMLESS),
    Fault("cr", (Phase.WHOLE,), body(lambda data: data.replace(b"\n", b"\r")), HARMLESS),
    Fault("bom", (Phase.WHOLE,), body(lambda data: b"\xef\xbb\xbf" + data), HARMLESS),
    Fault("no-space", (Phase.WHOLE,), body(lambda data: data.replace(b"data: ", b"data:")), HARMLESS),
    Fault(
        "one-segment", (Phase.WHOLE,), instead(Send(b"".join(s.data for s in WHOLE if isinstance(s, Send)))), HARMLESS
    ),
    Fault(
        "drip", (Phase.WHOLE,), instead(Send(b"".join(s.data for s in WHOLE if isinstance(s, Send)), size=5)), HARMLESS
    ),
    Fault(
        "drip-byte-by-byte",
        (Phase.WHOLE,),
        instead(Send(HEAD + framed(b"".join(events_of([text("Hi"), chunk(finish="stop"), USAGE]))) + END, size=1)),
        HARMLESS,
        said=(_no_calls("Hi", ""),),
    ),
    Fault(
        "drip-crlf",
        (Phase.WHOLE,),
        instead(Send(HEAD), Send(framed(b"".join(events_of()).replace(b"\n", b"\r\n")) + END, size=3)),
        HARMLESS,
    ),
)


def _answer(*chunks: Chunk | bytes) -> Change:
    """A whole answer of these chunks after the reasoning."""
    return rewritten([ROLE, *REASONING, *chunks])


def _logprobs(**entry: object) -> Chunk:
    return chunk({"content": "!"}, logprobs={"content": [{"token": "!", "bytes": None, "top_logprobs": [], **entry}]})


_NAMED = call(0, "", call_id="call_a", name="get_weather")
_OSLO = call(0, '{"city": "Oslo"}')
_ONE = (("get_weather", '{"city": "Oslo"}'),)
_STOP = chunk(finish="stop")


def _content(escaped: str) -> bytes:
    """A chunk of text that JSON's own writer would not write."""
    return b'{"choices":[{"index":0,"delta":{"content":"%s"}}]}' % escaped.encode()


def _finishing(each: Chunk) -> Chunk:
    """A chunk that has a finish reason, too."""
    [choice] = each["choices"]
    return {**each, "choices": [{**choice, "finish_reason": "tool_calls"}]}


def _answers() -> list[Fault]:
    """Whole answers in odd forms."""
    both = Said()
    table: list[tuple[Any, ...]] = [
        # Nothing of a choice is lost, and nothing of it comes after its end.
        ("arguments-after-finish", _answer(_NAMED, FINISH, _OSLO, USAGE), HARMLESS, Said(text="", calls=_ONE)),
        (
            "text-after-finish",
            _answer(text("Bon"), _STOP, text("jour"), _STOP, USAGE),
            HARMLESS,
            _no_calls("Bonjour"),
        ),
        ("nul-after-finish", _answer(text("a"), _STOP, text("\0b"), USAGE), HARMLESS, _no_calls("a\0b")),
        (
            "reasoning-after-finish",
            _answer(text("a"), _STOP, reasoning(" More."), USAGE),
            HARMLESS,
            _no_calls("a", "Let me think. More."),
        ),
        (
            "call-after-finish",
            rewritten([ROLE, *REASONING, *TEXT, *CALLS[:3], FINISH, CALLS[3], USAGE]),
            HARMLESS,
            both,
        ),
        (
            "finish-on-every-call",
            rewritten([ROLE, *REASONING, *TEXT, *map(_finishing, CALLS), USAGE]),
            HARMLESS,
            both,
        ),
        (
            "finish-on-every-chunk",
            rewritten([*map(_finishing, CHUNKS[:-1]), USAGE]),
            HARMLESS,
            both,
        ),
        ("finish-twice", _answer(text("a"), _STOP, _STOP, USAGE), HARMLESS, _no_calls("a")),
        # A cut answer's last call is truncated; one of another kind of end is not executable.
        (
            "finish-length",
            rewritten([*CHUNKS[:-2], chunk(finish="length"), USAGE]),
            HARMLESS,
            Said(calls=_ONE, executable=False),
        ),
        ("finish-unknown", _answer(text("a"), chunk(finish="whatever"), USAGE), HARMLESS, _no_calls("a")),
        (
            "finish-abort",
            rewritten([*CHUNKS[:-2], chunk(finish="abort"), USAGE]),
            Allowed(whole=frozenset({"ABORTED/UPSTREAM_ABORTED"})),
        ),
        # One call reported as several, or without its arguments, is never executable.
        (
            "new-id-in-every-fragment",
            _answer(_NAMED, call(0, '{"city":', call_id="call_b"), call(0, '"Oslo"}', call_id="call_c"), FINISH, USAGE),
            HARMLESS,
            Said("", calls=_ONE),
            Said("", calls=(), executable=False),
        ),
        ("lost-arguments", _answer(_NAMED, FINISH, USAGE), HARMLESS, Said("", calls=(), executable=False)),
        ("null-arguments", _answer(_NAMED, call(0, None), _OSLO, FINISH, USAGE), HARMLESS, Said("", calls=_ONE)),
        (
            "arguments-as-object",
            _answer(call(0, {"city": "Oslo"}, call_id="call_a", name="get_weather"), FINISH, USAGE),
            HARMLESS,
            Said("", calls=_ONE),
        ),
        (
            "content-in-parts",
            _answer(text([{"type": "text", "text": "Hel"}]), text([{"type": "text", "text": "lo"}]), _STOP, USAGE),
            HARMLESS,
            _no_calls("Hello"),
        ),
        # Text that JSON or UTF-8 cannot represent.
        (
            "surrogate-pair-over-two-chunks",
            _answer(
                _content(r"ok \ud83d"),
                _content(r"\ude00 bye"),
                _STOP,
                USAGE,
            ),
            HARMLESS,
            _no_calls("ok 😀 bye"),
        ),
        (
            "lone-surrogate",
            _answer(_content(r"a\ud83db"), _STOP, USAGE),
            HARMLESS,
            _no_calls("a\ufffdb"),
        ),
        (
            "lone-surrogate-last",
            _answer(_content(r"a\ud83d"), _STOP, USAGE),
            HARMLESS,
            _no_calls("a\ufffd"),
        ),
        (
            "lone-surrogate-in-arguments",
            _answer(
                _NAMED,
                b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":'
                rb'{"arguments":"{\"city\": \"\ud83d\"}"}}]}}]}',
                FINISH,
                USAGE,
            ),
            HARMLESS,
            Said("", calls=(("get_weather", '{"city": "\ufffd"}'),)),
        ),
        (
            "invalid-utf-8",
            _answer(b'{"choices":[{"index":0,"delta":{"content":"a\xe2\x98"}}]}', text("b"), _STOP, USAGE),
            HARMLESS,
        ),
        # Figures never end an answer.
        ("null-logprob", _answer(_logprobs(logprob=None), _STOP, USAGE), HARMLESS, _no_calls("!")),
        ("nan-logprob", _answer(_logprobs(logprob="NaN"), _STOP, USAGE), HARMLESS, _no_calls("!")),
        ("usage-null", rewritten([*CHUNKS[:-1], figures(None, None)]), HARMLESS, both),
        ("usage-negative", rewritten([*CHUNKS[:-1], figures(-1, -1)]), HARMLESS, both),
        ("usage-huge", rewritten([*CHUNKS[:-1], figures(2**70, 1.5)]), HARMLESS, both),
        ("usage-text", rewritten([*CHUNKS[:-1], {"choices": [], "usage": "many"}]), HARMLESS, both),
        ("usage-missing", rewritten(CHUNKS[:-1]), HARMLESS, both),
        (
            "running-usage-null",
            rewritten([{**c, "usage": {"prompt_tokens": None, "completion_tokens": None}} for c in CHUNKS]),
            HARMLESS,
            both,
        ),
        (
            "running-usage-negative",
            rewritten([{**c, "usage": {"prompt_tokens": -1, "completion_tokens": -1}} for c in CHUNKS]),
            HARMLESS,
            both,
        ),
        # No message may be larger than what a client receives by default.
        (
            "huge-text",
            _answer(text("x" * 5_000_000), _STOP, USAGE),
            Allowed(create=TOO_LARGE),
            _no_calls("x" * 5_000_000),
        ),
        (
            "huge-reasoning",
            rewritten([ROLE, reasoning("x" * 5_000_000), text("a"), _STOP, USAGE]),
            Allowed(create=TOO_LARGE),
            _no_calls("a", "x" * 5_000_000),
        ),
        (
            "huge-call",
            _answer(
                _NAMED,
                *(call(0, piece) for piece in _pieces('{"city": "' + "x" * (4 * 1024 * 1024 - 27) + '"}')),
                FINISH,
                USAGE,
            ),
            Allowed(whole=OK | ABORTED_MALFORMED),
        ),
        (
            "huge-failed-call",
            _answer(
                _NAMED,
                *(call(0, piece) for piece in _pieces('{"city": "' + "x" * (4 * 1024 * 1024 - 27))),
                FINISH,
                USAGE,
            ),
            Allowed(whole=OK | ABORTED_MALFORMED),
        ),
    ]
    return [
        Fault(name, (Phase.WHOLE,), change, allowed, said=said, most_bytes=16_000_000)
        for name, change, allowed, *said in table
    ]


def _pieces(whole: str) -> list[str]:
    return [whole[start : start + 65536] for start in range(0, len(whole), 65536)]


FRAMING = (
    *(
        Fault(f"chunk-{name}", IN_BODY, then(Send(data), Stall()), UNFRAMED)
        for name, data in {
            "bad-size": b"zz\r\ndata: {}\r\n",
            "negative-size": b"-5\r\nhello\r\n",
            "size-too-large": b"ffffffffffffffffff\r\nhello\r\n",
            "no-size": b"\r\nhello\r\n",
            "bad-line-end": b"5\nhello\n",
            "no-crlf-after-data": b"5\r\n: abc5\r\n: abc\r\n",
            "data-too-long": b"3\r\n: abcdefgh\r\n",
        }.items()
    ),
    Fault(
        "chunk-extension",
        IN_BODY,
        lambda shape: [*shape.begun, Send(b'7;a=b;c="d"\r\n: ping\n\r\n'), *shape.ended],
        HARMLESS,
    ),
    Fault("chunk-extension-endless", IN_BODY, then(Send(b"5;x="), Flood(b"x" * 16384)), UNFRAMED, most_bytes=8_000_000),
    Fault("trailers", (Phase.DONE,), then(Send(b"0\r\nx-a: b\r\nx-c: d\r\n\r\n")), HARMLESS),
    Fault(
        "trailers-endless",
        IN_BODY,
        then(Send(b"0\r\n"), Flood(b"x-a: b\r\n" * 2000)),
        Allowed(UNAVAILABLE | MALFORMED, ABORTED_INCOMPLETE | ABORTED_MALFORMED, OK | ABORTED_MALFORMED),
        most_bytes=8_000_000,
    ),
    # What is sent beyond the length is on a connection that is idle by then.
    Fault(
        "content-length-too-short",
        IN_BODY,
        followed(_short, Close()),
        Allowed(UNAVAILABLE | MALFORMED, ABORTED_INCOMPLETE),
        alone=True,
    ),
    Fault("content-length-too-long", IN_BODY, followed(head(_LONG, keep=False), Close()), BROKEN_OFF),
    Fault(
        "content-length-too-long-stall", IN_BODY, followed(head(_LONG, keep=False), Stall()), SILENT, provider="short"
    ),
    *(
        Fault(
            f"content-length-{name}",
            (Phase.HEAD,),
            followed(head(f"HTTP/1.1 200 OK\n{_STREAM}\n{lines}"), Close()),
            INVALID,
        )
        for name, lines in {
            "text": "content-length: many",
            "negative": "content-length: -1",
            "twice": "content-length: 5\ncontent-length: 6",
        }.items()
    ),
    Fault(
        "transfer-encoding-unknown",
        (Phase.HEAD,),
        followed(head(f"HTTP/1.1 200 OK\n{_STREAM}\ntransfer-encoding: br"), Close()),
        Allowed(MALFORMED | OK),
    ),
    Fault("http-1-0", IN_BODY, followed(head(f"HTTP/1.0 200 OK\n{_STREAM}", keep=False), Close()), BROKEN_OFF),
    Fault("http-1-0-whole", (Phase.WHOLE,), followed(head(f"HTTP/1.0 200 OK\n{_STREAM}"), Close()), HARMLESS),
    Fault(
        "ended-by-close",
        (Phase.WHOLE,),
        followed(head(f"HTTP/1.1 200 OK\n{_STREAM}\nconnection: close"), Close()),
        HARMLESS,
    ),
    Fault(
        "content-length-right", (Phase.WHOLE,), head(f"HTTP/1.1 200 OK\n{_STREAM}\ncontent-length: {{whole}}"), HARMLESS
    ),
)

_OTHER = response(
    "200 OK", b"".join(events_of([text("another call's answer"), _STOP])), content_type="text/event-stream"
)

SECOND_ANSWERS = (
    Fault("second-answer-at-once", (Phase.WHOLE,), instead(*WHOLE[:-1], Send(END + _OTHER)), HARMLESS, alone=True),
    Fault("second-answer-later", (Phase.WHOLE,), instead(*WHOLE, Gate(), Send(_OTHER)), HARMLESS, alone=True),
    Fault("bytes-on-idle-connection", (Phase.WHOLE,), instead(*WHOLE, Gate(), Send(b"x")), HARMLESS, alone=True),
    Fault(
        "second-answer-after-error",
        (Phase.HEAD,),
        instead(Send(response("400 Bad Request", b"{}") + _OTHER)),
        Allowed(before=REJECTED),
        alone=True,
    ),
)

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        *CONNECTION,
        *NOT_A_STREAM,
        *_statuses(),
        *_redirects(),
        *_error_events(),
        *CONTENT,
        *_answers(),
        *FRAMING,
        *SECOND_ANSWERS,
    )
}
"""All of them, by name, in the order of the table."""
