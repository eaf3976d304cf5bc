"""What a provider's errors mean for the caller."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deltawire_server.errors import CallerError, Code, ProviderError, Reason
from deltawire_server.upstream.failures import (
    MAX_EXCERPT_BYTES,
    MAX_RETRY_SECONDS,
    RETRY_SECONDS,
    UpstreamError,
    failure_of,
    field_of,
    is_error,
    read_error,
)
from tests.support.recordings import TRANSCRIPTS

REJECTED = (Code.INVALID_ARGUMENT, Reason.UPSTREAM_REJECTED)

RECORDED = {
    "err-bad-json": (*REJECTED, ""),
    "err-content-type": (*REJECTED, ""),
    "err-image": (*REJECTED, "chat.messages"),
    "err-max-tokens-0": (*REJECTED, "chat.sampling.max_tokens"),
    "err-missing-messages": (*REJECTED, "chat.messages"),
    "err-n0": (*REJECTED, "chat.choice_count"),
    "err-n2-greedy": (*REJECTED, "chat.choice_count"),
    "err-named-missing": (*REJECTED, "chat.tool_choice"),
    "err-nonstream-bad-regex": (*REJECTED, ""),
    "err-not-found": (Code.FAILED_PRECONDITION, Reason.PROVIDER_MISCONFIGURED, ""),
    "err-prompt-too-long": (Code.INVALID_ARGUMENT, Reason.CONTEXT_LENGTH_EXCEEDED, "chat.messages"),
    "err-required-no-tools": (*REJECTED, "chat.tool_choice"),
    "err-temperature": (*REJECTED, "chat.sampling.temperature"),
    "err-temperature-type": (*REJECTED, "chat.sampling.temperature"),
    "err-tool-schema-type": (*REJECTED, "chat.tools[0]"),
    "err-unknown-model": (Code.NOT_FOUND, Reason.MODEL_NOT_FOUND, ""),
    "auth-chat-none": (Code.FAILED_PRECONDITION, Reason.PROVIDER_MISCONFIGURED, ""),
    "auth-models-none": (Code.FAILED_PRECONDITION, Reason.PROVIDER_MISCONFIGURED, ""),
    "fail-enginecore-sigkill-next-request": (Code.INTERNAL, Reason.UPSTREAM_ERROR, ""),
}
"""Each recorded refusal: code, reason and field."""


def recorded_refusals() -> list[str]:
    """The recordings of errors that came with an HTTP status."""
    paths = [*TRANSCRIPTS.glob("err-*.body"), *TRANSCRIPTS.glob("auth-*.body")]
    return [path.stem for path in paths if json.loads(path.with_suffix(".meta.json").read_bytes())["status"] != 200]


def test_every_recorded_refusal_has_its_row() -> None:
    """No recording is left out of the table that `test_vllm` goes through over HTTP."""
    assert set(recorded_refusals()) <= RECORDED.keys()


@pytest.mark.parametrize(
    ("status", "kind", "reason", "code"),
    [
        (0, ProviderError, Reason.UPSTREAM_ERROR, Code.INTERNAL),
        (204, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (307, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (400, CallerError, *reversed(REJECTED)),
        (401, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (403, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (404, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (405, ProviderError, Reason.PROVIDER_MISCONFIGURED, Code.FAILED_PRECONDITION),
        (408, ProviderError, Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE),
        (413, CallerError, *reversed(REJECTED)),
        (418, CallerError, *reversed(REJECTED)),
        (422, CallerError, *reversed(REJECTED)),
        (429, ProviderError, Reason.UPSTREAM_OVERLOADED, Code.RESOURCE_EXHAUSTED),
        (500, ProviderError, Reason.UPSTREAM_ERROR, Code.INTERNAL),
        (501, ProviderError, Reason.UPSTREAM_ERROR, Code.INTERNAL),
        (502, ProviderError, Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE),
        (503, ProviderError, Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE),
        (504, ProviderError, Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE),
    ],
)
def test_each_status(status: int, kind: type, reason: Reason, code: Code) -> None:
    """Status by status: whose fault, which reason, which code; only what passes by itself says when to try again."""
    error = failure_of(UpstreamError(status, "words"), "p", callers_token=False)
    assert (type(error), error.reason, error.code) == (kind, reason, code)
    assert error.metadata["provider"] == "p"
    key = "upstream_code" if reason is Reason.UPSTREAM_ERROR else "http_status"
    assert error.metadata[key] == str(status)
    retriable = reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED)
    assert error.retry_after == (RETRY_SECONDS if retriable else None)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_of_the_callers_is_the_callers(status: int) -> None:
    """The caller can mend it; the operator's token could only be mended by the operator."""
    error = failure_of(UpstreamError(status, "Unauthorized"), "p", callers_token=True)
    assert (type(error), error.reason, error.code) == (
        CallerError,
        Reason.UPSTREAM_UNAUTHENTICATED,
        Code.UNAUTHENTICATED,
    )
    assert "x-vllm-api-token" in error.message


