"""The registered models in memory, by every way they are looked up: no look-up ever waits for the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.messages import quoted
from deltawire_server.registry.model import Model, scoped_id

if TYPE_CHECKING:
    from collections.abc import Iterable


class RegisteredIndex:
    """Models by id, by name and by target. Empty at first; only `follower` changes it once the registry is open.

    Attributes:
        models: All of them, by id.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        self._targets: dict[tuple[str, str], dict[str, Model]] = {}

    def load(self, models: Iterable[Model]) -> None:
        """Know these and no others."""
        self.models.clear()
        self._names.clear()
        self._targets.clear()
        for model in models:
            self.add(model)

    def add(self, model: Model) -> None:
        """Know one more, whose names must be free."""
        self.models[model.id] = model
        self._names.update(dict.fromkeys(model.names, model))
        self._targets.setdefault(model.target, {})[model.id] = model

    def remove(self, model: Model) -> None:
        """Forget one that is known."""
        del self.models[model.id]
        for name in model.names:
            # While everything is read anew, another model may have the name before this one is removed.
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
        """The model registered for what a provider serves; of several the one with the scoped id, else the first."""
        others = self._targets.get((provider_id, served_name))
        if others is None:
            return None
        return others.get(scoped_id(provider_id, served_name)) or others[min(others)]

    def has_target(self, target: tuple[str, str]) -> bool:
        """Whether a model is registered for what a provider serves."""
        return target in self._targets

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
                raise taken(name, owner.id, f"already belongs to model {owner.id!r}")
            different = _differences(owner, wanted)
            if not different:
                return owner
            raise taken(name, owner.id, f"is already registered with different {' and '.join(different)}")
        return None

    def free(self, wanted: Model) -> None:
        """Hold that a model may bear all its names: nobody else does.

        Raises:
            RegistryError: A name is taken.
        """
        for name in wanted.names:
            owner = self.find(name)
            if owner is not None and owner.id != wanted.id:
                raise taken(name, owner.id, f"already belongs to model {owner.id!r}")


MEND = "update or unregister that one first, or choose another name"


def taken(name: str, model_id: str, why: str, remedy: str = MEND) -> RegistryError:
    """The failure of a registration whose name is not free.

    Args:
        name: The name.
        model_id: Whose it is.
        why: What comes after the name in the message.
        remedy: What to do.
    """
    return RegistryError(
        Reason.MODEL_ALREADY_EXISTS,
        f"the name {quoted(name)} {why}; {remedy}",
        metadata={"model": model_id, "name": name},
    )


def _differences(stored: Model, wanted: Model) -> list[str]:
    """The fields in which two registrations of an id differ. The order of aliases means nothing."""
    pairs = {
        "provider_id": (stored.provider_id, wanted.provider_id),
        "provider_model_id": (stored.provider_model_id, wanted.provider_model_id),
        "type": (stored.type, wanted.type),
        "aliases": (set(stored.aliases), set(wanted.aliases)),
        "annotations": (stored.annotations, wanted.annotations),
        "embedding_dimension": (stored.embedding_dimension, wanted.embedding_dimension),
    }
    return [field for field, (old, new) in pairs.items() if old != new]
