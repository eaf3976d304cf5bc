"""Names to models, models to providers.

    a name ──► id ──► alias ──► "provider/served name" ──► served name of just one provider
               └── memory ──┘   └────── memory, else the providers' listings ──────────────┘

Registered models are read from the database once and kept in memory: a look-up never waits for the database, and goes
on when it is away. A write goes to the database first and to memory when it has succeeded. What is not registered is
discovered: looked up in the listings of the providers, which `Providers` fetches once for all who ask and keeps for
five seconds. vLLM answers with its first served name whatever it was asked by, so answers are never matched on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from deltawire_server.errors import (
    CallerError,
    Code,
    DeltawireError,
    ProviderError,
    Reason,
    RegistryError,
    Violation,
    invalid_request,
)
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelSource, ModelType, scoped_id
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

    from deltawire_server.registry.store import Store
    from deltawire_server.upstream.base import Provider, ServedModel
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)

MAX_NAME_LENGTH = 256
"""Characters in an id or alias: twice the longest names on the public hubs, and error messages stay readable."""
MAX_ALIASES = 32
"""Aliases of a model: people use a few; this keeps a registration small."""
MAX_METADATA_ENTRIES = 64
MAX_METADATA_KEY_LENGTH = 128
MAX_METADATA_VALUE_LENGTH = 4096
"""Notes, not documents: the three together keep a model within a quarter of a megabyte."""
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
"""Models in a page: plenty for one call, and made within milliseconds."""
MAX_PAGE_BYTES = 1024 * 1024
"""Text in a page, give or take its last model: well within the 4 MiB that clients receive by default."""
MAX_NAMES_SHOWN = 20
MAX_NAMES_LENGTH = 600
"""Names, and characters of them, in a message: it travels in the trailers, whose limit leaves it about a thousand."""

T = TypeVar("T")

Listings = dict[str, "tuple[ServedModel, ...] | DeltawireError"]
"""What each provider serves, or why it did not say."""


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
        self._known = _Known(())
        self._lock = asyncio.Lock()
        self._writes: set[asyncio.Task[object]] = set()

    async def open(self) -> None:
        """Open the store and read all registered models into memory; then call the others. `close` even if this fails.

        Raises:
            RegistryError: The database cannot be used.
        """
        await self._store.open()
        self._known = _Known(await self._store.list())
        _log.info("registry opened", registered_models=len(self._known.models))

    async def close(self) -> None:
        """Let the writes under way finish, then close the store."""
        if self._writes:
            await asyncio.wait(self._writes)
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
        aliases, metadata = tuple(aliases), dict(metadata or {})
        wanted = self._checked(model_id, provider_id, provider_model_id, model_type, aliases, metadata)
        stored = self._known.same(wanted)
        if stored is not None:
            return stored
        wanted = _with_served(wanted, await self._serving(wanted, token))
        await self._refuse_served_names(wanted, token)
        now = datetime.now(UTC)
        return await self._to_the_end(self._insert(replace(wanted, create_time=now, update_time=now)))

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
        if await self._to_the_end(self._delete(name)):
            return
        model = await self._find(name, token)
        if model.source is ModelSource.DISCOVERED:
            raise RegistryError(
                Reason.MODEL_DISCOVERED,
                f"model {model.id!r} is not registered but discovered: it is there for as long as provider"
                f" {model.provider_id!r} serves it",
                metadata={"model": model.id},
            )
        raise CallerError(
            Reason.MODEL_NOT_FOUND,
            f"no registered model has the id or alias {_shown(name)}; it leads to model {model.id!r}: unregister that",
            metadata={"model": _cut(name)},
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
        return await self._find(name, token)

    async def resolve(self, name: str, token: str | None = None) -> Resolution:
        """The model of this name and who serves it.

        Args:
            name: As for `get`.
            token: The caller's token for the providers.

        Raises:
            CallerError: As for `get`, and PROVIDER_NOT_FOUND if the model's provider is no longer configured.
            ProviderError: As for `get`.
        """
        model = await self._find(name, token)
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
        violations = []
        if page_size < 0:
            violations.append(Violation("page_size", f"must not be negative, is {page_size}"))
        after = _decoded(page_token)
        if after is None:
            violations.append(Violation("page_token", "is not a next_page_token of this call"))
        if violations:
            raise invalid_request(violations)
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        listings: Listings = {}
        await self._fetch(self._providers.ids, token, listings)
        models = {**self._discovered(listings), **self._known.models}
        # `after` is empty for the first page, and no id is empty.
        ids = sorted(model_id for model_id in models if model_id > (after or ""))
        page: list[Model] = []
        room = MAX_PAGE_BYTES
        for model_id in ids[:size]:
            page.append(models[model_id])
            room -= _bytes_of(models[model_id])
            if room < 0:
                break
        return page, _encoded(page[-1].id) if len(ids) > len(page) else "", tuple(sorted(_failures(listings)))

    def _checked(
        self,
        model_id: str,
        provider_id: str,
        provider_model_id: str,
        model_type: ModelType | int,
        aliases: tuple[str, ...],
        metadata: Mapping[str, str],
    ) -> Model:
        """What is to be registered, if the request keeps all rules; it may still be served by nobody."""
        violations = [*_name_violations("model_id", model_id), *_metadata_violations(metadata)]
        if not provider_id:
            if len(self._providers.ids) == 1:
                (provider_id,) = self._providers.ids
            else:
                known = _some(self._providers.ids) or "none"
                violations.append(
                    Violation("provider_id", f"is required unless there is one provider; there are: {known}")
                )
        provider_model_id = provider_model_id or model_id
        number = model_type.value if isinstance(model_type, ModelType) else model_type or ModelType.LLM.value
        kind = _TYPES.get(number)
        if kind is None:
            violations.append(Violation("type", f"{number} is no model type"))
        final_id = model_id if model_id != provider_model_id else scoped_id(provider_id, provider_model_id)
        violations += _alias_violations(aliases, final_id)
        if violations or kind is None:
            raise invalid_request(violations)
        self._providers.get(provider_id)
        return Model(final_id, provider_id, provider_model_id, kind, aliases, metadata)

    async def _serving(self, wanted: Model, token: str | None) -> ServedModel:
        """The provider's own entry for what is to be registered, as of now."""
        listing = await self._providers.listing(wanted.provider_id, token, fresh=True)
        for served in listing:
            if served.id == wanted.provider_model_id:
                return served
        names = _some(served.id for served in listing) or "nothing"
        raise RegistryError(
            Reason.MODEL_NOT_SERVED,
            f"model {_shown(wanted.provider_model_id)} is not being served by provider {wanted.provider_id!r};"
            f" it serves: {names}",
            metadata={"model": _cut(wanted.provider_model_id), "provider": wanted.provider_id},
        )

    async def _refuse_served_names(self, wanted: Model, token: str | None) -> None:
        """Keep "provider/served name" for what the provider serves: its callers must not be led elsewhere."""
        for name in wanted.names:
            for provider_id, served_name in self._scopes(name).items():
                if (provider_id, served_name) == wanted.target:
                    continue
                listing = await self._providers.listing(provider_id, token)
                if any(served.id == served_name for served in listing):
                    raise _taken(name, name, f"is what provider {provider_id!r} serves as {served_name!r}")

    async def _insert(self, model: Model) -> Model:
        async with self._lock:
            # Someone may have been faster while the provider was asked.
            stored = self._known.same(model)
            if stored is not None:
                return stored
            if await self._store.insert(model):
                self._known.add(model)
                return model
            # The names were free in memory: another process on this database has registered in the meantime.
            self._known = _Known(await self._store.list())
            stored = self._known.same(model)
            if stored is not None:
                return stored
            raise _taken(model.id, model.id, "or an alias belongs to a record that cannot be read")

    async def _delete(self, name: str) -> bool:
        async with self._lock:
            # The database decides: it may hold what another process registered, or a record too damaged for memory.
            deleted = await self._store.delete(name)
            known = self._known.find(name)
            if known is not None:
                self._known.remove(known)
            return deleted is not None or known is not None

    async def _to_the_end(self, write: Coroutine[object, object, T]) -> T:
        """Do a write as a whole even if its caller gives up: memory must not miss what the database has."""
        task = asyncio.create_task(write)
        self._writes.add(task)
        task.add_done_callback(self._written)
        return await asyncio.shield(task)

    def _written(self, task: asyncio.Task[object]) -> None:
        self._writes.discard(task)
        if not task.cancelled():
            # Looked at here in case nobody waits any more.
            task.exception()

    async def _find(self, name: str, token: str | None) -> Model:
        model = self._known.find(name)
        if model is not None:
            return model
        listings: Listings = {}
        scopes = self._scopes(name)
        # First the providers that the name names: the others may be slow, and are asked only if that leads nowhere.
        found = await self._served(scopes, token, listings)
        if not found:
            found = await self._served(dict.fromkeys(self._providers.ids, name), token, listings)
        if len(found) > 1:
            raise _ambiguous(name, found)
        if not found:
            raise self._not_found(name, tuple(scopes) or self._providers.ids, listings)
        return found[0]

    def _scopes(self, name: str) -> dict[str, str]:
        """Each way to read a name as provider and served name: both may hold slashes."""
        return {
            provider_id: name[len(provider_id) + 1 :]
            for provider_id in self._providers.ids
            if name.startswith(f"{provider_id}/")
        }

    async def _served(self, wanted: Mapping[str, str], token: str | None, listings: Listings) -> Sequence[Model]:
        """The models that providers have under the names wanted of them, by provider; what is fetched is added."""
        registered = {
            provider_id: self._known.serving(provider_id, served_name) for provider_id, served_name in wanted.items()
        }
        await self._fetch([provider_id for provider_id, model in registered.items() if model is None], token, listings)
        found = []
        for provider_id, served_name in wanted.items():
            model = registered[provider_id]
            listing = listings.get(provider_id, ())
            if model is None and not isinstance(listing, DeltawireError):
                model = next((_discovered(provider_id, served) for served in listing if served.id == served_name), None)
            if model is not None:
                found.append(model)
        return found

    async def _fetch(self, provider_ids: Iterable[str], token: str | None, listings: Listings) -> None:
        """Add the listings that are missing, all at once."""
        missing = [provider_id for provider_id in provider_ids if provider_id not in listings]
        results = await asyncio.gather(
            *(self._providers.listing(provider_id, token) for provider_id in missing), return_exceptions=True
        )
        for provider_id, result in zip(missing, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, DeltawireError):
                raise result
            if isinstance(result, DeltawireError):
                _log.warning("provider not listed", provider=provider_id, error=result.message)
            listings[provider_id] = result

    def _discovered(self, listings: Listings) -> dict[str, Model]:
        """What is served and neither registered nor hidden behind a registered name, by id."""
        return {
            model.id: model
            for provider_id, listing in listings.items()
            if not isinstance(listing, DeltawireError)
            for model in (_discovered(provider_id, served) for served in listing)
            if self._known.serving(*model.target) is None and self._known.find(model.id) is None
        }

    def _not_found(self, name: str, asked: Sequence[str], listings: Listings) -> DeltawireError:
        """Why nothing was found: there is nothing, or those who could know it are away."""
        failures = _failures(listings)
        if asked and all(provider_id in failures for provider_id in asked):
            first = failures[asked[0]]
            if all(failures[provider_id].code is not Code.UNAVAILABLE for provider_id in asked):
                # Refused, misconfigured: that is what has to be known, and waiting would not help.
                return first
            return ProviderError(
                Reason.UPSTREAM_UNAVAILABLE,
                f"whether there is a model {_shown(name)} cannot be told now: no answer from provider"
                f" {_some(asked)}: {first.message}",
                metadata={"provider": ", ".join(asked)},
                retry_after=1.0,
            )
        names = _some(sorted({*self._known.models, *self._discovered(listings)})) or "none"
        away = f"; without an answer: {_some(sorted(failures))}" if failures else ""
        return CallerError(
            Reason.MODEL_NOT_FOUND,
            f"model {_shown(name)} not found; there are: {names}{away}",
            metadata={"model": _cut(name)},
        )


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


