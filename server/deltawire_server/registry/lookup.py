"""Resolves a name to a model: a registered one first, then a discovered one.

    name ──▶ id ──▶ alias ──▶ "provider/served name" ──▶ served name of exactly one provider
             └─ memory ──┘    └─ memory, then the last listings, then new listings ───────┘

A name that begins with a provider's id refers only to that provider; see `scopes`. New listings are requested only for names that
are not found otherwise, so a call for a known model never waits for a provider.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason, Violation, invalid_request
from deltawire_server.registry.messages import cut, quoted, some
from deltawire_server.registry.model import Model, ModelType, scoped_id
from deltawire_server.registry.scopes import registered, scopes_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from deltawire_server.registry.listings import Listings
    from deltawire_server.registry.registered_index import RegisteredIndex


async def find(name: str, known: RegisteredIndex, listings: Listings) -> Model:
    """The model of this name. Only providers that may serve it are listed.

    Raises:
        CallerError: MODEL_NOT_FOUND, with some existing names in the message; MODEL_AMBIGUOUS.
        ProviderError: No provider that may serve it answers.
    """
    model = registered(name, known, listings.provider_ids)
    if model is not None:
        if not listings.permits(model.id):
            raise _not_found(name, (), known, listings)
        return model
    # If the name begins with a provider's id, this provider may serve the rest of the name, or the whole name.
    scopes = scopes_of(name, listings.provider_ids)
    asked = tuple(scopes) or listings.provider_ids
    found: list[Model] = []
    for have in (listings.recall, listings.fetch):
        for wanted in (scopes, dict.fromkeys(asked, name)):
            found = found or await _serving(wanted, known, listings, have)
    if len(found) > 1:
        raise _ambiguous(name, found)
    if not found:
        raise _not_found(name, asked, known, listings)
    return found[0]


async def only_chat_model(known: RegisteredIndex, listings: Listings) -> Model:
    """The only chat model, for a request without a name. A model and its registrations count as one, by its first registered id.

    Raises:
        CallerError: INVALID_REQUEST if there are several, with their names in the message; MODEL_NOT_FOUND if there is none.
        ProviderError: There is none, and no provider answers.
    """
    await listings.recall(listings.provider_ids)
    chat_models = _chat_models(known, listings)
    if not chat_models:
        await listings.fetch(listings.provider_ids)
        chat_models = _chat_models(known, listings)
    if len(chat_models) > 1:
        raise invalid_request(
            [
                Violation(
                    "chat.model",
                    f"is required if several chat models are served; there are: {some(sorted(chat_models.values()))}",
                )
            ]
        )
    for target, model_id in chat_models.items():
        model = known.models.get(model_id) or listings.find(*target)
        if model is not None:
            return model
    raise _not_found("", listings.provider_ids, known, listings)


def _chat_models(known: RegisteredIndex, listings: Listings) -> dict[tuple[str, str], str]:
    """The ids of the chat models by target: the first registered id, else the id of the discovered model.

    Discovered models are not built here, because there may be very many.
    """
    found: dict[tuple[str, str], str] = {}
    for model_id, model in sorted(known.models.items()):
        if model.type is ModelType.LLM and listings.permits(model_id):
            found.setdefault(model.target, model_id)
    for target in listings.targets():
        if not known.has_target(target):
            found[target] = scoped_id(*target)
    return found


async def _serving(
    wanted: Mapping[str, str],
    known: RegisteredIndex,
    listings: Listings,
    have: Callable[[Iterable[str]], Awaitable[None]],
) -> list[Model]:
    """The models of served names. A listing is loaded only if no model is registered for the name.

    Args:
        wanted: The served name by provider.
        known: The registered models.
        listings: The listings.
        have: The method of `listings` that loads them.
    """
    serving = {provider_id: known.serving(provider_id, served_name) for provider_id, served_name in wanted.items()}
    await have(provider_id for provider_id, model in serving.items() if model is None)
    models = (serving[provider_id] or listings.find(provider_id, name) for provider_id, name in wanted.items())
    return [model for model in models if model is not None and listings.permits(model.id)]


def _ambiguous(name: str, found: Sequence[Model]) -> CallerError:
    providers = [model.provider_id for model in found]
    ways = " or ".join(repr(scoped_id(*model.target)) for model in found[:2])
    return CallerError(
        Reason.MODEL_AMBIGUOUS,
        f"{quoted(name)} is served by several providers: {some(providers)}; call it as {ways}",
        metadata={"model": cut(name), "providers": ", ".join(providers)},
    )


def _not_found(name: str, asked: Sequence[str], known: RegisteredIndex, listings: Listings) -> DeltawireError:
    """The error if no model was found: it does not exist, or the providers that may serve it do not answer."""
    failures = [listings.failures[provider_id] for provider_id in asked if provider_id in listings.failures]
    if failures and len(failures) == len(asked):
        if all(failure.code is not Code.UNAVAILABLE for failure in failures):
            # A rejected token or a wrong setting: a retry would not help.
            return failures[0]
        return ProviderError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"{_described(name)} cannot be looked up now: no answer from provider {some(asked)}: {failures[0].message}",
            metadata={"provider": ", ".join(asked)},
            retry_after=1.0,
        )
    discovered_ids = {scoped_id(*target) for target in listings.targets() if not known.has_target(target)}
    names = some(sorted(discovered_ids | {each for each in known.models if listings.permits(each)})) or "none"
    away = f"; without an answer: {some(sorted(listings.failures))}" if listings.failures else ""
    if any(failure.reason is Reason.UPSTREAM_UNAUTHENTICATED for failure in listings.failures.values()):
        away += ", and a token may help: it is sent to the provider that the name begins with, as in provider/model"
    scopes = scopes_of(name, listings.provider_ids)
    reserved = ""
    if scopes:
        reserved = (
            f": only provider {some(scopes)} is asked for names that begin with its id, and another provider's model is called"
            f" as {quoted(f'provider/{name}')}"
        )
    return CallerError(
        Reason.MODEL_NOT_FOUND,
        f"{_described(name)} not found{reserved}; there are: {names}{away}",
        metadata={"model": cut(name)},
    )


def _described(name: str) -> str:
    """The model that was requested: by its name, or any chat model."""
    return f"model {quoted(name)}" if name else "a chat model"
