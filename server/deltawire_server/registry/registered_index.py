"""The registered models in memory, indexed by id, name and target, so that no look-up waits for the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.messages import quoted
from deltawire_server.registry.model import Model, scoped_id

if TYPE_CHECKING:
    from collections.abc import Iterable


class RegisteredIndex:
    """Models by id, by name and by target. Initially empty; only `ChangeLogReader` changes it while the registry is open.

    Attributes:
        models: All models, by id.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        self._targets: dict[tuple[str, str], dict[str, Model]] = {}

    def load(self, models: Iterable[Model]) -> None:
        """Replace all models."""
        self.models.clear()
        self._names.clear()
        self._targets.clear()
        for model in models:
            self.add(model)

    def add(self, model: Model) -> None:
        """Add a model, whose names must not be taken."""
        self.models[model.id] = model
        self._names.update(dict.fromkeys(model.names, model))
        self._targets.setdefault(model.target, {})[model.id] = model

    def remove(self, model: Model) -> None:
        """Remove a model that was added."""
        del self.models[model.id]
        for name in model.names:
            # During a reload, another model may have the name before this one is removed.
            if self._names.get(name) is model:
                del self._names[name]
        others = self._targets[model.target]
        del others[model.id]
        if not others:
            del self._targets[model.target]

    def find(self, name: str) -> Model | None:
        """The model of this id or alias."""
        return self._names.get(name)

    def serving(self, provider_id: str, served_name: str) -> Model | None:
        """The model registered for a served name; of several, the one with the scoped id, or else the first by id."""
        others = self._targets.get((provider_id, served_name))
        if others is None:
            return None
        return others.get(scoped_id(provider_id, served_name)) or others[min(others)]

    def has_target(self, target: tuple[str, str]) -> bool:
        """Whether a model is registered for a provider's served name."""
        return target in self._targets

    def ids_of(self, target: tuple[str, str]) -> Iterable[str]:
        """The ids of the models that are registered for a provider's served name."""
        return self._targets.get(target, {}).keys()

    def same(self, wanted: Model) -> Model | None:
        """The existing model with an equal registration; `None` if all names are free.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS: a name is taken.
        """
        owner = self.models.get(wanted.id)
        if owner is None:
            self.free(wanted)
        elif different := _differences(owner, wanted):
            raise taken(wanted.id, owner.id, f"is already registered with different {' and '.join(different)}")
        return owner

    def free(self, wanted: Model) -> None:
        """Check that no other model has one of the names.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS: a name is taken.
        """
        for name in wanted.names:
            owner = self.find(name)
            if owner is not None and owner.id != wanted.id:
                raise taken(name, owner.id, f"already belongs to model {owner.id!r}")


MEND = "update or unregister that one first, or choose another name"


def taken(name: str, model_id: str, why: str, remedy: str = MEND) -> RegistryError:
    """The error for a registration whose name is taken.

    Args:
        name: The name.
        model_id: The model that has the name.
        why: The message after the name.
        remedy: What the caller can do.
    """
    return RegistryError(
        Reason.MODEL_ALREADY_EXISTS,
        f"the name {quoted(name)} {why}; {remedy}",
        metadata={"model": model_id, "name": name},
    )


def _differences(stored: Model, wanted: Model) -> list[str]:
    """The fields in which two registrations of an id differ. The order of aliases is ignored."""
    pairs = {
        "provider_id": (stored.provider_id, wanted.provider_id),
        "provider_model_id": (stored.provider_model_id, wanted.provider_model_id),
        "type": (stored.type, wanted.type),
        "aliases": (set(stored.aliases), set(wanted.aliases)),
        "annotations": (stored.annotations, wanted.annotations),
        "embedding_dimension": (stored.embedding_dimension, wanted.embedding_dimension),
    }
    return [field for field, (old, new) in pairs.items() if old != new]
