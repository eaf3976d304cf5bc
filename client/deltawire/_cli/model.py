"""Which model is meant when none is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire._cli.connection import call_options
from deltawire._cli.output import note_unreachable
from deltawire._cli.status import FailedError, UsageError
from deltawire.v1.model_registry_pb2 import ModelSource, ModelType

if TYPE_CHECKING:
    import argparse

    from deltawire._client import Client


def only_model(client: Client, options: argparse.Namespace) -> str:
    """The only LLM there is. A model and its registration are one model, called by its registered id."""
    listing = client.models.list(**call_options(options))
    chosen: dict[tuple[str, str], str] = {}
    for model in listing:
        key = (model.provider_id, model.provider_model_id)
        if model.type == ModelType.MODEL_TYPE_LLM and (
            key not in chosen or model.source == ModelSource.MODEL_SOURCE_REGISTERED
        ):
            chosen[key] = model.id
    unreachable = listing.unreachable_provider_ids
    if not chosen and unreachable:
        message = (
            f"there is no model to chat with, and these providers could not be listed: {', '.join(unreachable)};"
            " see `deltawire health` and the gateway's log"
        )
        raise FailedError(message)
    note_unreachable(unreachable)
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    if not chosen:
        message = "there is no model to chat with"
        raise UsageError(message)
    message = f"there is more than one model; give --model, one of: {', '.join(sorted(chosen.values()))}"
    raise UsageError(message)
