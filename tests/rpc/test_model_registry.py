from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1 import model_registry_pb2_grpc as pb_grpc
from deltawire_server.registry.model import ModelSource, ModelType
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.rpc.interceptors import CallInterceptor
from deltawire_server.rpc.model_registry import (
    HEALTH_STATUSES,
    MODEL_SOURCES,
    MODEL_TYPES,
    ModelRegistryServicer,
)
from deltawire_server.upstream.base import HealthStatus, ServedModel
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Mapping


@pytest.fixture
def alpha() -> FakeProvider:
    """Serves a model of which all is known, and one of which nothing is."""
    lora = ServedModel("lora", root="/adapters/lora", parent="llama", max_context_tokens=4096)
    return FakeProvider("alpha", ["llama", lora])


@pytest.fixture
def beta() -> FakeProvider:
    """Serves nothing."""
    return FakeProvider("beta")


@asynccontextmanager
async def _served(providers: Providers) -> AsyncIterator[pb_grpc.ModelRegistryAsyncStub]:
    registry = ModelRegistry(Store("sqlite://"), providers)
    await registry.open()
    server = aio.server(interceptors=[CallInterceptor()])
    pb_grpc.add_ModelRegistryServicer_to_server(ModelRegistryServicer(registry, providers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield pb_grpc.ModelRegistryStub(channel)
    finally:
        await server.stop(None)
        await registry.close()


@pytest.fixture
async def stub(alpha: FakeProvider, beta: FakeProvider) -> AsyncIterator[pb_grpc.ModelRegistryAsyncStub]:
    """A client of a real server over both providers."""
    async with _served(Providers([alpha, beta], listing_seconds=0.0)) as stub:
        yield stub


async def failure_of(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, list[str]]:
    """Code, reason and violated fields of a call that must fail."""
    with pytest.raises(aio.AioRpcError) as failure:
        await call
    trailers = dict(failure.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    fields = []
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            fields = [violation.field for violation in bad_request.field_violations]
    return failure.value.code(), str(trailers["deltawire-reason"]), fields


async def test_a_model_from_registration_to_its_end(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """Every field goes over the wire, in each answer alike; afterwards only what is served is left."""
    response = await stub.RegisterModel(
        pb.RegisterModelRequest(
            model_id="mine",
            provider_id="alpha",
            provider_model_id="lora",
            type=pb.MODEL_TYPE_EMBEDDING,
            aliases=["a", "b"],
            metadata={"k": "v"},
        )
    )
    model = response.model
    assert model.create_time.seconds > 1_700_000_000
    assert model == pb.Model(
        id="mine",
        provider_id="alpha",
        provider_model_id="lora",
        type=pb.MODEL_TYPE_EMBEDDING,
        aliases=["a", "b"],
        metadata={"k": "v"},
        source=pb.MODEL_SOURCE_REGISTERED,
        max_context_tokens=4096,
        root="/adapters/lora",
        parent="llama",
        create_time=model.create_time,
        update_time=model.create_time,
    )
    assert (await stub.GetModel(pb.GetModelRequest(model_id="b"))).model == model
    listed = await stub.ListModels(pb.ListModelsRequest())
    assert listed == pb.ListModelsResponse(
        models=[
            pb.Model(
                id="alpha/llama",
                provider_id="alpha",
                provider_model_id="llama",
                type=pb.MODEL_TYPE_LLM,
                source=pb.MODEL_SOURCE_DISCOVERED,
            ),
            model,
        ]
    )
    assert not listed.models[0].HasField("max_context_tokens")
    assert not listed.models[0].HasField("create_time")
    assert await stub.UnregisterModel(pb.UnregisterModelRequest(model_id="a")) == pb.UnregisterModelResponse()
    left = await stub.ListModels(pb.ListModelsRequest())
    assert [model.id for model in left.models] == ["alpha/llama", "alpha/lora"]


async def test_an_unspecified_type_is_llm(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """And the provider's own name is scoped."""
    response = await stub.RegisterModel(pb.RegisterModelRequest(model_id="llama", provider_id="alpha"))
    assert (response.model.id, response.model.type) == ("alpha/llama", pb.MODEL_TYPE_LLM)


async def test_every_violated_field_is_named(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """An enum's number that this gateway does not know is among them."""
    request = pb.RegisterModelRequest.FromString(
        pb.RegisterModelRequest(aliases=[""]).SerializeToString() + b"\x20\x09"
    )
    assert await failure_of(stub.RegisterModel(request)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["model_id", "provider_id", "type", "aliases[0]"],
    )


async def test_required_fields(stub: pb_grpc.ModelRegistryAsyncStub) -> None:
    """What names nothing is a broken rule and not an unknown name."""
    calls: list[tuple[Awaitable[object], str]] = [
        (stub.GetModel(pb.GetModelRequest()), "model_id"),
        (stub.UnregisterModel(pb.UnregisterModelRequest()), "model_id"),
        (stub.CheckProviderHealth(pb.CheckProviderHealthRequest()), "provider_id"),
    ]
    for call, field in calls:
        assert await failure_of(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", [field])


async def test_failures_keep_their_codes_and_reasons(
    stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """What the registry raises is what the caller gets."""
    register = pb.RegisterModelRequest(model_id="mine", provider_id="alpha", provider_model_id="llama")
    await stub.RegisterModel(register)
    register.metadata["k"] = "v"
    unserved = pb.RegisterModelRequest(model_id="x", provider_id="alpha")
    calls: list[tuple[Awaitable[object], grpc.StatusCode, str]] = [
        (stub.RegisterModel(register), grpc.StatusCode.ALREADY_EXISTS, "MODEL_ALREADY_EXISTS"),
        (stub.RegisterModel(unserved), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_SERVED"),
        (stub.GetModel(pb.GetModelRequest(model_id="x")), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (
            stub.UnregisterModel(pb.UnregisterModelRequest(model_id="lora")),
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_DISCOVERED",
        ),
        (
            stub.CheckProviderHealth(pb.CheckProviderHealthRequest(provider_id="x")),
            grpc.StatusCode.NOT_FOUND,
            "PROVIDER_NOT_FOUND",
        ),
    ]
    for call, code, reason in calls:
        assert await failure_of(call) == (code, reason, [])
    alpha.go_down()
    beta.go_down()
    assert await failure_of(stub.GetModel(pb.GetModelRequest(model_id="lora"))) == (
        grpc.StatusCode.UNAVAILABLE,
        "UPSTREAM_UNAVAILABLE",
        [],
    )


async def test_pages(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """A page's token leads to the next one; providers that are away are named on each."""
    beta.go_down()
    first = await stub.ListModels(pb.ListModelsRequest(page_size=1))
    assert ([model.id for model in first.models], list(first.unreachable_provider_ids)) == (["alpha/llama"], ["beta"])
    second = await stub.ListModels(pb.ListModelsRequest(page_size=1, page_token=first.next_page_token))
    assert ([model.id for model in second.models], second.next_page_token) == (["alpha/lora"], "")
    assert await failure_of(stub.ListModels(pb.ListModelsRequest(page_size=-1, page_token="!"))) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_size", "page_token"],
    )


async def test_the_callers_token_goes_to_the_provider(
    stub: pb_grpc.ModelRegistryAsyncStub, alpha: FakeProvider
) -> None:
    """Every call that may ask a provider passes it on."""
    metadata = (("x-vllm-api-token", "mine"),)
    await stub.RegisterModel(pb.RegisterModelRequest(model_id="llama", provider_id="alpha"), metadata=metadata)
    await stub.GetModel(pb.GetModelRequest(model_id="lora"), metadata=metadata)
    await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
    await failure_of(stub.UnregisterModel(pb.UnregisterModelRequest(model_id="lora"), metadata=metadata))
    assert alpha.tokens == ["mine"] * 4


async def test_providers_and_their_health(stub: pb_grpc.ModelRegistryAsyncStub, beta: FakeProvider) -> None:
    """All that are configured, by id; one that is down is an answer and no failure."""
    assert await stub.ListProviders(pb.ListProvidersRequest()) == pb.ListProvidersResponse(
        providers=[
            pb.Provider(id="alpha", kind="fake", base_url="http://alpha.localhost/v1"),
            pb.Provider(id="beta", kind="fake", base_url="http://beta.localhost/v1"),
        ]
    )
    beta.go_down()
    assert await stub.CheckProviderHealth(
        pb.CheckProviderHealthRequest(provider_id="alpha")
    ) == pb.CheckProviderHealthResponse(status=pb.HEALTH_STATUS_OK)
    assert await stub.CheckProviderHealth(
        pb.CheckProviderHealthRequest(provider_id="beta")
    ) == pb.CheckProviderHealthResponse(
        status=pb.HEALTH_STATUS_ERROR, message="Health check failed: provider 'beta' cannot be reached"
    )


@pytest.mark.parametrize(
    ("table", "members"),
    [(MODEL_TYPES, ModelType), (MODEL_SOURCES, ModelSource), (HEALTH_STATUSES, HealthStatus)],
)
def test_the_tables_are_whole(table: Mapping[object, int], members: type[ModelType]) -> None:
    """Each of our values has its number on the wire, and it is the one that its comment promises."""
    assert dict(table) == {member: member.value for member in members}
