"""Decodes the payload of an event: a fast path for vLLM's own format, and a tolerant slow path for variations of it.

msgspec decodes the usual format directly into the structures of `chunks`. Payloads that it rejects are decoded again with the
standard library's JSON parser, field by field:

    an invalid number (a count of -1, a log-probability that is a string)             omitted, an anomaly
    text in parts, arguments as an object, misplaced fields                           moved to the right field
    bytes that are not UTF-8                                                          U+FFFD, an anomaly
    lone surrogates in text that arrives in pieces                                    kept, for `characters.Halves`
    an error in any format                                                            its code and an excerpt of its message
    not JSON, not an object, choices that are not a list, invalid content             MalformedChunkError
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.sansio.characters import BROKEN, mend
from deltawire_server.sansio.chunks import (
    MAX_COUNT,
    Choice,
    Chunk,
    CompletionDetails,
    Delta,
    ErrorBody,
    Function,
    LogprobEntry,
    Logprobs,
    LooseChunk,
    MalformedChunkError,
    Marker,
    PromptDetails,
    ToolEntry,
    TopLogprob,
    UsageFigures,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    Object = dict[str, object]

DONE = b"[DONE]"
"""The payload of the last event of a stream."""

EXCERPT_BYTES = 512
"""Limit for the excerpt of an error in an unknown format, or of an invalid event: enough to recognize the sender."""

MESSAGE_BYTES = 8192
"""Limit for the message of an error in vLLM's own format."""

_MESSAGES = ("message", "detail", "details", "error")
_CODES = ("code", "status", "status_code")
_STATUS = re.compile(r"[1-5][0-9]{2}")
_ARGUMENTS = re.compile(r'"arguments"\s*:\s*(?=[\[{])')

_decoder = msgspec.json.Decoder(Chunk)


def decode_chunk(payload: bytes) -> Chunk | ErrorBody | Marker:
    """Decode an event's payload.

    Args:
        payload: The event's data.

    Returns:
        The chunk (a `LooseChunk` from the slow path), the error, or the marker.

    Raises:
        MalformedChunkError: The payload is invalid; the rest of the answer cannot be read.
    """
    try:
        chunk = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    else:
        if chunk.error is None and (chunk.choices is not None or chunk.usage is not None):
            return chunk
    stripped = payload.strip()
    if not stripped:
        return Marker.NOTHING
    if stripped == DONE:
        return Marker.DONE
    try:
        return _Reading(payload).read()
    except RecursionError:
        raise MalformedChunkError("an event is nested too deeply") from None


def _number(text: str) -> int | float:
    """Convert a JSON integer. One that is too long for any field becomes infinity, so the work is bounded."""
    return int(text) if len(text) <= 20 else math.inf


_json = json.JSONDecoder(strict=False, parse_int=_number)


