"""The models, independent of the database and of protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    Permits = Callable[[str], bool]
    """Whether a model exists for a caller, by its id."""

MAX_CONTEXT_TOKENS = 2**31 - 1
"""The maximum in the API."""


_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})
"""Shared by all models without annotations: there may be very many discovered ones."""


class ModelType(enum.Enum):
    """The purpose of a model; the values are those of `deltawire.v1.ModelType`, the names are stored in the database."""

    LLM = 1
    EMBEDDING = 2
    RERANK = 3


class ModelState(enum.Enum):
    """Whether a model can be called now; the values are those of `deltawire.v1.ModelState`."""

    SERVING = 1
    UNAVAILABLE = 2
    UNKNOWN = 3


class ModelSource(enum.Enum):
    """The origin of a model; the values are those of `deltawire.v1.ModelSource`."""

    REGISTERED = 1
    DISCOVERED = 2


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be called.

    Attributes:
        id: Unique. An alias chosen at registration, else "provider_id/provider_model_id".
        provider_id: The provider that serves it.
        provider_model_id: Its name at the provider.
        type: Its purpose. Discovered models are LLM, because vLLM does not report it.
        aliases: Further names in the order of the registration, each unique in the registry.
        annotations: Free text by key, set at registration.
        source: Its origin.
        max_context_tokens: Limit of prompt and answer together, as reported by the provider at registration, or in the last
            listing for a discovered model; `None` if unknown.
        engine_root: The path or repository that the provider loaded it from; empty if unknown.
        base_model: The base model of a LoRA adapter; empty for other models.
        create_time: When it was registered, in UTC; `None` for discovered models.
        update_time: When its registration last changed, in UTC; `None` for discovered models.
        embedding_dimension: Length of its vectors; `None` unless its type is EMBEDDING.
        revision: The revision of its last change, unique and ascending; 0 for discovered models.
        state: Whether it can be called now, as known to this process.
        owner: The name of the caller that registered it; empty for discovered models and if callers are not identified.
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
        """The id, then the aliases; each is unique in the registry."""
        return (self.id, *self.aliases)

    @property
    def target(self) -> tuple[str, str]:
        """The provider and the provider's name of the model."""
        return (self.provider_id, self.provider_model_id)

    @property
    def etag(self) -> str:
        """The etag, which every change of the registration changes; empty for discovered models."""
        return f"r{self.revision}" if self.revision else ""


def all_models(_model_id: str) -> bool:
    """Permits every model; see `Permits`."""
    return True


def scoped_id(provider_id: str, provider_model_id: str) -> str:
    """The id of a model without a registered name: "provider_id/provider_model_id"."""
    return f"{provider_id}/{provider_model_id}"
