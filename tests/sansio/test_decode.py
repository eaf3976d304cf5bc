"""Decoding one event: the usual form, every other whose meaning is plain, what has none, and any error at all."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.chunks import (
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
from deltawire_server.sansio.decode import EXCERPT_BYTES, decode_chunk
from tests.sansio.build import DONE, read


def test_decodes_every_field_that_means_something() -> None:
    """A chunk with everything in it, and fields that are not known."""
    chunk = decode_chunk(
        b'{"id":"i","model":"m","created":1,"new":[{}],"choices":[{"index":1,"delta":{"role":"assistant","content":"c",'
        b'"reasoning":"r","reasoning_content":"o","tool_calls":[{"index":2,"id":"t","type":"function",'
        b'"function":{"name":"f","arguments":"{"}}]},"logprobs":{"content":[{"token":"c","logprob":-1,"bytes":[99],'
        b'"top_logprobs":[{"token":"d","logprob":-2.5,"bytes":null}]}]},"finish_reason":"stop","stop_reason":7}],'
        b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":1},'
        b'"completion_tokens_details":{"reasoning_tokens":2}}}'
    )
    delta = Delta("c", "r", "o", [ToolEntry(2, "t", Function("f", "{"))])
    logprobs = Logprobs([LogprobEntry("c", -1.0, [99], [TopLogprob("d", -2.5)])])
    usage = UsageFigures(1, 2, PromptDetails(1), CompletionDetails(2))
    assert chunk == Chunk([Choice(1, delta, logprobs, "stop", 7)], usage, id="i", model="m")


USUAL = {
    "no choices left": b'{"choices":[]}',
    "usage without choices": b'{"usage":{}}',
    "null choices beside usage": b'{"choices":null,"usage":{"completion_tokens":null}}',
    "an empty choice": b'{"choices":[{}]}',
    "nulls in a choice": b'{"choices":[{"delta":null,"logprobs":null,"finish_reason":null,"stop_reason":null}]}',
    "nulls in a delta": b'{"choices":[{"delta":{"content":null,"reasoning":null,"tool_calls":null}}]}',
    "nulls in an entry": b'{"choices":[{"delta":{"tool_calls":[{"index":null,"id":null,"function":null},{}]}}]}',
    "nulls in a function": b'{"choices":[{"delta":{"tool_calls":[{"function":{"name":null,"arguments":null}}]}}]}',
    "nulls in logprobs": b'{"choices":[{"logprobs":{"content":null}}]}',
    "a null log-probability": b'{"choices":[{"logprobs":{"content":[{"token":"a","logprob":null}]}}]}',
    "null counts": b'{"choices":[],"usage":{"prompt_tokens":null,"completion_tokens":null}}',
    "a null error": b'{"choices":[],"error":null}',
    "spaces and line ends": b' {\n "choices" : [ ] } ',
    "an unknown field nested deeply": b'{"x":' + b"[" * 100 + b"]" * 100 + b',"choices":[]}',
}


@pytest.mark.parametrize("payload", USUAL.values(), ids=USUAL.keys())
def test_what_may_be_left_out_null_or_added(payload: bytes) -> None:
    """None of it takes the slow path."""
    assert type(decode_chunk(payload)) is Chunk


@pytest.mark.parametrize("payload", [b"", b" ", b"\t \x0c"])
def test_no_data_is_nothing(payload: bytes) -> None:
    """White space alone says nothing."""
    assert decode_chunk(payload) is Marker.NOTHING


@pytest.mark.parametrize("payload", [b"[DONE]", b"[DONE] ", b"\t[DONE]\n"])
def test_done_may_have_white_space_around_it(payload: bytes) -> None:
    """It is the same marker."""
    assert decode_chunk(payload) is Marker.DONE


MALFORMED = {
    "no JSON": b"<html>",
    "cut JSON": b'{"choices":[',
    "something after it": b'{"choices":[]} x',
    "a BOM": b'\xef\xbb\xbf{"choices":[]}',
    "an array": b"[]",
    "null": b"null",
    "a string": b'"data"',
    "neither chunk nor error": b'{"ping":1}',
    "null choices": b'{"choices":null}',
    "choices of another type": b'{"choices":{"a":1}}',
    "choices of another type beside usage": b'{"choices":{},"usage":{}}',
    "a choice of another type": b'{"choices":[7]}',
    "a delta of another type": b'{"choices":[{"delta":"x"}]}',
    "text of another type": b'{"choices":[{"delta":{"content":1}}]}',
    "a part of another kind": b'{"choices":[{"delta":{"content":[{"type":"refusal","refusal":"no"}]}}]}',
    "tool calls of another type": b'{"choices":[{"delta":{"tool_calls":"f"}}]}',
    "a tool call of another type": b'{"choices":[{"delta":{"tool_calls":["f"]}}]}',
    "an invalid index": b'{"choices":[{"index":"one"}]}',
    "an index between two": b'{"choices":[{"index":0.5}]}',
    "an index without end": b'{"choices":[{"index":' + b"1" * 5000 + b"}]}",
    "nested too deeply": b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b',"choices":[]}',
    "arguments nested too deeply": b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":'
    + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}}]}}]}",
    "parts nested too deeply": b'{"choices":[{"delta":{"content":'
    + b'{"type":"thinking","thinking":' * 1_000_000 + b'""' + b"}" * 1_000_000 + b"}}]}",
    "an error nested too deeply": b'{"error":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_does_not_take(payload: bytes) -> None:
    """What has no meaning is `MalformedChunkError`, and never another exception."""
    with pytest.raises(MalformedChunkError, match="an event is n") as raised:
        decode_chunk(payload)
    assert len(str(raised.value).encode()) <= EXCERPT_BYTES + 100


def test_what_is_no_chunk_is_quoted() -> None:
    """A page of HTML or a list says who sent it, as far as an excerpt can."""
    with pytest.raises(MalformedChunkError, match=r"is not JSON \(Expecting value\): <html>502 Bad Gateway"):
        decode_chunk(b"<html>502 Bad Gateway" + b"x" * 1000)
    with pytest.raises(MalformedChunkError, match=r'is not an object: \[{"error": "é'):
        decode_chunk('[{"error": "é'.encode() + "é".encode() * 1000 + b'"}]')


# --- forms whose meaning is plain


def _choice(payload: dict[str, Any]) -> tuple[Choice, dict[str, int]]:
    chunk = decode_chunk(json.dumps({"choices": [payload]}).encode())
    assert isinstance(chunk, LooseChunk)
    assert chunk.choices is not None
    return chunk.choices[0], chunk.anomalies


CONTENTS: dict[str, tuple[object, str]] = {
    "a part": ([{"type": "text", "text": "ab"}], "ab"),
    "parts": ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"text": "c"}, "d"], "abcd"),
    "a part alone": ({"type": "text", "text": "a"}, "a"),
    "no parts": ([], ""),
}


@pytest.mark.parametrize(("content", "text"), CONTENTS.values(), ids=CONTENTS.keys())
def test_content_in_parts(content: object, text: str) -> None:
    """Parts of text are the text, for reasoning too."""
    choice, anomalies = _choice({"delta": {"content": content}})
    assert (choice.delta, anomalies) == (Delta(text, ""), {})
    for name in ("reasoning", "reasoning_content"):
        choice, _ = _choice({"delta": {name: content, "content": [""]}})
        assert choice.delta == Delta("", text)


def test_thinking_among_the_parts_is_reasoning() -> None:
    """Mistral's own API sends it so."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
    choice, _ = _choice({"delta": {"content": [thinking, {"type": "text", "text": "a"}]}})
    assert choice.delta == Delta("a", "Hm")