@pytest.mark.parametrize(
    "error",
    [
        UpstreamError(404, "m", "NotFoundError", ""),
        UpstreamError(404, "m", "", "model"),
        UpstreamError(404, "Not Found"),
    ],
)
def test_a_404_that_is_not_about_the_model(error: UpstreamError) -> None:
    """Only vLLM's own words about the model make it the caller's affair: else the base URL is wrong."""
    assert failure_of(error, "p", callers_token=False).reason is Reason.PROVIDER_MISCONFIGURED


def test_a_404_about_the_model_names_it() -> None:
    """By the name that the caller used."""
    error = failure_of(UpstreamError(404, "m", "NotFoundError", "model"), "p", callers_token=False, model="asked")
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert error.metadata == {"provider": "p", "http_status": "404", "model": "asked"}


@pytest.mark.parametrize(
    ("said", "told"), [(7.0, 7.0), (0.0, 0.0), (1e30, MAX_RETRY_SECONDS), (float("inf"), MAX_RETRY_SECONDS)]
)
def test_the_providers_own_delay_comes_first(said: float, told: float) -> None:
    """Within reason."""
    assert failure_of(UpstreamError(429, retry_after=said), "p", callers_token=False).retry_after == told


def test_an_error_without_words() -> None:
    """The status is said instead."""
    assert failure_of(UpstreamError(429), "p", callers_token=False).message.endswith("HTTP 429")


TOO_LONG = (
    "This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input tokens",
    "this model's maximum context length is 4096 tokens, but the prompt contains 5000 input tokens",
    "The model's context length is 4096 tokens",
    "You passed 4097 input tokens and requested 1 output tokens. However, the model's context length is only 4096 tokens",
    "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 4096 tokens",
    "max_tokens is too large: 5000",
    "max_tokens=8192 cannot be greater than max_model_len=max_total_tokens=4096. Please request fewer output tokens.",
    "max_completion_tokens=131072 cannot be greater than max_model_len=128000",
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
    "The prompt (total length 5000) is too long to fit into the model (context length 4096).",
    "Input prompt (5000 tokens) is too long and exceeds limit of 4096",
    "litellm.ContextWindowExceededError: ContextWindowExceededError: Hosted_vllmException - too long",
    "litellm.BadRequestError: OpenAIException - max_tokens=16384 cannot be greater than max_model_len=8192",
)
"""How vLLM's versions, and LiteLLM in front of one, begin the message."""


@pytest.mark.parametrize("said", TOO_LONG)
def test_a_context_that_is_too_long(said: str) -> None:
    """Recognized by the beginning of the message, where vLLM names no field."""
    assert failure_of(UpstreamError(400, said), "p").reason is Reason.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize(
    "error",
    [
        UpstreamError(400, "m", param="input_tokens"),
        UpstreamError(400, "m", type="context_length_exceeded"),
    ],
)
def test_a_context_that_is_too_long_by_the_fields_of_the_error(error: UpstreamError) -> None:
    """Whatever the message is."""
    assert failure_of(error, "p").reason is Reason.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize("said", TOO_LONG)
@pytest.mark.parametrize(
    "quoting",
    [
        "1 validation error:\n  {{'type': 'string_type', 'loc': 'body.messages.0.content', 'input': \"{}\"}}",
        'Grammar error: at 1(8): invalid regex "{}"',
        "Unsupported value: {}",
    ],
)
def test_a_request_that_is_quoted_decides_nothing(said: str, quoting: str) -> None:
    """A message that quotes a prompt about context lengths is an error of another kind."""
    for text in (said, "max_model_len", "maximum context length", "Context Window"):
        error = UpstreamError(400, quoting.format(text), "Bad Request")
        assert failure_of(error, "p").reason is Reason.UPSTREAM_REJECTED


