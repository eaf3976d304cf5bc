"""What can be registered: requests within the limits, of models that are served, under names that are not reserved.

requested ──► as_registered   is it there already?
    └───────► as_served       what its provider calls it
                  └── the identifier rule, on the provider's own name of the model
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltawire_server.errors import Reason, RegistryError, Violation, invalid_request
from deltawire_server.registry.catalog import served_as
from deltawire_server.registry.messages import MAX_NAME_LENGTH, cut, quoted, some
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelType, scoped_id
from deltawire_server.registry.scopes import may_have, scopes_of
from deltawire_server.registry.view import with_served
from deltawire_server.upstream.base import ServedModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from deltawire_server.registry.listing_cache import ListingCache
    from deltawire_server.registry.registered_index import RegisteredIndex
    from deltawire_server.upstream.providers import Providers

MAX_ALIASES = 32
"""Aliases of a model: people use a few; this keeps a registration small."""
MAX_ANNOTATIONS = 64
MAX_ANNOTATION_KEY_LENGTH = 128
MAX_ANNOTATION_VALUE_LENGTH = 4096
MAX_ANNOTATION_BYTES = 64 * 1024
"""Notes, not documents: every gateway keeps them in memory and sends them with every list, watch and change. The sum is that of
all keys and values in UTF-8, room for fifteen values of the greatest length."""

_TYPES: Mapping[int, ModelType] = MappingProxyType({0: ModelType.LLM} | {kind.value: kind for kind in ModelType})


def requested(
    providers: Providers,
    model_id: str,
    provider_id: str,
    provider_model_id: str,
    model_type: ModelType | int,
    aliases: Sequence[str],
    annotations: Mapping[str, str],
    embedding_dimension: int | None,
) -> Model:
    """The model that a request describes, if it is within all limits; its provider may not serve it.

    Its id and its name at the provider are those of the request: `as_registered` and `as_served` give them their
    final form.

    Raises:
        CallerError: INVALID_REQUEST, which lists all broken rules; PROVIDER_NOT_FOUND.
    """
    violations = [*_name_violations("model_id", model_id), *_annotation_violations(annotations)]
    if not provider_id and len(providers.ids) == 1:
        (provider_id,) = providers.ids
    if not provider_id:
        known = some(providers.ids) or "none"
        violations.append(Violation("provider_id", f"is required unless there is one provider; there are: {known}"))
    kind = _kind(model_type)
    violations += _kind_violations(model_type, kind, embedding_dimension)
    provider_model_id = provider_model_id or model_id
    violations += _alias_violations(aliases, _final_id(model_id, provider_id, provider_model_id))
    if violations or kind is None:
        raise invalid_request(violations)
    providers.get(provider_id)
    return Model(
        model_id,
        provider_id,
        provider_model_id,
        kind,
        tuple(aliases),
        dict(annotations),
        embedding_dimension=embedding_dimension,
    )


UPDATABLE = ("provider_id", "provider_model_id", "type", "aliases", "annotations", "embedding_dimension")
"""The fields of a registered model that can change. The id cannot, because callers use it."""


def changed(model: Model, changes: Mapping[str, Any], providers: Providers) -> Model:
    """A registered model with changes, if it keeps all limits then.

    Args:
        model: As it is.
        changes: New values by `UPDATABLE` name.
        providers: All there are.

    Raises:
        CallerError: INVALID_REQUEST, which lists all broken rules; PROVIDER_NOT_FOUND.
    """
    values = {name: getattr(model, name) for name in UPDATABLE} | dict(changes)
    kind = _kind(values["type"])
    violations = [
        *(Violation(name, "is required") for name in ("provider_id", "provider_model_id") if not values[name]),
        *_kind_violations(values["type"], kind, values["embedding_dimension"]),
        *_alias_violations(values["aliases"], model.id, model.aliases),
        # Those that it has, from before a limit was lower, do not prevent other changes.
        *(_annotation_violations(values["annotations"]) if values["annotations"] != model.annotations else ()),
    ]
    if violations or kind is None:
        raise invalid_request([Violation(f"model.{each.field}", each.description) for each in violations])
    providers.get(values["provider_id"])
    values |= {"type": kind, "aliases": tuple(values["aliases"]), "annotations": dict(values["annotations"])}
    return replace(model, **values)


def as_registered(wanted: Model, known: RegisteredIndex) -> Model:
    """What is requested in the form in which it is registered, if it is; no provider is asked.

    What its provider called the model is then known; for a model that is not registered it is taken to be the name of
    the request.
    """
    for model_id in (wanted.id, scoped_id(wanted.provider_id, wanted.id)):
        model = known.find(model_id)
        if model is not None and model.provider_id == wanted.provider_id:
            served = ServedModel(model.provider_model_id, model.engine_root, model.base_model)
            if served_as(wanted.provider_model_id, [served]) is not None:
                return _named(wanted, served.id)
    return _named(wanted, wanted.provider_model_id)


async def as_served(wanted: Model, providers: ListingCache, token: str | None, *, named: bool) -> Model:
    """What is requested in the form in which it is to be registered, as its provider, asked anew, lists it.

    Args:
        wanted: As it is requested.
        providers: What they serve.
        token: The caller's.
        named: Whether the request names the provider; see `Providers.token_for`.

    Raises:
        CallerError: INVALID_REQUEST if an alias is what the id has become.
        RegistryError: MODEL_NOT_SERVED.
        ProviderError: The provider cannot be asked.
    """
    listing = await providers.listing(wanted.provider_id, token, fresh=True, named=named)
    served = served_as(wanted.provider_model_id, tuple(listing.values()))
    if served is not None:
        model = with_served(_named(wanted, served.id), served)
        if violations := list(_alias_violations(model.aliases, model.id)):
            raise invalid_request(violations)
        return model
    names = some(listing) or "nothing"
    raise RegistryError(
        Reason.MODEL_NOT_SERVED,
        f"model {quoted(wanted.provider_model_id)} is not being served by provider {wanted.provider_id!r};"
        f" it serves: {names}",
        metadata={"model": cut(wanted.provider_model_id), "provider": wanted.provider_id},
    )


def refuse_reserved_names(wanted: Model, provider_ids: Sequence[str], before: Model | None = None) -> None:
    """Check that no name begins with a provider's id, but "provider/served name" of the model itself.

    Whether that provider serves such a name now does not matter: it may do so later.

    Args:
        wanted: As it is to be registered.
        provider_ids: All configured providers.
        before: As it is registered already: its names do not prevent other changes, unless it is to lead elsewhere.

    Raises:
        CallerError: INVALID_REQUEST, which lists all such names.
    """
    fields = {wanted.id: "model_id" if before is None else "provider_id"}
    fields |= {alias: f"aliases[{place}]" for place, alias in enumerate(wanted.aliases)}
    own = before.names if before is not None and before.target == wanted.target else ()
    violations = [
        Violation(
            field if before is None else f"model.{field}",
            f"{quoted(name)} is reserved for what provider {some(scopes_of(name, provider_ids))} serves under that name:"
            " choose a name that begins with no provider's id",
        )
        for name, field in fields.items()
        if name not in own and not may_have(name, wanted, provider_ids)
    ]
    if violations:
        raise invalid_request(violations)


def _kind(model_type: ModelType | int) -> ModelType | None:
    return model_type if isinstance(model_type, ModelType) else _TYPES.get(model_type)


def _kind_violations(model_type: ModelType | int, kind: ModelType | None, dimension: int | None) -> Iterable[Violation]:
    if kind is None:
        yield Violation("type", f"{model_type} is not a valid model type")
    elif kind is ModelType.EMBEDDING and dimension is None:
        yield Violation("embedding_dimension", "is required for an EMBEDDING model: how many numbers a vector has")
    elif kind is not ModelType.EMBEDDING and dimension is not None:
        yield Violation("embedding_dimension", f"is for EMBEDDING models; the type is {kind.name}")
    if dimension is not None and not 1 <= dimension <= MAX_CONTEXT_TOKENS:
        yield Violation("embedding_dimension", f"must be 1 to {MAX_CONTEXT_TOKENS}, is {dimension}")


def _final_id(model_id: str, provider_id: str, served_name: str) -> str:
    """The identifier rule: an id that differs from the provider's name is kept; the provider's own name gets a scope."""
    return scoped_id(provider_id, served_name) if model_id == served_name else model_id


def _named(wanted: Model, served_name: str) -> Model:
    return replace(wanted, id=_final_id(wanted.id, wanted.provider_id, served_name), provider_model_id=served_name)


def _name_violations(field: str, name: str) -> Iterable[Violation]:
    if not name:
        yield Violation(field, "is required")
    if len(name) > MAX_NAME_LENGTH:
        yield Violation(field, f"has {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed")
    # Other alphabets have letters that look like these, and several spellings of one letter: a name that looks like another
    # one must be that one. The names of models on the public hubs are within this. No further than a name may be long: each
    # character is looked at by itself, which takes a second for 8 MiB.
    if not all("!" <= character <= "~" for character in name[:MAX_NAME_LENGTH]):
        yield Violation(field, "must be printable ASCII, without white space; in annotations any text is allowed")


def _alias_violations(aliases: Sequence[str], model_id: str, before: Sequence[str] = ()) -> Iterable[Violation]:
    """What is wrong with aliases; one that the model has already may have any characters."""
    if len(aliases) > MAX_ALIASES:
        yield Violation("aliases", f"are {len(aliases)}; at most {MAX_ALIASES} are allowed")
    seen = {model_id}
    # Aliases beyond the limit are not checked: the violation above covers them.
    for position, alias in enumerate(aliases[:MAX_ALIASES]):
        field = f"aliases[{position}]"
        if alias not in before:
            yield from _name_violations(field, alias)
        if alias in seen:
            yield Violation(field, "repeats the id or another alias")
        seen.add(alias)


def _annotation_violations(annotations: Mapping[str, str]) -> Iterable[Violation]:
    if len(annotations) > MAX_ANNOTATIONS:
        yield Violation("annotations", f"has {len(annotations)} entries; at most {MAX_ANNOTATIONS} are allowed")
        return
    for key, value in annotations.items():
        if not 1 <= len(key) <= MAX_ANNOTATION_KEY_LENGTH:
            yield Violation("annotations", f"key {quoted(key)} must have 1 to {MAX_ANNOTATION_KEY_LENGTH} characters")
        if len(value) > MAX_ANNOTATION_VALUE_LENGTH:
            field = f"annotations[{quoted(key)}]"
            yield Violation(field, f"has {len(value)} characters; at most {MAX_ANNOTATION_VALUE_LENGTH} are allowed")
    size = sum(len(text.encode()) for text in (*annotations, *annotations.values()))
    if size > MAX_ANNOTATION_BYTES:
        yield Violation(
            "annotations",
            f"have {size} bytes of keys and values in all; at most {MAX_ANNOTATION_BYTES} are allowed: keep documents"
            " elsewhere, and a link to them here",
        )
