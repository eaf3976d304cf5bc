"""The ModelRegistry service.

Methods raise the `DeltawireError`s of the registry, which `CallInterceptor` converts to statuses.
"""

# gRPC gives the methods their names and arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import time
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1 import model_registry_pb2_grpc as pb_grpc
from deltawire.v1.error_reason_pb2 import ErrorReason
from deltawire_server.errors import GatewayError, Reason, Violation, invalid_request
from deltawire_server.limits import Use
from deltawire_server.pacing import give_way
from deltawire_server.registry import pages, rules
from deltawire_server.registry.messages import quoted
from deltawire_server.registry.model import ModelSource, ModelState, ModelType
from deltawire_server.registry.registry import Filter
from deltawire_server.rpc.interceptors import call_context, call_record
from deltawire_server.rpc.status import MAX_MESSAGE, shorten
from deltawire_server.rpc.violations import Violations
from deltawire_server.rpc.writer import StreamWriter

if TYPE_CHECKING:
    import grpc

    from deltawire_server.registry.feed import Step
    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registry import ModelRegistry
    from deltawire_server.rpc.interceptors import CallRecord
    from deltawire_server.upstream.base import ReplicaStatus
    from deltawire_server.upstream.engine import Engine
    from deltawire_server.upstream.providers import Providers

    Context = grpc.aio.ServicerContext[Any, Any]

SLOW_WATCHER_SECONDS = 30.0
"""How long a watcher may take to receive a message by default: as long as the caller of a chat."""

FAREWELL_SECONDS = 0.5
"""The same when watches are ended on shutdown: enough for a watcher that is only slow."""

MAX_LOGGED_NAME = 256
"""Bytes of a name in a log line that was not validated."""

BATCH = 25
"""Models of a snapshot in one message: about a millisecond of work."""

HIDDEN_AT_ONCE = 250
"""Models that do not exist for the watcher, after which other calls run."""

