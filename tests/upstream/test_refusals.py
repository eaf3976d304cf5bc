"""What a provider's errors mean for the caller."""

from __future__ import annotations

import json

import pytest

from deltawire_server.errors import CallerError, Code, ProviderError, Reason
from deltawire_server.upstream.refusals import MAX_RETRY_SECONDS, RETRY_SECONDS, Refusal, error_of, field_of
from tests.support.recordings import TRANSCRIPTS

REJECTED = (Code.INVALID_ARGUMENT, Reason.UPSTREAM_REJECTED)

RECORDED = {
    "err-bad-json": (*REJECTED, ""),
    "err-content-type": (*REJECTED, ""),
    "err-image": (*REJECTED, ""),
    "err-max-tokens-0": (*REJECTED, "chat.sampling.max_tokens"),
    "err-missing-messages": (*REJECTED, "chat.messages"),
    "err-n0": (*REJECTED, ""),
    "err-n2-greedy": (*REJECTED, ""),
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
    error = error_of(Refusal(status, "words"), "p", callers_token=False)
    assert (type(error), error.reason, error.code) == (kind, reason, code)
    assert error.metadata["provider"] == "p"
    key = "upstream_code" if reason is Reason.UPSTREAM_ERROR else "http_status"
    assert error.metadata[key] == str(status)
    retriable = reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED)
    assert error.retry_after == (RETRY_SECONDS if retriable else None)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_of_the_callers_is_the_callers(status: int) -> None:
    """The caller can mend it; the operator's token could only be mended by the operator."""
    error = error_of(Refusal(status, "Unauthorized"), "p", callers_token=True)
    assert (type(error), error.reason, error.code) == (
        CallerError,
        Reason.UPSTREAM_UNAUTHENTICATED,
        Code.UNAUTHENTICATED,
    )
    assert "x-vllm-api-token" in error.message


@pytest.mark.parametrize(
    "refusal", [Refusal(404, "m", "NotFoundError", ""), Refusal(404, "m", "", "model"), Refusal(404, "Not Found")]
)
def test_a_404_that_is_not_about_the_model(refusal: Refusal) -> None:
    """Only vLLM's own words about the model make it the caller's affair: else the base URL is wrong."""
    assert error_of(refusal, "p", callers_token=False).reason is Reason.PROVIDER_MISCONFIGURED


def test_a_404_about_the_model_names_it() -> None:
    """By the name that the caller used."""
    error = error_of(Refusal(404, "m", "NotFoundError", "model"), "p", callers_token=False, model="asked")
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert error.metadata == {"provider": "p", "http_status": "404", "model": "asked"}


@pytest.mark.parametrize(
    ("said", "told"), [(7.0, 7.0), (0.0, 0.0), (1e30, MAX_RETRY_SECONDS), (float("inf"), MAX_RETRY_SECONDS)]
)
def test_the_providers_own_delay_comes_first(said: float, told: float) -> None:
    """Within reason."""
    assert error_of(Refusal(429, retry_after=said), "p", callers_token=False).retry_after == told


def test_an_error_without_words() -> None:
    """The status is said instead."""
    assert error_of(Refusal(429), "p", callers_token=False).message.endswith("HTTP 429")


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens",
        "exceeds max_model_len",
        "beyond the Context Window",
    ],
)
def test_context_told_by_its_words(said: str) -> None:
    """Versions differ in what they blame; the sentence is alike."""
    assert error_of(Refusal(400, said), "p", callers_token=False).reason is Reason.CONTEXT_LENGTH_EXCEEDED


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
