"""Validates registrations: limits, whether the provider serves the model, and reserved names.

requested ──▶ as_registered   in the form of an existing registration
    └───────▶ as_served       in the form of the provider's listing; the id depends on the provider's name of the model
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
"""Limit for the aliases of a model."""
MAX_ANNOTATIONS = 64
MAX_ANNOTATION_KEY_LENGTH = 128
MAX_ANNOTATION_VALUE_LENGTH = 4096
MAX_ANNOTATION_BYTES = 64 * 1024
"""Limits for annotations: every gateway keeps them in memory and sends them with every list, watch and change. The bytes are those
of all keys and values in UTF-8, enough for fifteen values of the maximum length."""

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
    """Validate a request; whether the provider serves the model is not checked.

    The id and the provider's name are those of the request; `as_registered` and `as_served` convert them to their final form.

    Raises:
        CallerError: INVALID_REQUEST, which lists all violations; PROVIDER_NOT_FOUND.
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
    """Validate changes of a registered model; return the changed model.

    Args:
        model: The registered model.
        changes: New values by `UPDATABLE` name.
        providers: The configured providers.

    Raises:
        CallerError: INVALID_REQUEST, which lists all violations; PROVIDER_NOT_FOUND.
    """
    values = {name: getattr(model, name) for name in UPDATABLE} | dict(changes)
    kind = _kind(values["type"])
    violations = [
        *(Violation(name, "is required") for name in ("provider_id", "provider_model_id") if not values[name]),
        *_kind_violations(values["type"], kind, values["embedding_dimension"]),
        *_alias_violations(values["aliases"], model.id, model.aliases),
        # Existing annotations above a limit, which may have been higher, do not prevent other changes.
        *(_annotation_violations(values["annotations"]) if values["annotations"] != model.annotations else ()),
    ]
    if violations or kind is None:
        raise invalid_request([Violation(f"model.{each.field}", each.description) for each in violations])
    providers.get(values["provider_id"])
    values |= {"type": kind, "aliases": tuple(values["aliases"]), "annotations": dict(values["annotations"])}
    return replace(model, **values)


def as_registered(wanted: Model, known: RegisteredIndex) -> Model:
    """The requested model in the form of an existing registration, without listing the provider.

    If it is registered, its registration has the provider's name; otherwise, the name of the request is used.
    """
    for model_id in (wanted.id, scoped_id(wanted.provider_id, wanted.id)):
        model = known.find(model_id)
        if model is not None and model.provider_id == wanted.provider_id:
            served = ServedModel(model.provider_model_id, model.engine_root, model.base_model)
            if served_as(wanted.provider_model_id, [served]) is not None:
                return _named(wanted, served.id)
    return _named(wanted, wanted.provider_model_id)


async def as_served(wanted: Model, providers: ListingCache, token: str | None, *, named: bool) -> Model:
    """The requested model in the form of a new listing of its provider, to be registered.

    Args:
        wanted: The requested model.
        providers: The listings.
        token: The caller's token.
        named: Whether the request names the provider; see `Providers.token_for`.

    Raises:
        CallerError: INVALID_REQUEST if an alias equals the final id.
        RegistryError: MODEL_NOT_SERVED.
        ProviderError: The provider cannot be listed.
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
    """Check that no name begins with a provider's id, except "provider/served name" of the model itself.

    Such a name is refused even if the provider does not serve it now, because it may later.

    Args:
        wanted: The model to register.
        provider_ids: The ids of the configured providers.
        before: The registered model that is updated; its names are accepted unless the target changes.

    Raises:
        CallerError: INVALID_REQUEST, which lists all reserved names.
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
    """The id of a registration: "provider/name" if the requested id is the provider's own name, else the requested id."""
    return scoped_id(provider_id, served_name) if model_id == served_name else model_id


def _named(wanted: Model, served_name: str) -> Model:
    return replace(wanted, id=_final_id(wanted.id, wanted.provider_id, served_name), provider_model_id=served_name)


def _name_violations(field: str, name: str) -> Iterable[Violation]:
    if not name:
        yield Violation(field, "is required")
    if len(name) > MAX_NAME_LENGTH:
        yield Violation(field, f"has {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed")
    # Other alphabets have letters that look like ASCII ones, and several encodings of one letter. Names on the public hubs are
    # ASCII. Only the allowed length is checked, because checking 8 MiB takes a second.
    if not all("!" <= character <= "~" for character in name[:MAX_NAME_LENGTH]):
        yield Violation(field, "must be printable ASCII, without white space; in annotations any text is allowed")


def _alias_violations(aliases: Sequence[str], model_id: str, before: Sequence[str] = ()) -> Iterable[Violation]:
    """The violations of aliases; an alias that the model already has may have any characters."""
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
