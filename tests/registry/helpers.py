"""What the tests of the registry share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import DeltawireError
from deltawire_server.registry.model import ModelState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registry import ModelRegistry


async def failure_of(call: Awaitable[object]) -> DeltawireError:
    """What a call that must fail fails with."""
    with pytest.raises(DeltawireError) as failure:
        await call
    return failure.value


def kept(model: Model) -> Model:
    """A model without its state, which is no part of what is kept of it: that is found out anew after a restart."""
    return replace(model, state=ModelState.UNKNOWN)


def ids(models: Sequence[Model]) -> list[str]:
    """In their order."""
    return [model.id for model in models]


async def all_ids(registry: ModelRegistry) -> list[str]:
    """Of the first page, which is large enough."""
    models, _, _ = await registry.list()
    return ids(models)
