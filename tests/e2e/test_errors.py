"""Refused and rejected requests, with status, reason and field."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import (
    AsyncClient,
    CallError,
    ContextLengthExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    ProviderMisconfiguredError,
    ResponseFormat,
    UpstreamRejectedError,
    UpstreamUnauthenticatedError,
    chat_request,
)
from deltawire_server import settings
from deltawire_server.app import Gateway
from tests.e2e.support import CALL_SECONDS, MODEL, SEA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire import ChatRequest
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e


@pytest.fixture
async def keyless(vllm: VllmServer, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """A client of a gateway in this process with a wrong key for vLLM."""
    flags = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{tmp_path / 'registry.db'}"]
    variables = {"VLLM_URL": f"{vllm.base_url}/v1/", "VLLM_API_TOKEN": "not-the-key"}
    async with (
        Gateway(settings.parse(flags, variables).settings) as gateway,
        AsyncClient(gateway.addresses[0], timeout=CALL_SECONDS) as client,
    ):
        yield client


async def refusal(client: AsyncClient, request: ChatRequest) -> CallError:
    """The error of this request, which must be the same for a stream and a unary call, before any event."""
    with pytest.raises(CallError) as whole:
        await client.chat.create(request)
    async with client.chat.stream(request) as stream:
        with pytest.raises(CallError) as streamed:
            await anext(stream)
    one, other = whole.value, streamed.value
    assert type(one) is type(other)
    assert (one.code, one.reason, one.message, one.violations) == (
        other.code,
        other.reason,
        other.message,
        other.violations,
    )
    assert one.status is not None
    assert ("deltawire-reason", one.reason) in one.trailing_metadata
    assert not other.initial_metadata
    assert other.answer is None
    return one


async def test_an_unknown_model_is_not_found(client: AsyncClient) -> None:
    """The message lists the models."""
    error = await refusal(client, chat_request(SEA, model="gpt-5"))
    assert isinstance(error, ModelNotFoundError)
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert "vllm/smollm2" in error.message


async def test_an_invalid_request_lists_every_field(client: AsyncClient) -> None:
    """The gateway refuses the request before it calls vLLM."""
    error = await refusal(client, chat_request([], model=MODEL, temperature=-1.0, tool_choice="required"))
    assert isinstance(error, InvalidRequestError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    fields = {violation.field for violation in error.violations}
    assert {"chat.messages", "chat.sampling.temperature", "chat.tool_choice.mode"} <= fields


@pytest.mark.parametrize(
    "form",
    [ResponseFormat(regex="(unclosed"), ResponseFormat(grammar="root ::= missing")],
    ids=["regex", "grammar"],
)
async def test_an_invalid_response_format_is_rejected(client: AsyncClient, form: ResponseFormat) -> None:
    """VLLM responds with status 200 and an error in the stream; the caller gets a normal error."""
    error = await refusal(client, chat_request(SEA, model=MODEL, response_format=form))
    assert isinstance(error, UpstreamRejectedError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message


async def test_a_prompt_that_does_not_fit_is_too_long(client: AsyncClient) -> None:
    """The error names the field to shorten."""
    error = await refusal(client, chat_request("word " * 5000, model=MODEL))
    assert isinstance(error, ContextLengthExceededError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["chat.messages"]


async def test_an_answer_that_does_not_fit_is_too_long(client: AsyncClient) -> None:
    """`max_tokens` above the context size gets the same error."""
    error = await refusal(client, chat_request(SEA, model=MODEL, max_tokens=100_000))
    assert isinstance(error, ContextLengthExceededError)
    assert [violation.field for violation in error.violations] == ["chat.sampling.max_tokens"]


async def test_more_stop_texts_than_vllm_takes(client: AsyncClient) -> None:
    """The error names the field of the API."""
    error = await refusal(client, chat_request(SEA, model=MODEL, stop=["1", "2", "3", "4", "5"]))
    assert isinstance(error, UpstreamRejectedError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["chat.sampling.stop"]


async def test_several_greedy_answers_are_refused(client: AsyncClient) -> None:
    """The error has the message of vLLM and the field of the request."""
    error = await refusal(client, chat_request(SEA, model=MODEL, choice_count=2, temperature=0.0))
    assert isinstance(error, UpstreamRejectedError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["chat.choice_count"]


async def test_a_wrong_token_of_the_operator(keyless: AsyncClient) -> None:
    """The error is PROVIDER_MISCONFIGURED, which a retry does not repair."""
    error = await refusal(keyless, chat_request(SEA, model=MODEL))
    assert isinstance(error, ProviderMisconfiguredError)
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "vllm" in error.message
    assert "not-the-key" not in error.message


async def test_a_callers_token_overrides_the_operators(client: AsyncClient, vllm: VllmServer) -> None:
    """A caller's wrong token fails even if the operator's is valid; a valid one works."""
    with pytest.raises(UpstreamUnauthenticatedError) as caught:
        await client.chat.create(SEA, model=MODEL, max_tokens=1, vllm_token="wrong-key")
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert "wrong-key" not in caught.value.message
    answer = await client.chat.create(SEA, model=MODEL, max_tokens=1, vllm_token=vllm.api_key)
    assert answer.usage.completion_tokens == 1


async def test_failed_calls_do_not_disturb_others(client: AsyncClient) -> None:
    """An answer continues while other requests fail."""

    async def bad() -> None:
        with pytest.raises(CallError):
            await client.chat.create(SEA, model=MODEL, response_format=ResponseFormat(regex="(unclosed"))

    good = client.chat.create(SEA, model=MODEL, max_tokens=24, ignore_eos=True)
    answer, *_ = await asyncio.gather(good, bad(), bad(), bad())
    assert answer.usage.completion_tokens == 24