BATCH_BYTES = 1024 * 1024
"""Bytes after which a message gets no more models: far below the 4 MiB that gRPC clients receive by default."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Choice = TypeVar("_Choice", ModelType, ModelState, ModelSource)


class ModelRegistryServicer(pb_grpc.ModelRegistryServicer):
    """Implements the ModelRegistry service. Every method raises the `DeltawireError`s of the registry.

    Args:
        registry: The open registry.
        providers: The providers of the registry.
        slow_watcher_seconds: How long a watcher may take to receive a message.
    """

    def __init__(
        self, registry: ModelRegistry, providers: Providers, *, slow_watcher_seconds: float = SLOW_WATCHER_SECONDS
    ) -> None:
        self._registry = registry
        self._providers = providers
        self._slow_watcher_seconds = slow_watcher_seconds
        self._watches_ended = False
        self._watches: set[StreamWriter] = set()

    def end_watches(self) -> None:
        """End all watches with DRAINING on shutdown. Watchers that do not read get `FAREWELL_SECONDS`."""
        self._watches_ended = True
        self._registry.stop_watches()
        for writer in self._watches:
            writer.hasten(FAREWELL_SECONDS)

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.RegisterModelResponse:
        """Register a served model under an id and aliases."""
        _log_asked(context, request.model_id)
        model = await self._registry.register(
            request.model_id,
            request.provider_id,
            request.provider_model_id,
            request.type,
            request.aliases,
            request.annotations,
            request.embedding_dimension if request.HasField("embedding_dimension") else None,
            token=call_context(context).token,
            owner=call_record(context).caller,
            permits=call_record(context).terms.permits,
        )
        _log_written(context, model)
        return pb.RegisterModelResponse(model=model_message(model))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one model, by any of its names."""
        _require("model_id", request.model_id)
        model = await self._registry.get(
            request.model_id, call_context(context).token, call_record(context).terms.permits
        )
        return pb.GetModelResponse(model=model_message(model))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Return a page of all models."""
        wanted = Filter(
            request.provider_id,
            _chosen("type", request.type, ModelType),
            _chosen("state", request.state, ModelState),
            _chosen("source", request.source, ModelSource),
        )
        models, next_page_token, unreachable = await self._registry.list(
            request.page_size,
            request.page_token,
            call_context(context).token,
            wanted,
            call_record(context).terms.permits,
        )
        return pb.ListModelsResponse(
            models=map(model_message, models),
            next_page_token=next_page_token,
            unreachable_provider_ids=unreachable,
        )

    async def UnregisterModel(self, request: pb.UnregisterModelRequest, context: Context) -> pb.UnregisterModelResponse:
        """Remove a registered model."""
        _log_asked(context, request.model_id)
        _require("model_id", request.model_id)
        change = await self._registry.unregister(
            request.model_id,
            request.etag,
            call_context(context).token,
            _only_of(call_record(context)),
            call_record(context).terms.permits,
        )
        if change.model is None:
            call_record(context).values["model"] = change.model_id
        else:
            _log_written(context, change.model)
        return pb.UnregisterModelResponse()

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Context) -> pb.UpdateModelResponse:
        """Change a registered model."""
        _log_asked(context, request.model.id)
        _require("model.id", request.model.id)
        model = await self._registry.update(
            request.model.id,
            changes_of(request),
            request.model.etag,
            call_context(context).token,
            _only_of(call_record(context)),
            call_record(context).terms.permits,
        )
        _log_written(context, model)
        return pb.UpdateModelResponse(model=model_message(model))

    async def WatchModels(  # type: ignore[override]  # (written to, as a stream of answers is)
        self, request: pb.WatchModelsRequest, context: Context
    ) -> None:
        """Stream all models, and then every change to them."""
        record = call_record(context)
        writer = StreamWriter(context, record, self._slow_watcher_seconds, self._slow)
        record.share.take(Use.WATCHES)
        self._watches.add(writer)
        if self._watches_ended:
            writer.hasten(FAREWELL_SECONDS)
        try:
            async with aclosing(self._registry.watch(request.revision, record.terms.scope)) as steps, writer:
                batch, size, hidden = _batch(), 0, 0
                async for step in steps:
                    if step.model is not None and not record.terms.permits(step.model.id):
                        hidden += 1
                        if hidden % HIDDEN_AT_ONCE == 0:
                            await give_way()  # nothing is written meanwhile, which would
                        continue
                    joins = request.batch_snapshot and step.model is not None and not step.revision
                    if joins and step.model is not None:
                        batch.models.append(model_message(step.model))
                        size += batch.models[-1].ByteSize()
                    if batch.models and (not joins or len(batch.models) == BATCH or size >= BATCH_BYTES):
                        await writer.write(batch)
                        batch, size = _batch(), 0
                    if not joins:
                        await writer.write(step_message(step))
        finally:
            self._watches.discard(writer)
            record.share.give_back(Use.WATCHES)

    def _slow(self, limit: float) -> GatewayError:
        """The failure of a watcher that does not read."""
        if self._watches_ended:
            return GatewayError(
                Reason.DRAINING,
                "this gateway process is shutting down: watch again on a new connection",
                retry_after=0.0,
            )
        return GatewayError(
            Reason.SLOW_WATCHER,
            f"the watcher did not receive a message for {limit:g} seconds: watch again from the last revision",
            metadata={"limit_seconds": f"{limit:g}"},
        )

    async def RefreshModels(self, request: pb.RefreshModelsRequest, context: Context) -> pb.RefreshModelsResponse:
        """Request the current listings of the providers."""
        call_record(context).values["provider"] = shorten(request.provider_id, MAX_LOGGED_NAME)
        results = await self._registry.refresh(
            request.provider_id, call_context(context).token, call_record(context).terms.permits
        )
        response = pb.RefreshModelsResponse()
        for provider_id, result in results.items():
            if isinstance(result, int):
                response.providers.add(provider_id=provider_id, model_count=result)
            else:
                response.providers.add(provider_id=provider_id, error=shorten(result.message, MAX_MESSAGE))
        return response

    async def ListProviders(self, request: pb.ListProvidersRequest, context: Context) -> pb.ListProvidersResponse:
        """Return a page of the configured providers."""
        page = pages.asked_for(request.page_size, request.page_token, "providers")
        providers = {
            provider.id: pb.Provider(
                id=provider.id,
                kind=provider.kind,
                base_urls=provider.base_urls,
                engine=engine_message(provider.engine),
                replicas=map(replica_message, provider.replicas),
            )
            for provider in self._providers.all()
        }
        shown, next_page_token = pages.page_of(providers, page, pb.Provider.ByteSize)
        return pb.ListProvidersResponse(providers=shown, next_page_token=next_page_token)

    async def CheckProviderHealth(
        self,
        request: pb.CheckProviderHealthRequest,
        context: Context,
    ) -> pb.CheckProviderHealthResponse:
        """Check the health of a provider. A failed health check is a successful call."""
        _require("provider_id", request.provider_id)
        provider = self._providers.get(request.provider_id)
        health = await self._providers.check_health(provider.id)
        return pb.CheckProviderHealthResponse(
            status=pb.HealthStatus.ValueType(health.status.value),
            message=shorten(health.message, MAX_MESSAGE),
            engine=engine_message(provider.engine),
        )


def changes_of(request: pb.UpdateModelRequest) -> dict[str, object]:
    """The new values in a request, by field.

    Raises:
        CallerError: INVALID_REQUEST: a path of the mask cannot be changed, or there is nothing to change.
    """
    given = request.model
    paths = list(request.update_mask.paths) or [
        field.name for field, _ in given.ListFields() if field.name in rules.UPDATABLE
    ]
    if paths == ["*"]:
        paths = list(rules.UPDATABLE)
    violations = Violations()
    known = ", ".join(rules.UPDATABLE)
    for path in paths:
        if path not in rules.UPDATABLE:
            violations.add("update_mask", f"{quoted(path)} cannot be changed: use some of {known}")
    if not paths:
        violations.add("update_mask", f"is empty, so there is nothing to change: set some of {known}")
    violations.raise_any()
    values: dict[str, object] = {
        "provider_id": given.provider_id,
        "provider_model_id": given.provider_model_id,
        "type": given.type,
        "aliases": tuple(given.aliases),
        "annotations": dict(given.annotations),
        "embedding_dimension": given.embedding_dimension if given.HasField("embedding_dimension") else None,
    }
    return {path: values[path] for path in paths}


def _batch() -> pb.WatchModelsResponse:
    return pb.WatchModelsResponse(change=pb.WatchModelsResponse.CHANGE_ADDED)


def step_message(step: Step) -> pb.WatchModelsResponse:
    """The message for a step of a watch."""
    if step.kind is None or step.model is None:
        return pb.WatchModelsResponse(bookmark=True, revision=step.revision)
    return pb.WatchModelsResponse(
        change=pb.WatchModelsResponse.Change.ValueType(step.kind.value),
        model=model_message(step.model),
        revision=step.revision,
    )


def model_message(model: Model) -> pb.Model:
    """The message for a model."""
    return pb.Model(
        id=model.id,
        provider_id=model.provider_id,
        provider_model_id=model.provider_model_id,
        type=pb.ModelType.ValueType(model.type.value),
        aliases=model.aliases,
        annotations=model.annotations,
        source=pb.ModelSource.ValueType(model.source.value),
        max_context_tokens=model.max_context_tokens,
        engine_root=model.engine_root,
        base_model=model.base_model,
        create_time=_timestamp(model.create_time),
        update_time=_timestamp(model.update_time),
        state=pb.ModelState.ValueType(model.state.value),
        etag=model.etag,
        embedding_dimension=model.embedding_dimension,
        owner=model.owner,
    )


def engine_message(engine: Engine) -> pb.Engine:
    """The message for the engine of a provider."""
    return pb.Engine(
        kind=pb.Engine.Kind.ValueType(engine.kind.value),
        version=engine.version,
        detail=shorten(engine.detail, MAX_MESSAGE),
    )


def replica_message(replica: ReplicaStatus) -> pb.Replica:
    """The message for a replica."""
    message = pb.Replica(
        base_url=replica.base_url,
        state=pb.Replica.State.Value(f"STATE_{replica.state.name}"),
        active_streams=replica.streams,
    )
    if replica.ejected_for is not None:
        message.ejected_until.FromMilliseconds(round((time.time() + replica.ejected_for) * 1000))
    if replica.last_failure is not None:
        message.last_failure_reason = ErrorReason.ValueType(replica.last_failure.value)
    if replica.last_failure_time is not None:
        message.last_failure_time.FromMilliseconds(round(replica.last_failure_time * 1000))
    return message


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    since = moment - _EPOCH
    # Unlike `FromDatetime`, without a call of the calendar for each model of a list.
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def _chosen(field: str, number: int, meanings: type[_Choice]) -> _Choice | None:
    """The enum value for a filter's number; `None` for all."""
    try:
        return meanings(number) if number else None
    except ValueError:
        known = ", ".join(f"{meaning.value} ({meaning.name})" for meaning in meanings)
        violation = f"{number} is not a valid value: use one of {known}, or 0 for all"
        raise invalid_request([Violation(field, violation)]) from None


def _only_of(record: CallRecord) -> str | None:
    """The owner whose registrations a caller may change; `None` for all owners."""
    return None if record.may_operate else record.caller


def _log_asked(context: Context, name: str) -> None:
    """Add the name of the model that a call wants to write to its log line, which has it even if the call fails."""
    call_record(context).values["model_asked"] = shorten(name, MAX_LOGGED_NAME)


def _log_written(context: Context, model: Model) -> None:
    """Add a model that was written to the log line of the call, for audits."""
    call_record(context).values.update(model=model.id, owner=model.owner, etag=model.etag)


def _require(field: str, value: str) -> None:
    if not value:
        raise invalid_request([Violation(field, "is required")])
