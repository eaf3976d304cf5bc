"""What is left when the engine goes: ended in the middle of an answer, another in its place, killed, gone.

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
"""The name under which the engine serves once it has been restarted."""

SCOPED = f"vllm/{MODEL}"

TELLING_SECONDS = 90.0
"""Until a watch must have told what happened to the engine: three times the gateway's refresh interval."""


async def interrupted(
    client: AsyncClient, interrupt: Callable[[], None], model: str = MODEL
) -> tuple[list[StreamChatCompletionResponse], CallError]:
    """The events and the error of an answer in whose middle something happens."""
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
    """A faulted stream keeps all its promises: the text, one end of the choice, one Completed with usage, the status."""
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


async def told(watch: AsyncModelWatch, change: str, model_id: str) -> ModelChange:
    """The next event of a watch that is no bookmark, which must be this one."""
    async with asyncio.timeout(TELLING_SECONDS):
        while isinstance(event := await anext(watch), WatchBookmark):
            pass
    assert (event.change, event.model.id) == (change, model_id)
    return event


async def test_an_engine_that_is_ended_politely(client: AsyncClient, vllm: VllmServer) -> None:
    """At SIGTERM vLLM ends its engine, and with it the answer: never well, and never without the text and its cost.

    Mostly it says so in an error event. At times it says nothing any more, yet keeps the connection: only the gateway's
    limit on silence ends that. Whoever watches is told that the model cannot be called now.
    """
    async with client.models.watch() as watch:
        assert (await told(watch, "ADDED", SCOPED)).model.state == ModelState.MODEL_STATE_SERVING
        events, error = await interrupted(client, lambda: os.kill(vllm.pid, signal.SIGTERM))
        assert (await told(watch, "MODIFIED", SCOPED)).model.state == ModelState.MODEL_STATE_UNAVAILABLE
    if isinstance(error, UpstreamTimeoutError):
        reason = ErrorReason.ERROR_REASON_UPSTREAM_TIMEOUT
    else:
        assert isinstance(error, UpstreamError)
        assert error.metadata["upstream_code"] == "500"
        reason = ErrorReason.ERROR_REASON_UPSTREAM_ERROR
    check_the_rest(events, error, reason, StopReason.STOP_REASON_ERROR)


async def test_another_engine_in_its_place(client: AsyncClient, vllm: VllmServer, engine: Engine) -> None:
    """The gateway needs no restart when its vLLM had one; what that serves now is told, and what it served is gone."""
    vllm.stop()
    vllm.model_name = NEXT
    vllm.arguments = ("--enable-lora", "--max-lora-rank", str(LORA_RANK))
    vllm.variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    async with client.models.watch() as watch:
        assert (await told(watch, "ADDED", SCOPED)).model.state == ModelState.MODEL_STATE_UNAVAILABLE
        vllm.start()
        vllm.wait_healthy()
        await told(watch, "REMOVED", SCOPED)
        assert (await told(watch, "ADDED", f"vllm/{NEXT}")).model.state == ModelState.MODEL_STATE_SERVING
    answer = await client.chat.create(SEA, model=NEXT, max_tokens=4, ignore_eos=True)
    assert answer.usage.completion_tokens == 4
    with pytest.raises(ModelNotFoundError):
        await client.chat.create(SEA, model=MODEL)
    await engine.becomes_idle()


async def test_an_adapter_that_comes_and_goes(client: AsyncClient, engine: Engine, tmp_path: Path) -> None:
    """A LoRA adapter is a model that names its base; it is found when it is loaded, called, and gone when it is unloaded."""
    write_adapter(tmp_path / "adapter", locate().model)
    async with client.models.watch() as watch:
        await told(watch, "ADDED", f"vllm/{NEXT}")
        engine.adapter("load", lora_name="sea", lora_path=str(tmp_path / "adapter"))
        await client.models.refresh()
        adapter = (await told(watch, "ADDED", "vllm/sea")).model
        assert (adapter.base_model, adapter.engine_root) == (NEXT, str(tmp_path / "adapter"))
        answer = await client.chat.create(SEA, model="sea", max_tokens=4, ignore_eos=True)
        assert (answer.started.model, answer.usage.completion_tokens) == ("vllm/sea", 4)
        engine.adapter("unload", lora_name="sea")
        # One call is enough to notice it.
        with pytest.raises(ModelNotFoundError):
            await client.chat.create(SEA, model="sea")
        await told(watch, "REMOVED", "vllm/sea")


async def test_an_engine_that_is_killed(client: AsyncClient, vllm: VllmServer) -> None:
    """The connection breaks without a word; an answer without a finish reason is never taken for a whole one.

    That call is enough: watchers are told at once, and not at the provider's next turn.
    """
    async with client.models.watch() as watch:
        await told(watch, "ADDED", f"vllm/{NEXT}")
        events, error = await interrupted(client, vllm.kill_group, NEXT)
        assert (await told(watch, "MODIFIED", f"vllm/{NEXT}")).model.state == ModelState.MODEL_STATE_UNAVAILABLE
    assert isinstance(error, UpstreamIncompleteError)
    check_the_rest(
        events, error, ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE, StopReason.STOP_REASON_UPSTREAM_INCOMPLETE
    )


async def test_nobody_listens(client: AsyncClient, gateway: GatewayProcess, vllm: VllmServer) -> None:
    """UNAVAILABLE before any event, with a hint when to try again; health says it too, and the gateway lives on."""
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


async def test_what_it_served_is_listed_as_unavailable(client: AsyncClient) -> None:
    """The listing says whose models are old news, and that they cannot be called now."""
    listing = client.models.list()
    states = {model.id: model.state async for model in listing}
    assert states == {f"vllm/{NEXT}": ModelState.MODEL_STATE_UNAVAILABLE}
    assert listing.unreachable_provider_ids == ["vllm"]
    [provider] = await client.models.refresh()
    assert (provider.provider_id, provider.model_count, bool(provider.error)) == ("vllm", 0, True)


async def test_the_gateway_ends_when_it_is_told_to(gateway: GatewayProcess) -> None:
    """With status 0, and nobody listens any more."""
    assert gateway.stop() == 0
    async with AsyncClient(gateway.address, timeout=CALL_SECONDS) as client:
        with pytest.raises(CallError) as caught:
            await client.chat.create(SEA, model=MODEL)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    await eventually(lambda: not gateway.running, "the gateway lives on")


async def test_run_sets_up_a_model_of_its_own(vllm: VllmServer) -> None:
    """`make run` without VLLM_URL: its own vLLM, an answer, a call; told to stop, it leaves no process of all these."""
    assert not vllm.running
    async with serving("--port", "0", variables={"VLLM_URL": "", "VLLM_API_TOKEN": ""}) as process:
        started = descendants(process.pid)
        assert any("vllm.entrypoints" in command for command in started.values())
        assert any("deltawire-server" in command for command in started.values())
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not alive(started)
