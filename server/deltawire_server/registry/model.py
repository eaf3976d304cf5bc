"""A model that can be called: plain frozen values, free of database and protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

MAX_CONTEXT_TOKENS = 2**31 - 1
"""What the wire can carry, and a few thousand times the longest context there is."""


_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})
"""Shared by all models without annotations: there may be very many discovered ones."""


class ModelType(enum.Enum):
    """What a model is for; the values are those of `deltawire.v1.ModelType`, the names are what the database holds."""

    LLM = 1
    EMBEDDING = 2
    RERANK = 3


class ModelState(enum.Enum):
    """Whether a model can be called now; the values are those of `deltawire.v1.ModelState`."""

    SERVING = 1
    UNAVAILABLE = 2
    UNKNOWN = 3


class ModelSource(enum.Enum):
    """How a model came to be known; the values are those of `deltawire.v1.ModelSource`."""

    REGISTERED = 1
    DISCOVERED = 2


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be called.

    Attributes:
        id: Unique. An alias chosen at registration, else "provider_id/provider_model_id".
        provider_id: Who serves it.
        provider_model_id: Its name at the provider.
        type: What it is for. Discovered models are LLM: a vLLM does not say.
        aliases: Further names in the order they were given, each unique over the registry.
        annotations: Free notes, set at registration.
        source: How it came to be known.
        max_context_tokens: Longest prompt and answer together, as the provider said at registration, or says now of a
            discovered model; `None` if it does not say.
        engine_root: What the provider loaded it from; empty if it does not say.
        base_model: The base model of a LoRA adapter; empty for others.
        create_time: When it was registered, in UTC; `None` for discovered models.
        update_time: When its registration last changed, in UTC; `None` for discovered models.
        embedding_dimension: Numbers in a vector that it makes; `None` unless its type is EMBEDDING.
        revision: Of the change that made it what it is, unique and rising; 0 for discovered models.
        state: Whether it can be called now, as far as this process knows.
        owner: The name of the caller that registered it; empty for discovered models and where callers are not identified.
    """

    id: str
    provider_id: str
    provider_model_id: str
    type: ModelType = ModelType.LLM
    aliases: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=lambda: _NO_ANNOTATIONS)
    source: ModelSource = ModelSource.REGISTERED
    max_context_tokens: int | None = None
    engine_root: str = ""
    base_model: str = ""
    create_time: datetime | None = None
    update_time: datetime | None = None
    embedding_dimension: int | None = None
    revision: int = 0
    state: ModelState = ModelState.UNKNOWN
    owner: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The id, then the aliases. No other model may have any of them."""
        return (self.id, *self.aliases)

    @property
    def target(self) -> tuple[str, str]:
        """Provider and name at the provider: what actually answers."""
        return (self.provider_id, self.provider_model_id)

    @property
    def etag(self) -> str:
        """What changes with every change of the registration; empty for discovered models."""
        return f"r{self.revision}" if self.revision else ""


def scoped_id(provider_id: str, provider_model_id: str) -> str:
    """The id of a model without a registered name: "provider_id/provider_model_id"."""
    return f"{provider_id}/{provider_model_id}"