def test_a_message_in_the_place_of_the_delta() -> None:
    """An answer that was not streamed, sent as an event; beside a delta it is a repetition."""
    choice, _ = _choice({"message": {"content": "a"}, "finish_reason": "stop"})
    assert (choice.delta, choice.finish_reason) == (Delta("a", ""), "stop")
    choice, _ = _choice({"message": {"content": "ab"}, "delta": {"content": "b"}})
    assert choice.delta == Delta("b", "")


@pytest.mark.parametrize(("index", "read"), [("1", 1), (1.0, 1), (None, 0)])
def test_an_index_in_another_form(index: object, read: int) -> None:
    """A number as text or with a point is that number."""
    assert _choice({"index": index, "delta": {"content": []}})[0].index == read


ENTRIES: dict[str, tuple[object, list[ToolEntry], dict[str, int]]] = {
    "an object as arguments": (
        [{"index": 0, "function": {"name": "f", "arguments": {"a": [1.50, "x"]}}}],
        [ToolEntry(0, None, Function("f", '{"a": [1.5, "x"]}'))],
        {},
    ),
    "a list as arguments": ([{"function": {"arguments": [1]}}], [ToolEntry(None, None, Function(None, "[1]"))], {}),
    "a number as arguments": ([{"function": {"arguments": 1}}], [ToolEntry(None, None, Function(None, "1"))], {}),
    "no function around it": (
        [{"index": 0, "id": "a", "name": "f", "arguments": "{}"}], [ToolEntry(0, "a", Function("f", "{}"))], {},
    ),
    "the name outside": (
        [{"name": "f", "function": {"arguments": "{}"}}], [ToolEntry(None, None, Function("f", "{}"))], {},
    ),
    "one entry without a list": (
        {"index": 0, "function": {"name": "f"}}, [ToolEntry(0, None, Function("f", None))], {},
    ),
    "a null entry": ([None], [ToolEntry()], {}),
    "an index as text": ([{"index": "1", "id": "a"}], [ToolEntry(1, "a", Function())], {}),
    "an invalid index": (
        [{"index": [], "id": "a"}], [ToolEntry(None, "a", Function())], {"index of another type": 1},
    ),
    "an id that is a number": ([{"id": 7}], [ToolEntry(None, "7", Function())], {}),
    "an invalid id": ([{"id": {}}], [ToolEntry(None, None, Function())], {"id of another type": 1}),
    "an invalid name": (
        [{"function": {"name": 5}}], [ToolEntry(None, None, Function())], {"name of another type": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "read", "anomalies"), ENTRIES.values(), ids=ENTRIES.keys())
def test_tool_calls_in_another_form(entries: object, read: list[ToolEntry], anomalies: dict[str, int]) -> None:
    """Each piece is put where it belongs; what cannot be used is left out."""
    choice, counted = _choice({"delta": {"content": [], "tool_calls": entries}})
    assert choice.delta is not None
    assert (choice.delta.tool_calls, counted) == (read, anomalies)


def test_the_function_call_of_the_older_api() -> None:
    """A call beside the list, or instead of it, is a call."""
    call = {"name": "f", "arguments": "{}"}
    entry = ToolEntry(None, None, Function("f", "{}"))
    assert _choice({"delta": {"function_call": call}})[0].delta == Delta("", "", None, [entry])
    both = {"tool_calls": [{"function": call}], "function_call": call}
    assert _choice({"delta": both})[0].delta == Delta("", "", None, [entry, entry])


@pytest.mark.parametrize(
    "arguments",
    [
        '{ "b" : 1.50, "a":1e400, "a": [ ] }',
        '{"n": 123456789012345678901234567890}',
        '{"s": "\\ud800\\u00e9"}',
        '{"arguments": {"x": 1}}',
    ],
)
def test_arguments_as_an_object_are_passed_on_as_they_were_written(arguments: str) -> None:
    """Spaces, numbers of any size, repeated keys and escapes are the model's own, also after something that looks alike."""
    function = '{"name": "f", "arguments" : ' + arguments + "}"
    payload = f'{{"x": {{"arguments": {{"y": 2}}}}, "choices": [{{"delta": {{"tool_calls": [{{"function": {function}}}]}}}}]}}'
    chunk = decode_chunk(payload.encode())
    assert isinstance(chunk, LooseChunk)
    assert chunk.choices is not None
    assert chunk.choices[0].delta == Delta("", "", None, [ToolEntry(None, None, Function("f", arguments))])


def test_arguments_whose_place_is_not_found_are_written_anew() -> None:
    """A name in escapes hides the place; NaN is never equal to itself, and stays what it is, no JSON."""
    for arguments, text in [('{"a":1}', '{"a": 1}'), ('{"a":NaN}', '{"a": NaN}')]:
        entry = f'{{"function": {{"\\u0061rguments": {arguments}}}}}'
        chunk = decode_chunk(f'{{"choices": [{{"delta": {{"tool_calls": [{entry}]}}}}]}}'.encode())
        assert isinstance(chunk, LooseChunk)
        assert chunk.choices is not None
        assert chunk.choices[0].delta == Delta("", "", None, [ToolEntry(None, None, Function(None, text))])


# --- figures that cannot be used

FIGURES: dict[str, object] = {
    "negative": -1,
    "a float": 7.0,
    "text": "7",
    "too large": 2**31,
    "true": True,
    "a list": [],
}


@pytest.mark.parametrize("value", FIGURES.values(), ids=FIGURES.keys())
def test_counts_that_cannot_be_used_are_absent(value: object) -> None:
    """Each alone; the others are read."""
    usage: dict[str, Any] = {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    for path in [
        ("prompt_tokens",),
        ("completion_tokens",),
        ("prompt_tokens_details", "cached_tokens"),
        ("completion_tokens_details", "reasoning_tokens"),
    ]:
        broken = json.loads(json.dumps(usage))
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        chunk = decode_chunk(json.dumps({"choices": [], "usage": broken}).encode())
        assert isinstance(chunk, LooseChunk)
        figures = chunk.usage
        assert figures is not None
        assert figures.prompt_tokens_details is not None
        assert figures.completion_tokens_details is not None
        read = (
            figures.prompt_tokens,
            figures.completion_tokens,
            figures.prompt_tokens_details.cached_tokens,
            figures.completion_tokens_details.reasoning_tokens,
        )
        assert sum(count is None for count in read) == 1
        assert chunk.anomalies == {"count that cannot be used": 1}


@pytest.mark.parametrize("usage", ["none", 7, [1], True])
def test_usage_of_another_type_has_no_figures(usage: object) -> None:
    """It is an account all the same."""
    chunk = decode_chunk(json.dumps({"choices": [], "usage": usage}).encode())
    assert isinstance(chunk, LooseChunk)
    assert chunk.usage == UsageFigures(None, None, PromptDetails(None), CompletionDetails(None))
    assert chunk.anomalies == {"usage of another type": 1}


TOKENS: dict[str, tuple[object, LogprobEntry, dict[str, int]]] = {
    "NaN": ({"token": "a", "logprob": math.nan}, LogprobEntry("a", None, None, []), {"log-probability that cannot be used": 1}),
    "null beside invalid bytes": (
        {"token": "a", "logprob": None, "bytes": "a"}, LogprobEntry("a", None, None, []), {"bytes that cannot be used": 1},
    ),
    "a word": ({"token": "a", "logprob": "x"}, LogprobEntry("a", None, None, []), {"log-probability that cannot be used": 1}),
    "an invalid byte": (
        {"token": "a", "logprob": -1, "bytes": [256]}, LogprobEntry("a", -1.0, None, []), {"bytes that cannot be used": 1},
    ),
    "bytes as text": (
        {"token": "a", "logprob": -1, "bytes": "a"}, LogprobEntry("a", -1.0, None, []), {"bytes that cannot be used": 1},
    ),
    "invalid alternatives": (
        {"token": "a", "logprob": -1, "bytes": [97], "top_logprobs": [None, {}, {"token": "b", "logprob": -2}]},
        LogprobEntry("a", -1.0, [97], [TopLogprob("b", -2.0)]),
        {"alternative that cannot be read": 1},
    ),
    "alternatives as an object": (
        {"token": "a", "logprob": -1, "top_logprobs": {}},
        LogprobEntry("a", -1.0, None, []),
        {"alternative that cannot be read": 1},
    ),
    "no token": ({"token": [], "logprob": -1}, LogprobEntry("", -1.0, None, []), {"token of another type": 1}),
    "null": (None, LogprobEntry(""), {"token that cannot be read": 1}),
    "a number": (-0.5, LogprobEntry(""), {"token that cannot be read": 1}),
    "half a character": (
        {"token": "\ud83d", "logprob": -1}, LogprobEntry("\ufffd", -1.0, None, []), {"broken character": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("token", "read", "anomalies"), TOKENS.values(), ids=TOKENS.keys())
def test_log_probabilities_that_cannot_be_used_are_absent(
    token: object, read: LogprobEntry, anomalies: dict[str, int]
) -> None:
    """The entry is there all the same, so that entries are as many as tokens."""
    choice, counted = _choice({"delta": {"content": []}, "logprobs": {"content": [token]}})
    assert choice.logprobs == Logprobs([read])
    assert counted == anomalies


@pytest.mark.parametrize("logprobs", ["x", {"content": {}}])
def test_log_probabilities_of_another_type_are_left_out(logprobs: object) -> None:
    """All of them."""
    choice, anomalies = _choice({"delta": {"content": []}, "logprobs": logprobs})
    assert choice.logprobs is None
    assert anomalies == {"log-probabilities of another type": 1}


STOPS: list[tuple[object, int | str | None]] = [
    (2**31 - 1, 2**31 - 1),
    (-(2**31), -(2**31)),
    ("x", "x"),
    (2**31, None),
    (-(2**31) - 1, None),
    (2**63, None),
    ({}, None),
    (1.5, None),
    (True, None),
]


@pytest.mark.parametrize(("value", "read"), STOPS)
def test_a_stop_reason_that_cannot_be_passed_on_is_absent(value: object, read: int | str | None) -> None:
    """A token's number has 32 bits in the API."""
    choice, anomalies = _choice({"delta": {"content": []}, "stop_reason": value})
    assert choice.stop_reason == read
    assert anomalies == ({} if read is not None else {"stop reason of another type": 1})


def test_labels_of_another_type() -> None:
    """A number may be an id or a model's name; a finish reason that is no word is none."""
    chunk = decode_chunk(b'{"id":7,"model":{},"choices":[{"finish_reason":false}]}')
    assert isinstance(chunk, LooseChunk)
    assert chunk.choices is not None
    assert (chunk.id, chunk.model, chunk.choices[0].finish_reason) == ("7", None, None)
    assert chunk.anomalies == {"model of another type": 1, "finish reason of another type": 1}


def test_halves_of_characters_are_kept_in_what_comes_in_pieces_only() -> None:
    """Text, reasoning and a call's pieces may go on in the next chunk; an id cannot."""
    payload = (
        b'{"id":"\\ud83d","choices":[{"delta":{"content":"a\\ud83d","reasoning":"\\ude00",'
        b'"tool_calls":[{"id":"\\ud83dx","function":{"name":"\\ud83d","arguments":"\\ud83d"}}]}}]}'
    )
    chunk = decode_chunk(payload)
    assert isinstance(chunk, LooseChunk)
    assert chunk.choices is not None
    entry = ToolEntry(None, "\ufffdx", Function("\ud83d", "\ud83d"))
    assert (chunk.id, chunk.choices[0].delta) == ("\ufffd", Delta("a\ud83d", "\ude00", None, [entry]))
    assert chunk.anomalies == {"broken character": 2}


def test_bytes_that_are_not_utf_8_are_replaced() -> None:
    """And control characters in a text are taken as they are."""
    chunk = decode_chunk(b'{"choices":[{"delta":{"content":"a\xff\xf0\x9f\x98b\n"}}]}')
    assert isinstance(chunk, LooseChunk)
    assert chunk.choices is not None
    assert chunk.choices[0].delta == Delta("a\ufffd\ufffdb\n", "")
    assert chunk.anomalies == {"broken character": 1}


# --- errors

ERRORS = {
    "an object": (
        b'{"error": {"message": "m", "type": "T", "param": "p", "code": 400}}',
        ErrorBody("m", "T", "p", 400),
    ),
    "a code in words": (b'{"error": {"message": "m", "code": "c"}}', ErrorBody("m")),
    "a code as text": (b'{"error": {"message": "m", "code": "503"}}', ErrorBody("m", code=503)),
    "a code that is no status": (b'{"error": {"message": "m", "code": 4000}}', ErrorBody("m")),
    "a code without end": (b'{"error": {"message": "m", "code": ' + b"1" * 5000 + b"}}", ErrorBody("m")),
    "a status": (b'{"error": {"message": "m", "status": 429}}', ErrorBody("m", code=429)),
    "an object beside choices": (b'{"error": {"message": "m"}, "choices": []}', ErrorBody("m")),
    "an empty object": (b'{"error": {}}', ErrorBody()),
    "an object in other words": (b'{"error": {"detail": "m", "type": [], "param": {}}}', ErrorBody("m")),
    "an object without words": (b'{"error": {"message": null, "x": 1}}', ErrorBody('{"message": null, "x": 1}')),
    "a string": (b'{"error":"Unauthorized"}', ErrorBody("Unauthorized")),
    "a string beside choices": (b'{"error":"m","choices":[]}', ErrorBody("m")),
    "a string beside a code": (b'{"error":"m","status_code":401}', ErrorBody("m", code=401)),
    "a string beside a message": (
        b'{"error":"Unauthorized","message":"no key","code":401}',
        ErrorBody("no key", code=401),
    ),
    "a list": (b'{"error":["a",{"b":1}]}', ErrorBody('["a", {"b": 1}]')),
    "a number": (b'{"error":503}', ErrorBody("503")),
    "fields at the top": (
        b'{"object":"error","message":"m","type":"T","param":null,"code":500}',
        ErrorBody("m", "T", "", 500),
    ),
    "nothing but the word": (b'{"object":"error"}', ErrorBody()),
    "a detail": (b'{"detail":"Not Found"}', ErrorBody("Not Found")),
    "a detail of pydantic's": (
        '{"detail":[{"loc":["body","n"],"msg":"é"}]}'.encode(),
        ErrorBody('[{"loc": ["body", "n"], "msg": "é"}]'),
    ),
    "details": (b'{"code":400,"details":"m"}', ErrorBody("m", code=400)),
    "a code alone": (b'{"code":500}', ErrorBody(code=500)),
}


@pytest.mark.parametrize(("payload", "body"), ERRORS.values(), ids=ERRORS.keys())
def test_knows_an_error(payload: bytes, body: ErrorBody) -> None:
    """Each shape in which an error has been sent is the same error."""
    assert decode_chunk(payload) == body


@pytest.mark.parametrize("error", [b"false", b'""', b"[]", b"{}", b"0"])
def test_an_error_that_says_no_beside_choices_is_none(error: bytes) -> None:
    """A relay that always fills in the field has no error to report."""
    assert isinstance(decode_chunk(b'{"choices":[],"error":' + error + b"}"), LooseChunk)


@pytest.mark.parametrize("payload", [b'{"detail":"%s"}', b'{"error":["%s"]}', b'{"error":{"details":{"a":"%s"}}}'])
@pytest.mark.parametrize("words", ["x" * 10_000, "é" * 10_000])
def test_words_in_an_unknown_shape_are_cut(payload: bytes, words: str) -> None:
    """An excerpt, never half a character."""
    error = decode_chunk(payload % words.encode())
    assert isinstance(error, ErrorBody)
    assert EXCERPT_BYTES - 8 <= len(error.message.encode()) <= EXCERPT_BYTES
    assert error.message.endswith("…")


def test_the_usual_message_may_be_long() -> None:
    """It says what to change, so more of it is kept."""
    error = decode_chunk(b'{"error":{"message":"' + b"x" * 8_000 + b'","type":"' + b"T" * 1000 + b'"}}')
    assert isinstance(error, ErrorBody)
    assert error.message == "x" * 8_000
    longer = decode_chunk(b'{"error":{"message":"' + b"x" * 1_000_000 + b'"}}')
    assert isinstance(longer, ErrorBody)
    assert len(longer.message.encode()) == 8_192
    assert len(error.type.encode()) <= EXCERPT_BYTES


def test_an_error_with_half_a_character() -> None:
    """It can be passed on."""
    assert decode_chunk(b'{"error":{"message":"a\\ud83d"}}') == ErrorBody("a\ufffd")


# --- anything at all

_KEYS = st.sampled_from(
    [
        *["id", "model", "choices", "usage", "error", "object", "detail", "message", "code", "type", "index", "delta", "content"],
        *["reasoning", "tool_calls", "function_call", "function", "name", "arguments", "logprobs", "token", "logprob", "bytes"],
        *["top_logprobs", "finish_reason", "stop_reason", "text", "thinking", "prompt_tokens", "prompt_tokens_details"],
    ]
)  # fmt: skip
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 1, 2**31, 10**40, "", "1", "stop", "thinking", "text", "error", "a\ud83d", "\ude00b", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)
_CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "index": _VALUES,
        "delta": _VALUES | st.dictionaries(_KEYS, _VALUES, max_size=3),
        "message": _VALUES,
        "logprobs": st.fixed_dictionaries({"content": st.lists(_VALUES, max_size=3)}) | _VALUES,
        "finish_reason": _VALUES,
        "stop_reason": _VALUES,
    },
)


_EVENT = st.fixed_dictionaries(
    {"choices": st.lists(_CHOICE, max_size=2) | _VALUES}, optional={"usage": _VALUES, "error": _VALUES}
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(_EVENT | _VALUES, max_size=4))
def test_any_json_gives_events_that_can_be_sent(payloads: list[object]) -> None:
    """No payload raises out of a reader, and what it says has only Unicode text and numbers that the API can hold."""
    body = b"".join(b"data: " + json.dumps(payload).encode() + b"\n\n" for payload in payloads)
    events = read(body, DONE, incremental=True)
    msgspec.json.encode(events)
    for event in events:
        for number in (getattr(event, "index", 0), getattr(event, "matched_stop", 0)):
            assert not isinstance(number, int) or -(2**31) <= number < 2**31


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=40))
def test_any_bytes_are_an_event_or_malformed(payload: bytes) -> None:
    """Nothing else is raised."""
    try:
        decode_chunk(payload)
    except MalformedChunkError as error:
        str(error).encode()