FORMAT_ERRORS = (
    'Grammar error: at 1(8): invalid regex "(unclosed" (in regex)',
    "litellm.BadRequestError: Hosted_vllmException - Grammar error: lexer error",
    "Invalid grammar specification.",
    "Failed to transform regex into a grammar: Regex parsing error at position 9",
    "Failed to convert the grammar from Lark to EBNF.",
    "Error parsing regex: unclosed group",
    "Regex uses unsupported feature for structured outputs: lookahead",
    "The JSON schema is nested too deeply: objects and arrays may nest at most 64 levels",
    "The provided JSON schema contains features not supported by xgrammar.",
)
"""How vLLM's backends for structured outputs begin the message."""


@pytest.mark.parametrize("text", FORMAT_ERRORS)
def test_an_invalid_response_format_is_named(text: str) -> None:
    """The message begins with the request's field; the violation has vLLM's own message."""
    error = failure_of(UpstreamError(400, text), "p", format_field="chat.response_format.regex")
    assert (error.reason, error.message) == (Reason.UPSTREAM_REJECTED, f"chat.response_format.regex: {text}")
    assert [(each.field, each.description) for each in error.violations] == [("chat.response_format.regex", text)]
    assert error.metadata["field"] == "chat.response_format.regex"
    without = failure_of(UpstreamError(400, text), "p")
    assert (without.message, without.violations) == (text, ())


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("n must be 1 when using greedy sampling, got 2.", "chat.choice_count"),
        ("litellm.BadRequestError: OpenAIException - n must be at least 1, got 0.", "chat.choice_count"),
        ("min_tokens must be less than or equal to max_tokens=1, got 2.", "chat.sampling.min_tokens"),
        ("bad_words cannot contain an empty string.", "chat.sampling.bad_words"),
        ("smollm2 is not a multimodal model", "chat.messages"),
        ("Found unexpected chat template kwargs from request: {'tokenize'}", "chat.chat_template_kwargs"),
        ("extra_args must be small", ""),
        ("the template says: n must be 1", ""),
    ],
)
def test_an_error_without_a_field_that_begins_with_one(text: str, field: str) -> None:
    """The message and the violation name the field of this API, not only vLLM's."""
    error = failure_of(UpstreamError(400, text), "p")
    assert error.message == (f"{field}: {text}" if field else text)
    assert [each.field for each in error.violations] == ([field] if field else [])


def test_an_image_too_many() -> None:
    """VLLM names the kind of input instead of a field."""
    error = failure_of(UpstreamError(400, "At most 1 image(s) may be provided in one prompt.", param="image"), "p")
    assert [each.field for each in error.violations] == ["chat.messages"]


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (UpstreamError(400, "m", param="structured_outputs"), "chat.response_format.regex"),
        (UpstreamError(400, "Grammar error: m", param="tools"), "chat.tools"),
        (UpstreamError(400, "too many: Grammar error: m"), ""),
    ],
)
def test_the_field_of_the_error_has_precedence(error: UpstreamError, field: str) -> None:
    """The message matters only if `param` is empty, and only its beginning."""
    rejection = failure_of(error, "p", format_field="chat.response_format.regex")
    assert rejection.metadata.get("field", "") == field


