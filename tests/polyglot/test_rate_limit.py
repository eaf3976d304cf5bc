"""A real Envoy with the shipped rate limit in front of two gateways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from deltawire_server.fake_vllm import FakeVllm
from tests.polyglot.calls import COMPLETIONS, find_completions, gateway
from tests.polyglot.programs import RATE_LIMIT_CONFIG, run, tool
from tests.polyglot.proxy import rate_limit
from tests.support.gateway import ask

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot

CALLS = 6
"""What a caller may call per minute here."""


async def test_the_shipped_configuration_is_valid(tmp_path: Path) -> None:
    """As it is in the repository, by Envoy's own check."""
    checked = await run(tool("envoy"), "--mode", "validate", "-c", str(RATE_LIMIT_CONFIG), home=tmp_path)
    assert checked.status == 0, checked.err


async def test_each_caller_has_its_limit_over_all_gateways(vllm: FakeVllm, tmp_path: Path) -> None:
    """Further calls get RESOURCE_EXHAUSTED, which no client retries at once; another caller and other methods are served."""
    async with (
        FakeVllm() as other,
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        rate_limit(tmp_path, first, second, calls=CALLS) as target,
        aio.insecure_channel(target, options=(("grpc.enable_retries", 0),)) as channel,
    ):
        chat = chat_completion_pb2_grpc.ChatCompletionStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

        async def call(key: str) -> grpc.StatusCode:
            metadata = (("authorization", f"Bearer {key}"),)
            try:
                await chat.CreateChatCompletion(chat_pb.CreateChatCompletionRequest(chat=ask()), metadata=metadata)
            except aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert [await call("noisy") for _ in range(CALLS + 2)] == [
            *[grpc.StatusCode.OK] * CALLS,
            *[grpc.StatusCode.RESOURCE_EXHAUSTED] * 2,
        ]
        assert await call("quiet") is grpc.StatusCode.OK
        count = chat_pb.CountTokensRequest(chat=ask())
        await chat.CountTokens(count, metadata=(("authorization", "Bearer noisy"),))
        assert len(vllm.chats) + len(other.chats) == CALLS + 1


async def test_calls_about_a_completion_reach_its_gateway(vllm: FakeVllm, tmp_path: Path) -> None:
    """They are not counted, and go where the call went that began it, which was."""
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(vllm, tmp_path) as (_, second),
        rate_limit(tmp_path, first, second, calls=2 * COMPLETIONS) as target,
    ):
        await find_completions(target)
