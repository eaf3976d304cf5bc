"""The ModelRegistry service: requests in, the registry's rules, answers out.

Failures are raised as they come from below; whoever serves this turns them into statuses.
"""

# gRPC gives the methods their names and arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1 import model_registry_pb2_grpc as pb_grpc
from deltawire_server.errors import Violation, invalid_request
from deltawire_server.registry.model import ModelSource, ModelType
from deltawire_server.rpc.interceptors import call_context
from deltawire_server.upstream.base import HealthStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import grpc

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registry import ModelRegistry
    from deltawire_server.upstream.providers import Providers

    Context = grpc.aio.ServicerContext[Any, Any]

MODEL_TYPES: Mapping[ModelType, pb.ModelType.ValueType] = MappingProxyType(
    {
        ModelType.LLM: pb.MODEL_TYPE_LLM,
        ModelType.EMBEDDING: pb.MODEL_TYPE_EMBEDDING,
        ModelType.RERANK: pb.MODEL_TYPE_RERANK,
    }
)
MODEL_SOURCES: Mapping[ModelSource, pb.ModelSource.ValueType] = MappingProxyType(
    {
        ModelSource.REGISTERED: pb.MODEL_SOURCE_REGISTERED,
        ModelSource.DISCOVERED: pb.MODEL_SOURCE_DISCOVERED,
    }
)
HEALTH_STATUSES: Mapping[HealthStatus, pb.HealthStatus.ValueType] = MappingProxyType(
    {
        HealthStatus.OK: pb.HEALTH_STATUS_OK,
        HealthStatus.ERROR: pb.HEALTH_STATUS_ERROR,
        HealthStatus.NOT_IMPLEMENTED: pb.HEALTH_STATUS_NOT_IMPLEMENTED,
    }
)


class ModelRegistryServicer(pb_grpc.ModelRegistryServicer):
    """Answers the ModelRegistry service's calls. Every method raises the `DeltawireError`s of what it calls.

    Args:
        registry: Open.
        providers: Those of the registry.
    """

    def __init__(self, registry: ModelRegistry, providers: Providers) -> None:
        self._registry = registry
        self._providers = providers

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.RegisterModelResponse:
        """Give a served model an id and aliases."""
        model = await self._registry.register(
            request.model_id,
            request.provider_id,
            request.provider_model_id,
            request.type,
            request.aliases,
            request.metadata,
            token=call_context(context).token,
        )
        return pb.RegisterModelResponse(model=model_message(model))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One model, by any of its names."""
        _require("model_id", request.model_id)
        model = await self._registry.get(request.model_id, call_context(context).token)
        return pb.GetModelResponse(model=model_message(model))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """A page of all models."""
        models, next_page_token, unreachable = await self._registry.list(
            request.page_size, request.page_token, call_context(context).token
        )
        return pb.ListModelsResponse(
            models=map(model_message, models),
            next_page_token=next_page_token,
            unreachable_provider_ids=unreachable,
        )

    async def UnregisterModel(self, request: pb.UnregisterModelRequest, context: Context) -> pb.UnregisterModelResponse:
        """Forget a registered model."""
        _require("model_id", request.model_id)
        await self._registry.unregister(request.model_id, call_context(context).token)
        return pb.UnregisterModelResponse()

    async def ListProviders(self, request: pb.ListProvidersRequest, context: Context) -> pb.ListProvidersResponse:
        """The configured providers."""
        return pb.ListProvidersResponse(
            providers=[
                pb.Provider(id=provider.id, kind=provider.kind, base_urls=[provider.base_url])
                for provider in self._providers.all()
            ]
        )

    async def CheckProviderHealth(
        self,
        request: pb.CheckProviderHealthRequest,
        context: Context,
    ) -> pb.CheckProviderHealthResponse:
        """How a provider is; one that is down is an answer."""
        _require("provider_id", request.provider_id)
        health = await self._providers.get(request.provider_id).check_health()
        return pb.CheckProviderHealthResponse(status=HEALTH_STATUSES[health.status], message=health.message)


def model_message(model: Model) -> pb.Model:
    """A model as it goes over the wire."""
    return pb.Model(
        id=model.id,
        provider_id=model.provider_id,
        provider_model_id=model.provider_model_id,
        type=MODEL_TYPES[model.type],
        aliases=model.aliases,
        metadata=model.metadata,
        source=MODEL_SOURCES[model.source],
        max_context_tokens=model.max_context_tokens,
        root=model.root,
        parent=model.parent,
        create_time=_timestamp(model.create_time),
        update_time=_timestamp(model.update_time),
    )


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def _require(field: str, value: str) -> None:
    if not value:
        raise invalid_request([Violation(field, "is required")])
