"""Names that begin with a provider's id and a slash: they are reserved for the models of that provider.

If an id or alias "b/adapter" resolved to another provider, that provider would receive prompts and tokens that callers intend for
b. So such a name is refused at registration. A name that was registered before b was configured cannot be called while b is
configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.registry.catalog import served_as
from deltawire_server.upstream.base import ServedModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registered_index import RegisteredIndex


def scopes_of(name: str, provider_ids: Iterable[str]) -> dict[str, str]:
    """Each way to read a name as a provider and its served name: both may hold slashes."""
    return {
        provider_id: name[len(provider_id) + 1 :] for provider_id in provider_ids if name.startswith(f"{provider_id}/")
    }


def may_have(name: str, model: Model, provider_ids: Iterable[str]) -> bool:
    """Whether a model may be registered under a name, and be called by it.

    Args:
        name: An id or alias.
        model: Where it leads.
        provider_ids: All configured providers.

    Returns:
        True for a name that no provider's id begins, and for "provider/served name" of the model itself, also by the other
        names that the catalog knows the served model by.
    """
    scopes = scopes_of(name, provider_ids)
    if not scopes:
        return True
    served = ServedModel(model.provider_model_id, model.engine_root, model.base_model)
    return model.provider_id in scopes and served_as(scopes[model.provider_id], [served]) is not None


def registered(name: str, known: RegisteredIndex, provider_ids: Iterable[str]) -> Model | None:
    """The registered model that a name leads to; `None` if there is none, or the name is reserved for something else."""
    model = known.find(name)
    return model if model is not None and may_have(name, model, provider_ids) else None
