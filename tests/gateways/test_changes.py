"""A registration at one gateway is visible at the other within a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire import ModelNotFoundError
from tests.gateways.support import client_watch, following

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways


async def test_a_change_reaches_the_other_gateway(start_gateways: StartGateways) -> None:
    """The other gateway's watch reports a registration, an update and a removal, and its calls resolve accordingly."""
    one, two = await start_gateways("one", "two")
    async with following(client_watch(two.client)) as watch:
        model = await one.client.models.register("mine", provider_model_id="llama")
        assert await watch.until_present(model.id) == model
        answer = await two.client.chat.create("hi", model="mine")
        assert (answer.started.model, answer.started.alias) == ("mine", "")

        changed = await one.client.models.update(model, aliases=["other"])
        assert await watch.until_present(model.id, changed.etag) == changed
        answer = await two.client.chat.create("hi", model="other")
        assert (answer.started.model, answer.started.alias) == ("mine", "other")

        await one.client.models.unregister("other")
        await watch.until_removed(model.id)
        with pytest.raises(ModelNotFoundError):
            await two.client.chat.create("hi", model="mine")