def test_words_about_the_model_decide_nothing() -> None:
    """Only `type` and `param` together, in a 404, make it the caller's wrong model."""
    said = "The model `x` does not exist. NotFoundError"
    for error in (UpstreamError(400, said, "NotFoundError", "model"), UpstreamError(404, said, "BadRequestError")):
        assert failure_of(error, "p").reason is not Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":{"message":"m","type":"t","param":"p","code":404}}', UpstreamError(404, "m", "t", "p")),
        (b'{"error":{"message":"m","code":"404"}}', UpstreamError(404, "m")),
        (
            b'{"error":{"message":"m","type":"t","code":"context_length_exceeded"}}',
            UpstreamError(0, "m", "context_length_exceeded"),
        ),
        (b'{"error":"m"}', UpstreamError(0, "m")),
        (b'{"error":"m","code":503}', UpstreamError(503, "m")),
        (b'{"object":"error","message":"m\\nn","type":"t","code":400}', UpstreamError(400, "m\nn", "t")),
        (b'{"message":"m\\nn"}', UpstreamError(0, "m n")),
        (b'{"detail":"Not Found"}', UpstreamError(0, "Not Found")),
        (b'{"detail":{"why":"m"}}', UpstreamError(0, '{"why":"m"}')),
        (
            b'{"detail":[{"loc":["body","stop",3],"msg":"too many"},{"msg":"n"},{"why":1}]}',
            UpstreamError(0, 'body.stop.3: too many; n; {"why":1}', param="body.stop.3"),
        ),
        (b'{"detail":["m"]}', UpstreamError(0, '["m"]')),
        (b'{"code":400,"details":"m"}', UpstreamError(400, "m")),
        (b'{"code":400,"reason":"m"}', UpstreamError(400, '{"code":400,"reason":"m"}')),
        (b'{"error":{"message":5}}', UpstreamError(0, "5")),
        (b'{"error":{"why":"m"}}', UpstreamError(0, '{"why":"m"}')),
        (b'{"error":null}', UpstreamError(0, '{"error":null}')),
        (b'["m"]', UpstreamError(0, '["m"]')),
        (b'"m"', UpstreamError(0, "m")),
        (b"m\r\n\x00n", UpstreamError(0, "m n")),
        (
            b"<html><head><TITLE>\n502 Bad &amp; Gateway\n</TITLE></head>",
            UpstreamError(0, "an HTML page: 502 Bad & Gateway"),
        ),
        (b"<!DOCTYPE html><p>no", UpstreamError(0, "an HTML page")),
        (b"\xff\xfe", UpstreamError(0, "\ufffd\ufffd")),
        (b"{}", UpstreamError(0)),
        (b"null", UpstreamError(0)),
        (b"", UpstreamError(0)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_shapes_of_errors(body: bytes, error: UpstreamError) -> None:
    """The words of each shape are found; the status of an event is its code."""
    assert read_error(body) == error
    assert read_error(body, 418, "7") == replace(error, status=418, retry_after=7.0)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"error":' * 100_000,
        b"x" * 100_000,
        "é".encode() * 100_000,
        b"\x1b[2J" * 100_000,
        b'{"detail":"' + b"m" * 100_000 + b'"}',
        b'{"message":"' + b"m" * 100_000 + b'"}',
        b'{"why":"' + b"m" * 100_000 + b'"}',
        b"<html><title>" + b"m" * 100_000,
    ],
    ids=lambda value: str(value)[:20],
)
def test_words_of_unknown_shapes_are_an_excerpt(body: bytes) -> None:
    """Of at most 512 bytes, without control characters."""
    said = read_error(body, 400).message
    assert 0 < len(said.encode()) <= MAX_EXCERPT_BYTES
    assert said.isprintable()


def test_control_characters_are_replaced_in_vllms_own_messages() -> None:
    """Its line breaks stay."""
    assert read_error(b'{"error":{"message":"a\\nb\\tc\\u001b[2Jd"}}').message == "a\nb\tc\ufffd[2Jd"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"error":{"message":"m"}}', True),
        (b'{"error":"m","choices":[]}', True),
        (b'{"object":"error","message":"m"}', True),
        (b'{"detail":"m"}', True),
        (b'{"code":400,"details":"m"}', True),
        (b'{"choices":[],"message":"m"}', False),
        (b'{"error":null,"choices":[]}', False),
        (b'{"usage":{}}', False),
        (b"[]", False),
        (b"{", False),
    ],
)
def test_which_events_are_errors(payload: bytes, expected: bool) -> None:
    """Those with words of an error, unless they are chunks."""
    assert is_error(payload) is expected


def test_after_the_start_every_error_is_aborted() -> None:
    """Start again from the top; with the engine's code, its words, and what the caller of the function adds."""
    error = failure_of(UpstreamError(400, "m"), "p", begun=True, metadata={"completion_id": "c"})
    assert (error.reason, error.code, error.retry_after) == (Reason.UPSTREAM_ERROR, Code.ABORTED, None)
    assert error.metadata == {"provider": "p", "upstream_code": "400", "completion_id": "c"}
    assert error.message.endswith(": m")
    assert "upstream_code" not in failure_of(UpstreamError(0), "p", begun=True).metadata


@pytest.mark.parametrize(
    ("param", "field"),
    [
        ("", ""),
        ("body", ""),
        ("no_such", ""),
        ("stop", "chat.sampling.stop"),
        ("body.stop", "chat.sampling.stop"),
        ("stop[1]", "chat.sampling.stop[1]"),
        ("body.messages.0.content", "chat.messages[0]"),
        ("messages[12].content", "chat.messages[12]"),
        ("input_tokens", "chat.messages"),
        ("n", "chat.choice_count"),
        ("top_logprobs", "chat.logprobs.top_k"),
        ("response_format.type", "chat.response_format"),
        ("structured_outputs", "chat.response_format"),
        ("max_completion_tokens", "chat.sampling.max_tokens"),
        ("logit_bias.5", "chat.sampling.logit_bias[5]"),
    ],
)
def test_fields(param: str, field: str) -> None:
    """Its names, in each of their forms, are this API's paths; a name that is none of them is none."""
    assert field_of(param) == field
