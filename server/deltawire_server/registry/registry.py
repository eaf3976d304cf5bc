"""The registry of models: what others call.

Registered models are read from the database once and kept in memory: a look-up never waits for the database, and goes
on when it is away. A write goes to the database first and to memory when it has succeeded. What is not registered is
discovered: looked up in the listings of the providers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Reason, RegistryError
from deltawire_server.registry import lookup, pages, rules
from deltawire_server.registry.known import Known
from deltawire_server.registry.listings import Listings
from deltawire_server.registry.messages import cut, quoted
from deltawire_server.registry.model import Model, ModelSource, ModelType
from deltawire_server.registry.writes import Writes
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltawire_server.registry.store import Store
    from deltawire_server.upstream.base import Provider
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where a name leads.

    Attributes:
        model: What it names.
        alias: The name that was asked for, if it is not the model's id; else empty.
        provider: Who serves the model: call it with `model.provider_model_id`.
    """

    model: Model
    alias: str
    provider: Provider


class ModelRegistry:
    """Which models can be called, and under which names. `open` it before anything else, `close` it in the end.

    Args:
        store: Where registered models are kept; opened and closed with the registry.
        providers: Who serves; theirs is the owner's to close.
    """

    def __init__(self, store: Store, providers: Providers) -> None:
        self._store = store
        self._providers = providers
        self._known = Known()
        self._writes = Writes(store, self._known)

    async def open(self) -> None:
        """Open the store and read all registered models into memory; then call the others. `close` even if this fails.

        Raises:
            RegistryError: The database cannot be used.
        """
        await self._store.open()
        self._known.load(await self._store.list())
        _log.info("registry opened", registered_models=len(self._known.models))

    async def close(self) -> None:
        """Let the writes under way finish, then close the store."""
        await self._writes.finish()
        await self._store.close()

    async def register(
        self,
        model_id: str,
        provider_id: str = "",
        provider_model_id: str = "",
        model_type: ModelType | int = ModelType.LLM,
        aliases: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> Model:
        """Give a served model an id and aliases.

        The same again changes nothing, asks no provider and gives back what is stored, with its times: whoever
        registers at start-up may do so while the provider is still loading.

        Args:
            model_id: The id. If it equals the provider's name, the id becomes "provider_id/provider_model_id".
            provider_id: Who serves it; empty for the only provider there is.
            provider_model_id: Its name there; empty for `model_id`.
            model_type: What it is for: a `ModelType`, or the number of one as it came; 0 is LLM.
            aliases: Further names, at most 32.
            metadata: Free notes.
            token: The caller's token for the provider.

        Raises:
            CallerError: Rules are broken (INVALID_REQUEST lists all of them), or there is no such provider.
            RegistryError: MODEL_ALREADY_EXISTS if a name belongs to another model or the id to a different
                registration: unregister that first. MODEL_NOT_SERVED. STORE_UNAVAILABLE.
            ProviderError: The provider cannot be asked whether it serves the model.
        """
        wanted = rules.requested(
            self._providers, model_id, provider_id, provider_model_id, model_type, aliases, metadata or {}
        )
        stored = self._known.same(wanted)
        if stored is not None:
            return stored
        wanted = await rules.as_served(wanted, self._providers, token)
        await rules.refuse_served_names(wanted, self._providers, token)
        now = datetime.now(UTC)
        return await self._writes.insert(replace(wanted, create_time=now, update_time=now))

    async def unregister(self, name: str, token: str | None = None) -> None:
        """Forget a registered model. What its provider serves stays callable by the provider's own name.

        Args:
            name: Its id or one of its aliases.
            token: The caller's token for the providers.

        Raises:
            CallerError: MODEL_NOT_FOUND.
            RegistryError: MODEL_DISCOVERED if it is served but not registered. STORE_UNAVAILABLE.
            ProviderError: No model of this name is registered, and no provider can be asked whether it serves one.
        """
        if await self._writes.delete(name):
            return
        model = await self.get(name, token)
        if model.source is ModelSource.DISCOVERED:
            raise RegistryError(
                Reason.MODEL_DISCOVERED,
                f"model {model.id!r} is not registered but discovered: it is there for as long as provider"
                f" {model.provider_id!r} serves it",
                metadata={"model": model.id},
            )
        raise CallerError(
            Reason.MODEL_NOT_FOUND,
            f"no registered model has the id or alias {quoted(name)}; it leads to model {model.id!r}: unregister that",
            metadata={"model": cut(name)},
        )

    async def get(self, name: str, token: str | None = None) -> Model:
        """The model of this name.

        Args:
            name: Id, alias, "provider/served name", or a served name that just one provider has.
            token: The caller's token for the providers.

        Raises:
            CallerError: MODEL_NOT_FOUND, whose message lists some that there are; MODEL_AMBIGUOUS.
            ProviderError: Nobody who could serve it can be asked: try again.
        """
        return await lookup.find(name, self._known, Listings(self._providers, token))

    async def resolve(self, name: str, token: str | None = None) -> Resolution:
        """The model of this name and who serves it.

        Args:
            name: As for `get`.
            token: The caller's token for the providers.

        Raises:
            CallerError: As for `get`, and PROVIDER_NOT_FOUND if the model's provider is no longer configured.
            ProviderError: As for `get`.
        """
        model = await self.get(name, token)
        return Resolution(model, "" if name == model.id else name, self._providers.get(model.provider_id))

    async def list(
        self, page_size: int = 0, page_token: str = "", token: str | None = None
    ) -> tuple[list[Model], str, tuple[str, ...]]:
        """A page of all models, registered and discovered, by ascending id; of models with many notes a shorter one.

        A page begins after the last id of the one before, whatever has come or gone meanwhile: what stays is seen
        exactly once.

        Args:
            page_size: 1 to 1000; 0 for 100, more is taken as 1000.
            page_token: As the page before gave it; empty for the first.
            token: The caller's token for the providers.

        Returns:
            The models; the token of the next page, empty on the last; and the providers that could not be listed, whose
            discovered models are missing.

        Raises:
            CallerError: A negative page size, or a token that is none of ours.
        """
        size, after = pages.asked_for(page_size, page_token)
        listings = Listings(self._providers, token)
        await listings.fetch(listings.provider_ids)
        page, next_page_token = pages.page_of(lookup.all_models(self._known, listings), size, after)
        return page, next_page_token, tuple(sorted(listings.failures))


def require_type(model: Model, wanted: ModelType) -> None:
    """Hold that a model is of the type a call needs.

    Raises:
        CallerError: MODEL_WRONG_TYPE.
    """
    if model.type is not wanted:
        raise CallerError(
            Reason.MODEL_WRONG_TYPE,
            f"model {model.id!r} is of type {model.type.name} rather than the expected type {wanted.name};"
            f" ListModels tells each model's type",
            metadata={"model": model.id, "type": model.type.name},
        )
