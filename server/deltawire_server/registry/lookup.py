"""A name to its model: registered or, failing that, discovered.

    a name ──► id ──► alias ──► "provider/served name" ──► served name of just one provider
               └── memory ──┘   └── memory, what the providers said last, what they say now ─┘

Registered names come first, so whoever registers decides what a name means. Providers are asked only about names that
lead nowhere without: a call for what is there waits for nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason, Violation, invalid_request
from deltawire_server.registry.messages import cut, quoted, some
from deltawire_server.registry.model import Model, ModelSource, ModelType, scoped_id
from deltawire_server.registry.view import is_new

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from deltawire_server.registry.known import Known
    from deltawire_server.registry.listings import Listings


async def find(name: str, known: Known, listings: Listings) -> Model:
    """The model of this name. Asks only the providers that it needs to.

    Raises:
        CallerError: MODEL_NOT_FOUND, whose message lists some that there are; MODEL_AMBIGUOUS.
        ProviderError: Nobody who could serve it can be asked.
    """
    model = known.find(name)
    if model is not None:
        return model
    # First the providers that the name names: the others may be slow, and are asked only if that leads nowhere.
    scopes = scopes_of(name, listings.provider_ids)
    found: list[Model] = []
    for have in (listings.recall, listings.fetch):
        for wanted in (scopes, dict.fromkeys(listings.provider_ids, name)):
            found = found or await _serving(wanted, known, listings, have)
    if len(found) > 1:
        raise _ambiguous(name, found)
    if not found:
        raise _not_found(name, tuple(scopes) or listings.provider_ids, known, listings)
    return found[0]


async def only_chat_model(known: Known, listings: Listings) -> Model:
    """The chat model, for a request that names none. A model and its registrations count as one, by its first registered id.

    Raises:
        CallerError: INVALID_REQUEST, which lists the models to choose from; MODEL_NOT_FOUND if there is none.
        ProviderError: There is none, and a provider cannot be asked.
    """
    await listings.recall(listings.provider_ids)
    if not any(model.type is ModelType.LLM for model in all_models(known, listings).values()):
        await listings.fetch(listings.provider_ids)
    chat_models: dict[tuple[str, str], Model] = {}
    models = all_models(known, listings).values()
    for model in sorted(models, key=lambda model: (model.source is ModelSource.DISCOVERED, model.id)):
        if model.type is ModelType.LLM:
            chat_models.setdefault(model.target, model)
    if len(chat_models) > 1:
        names = some(sorted(model.id for model in chat_models.values()))
        raise invalid_request(
            [Violation("chat.model", f"is required if several chat models are served; there are: {names}")]
        )
    for model in chat_models.values():
        return model
    raise _not_found("", listings.provider_ids, known, listings)


def scopes_of(name: str, provider_ids: Iterable[str]) -> dict[str, str]:
    """Each way to read a name as a provider and its served name: both may hold slashes."""
    return {
        provider_id: name[len(provider_id) + 1 :] for provider_id in provider_ids if name.startswith(f"{provider_id}/")
    }


def all_models(known: Known, listings: Listings) -> dict[str, Model]:
    """By id: the registered models, and what was listed unless it or its name is registered."""
    return {model.id: model for model in listings.models() if is_new(model, known)} | known.models


async def _serving(
    wanted: Mapping[str, str],
    known: Known,
    listings: Listings,
    have: Callable[[Iterable[str]], Awaitable[None]],
) -> list[Model]:
    """The models that providers have under the names wanted of them; whose is registered is not asked.

    Args:
        wanted: By provider.
        known: What is registered.
        listings: Of the providers.
        have: Their method that gets those that are looked at.
    """
    registered = {provider_id: known.serving(provider_id, served_name) for provider_id, served_name in wanted.items()}
    await have(provider_id for provider_id, model in registered.items() if model is None)
    models = (registered[provider_id] or listings.find(provider_id, name) for provider_id, name in wanted.items())
    return [model for model in models if model is not None]


def _ambiguous(name: str, found: Sequence[Model]) -> CallerError:
    providers = [model.provider_id for model in found]
    ways = " or ".join(repr(scoped_id(*model.target)) for model in found[:2])
    return CallerError(
        Reason.MODEL_AMBIGUOUS,
        f"{quoted(name)} is served by several providers: {some(providers)}; call it as {ways}",
        metadata={"model": cut(name), "providers": ", ".join(providers)},
    )


def _not_found(name: str, asked: Sequence[str], known: Known, listings: Listings) -> DeltawireError:
    """Why nothing was found: there is nothing, or those who could know it are away."""
    failures = [listings.failures[provider_id] for provider_id in asked if provider_id in listings.failures]
    if failures and len(failures) == len(asked):
        if all(failure.code is not Code.UNAVAILABLE for failure in failures):
            # Refused, misconfigured: that is what has to be known, and waiting would not help.
            return failures[0]
        return ProviderError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"{_described(name)} cannot be looked up now: no answer from provider {some(asked)}: {failures[0].message}",
            metadata={"provider": ", ".join(asked)},
            retry_after=1.0,
        )
    names = some(sorted(all_models(known, listings))) or "none"
    away = f"; without an answer: {some(sorted(listings.failures))}" if listings.failures else ""
    return CallerError(
        Reason.MODEL_NOT_FOUND,
        f"{_described(name)} not found; there are: {names}{away}",
        metadata={"model": cut(name)},
    )


def _described(name: str) -> str:
    """What was looked for: a model by its name, or any chat model."""
    return f"model {quoted(name)}" if name else "a chat model"
