"""`deltawire models`, `deltawire providers` and `deltawire health`."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, NoReturn, cast

from google.protobuf.json_format import MessageToDict

from deltawire._cli.connection import first_call
from deltawire._cli.interrupt import Interrupt
from deltawire._cli.output import (
    note_unreachable,
    print_json,
    print_json_text,
    print_line,
    print_row,
    print_table,
    say,
    word,
)
from deltawire._cli.status import FAILED, OK, FailedError, UsageError
from deltawire._errors import CallCancelledError
from deltawire._watch import ModelChange
from deltawire.v1.error_reason_pb2 import ErrorReason
from deltawire.v1.model_registry_pb2 import (
    Engine,
    HealthStatus,
    Model,
    ModelSource,
    ModelState,
    ModelType,
    Provider,
    Replica,
    WatchModelsResponse,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from deltawire._client import Client
    from deltawire._requests import RegisterOptions
    from deltawire._watch import WatchEvent

# The longest id of a stream is not known in advance; this width fits most of them.
_WATCH_WIDTHS = (8, 40, 11, 9)


def list_models(client: Client, options: argparse.Namespace) -> int:
    """All models, or those that pass the filters.

    Raises:
        FailedError: No provider has the id of the filter.
    """
    call = first_call(client, options)
    listing = client.models.list(
        provider_id=options.provider, model_type=options.type, state=options.state, source=options.source, **call
    )
    models = iter(listing)
    first = next(models, None)
    if first is None and options.provider:
        ids = [each.id for each in client.providers.list(**call)]
        if options.provider not in ids:
            message = f"there is no provider {options.provider}; there are: {', '.join(ids) or 'none'}"
            raise FailedError(message)
    found = () if first is None else itertools.chain([first], models)
    if options.json:
        for model in found:
            print_json(model)
    else:
        rows = [
            (
                model.id,
                _type(model),
                _state(model),
                word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
                model.provider_id,
                str(model.max_context_tokens) if model.HasField("max_context_tokens") else "-",
                ", ".join(model.aliases),
            )
            for model in found
        ]
        print_table(("ID", "TYPE", "STATE", "SOURCE", "PROVIDER", "CONTEXT", "ALIASES"), rows)
    note_unreachable(listing.unreachable_provider_ids)
    return OK


def get_model(client: Client, options: argparse.Namespace) -> int:
    """One model."""
    _print_model(client.models.get(options.model, **first_call(client, options)), options)
    return OK


def register_model(client: Client, options: argparse.Namespace) -> int:
    """Register a model."""
    model = client.models.register(
        options.model,
        provider_id=options.provider,
        provider_model_id=options.provider_model,
        model_type=options.type,
        aliases=options.alias,
        annotations=_notes(options.annotations),
        embedding_dimension=options.embedding_dimension,
        **first_call(client, options),
    )
    _print_model(model, options)
    return OK


def update_model(client: Client, options: argparse.Namespace) -> int:
    """Change a registered model."""
    given = {
        "provider_id": options.provider,
        "provider_model_id": options.provider_model,
        "model_type": options.type,
        "aliases": options.alias,
        "annotations": None if options.annotations is None else _notes(options.annotations),
        "embedding_dimension": options.embedding_dimension,
    }
    changes = cast("RegisterOptions", {name: value for name, value in given.items() if value is not None})
    if options.type not in {None, "embedding"}:
        # Other types have none, so one that was goes with the old type.
        changes.setdefault("embedding_dimension", None)
    if not changes:
        message = "there is nothing to change: give at least one option that says what"
        raise UsageError(message)
    model = client.models.update(options.model, etag=options.etag or "", **changes, **first_call(client, options))
    _print_model(model, options)
    return OK


def unregister_model(client: Client, options: argparse.Namespace) -> int:
    """Unregister a model. It is not looked up first: its record may be damaged, and the caller may not read."""
    client.models.unregister(options.model, etag=options.etag or "", **first_call(client, options))
    print_line("{}" if options.json else f"{options.model} is no longer registered")
    return OK


def refresh_models(client: Client, options: argparse.Namespace) -> int:
    """List what providers serve now; one that cannot be listed makes the exit status 1, for scripts."""
    providers = client.models.refresh(options.provider, **first_call(client, options))
    if options.json:
        for each in providers:
            print_json(each)
    else:
        rows = [(each.provider_id, "-" if each.error else str(each.model_count)) for each in providers]
        print_table(("PROVIDER", "MODELS"), rows)
    failed = [each for each in providers if each.error]
    for each in failed:
        say(f"error: {each.provider_id} could not be listed: {each.error}")
    return FAILED if failed else OK


def watch_models(client: Client, options: argparse.Namespace) -> NoReturn:
    """Every change to models as it happens, until Ctrl-C or an error."""
    if not options.json:
        print_row(("CHANGE", "ID", "STATE", "TYPE", "PROVIDER"), _WATCH_WIDTHS)
    call = first_call(client, options)
    # The client's own does not limit a watch.
    call["timeout"] = options.timeout
    watch = client.models.watch(options.revision, **call)
    with watch, Interrupt(watch.cancel) as interrupt:
        try:
            while True:
                _print_event(next(watch), options)
        except CallCancelledError:
            if interrupt.pressed:
                raise KeyboardInterrupt from None
            raise


def list_providers(client: Client, options: argparse.Namespace) -> int:
    """All providers."""
    providers = client.providers.list(**first_call(client, options))
    if options.json:
        for provider in providers:
            print_json(provider)
    else:
        rows = [(each.id, each.kind, _engine(each.engine), _urls(each)) for each in providers]
        print_table(("ID", "KIND", "ENGINE", "URLS"), rows)
    return OK


def _urls(provider: Provider) -> str:
    """The addresses of a provider, each with its active streams, and its state if it does not get its full share of the calls."""
    replicas = {each.base_url: each for each in provider.replicas}
    return ", ".join(_replica(url, replicas.get(url, Replica())) for url in provider.base_urls)


def _replica(url: str, replica: Replica) -> str:
    notes = [f"{replica.active_streams} active"] if replica.active_streams else []
    if replica.state > Replica.STATE_AVAILABLE:
        state = word(Replica.State, replica.state, "STATE_").lower()
        notes.append(f"{state}: {word(ErrorReason, replica.last_failure_reason, 'ERROR_REASON_')}")
    return f"{url} ({', '.join(notes)})" if notes else url


def check_health(client: Client, options: argparse.Namespace) -> int:
    """How providers are; one that is down makes the exit status 1, for scripts."""
    call = first_call(client, options)
    ids = [options.provider] if options.provider else [each.id for each in client.providers.list(**call)]
    answers = [(each, client.providers.health(each, **call)) for each in ids]
    if options.json:
        for provider_id, health in answers:
            print_json_text(json.dumps({"providerId": provider_id, **MessageToDict(health)}))
    else:
        rows = [
            (
                each,
                word(HealthStatus, health.status, "HEALTH_STATUS_"),
                _engine(health.engine),
                health.message or health.engine.detail,
            )
            for each, health in answers
        ]
        print_table(("PROVIDER", "STATUS", "ENGINE", "MESSAGE"), rows)
    return FAILED if any(health.status == HealthStatus.HEALTH_STATUS_ERROR for _, health in answers) else OK


def _print_event(event: WatchEvent, options: argparse.Namespace) -> None:
    """Print an event of a watch; a bookmark only as JSON, for its revision."""
    if isinstance(event, ModelChange):
        if options.json:
            change = WatchModelsResponse.Change.Value(f"CHANGE_{event.change}")
            print_json(WatchModelsResponse(change=change, model=event.model, revision=event.revision))
        else:
            model = event.model
            print_row((event.change, model.id, _state(model), _type(model), model.provider_id), _WATCH_WIDTHS)
    elif options.json:
        print_json(WatchModelsResponse(revision=event.revision, bookmark=True))


def _notes(given: Sequence[str]) -> dict[str, str]:
    """Notes from KEY=VALUE, each."""
    notes = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals:
            message = f"--annotation {each}: not KEY=VALUE"
            raise UsageError(message)
        notes[key] = value
    return notes


def _type(model: Model) -> str:
    """What a model is for, as it is printed."""
    return word(ModelType, model.type, "MODEL_TYPE_").lower()


def _state(model: Model) -> str:
    """Whether a model can be called, as it is printed."""
    return word(ModelState, model.state, "MODEL_STATE_").lower()


def _print_model(model: Model, options: argparse.Namespace) -> None:
    """One model, a line for each thing that is known of it."""
    if options.json:
        print_json(model)
        return
    facts = {
        "id": model.id,
        "provider": model.provider_id,
        "served as": model.provider_model_id,
        "type": _type(model),
        "dimension": str(model.embedding_dimension) if model.HasField("embedding_dimension") else "",
        "state": _state(model),
        "source": word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
        "aliases": ", ".join(model.aliases),
        "annotations": ", ".join(f"{key}={value}" for key, value in sorted(model.annotations.items())),
        "context": f"{model.max_context_tokens} tokens" if model.HasField("max_context_tokens") else "",
        "engine root": model.engine_root,
        "base model": model.base_model,
        "created": model.create_time.ToJsonString() if model.HasField("create_time") else "",
        "updated": model.update_time.ToJsonString() if model.HasField("update_time") else "",
        "owner": model.owner,
        "etag": model.etag,
    }
    for name, value in facts.items():
        if value:
            print_line(f"{name + ':':<13}{value}")


def _engine(engine: Engine) -> str:
    """What answers at a provider's addresses, in one or two words, such as "VLLM 0.32.0"; "-" from an older gateway."""
    if not engine.kind:
        return "-"
    return f"{word(Engine.Kind, engine.kind, 'KIND_')} {engine.version}".rstrip()
