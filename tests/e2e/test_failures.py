"""The engine stops: during an answer, by SIGTERM and SIGKILL, with another one in its place, and for good.

These tests run last, and in this order.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import (
    AsyncClient,
    CallError,
    ErrorReason,
    ModelNotFoundError,
    Sampling,
    StopReason,
    UpstreamError,
    UpstreamIncompleteError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
    WatchBookmark,
    chat_request,
)
from deltawire.v1.chat_completion_pb2 import UsageProvenance
from deltawire.v1.model_registry_pb2 import HealthStatus, ModelState
from tests.e2e.support import (
    CALL_SECONDS,
    LORA_RANK,
    MODEL,
    SEA,
    alive,
    descendants,
    eventually,
    kinds,
    serving,
    write_adapter,
)
from tests.support.vllm_cpu import locate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltawire import Answer, AsyncModelWatch, ModelChange, StreamChatCompletionResponse
    from tests.e2e.support import Engine
    from tests.support.gateway_process import GatewayProcess
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e

NEXT = "smollm2-next"
"""The model name of the engine after its restart."""

SCOPED = f"vllm/{MODEL}"

TELLING_SECONDS = 90.0
"""The timeout of an expected change: three times the gateway's refresh interval."""


async def interrupted(
    client: AsyncClient, interrupt: Callable[[], None], model: str = MODEL
) -> tuple[list[StreamChatCompletionResponse], CallError]:
    """The events and the error of an answer that is interrupted."""
    endless = chat_request(SEA, model=model, sampling=Sampling(max_tokens=3500, ignore_eos=True))
    events: list[StreamChatCompletionResponse] = []
    async with client.chat.stream(endless) as stream:
        try:
            async for event in stream:
                events.append(event)
                if event.sequence == 10:
                    interrupt()
        except CallError as error:
            return events, error
    pytest.fail("the answer ended well")


def check_the_rest(
    events: list[StreamChatCompletionResponse],
    error: CallError,
    reason: ErrorReason.ValueType,
    stop: StopReason.ValueType,
) -> None:
    """Check a faulted stream: the text, one end of the choice, one Completed with usage, the status."""
    assert kinds(events) == ["started", "text_delta", "choice_finished", "completed"]
    completed = events[-1].completed
    text = "".join(event.text_delta.text for event in events)
    assert text
    assert completed.choices[0].message.text == text
    assert completed.choices[0].stop_reason == events[-2].choice_finished.stop_reason == stop
    assert completed.error.reason == reason
    assert completed.error.code == grpc.StatusCode.ABORTED.value[0]
    assert completed.usage.provenance == UsageProvenance.USAGE_PROVENANCE_LOWER_BOUND
    assert completed.usage.prompt_tokens > 0
    assert completed.usage.completion_tokens >= 8
    assert error.code is grpc.StatusCode.ABORTED
    assert error.reason == ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    answer: Answer | None = error.answer
    assert answer is not None
    assert answer.text == text


async def next_change(watch: AsyncModelWatch, change: str, model_id: str) -> ModelChange:
    """The next change of a watch, which must be this one."""
    async with asyncio.timeout(TELLING_SECONDS):
        while isinstance(event := await anext(watch), WatchBookmark):
            pass
    assert (event.change, event.model.id) == (change, model_id)
    return event


async def test_an_engine_that_gets_sigterm(client: AsyncClient, vllm: VllmServer) -> None:
    """At SIGTERM vLLM stops its engine; the answer ends with a fault, with the text and the usage.

    Mostly it says so in an error event. At times it says nothing any more, yet keeps the connection: only the gateway's
    limit on silence ends that. A watcher gets the change that the model cannot be called now.
    """
    async with client.models.watch() as watch:
        assert (await next_change(watch, "ADDED", SCOPED)).model.state == ModelState.MODEL_STATE_SERVING
        events, error = await interrupted(client, lambda: os.kill(vllm.pid, signal.SIGTERM))
        assert (await next_change(watch, "MODIFIED", SCOPED)).model.state == ModelState.MODEL_STATE_UNAVAILABLE
    if isinstance(error, UpstreamTimeoutError):
        reason = ErrorReason.ERROR_REASON_UPSTREAM_TIMEOUT
    else:
        assert isinstance(error, UpstreamError)
        assert error.metadata["upstream_code"] == "500"
        reason = ErrorReason.ERROR_REASON_UPSTREAM_ERROR
    check_the_rest(events, error, reason, StopReason.STOP_REASON_ERROR)


