"""Decoding one event: what is forgiven, what is not, and the three shapes of an error."""

from __future__ import annotations

import pytest

from deltawire_server.sansio.chunks import (
    Choice,
    Chunk,
    CompletionDetails,
    Delta,
    ErrorBody,
    Function,
    LogprobEntry,
    Logprobs,
    MalformedChunkError,
    PromptDetails,
    ToolEntry,
    TopLogprob,
    UsageFigures,
    decode_chunk,
)


def test_decodes_every_field_that_means_something() -> None:
    """A chunk with everything in it, and fields that nobody knows."""
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


FORGIVEN = {
    "no choices left": b'{"choices":[]}',
    "usage without choices": b'{"usage":{}}',
    "null choices beside usage": b'{"choices":null,"usage":{"completion_tokens":null}}',
    "an empty choice": b'{"choices":[{}]}',
    "nulls in a choice": b'{"choices":[{"delta":null,"logprobs":null,"finish_reason":null,"stop_reason":null}]}',
    "nulls in a delta": b'{"choices":[{"delta":{"content":null,"reasoning":null,"tool_calls":null}}]}',
    "nulls in an entry": b'{"choices":[{"delta":{"tool_calls":[{"index":null,"id":null,"function":null},{}]}}]}',
    "nulls in a function": b'{"choices":[{"delta":{"tool_calls":[{"function":{"name":null,"arguments":null}}]}}]}',
    "nulls in logprobs": b'{"choices":[{"logprobs":{"content":null}}]}',
    "a null error": b'{"choices":[],"error":null}',
    "spaces and line ends": b' {\n "choices" : [ ] } ',
    "an unknown field nested deeply": b'{"x":' + b"[" * 100 + b"]" * 100 + b',"choices":[]}',
}


@pytest.mark.parametrize("payload", FORGIVEN.values(), ids=FORGIVEN.keys())
def test_forgives(payload: bytes) -> None:
    """What may be left out, null or added is no error."""
    assert isinstance(decode_chunk(payload), Chunk)


MALFORMED = {
    "nothing": b"",
    "no JSON": b"<html>",
    "cut JSON": b'{"choices":[',
    "something after it": b'{"choices":[]} x',
    "NaN": b'{"choices":[{"logprobs":{"content":[{"token":"a","logprob":NaN}]}}]}',
    "not UTF-8": b'{"choices":[{"delta":{"content":"\xff"}}]}',
    "half a surrogate pair": b'{"choices":[{"delta":{"content":"\\ud800"}}]}',
    "a BOM": b'\xef\xbb\xbf{"choices":[]}',
    "an array": b"[]",
    "null": b"null",
    "a string": b'"data"',
    "neither chunk nor error": b'{"detail":"Not Found"}',
    "null choices": b'{"choices":null}',
    "choices of another type": b'{"choices":{}}',
    "a null entry": b'{"choices":[{"delta":{"tool_calls":[null]}}]}',
    "text of another type": b'{"choices":[{"delta":{"content":1}}]}',
    "arguments as an object": b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":{}}}]}}]}',
    "an index of another type": b'{"choices":[{"index":"0"}]}',
    "an index without end": b'{"choices":[{"index":' + b"1" * 5000 + b"}]}",
    "a byte that is none": b'{"choices":[{"logprobs":{"content":[{"token":"a","logprob":-1,"bytes":[256]}]}}]}',
    "a negative byte": b'{"choices":[{"logprobs":{"content":[{"token":"a","logprob":-1,"bytes":[-1]}]}}]}',
    "more tokens than there can be": b'{"choices":[],"usage":{"prompt_tokens":4294967296}}',
    "fewer tokens than none": b'{"choices":[],"usage":{"completion_tokens":-1}}',
    "a stop token that is none": b'{"choices":[{"stop_reason":9223372036854775808}]}',
    "an error of another type": b'{"error":[]}',
    "nested too deeply": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"choices":[]}',
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_does_not_take(payload: bytes) -> None:
    """What is no chunk is `MalformedChunkError`, and never another exception."""
    with pytest.raises(MalformedChunkError, match="an event is n"):
        decode_chunk(payload)


ERRORS = {
    "an object": (
        b'{"error": {"message": "m", "type": "T", "param": "p", "code": 400}}',
        ErrorBody("m", "T", "p", 400),
    ),
    "an object with another code": (b'{"error": {"message": "m", "code": "c"}}', ErrorBody("m", code="c")),
    "an object beside choices": (b'{"error": {"message": "m"}, "choices": []}', ErrorBody("m")),
    "a string": (b'{"error":"Unauthorized"}', ErrorBody("Unauthorized")),
    "fields at the top": (
        b'{"object":"error","message":"m","type":"T","param":null,"code":500}',
        ErrorBody("m", "T", None, 500),
    ),
}


@pytest.mark.parametrize(("payload", "body"), ERRORS.values(), ids=ERRORS.keys())
def test_knows_an_error(payload: bytes, body: ErrorBody) -> None:
    """Each shape in which an error has been sent is the same error."""
    error = decode_chunk(payload)
    assert isinstance(error, ErrorBody)
    assert (error.message, error.type, error.param, error.code) == (body.message, body.type, body.param, body.code)