class _Reading:
    """Decodes one payload on the slow path.

    Raises:
        MalformedChunkError: From every method, if the payload is invalid.
    """

    def __init__(self, payload: bytes) -> None:
        self._anomalies: Counter[str] = Counter()
        try:
            self._text = payload.decode()
        except UnicodeDecodeError:
            self._text = payload.decode(errors="replace")
            self._anomalies[BROKEN] += 1
        self._verbatim = self._find_arguments()

    def read(self) -> LooseChunk | ErrorBody:
        try:
            event = _json.decode(self._text)
        except json.JSONDecodeError as problem:
            raise MalformedChunkError(f"an event is not JSON ({problem.msg}): {self._excerpt(self._text)}") from None
        if not isinstance(event, dict):
            raise MalformedChunkError(f"an event is not an object: {self._excerpt(self._text)}")
        choices, usage, error = event.get("choices"), event.get("usage"), event.get("error")
        if choices is None and usage is None:
            return self._error_without_choices(event)
        if error:
            return self._error(error, error) if isinstance(error, dict) else self._error(event)
        if choices is not None and not isinstance(choices, list):
            raise MalformedChunkError("an event is not a chunk: its choices are not a list")
        return LooseChunk(
            None if choices is None else [self._choice(choice) for choice in choices],
            self._usage(usage),
            self._label(event.get("id"), "id"),
            self._label(event.get("model"), "model"),
            None,
            self._anomalies,
        )

    def _error_without_choices(self, event: Object) -> ErrorBody:
        error = event.get("error")
        if isinstance(error, dict):
            return self._error(error, error or "")
        body = self._error(event)
        if not body.message and not body.code and "error" not in (event.get("object"), event.get("type")):
            raise MalformedChunkError(f"an event is neither a chunk nor an error: {self._excerpt(self._text)}")
        return body

    def _error(self, error: Object, otherwise: object = "") -> ErrorBody:
        message = next((error[key] for key in _MESSAGES if error.get(key)), otherwise)
        codes = (str(error.get(key)) for key in _CODES)
        kind, param = error.get("type"), error.get("param")
        return ErrorBody(
            self._as_excerpt(message, MESSAGE_BYTES if message is error.get("message") else EXCERPT_BYTES),
            self._excerpt(kind) if isinstance(kind, str) else "",
            self._excerpt(param) if isinstance(param, str) else "",
            next((int(code) for code in codes if _STATUS.fullmatch(code)), 0),
        )

    def _as_excerpt(self, message: object, limit: int) -> str:
        if isinstance(message, str):
            return self._excerpt(message, limit)
        return self._excerpt(json.dumps(message, ensure_ascii=False))

    def _excerpt(self, text: str, limit: int = EXCERPT_BYTES) -> str:
        encoded = mend(text[:limit], self._anomalies).encode()
        if len(encoded) <= limit and len(text) <= limit:
            return encoded.decode()
        return encoded[: limit - 3].decode(errors="ignore") + "…"

    def _choice(self, choice: object) -> Choice:
        if not isinstance(choice, dict):
            raise MalformedChunkError("an event is not a chunk: a choice is not an object")
        index = choice.get("index")
        whole = 0 if index is None else _whole(index)
        if whole is None:
            raise MalformedChunkError("an event is not a chunk: a choice's index is not a number")
        # An answer that is not streamed has `message` instead of `delta`.
        delta = choice.get("delta") if choice.get("delta") is not None else choice.get("message")
        return Choice(
            whole,
            self._delta(delta),
            self._logprobs(choice.get("logprobs")),
            self._label(choice.get("finish_reason"), "finish reason", numbers=False),
            self._stop_reason(choice.get("stop_reason")),
        )

    def _delta(self, delta: object) -> Delta | None:
        if delta is None:
            return None
        if not isinstance(delta, dict):
            raise MalformedChunkError("an event is not a chunk: a delta is not an object")
        content, thoughts = self._parts(delta.get("content"))
        reasoning = "".join(self._parts(delta.get("reasoning") or delta.get("reasoning_content")))
        return Delta(content, reasoning + thoughts, None, self._entries(delta))

    def _parts(self, content: object) -> tuple[str, str]:
        """The text and the reasoning of `content`, which is a text, a part or a list of parts."""
        if content is None or isinstance(content, str):
            return content or "", ""
        texts: list[str] = []
        thoughts: list[str] = []
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif isinstance(part, dict) and part.get("type") == "thinking":
                thoughts.extend(self._parts(part.get("thinking")))
            else:
                raise MalformedChunkError("an event is not a chunk: content is neither text nor parts of text")
        return "".join(texts), "".join(thoughts)

    def _entries(self, delta: Object) -> list[ToolEntry] | None:
        entries = delta.get("tool_calls")
        if entries is not None and not isinstance(entries, list | dict):
            raise MalformedChunkError("an event is not a chunk: tool calls are not a list")
        read = [self._entry(entry) for entry in ([entries] if isinstance(entries, dict) else entries or ())]
        if delta.get("function_call") is not None:
            read.append(self._entry({"function": delta["function_call"]}))
        return read or None

    def _entry(self, entry: object) -> ToolEntry:
        if entry is None:
            return ToolEntry()
        if not isinstance(entry, dict):
            raise MalformedChunkError("an event is not a chunk: a tool call is not an object")
        index, function = entry.get("index"), entry.get("function")
        if index is not None and _whole(index) is None:
            self._anomalies["index of another type"] += 1
        if not isinstance(function, dict):
            function = entry
        name, arguments = (
            entry.get(key) if function.get(key) is None else function[key] for key in ("name", "arguments")
        )
        if name is not None and not isinstance(name, str):
            self._anomalies["name of another type"] += 1
            name = None
        return ToolEntry(
            None if index is None else _whole(index),
            self._label(entry.get("id"), "id"),
            Function(name, arguments if arguments is None or isinstance(arguments, str) else self._as_text(arguments)),
        )

    def _as_text(self, arguments: object) -> str:
        """The JSON text of arguments that are JSON instead of text: verbatim if it is found in the payload, else re-encoded."""
        for value, text in self._verbatim:
            if value == arguments:
                return text
        return json.dumps(arguments)

    def _find_arguments(self) -> Iterator[tuple[object, str]]:
        """Each object or list under the key "arguments", with its text. Inside a JSON string the quotes would be escaped."""
        position = 0
        while found := _ARGUMENTS.search(self._text, position):
            value, position = _json.raw_decode(self._text, found.end())
            yield value, self._text[found.end() : position]

    def _logprobs(self, logprobs: object) -> Logprobs | None:
        if logprobs is None:
            return None
        content = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
        if content is not None and not isinstance(content, list):
            self._anomalies["log-probabilities of another type"] += 1
            return None
        return Logprobs([self._token(token) for token in content or ()])

    def _token(self, token: object) -> LogprobEntry:
        """Decode a token. An unreadable one gives an empty entry, so that there are as many entries as tokens."""
        if not isinstance(token, dict):
            self._anomalies["token that cannot be read"] += 1
            return LogprobEntry("")
        tops = token.get("top_logprobs")
        alternatives = tops if isinstance(tops, list) else []
        usable = [top for top in alternatives if isinstance(top, dict) and isinstance(top.get("token"), str)]
        if len(usable) < len(alternatives) or (tops is not None and not isinstance(tops, list)):
            self._anomalies["alternative that cannot be read"] += 1
        return LogprobEntry(
            self._label(token.get("token"), "token") or "",
            self._logprob(token.get("logprob")),
            self._bytes(token.get("bytes")),
            [
                TopLogprob(
                    mend(top["token"], self._anomalies),
                    self._logprob(top.get("logprob")),
                    self._bytes(top.get("bytes")),
                )
                for top in usable
            ],
        )

    def _logprob(self, value: object) -> float | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if value is not None:
            self._anomalies["log-probability that cannot be used"] += 1
        return None

    def _bytes(self, value: object) -> list[int] | None:
        if isinstance(value, list) and all(type(byte) is int and 0 <= byte <= 255 for byte in value):
            return value
        if value is not None:
            self._anomalies["bytes that cannot be used"] += 1
        return None

    def _usage(self, usage: object) -> UsageFigures | None:
        if usage is None:
            return None
        if not isinstance(usage, dict):
            self._anomalies["usage of another type"] += 1
            usage = {}
        prompt, completion = (
            details if isinstance(details := usage.get(key), dict) else {}
            for key in ("prompt_tokens_details", "completion_tokens_details")
        )
        return UsageFigures(
            self._count(usage.get("prompt_tokens")),
            self._count(usage.get("completion_tokens")),
            PromptDetails(self._count(prompt.get("cached_tokens"))),
            CompletionDetails(self._count(completion.get("reasoning_tokens"))),
        )

    def _count(self, value: object) -> int | None:
        if type(value) is int and 0 <= value <= MAX_COUNT:
            return value
        if value is not None:
            self._anomalies["count that cannot be used"] += 1
        return None

    def _stop_reason(self, value: object) -> int | str | None:
        if type(value) is int and -MAX_COUNT - 1 <= value <= MAX_COUNT:
            return value
        return self._label(value, "stop reason", numbers=False)

    def _label(self, value: object, what: str, *, numbers: bool = True) -> str | None:
        """A short text that is never split; with `numbers`, an integer is converted to text."""
        if isinstance(value, str):
            return mend(value, self._anomalies)
        if value is not None:
            if numbers and type(value) is int:
                return str(value)
            self._anomalies[f"{what} of another type"] += 1
        return None


def _whole(value: object) -> int | None:
    """An index as an integer, from an integer, 1.0 or "1"."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None