async def test_a_restarted_engine_with_another_model(client: AsyncClient, vllm: VllmServer, engine: Engine) -> None:
    """After a restart of vLLM, the gateway lists the new model and removes the old one."""
    vllm.stop()
    vllm.model_name = NEXT
    vllm.arguments = ("--enable-lora", "--max-lora-rank", str(LORA_RANK))
    vllm.variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    async with client.models.watch() as watch:
        assert (await next_change(watch, "ADDED", SCOPED)).model.state == ModelState.MODEL_STATE_UNAVAILABLE
        vllm.start()
        vllm.wait_healthy()
        await next_change(watch, "REMOVED", SCOPED)
        assert (await next_change(watch, "ADDED", f"vllm/{NEXT}")).model.state == ModelState.MODEL_STATE_SERVING
    answer = await client.chat.create(SEA, model=NEXT, max_tokens=4, ignore_eos=True)
    assert answer.usage.completion_tokens == 4
    with pytest.raises(ModelNotFoundError):
        await client.chat.create(SEA, model=MODEL)
    await engine.becomes_idle()


async def test_a_loaded_and_unloaded_adapter(client: AsyncClient, engine: Engine, tmp_path: Path) -> None:
    """A LoRA adapter is listed with its base model when it is loaded, can be called, and is removed when it is unloaded."""
    write_adapter(tmp_path / "adapter", locate().model)
    async with client.models.watch() as watch:
        await next_change(watch, "ADDED", f"vllm/{NEXT}")
        engine.adapter("load", lora_name="sea", lora_path=str(tmp_path / "adapter"))
        await client.models.refresh()
        adapter = (await next_change(watch, "ADDED", "vllm/sea")).model
        assert (adapter.base_model, adapter.engine_root) == (NEXT, str(tmp_path / "adapter"))
        answer = await client.chat.create(SEA, model="sea", max_tokens=4, ignore_eos=True)
        assert (answer.started.model, answer.usage.completion_tokens) == ("vllm/sea", 4)
        engine.adapter("unload", lora_name="sea")
        # One call is enough to notice it.
        with pytest.raises(ModelNotFoundError):
            await client.chat.create(SEA, model="sea")
        await next_change(watch, "REMOVED", "vllm/sea")


async def test_an_engine_that_is_killed(client: AsyncClient, vllm: VllmServer) -> None:
    """The connection breaks; an answer without a finish reason is not complete.

    That call is enough: watchers get the change at once, and not at the provider's next turn.
    """
    async with client.models.watch() as watch:
        await next_change(watch, "ADDED", f"vllm/{NEXT}")
        events, error = await interrupted(client, vllm.kill_group, NEXT)
        assert (await next_change(watch, "MODIFIED", f"vllm/{NEXT}")).model.state == ModelState.MODEL_STATE_UNAVAILABLE
    assert isinstance(error, UpstreamIncompleteError)
    check_the_rest(
        events, error, ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE, StopReason.STOP_REASON_UPSTREAM_INCOMPLETE
    )


async def test_an_unreachable_engine(client: AsyncClient, gateway: GatewayProcess, vllm: VllmServer) -> None:
    """The call fails with UNAVAILABLE and a retry delay, the health check fails, and the gateway keeps running."""
    vllm.stop()
    for name in (NEXT, f"vllm/{NEXT}"):
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.chat.create(SEA, model=name, max_tokens=4)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.retry_after
        assert caught.value.answer is None
    health = await client.providers.health("vllm")
    assert health.status == HealthStatus.HEALTH_STATUS_ERROR
    assert health.message
    assert gateway.running


async def test_models_of_an_unreachable_engine_are_unavailable(client: AsyncClient) -> None:
    """The listing names the unreachable provider, and its models are UNAVAILABLE."""
    listing = client.models.list()
    states = {model.id: model.state async for model in listing}
    assert states == {f"vllm/{NEXT}": ModelState.MODEL_STATE_UNAVAILABLE}
    assert listing.unreachable_provider_ids == ["vllm"]
    [provider] = await client.models.refresh()
    assert (provider.provider_id, provider.model_count, bool(provider.error)) == ("vllm", 0, True)


async def test_the_gateway_ends_at_sigterm(gateway: GatewayProcess) -> None:
    """The gateway exits with status 0 and closes its port."""
    assert gateway.stop() == 0
    async with AsyncClient(gateway.address, timeout=CALL_SECONDS) as client:
        with pytest.raises(CallError) as caught:
            await client.chat.create(SEA, model=MODEL)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    await eventually(lambda: not gateway.running, "the gateway lives on")


async def test_run_sets_up_its_own_vllm(vllm: VllmServer) -> None:
    """Without VLLM_URL, `make run` starts a vLLM and prints an answer and a call; a signal ends all its processes."""
    assert not vllm.running
    async with serving("--port", "0", variables={"VLLM_URL": "", "VLLM_API_TOKEN": ""}) as process:
        started = descendants(process.pid)
        assert any("vllm.entrypoints" in command for command in started.values())
        assert any("deltawire-server" in command for command in started.values())
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not alive(started)
