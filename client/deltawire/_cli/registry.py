"""`deltawire models`, `deltawire providers` and `deltawire health`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from deltawire._cli.connection import call_options
from deltawire._cli.output import note_unreachable, print_json, print_table, word
from deltawire._cli.status import FAILED, OK, UsageError
from deltawire.v1.model_registry_pb2 import HealthStatus, Model, ModelSource, ModelType

if TYPE_CHECKING:
    import argparse

    from deltawire._client import Client


def list_models(client: Client, options: argparse.Namespace) -> int:
    """All models."""
    listing = client.models.list(**call_options(options))
    if options.json:
        for model in listing:
            print_json(model)
    else:
        rows = [
            (
                model.id,
                word(ModelType, model.type, "MODEL_TYPE_").lower(),
                word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
                model.provider_id,
                str(model.max_context_tokens) if model.HasField("max_context_tokens") else "-",
                ", ".join(model.aliases),
            )
            for model in listing
        ]
        print_table(("ID", "TYPE", "SOURCE", "PROVIDER", "CONTEXT", "ALIASES"), rows)
    note_unreachable(listing.unreachable_provider_ids)
    return OK


def get_model(client: Client, options: argparse.Namespace) -> int:
    """One model."""
    _print_model(client.models.get(options.model, **call_options(options)), options)
    return OK


def register_model(client: Client, options: argparse.Namespace) -> int:
    """Register a model."""
    notes = {}
    for each in options.metadata:
        key, equals, value = each.partition("=")
        if not equals:
            message = f"--metadata {each}: not KEY=VALUE"
            raise UsageError(message)
        notes[key] = value
    model = client.models.register(
        options.model,
        provider_id=options.provider,
        provider_model_id=options.provider_model,
        model_type=options.type,
        aliases=options.alias,
        model_metadata=notes,
        **call_options(options),
    )
    _print_model(model, options)
    return OK


def unregister_model(client: Client, options: argparse.Namespace) -> int:
    """Unregister a model; without --json, say which."""
    call = call_options(options)
    # Asked before, as nobody knows afterwards whose alias it was.
    model_id = client.models.get(options.model, **call).id
    client.models.unregister(options.model, **call)
    alias = f" (alias {options.model})" if options.model != model_id else ""
    print("{}" if options.json else f"{model_id}{alias} is no longer registered")
    return OK


def list_providers(client: Client, options: argparse.Namespace) -> int:
    """All providers."""
    providers = client.providers.list(**call_options(options))
    if options.json:
        for provider in providers:
            print_json(provider)
    else:
        print_table(("ID", "KIND", "URLS"), [(each.id, each.kind, ", ".join(each.base_urls)) for each in providers])
    return OK


def check_health(client: Client, options: argparse.Namespace) -> int:
    """How providers are; one that is down makes the exit status 1, for scripts."""
    call = call_options(options)
    ids = [options.provider] if options.provider else [each.id for each in client.providers.list(**call)]
    answers = [(each, client.providers.health(each, **call)) for each in ids]
    if options.json:
        for provider_id, health in answers:
            print(json.dumps({"providerId": provider_id, **MessageToDict(health)}), flush=True)
    else:
        rows = [(each, word(HealthStatus, health.status, "HEALTH_STATUS_"), health.message) for each, health in answers]
        print_table(("PROVIDER", "STATUS", "MESSAGE"), rows)
    return FAILED if any(health.status == HealthStatus.HEALTH_STATUS_ERROR for _, health in answers) else OK


def _print_model(model: Model, options: argparse.Namespace) -> None:
    """One model, a line for each thing that is known of it."""
    if options.json:
        print_json(model)
        return
    facts = {
        "id": model.id,
        "provider": model.provider_id,
        "served as": model.provider_model_id,
        "type": word(ModelType, model.type, "MODEL_TYPE_").lower(),
        "source": word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
        "aliases": ", ".join(model.aliases),
        "metadata": ", ".join(f"{key}={value}" for key, value in sorted(model.metadata.items())),
        "context": f"{model.max_context_tokens} tokens" if model.HasField("max_context_tokens") else "",
        "root": model.root,
        "parent": model.parent,
        "created": model.create_time.ToJsonString() if model.HasField("create_time") else "",
        "updated": model.update_time.ToJsonString() if model.HasField("update_time") else "",
    }
    for name, value in facts.items():
        if value:
            print(f"{name + ':':<11}{value}")