class _Known:
    """The registered models in memory, by every way they are looked up. Changed only under the registry's lock."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        self._targets: dict[tuple[str, str], dict[str, Model]] = {}
        for model in models:
            self.add(model)

    def add(self, model: Model) -> None:
        self.models[model.id] = model
        self._names.update(dict.fromkeys(model.names, model))
        self._targets.setdefault(model.target, {})[model.id] = model

    def remove(self, model: Model) -> None:
        del self.models[model.id]
        for name in model.names:
            del self._names[name]
        others = self._targets[model.target]
        del others[model.id]
        if not others:
            del self._targets[model.target]

    def find(self, name: str) -> Model | None:
        """The model of this id or alias."""
        return self._names.get(name)

    def serving(self, provider_id: str, served_name: str) -> Model | None:
        """The model registered for what a provider serves; of several the one with the scoped id, else the first."""
        others = self._targets.get((provider_id, served_name))
        if others is None:
            return None
        return others.get(scoped_id(provider_id, served_name)) or others[min(others)]

    def same(self, wanted: Model) -> Model | None:
        """The model that is registered just as wanted; `None` if all its names are free.

        Raises:
            RegistryError: A name is taken.
        """
        for name in wanted.names:
            owner = self.find(name)
            if owner is None:
                continue
            if owner.id != wanted.id:
                raise _taken(name, owner.id, f"already belongs to model {owner.id!r}")
            different = _differences(owner, wanted)
            if not different:
                return owner
            raise _taken(name, owner.id, f"is already registered with different {' and '.join(different)}")
        return None


_TYPES = {kind.value: kind for kind in ModelType}


def _differences(stored: Model, wanted: Model) -> Sequence[str]:
    """The fields in which two registrations of an id differ. The order of aliases means nothing."""
    pairs = {
        "provider_id": (stored.provider_id, wanted.provider_id),
        "provider_model_id": (stored.provider_model_id, wanted.provider_model_id),
        "type": (stored.type, wanted.type),
        "aliases": (set(stored.aliases), set(wanted.aliases)),
        "metadata": (stored.metadata, wanted.metadata),
    }
    return [field for field, (old, new) in pairs.items() if old != new]


def _with_served(model: Model, served: ServedModel) -> Model:
    tokens = served.max_context_tokens
    # A number that cannot be is as good as none, and must not fail the call.
    known = tokens is not None and 0 <= tokens <= MAX_CONTEXT_TOKENS
    return replace(model, max_context_tokens=tokens if known else None, root=served.root, parent=served.parent)


def _discovered(provider_id: str, served: ServedModel) -> Model:
    model = Model(scoped_id(provider_id, served.id), provider_id, served.id, source=ModelSource.DISCOVERED)
    return _with_served(model, served)


def _bytes_of(model: Model) -> int:
    texts = (*model.names, *model.target, model.root, model.parent, *model.metadata, *model.metadata.values())
    return sum(len(text.encode()) for text in texts)


def _failures(listings: Listings) -> dict[str, DeltawireError]:
    return {provider_id: listing for provider_id, listing in listings.items() if isinstance(listing, DeltawireError)}


def _taken(name: str, model_id: str, why: str) -> RegistryError:
    return RegistryError(
        Reason.MODEL_ALREADY_EXISTS,
        f"the name {_shown(name)} {why}; unregister that one first, or choose another name",
        metadata={"model": model_id, "name": name},
    )


def _ambiguous(name: str, found: Sequence[Model]) -> CallerError:
    providers = [model.provider_id for model in found]
    ways = " or ".join(repr(scoped_id(*model.target)) for model in found[:2])
    return CallerError(
        Reason.MODEL_AMBIGUOUS,
        f"{_shown(name)} is served by several providers: {_some(providers)}; call it as {ways}",
        metadata={"model": _cut(name), "providers": ", ".join(providers)},
    )


def _name_violations(field: str, name: str) -> Iterable[Violation]:
    if not name:
        yield Violation(field, "is required")
    if len(name) > MAX_NAME_LENGTH:
        yield Violation(field, f"has {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed")
    if not all(character.isprintable() and not character.isspace() for character in name):
        yield Violation(field, "must be printable, without white space")


def _alias_violations(aliases: Sequence[str], model_id: str) -> Iterable[Violation]:
    if len(aliases) > MAX_ALIASES:
        yield Violation("aliases", f"are {len(aliases)}; at most {MAX_ALIASES} are allowed")
    seen = {model_id}
    # Those beyond the limit are not looked at: one violation tells all about them.
    for position, alias in enumerate(aliases[:MAX_ALIASES]):
        field = f"aliases[{position}]"
        yield from _name_violations(field, alias)
        if alias in seen:
            yield Violation(field, "repeats the id or another alias")
        seen.add(alias)


def _metadata_violations(metadata: Mapping[str, str]) -> Iterable[Violation]:
    if len(metadata) > MAX_METADATA_ENTRIES:
        yield Violation("metadata", f"has {len(metadata)} entries; at most {MAX_METADATA_ENTRIES} are allowed")
        return
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_LENGTH:
            yield Violation("metadata", f"key {_shown(key)} must have 1 to {MAX_METADATA_KEY_LENGTH} characters")
        if len(value) > MAX_METADATA_VALUE_LENGTH:
            field = f"metadata[{_shown(key)}]"
            yield Violation(field, f"has {len(value)} characters; at most {MAX_METADATA_VALUE_LENGTH} are allowed")


def _encoded(model_id: str) -> str:
    return base64.urlsafe_b64encode(model_id.encode()).decode()


def _decoded(page_token: str) -> str | None:
    """The id in a page token; `None` if it holds none."""
    try:
        return base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def _cut(name: str) -> str:
    """A caller's name, short enough for the trailers."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"


def _shown(name: str) -> str:
    return repr(_cut(name))


def _some(names: Iterable[str]) -> str:
    """Names for a message: at most twenty, and how many more there are; empty if there are none."""
    names = list(names)
    shown: list[str] = []
    for name in names[:MAX_NAMES_SHOWN]:
        if shown and sum(map(len, shown)) + len(name) > MAX_NAMES_LENGTH:
            break
        shown.append(_cut(name))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
