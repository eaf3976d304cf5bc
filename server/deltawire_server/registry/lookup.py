"""A name to its model: registered or, failing that, discovered.

    a name ──► id ──► alias ──► "provider/served name" ──► served name of just one provider
               └── memory ──┘   └── memory, what the providers said last, what they say now ─┘

Registered names come first. A name that begins with a provider's id leads to that provider or nowhere; see `scopes`.
Providers are called only for names that nothing else resolves: a call for a known model waits for no provider.
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
    """The model of this name. Asks only the providers that it needs to.

    Raises:
        CallerError: MODEL_NOT_FOUND, whose message lists some that there are; MODEL_AMBIGUOUS.
        ProviderError: No provider that could serve it answers.
    """
    model = registered(name, known, listings.provider_ids)
    if model is not None:
        return model
    # A provider that the name begins with is the only one asked; it may serve the rest of the name, or all of it.
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
    """The chat model, for a request that names none. A model and its registrations count as one, by its first registered id.

    Raises:
        CallerError: INVALID_REQUEST, which lists the models to choose from; MODEL_NOT_FOUND if there is none.
        ProviderError: There is none, and a provider cannot be asked.
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
    """What can chat, by target: the first id that is registered for it, else the id that it is discovered by.

    A discovered model is only named here: there may be very many of them.
    """
    found: dict[tuple[str, str], str] = {}
    for model_id, model in sorted(known.models.items()):
        if model.type is ModelType.LLM:
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
    """The models that providers have under the names wanted of them; whose is registered is not asked.

    Args:
        wanted: By provider.
        known: What is registered.
        listings: Of the providers.
        have: Their method that gets those that are looked at.
    """
    serving = {provider_id: known.serving(provider_id, served_name) for provider_id, served_name in wanted.items()}
    await have(provider_id for provider_id, model in serving.items() if model is None)
    models = (serving[provider_id] or listings.find(provider_id, name) for provider_id, name in wanted.items())
    return [model for model in models if model is not None]


def _ambiguous(name: str, found: Sequence[Model]) -> CallerError:
    providers = [model.provider_id for model in found]
    ways = " or ".join(repr(scoped_id(*model.target)) for model in found[:2])
    return CallerError(
        Reason.MODEL_AMBIGUOUS,
        f"{quoted(name)} is served by several providers: {some(providers)}; call it as {ways}",
        metadata={"model": cut(name), "providers": ", ".join(providers)},
    )


def _not_found(name: str, asked: Sequence[str], known: RegisteredIndex, listings: Listings) -> DeltawireError:
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
    discovered_ids = {scoped_id(*target) for target in listings.targets() if not known.has_target(target)}
    names = some(sorted(discovered_ids | known.models.keys())) or "none"
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
    """What was looked for: a model by its name, or any chat model."""
    return f"model {quoted(name)}" if name else "a chat model"
