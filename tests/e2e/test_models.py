"""Listed models, registered names, and the health of the provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltawire import ModelAlreadyExistsError, ModelDiscoveredError, ModelNotFoundError, ModelNotServedError, ModelType
from deltawire.v1.model_registry_pb2 import HealthStatus, ModelSource
from tests.e2e.support import MODEL, SEA

if TYPE_CHECKING:
    from deltawire import AsyncClient
    from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.e2e


async def test_served_models_are_listed(client: AsyncClient) -> None:
    """A model is listed as "provider/name" with vLLM's context size, and can be looked up by both names."""
    listing = client.models.list()
    [model] = [model async for model in listing]
    assert not listing.unreachable_provider_ids
    assert (model.id, model.provider_id, model.provider_model_id) == ("vllm/smollm2", "vllm", "smollm2")
    assert model.type == ModelType.MODEL_TYPE_LLM
    assert model.source == ModelSource.MODEL_SOURCE_DISCOVERED
    assert model.max_context_tokens == 4096
    assert await client.models.get("smollm2") == await client.models.get("vllm/smollm2") == model


async def test_a_registered_alias(client: AsyncClient) -> None:
    """A registered model is listed, can be used under each name, reserves its names, and is removed."""
    model = await client.models.register("little", provider_model_id="smollm2", aliases=["tiny", "wee"])
    assert (model.id, list(model.aliases)) == ("little", ["tiny", "wee"])
    again = await client.models.register("little", provider_model_id="smollm2", aliases=["tiny", "wee"])
    assert again == model
    assert "little" in [each.id async for each in client.models.list(page_size=1)]
    for name in ("little", "tiny", "wee"):
        answer = await client.chat.create(SEA, model=name, max_tokens=2)
        assert answer.started.model == "little"
        assert answer.started.alias == ("" if name == "little" else name)
        assert answer.usage.completion_tokens <= 2
    with pytest.raises(ModelAlreadyExistsError):
        await client.models.register("tiny", provider_model_id="smollm2")
    await client.models.unregister("tiny")
    with pytest.raises(ModelNotFoundError):
        await client.chat.create(SEA, model="little", max_tokens=2)
    assert [each.id async for each in client.models.list()] == ["vllm/smollm2"]


async def test_a_model_that_is_not_served_cannot_be_registered(client: AsyncClient) -> None:
    """The message lists the served models."""
    with pytest.raises(ModelNotServedError, match="smollm2"):
        await client.models.register("big", provider_model_id="llama-405b")


async def test_a_discovered_model_cannot_be_unregistered(client: AsyncClient) -> None:
    """A model that was not registered cannot be unregistered."""
    with pytest.raises(ModelDiscoveredError):
        await client.models.unregister(MODEL)


async def test_the_provider_is_healthy(client: AsyncClient) -> None:
    """The only provider is healthy, and its key is not shown."""
    [provider] = await client.providers.list()
    assert (provider.id, provider.kind) == ("vllm", "vllm")
    health = await client.providers.health("vllm")
    assert health.status == HealthStatus.HEALTH_STATUS_OK


async def test_standard_health_checks(gateway: GatewayProcess) -> None:
    """The standard health service reports SERVING for the process and for each service."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "deltawire.v1.ChatCompletion", "deltawire.v1.ModelRegistry"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
