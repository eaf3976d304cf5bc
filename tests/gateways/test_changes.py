"""What is registered at one gateway is there at the other, well within a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire import ModelNotFoundError
from tests.gateways.support import client_watch, following

if TYPE_CHECKING:
    from tests.gateways.conftest import StartGateways


async def test_a_change_reaches_the_other_gateway(start_gateways: StartGateways) -> None:
    """It is announced there, and true there from then on: called, called by a new name, gone."""
    one, two = await start_gateways("one", "two")
    async with following(client_watch(two.client)) as watch:
        model = await one.client.models.register("mine", provider_model_id="llama")
        assert await watch.until_told(model.id) == model
        answer = await two.client.chat.create("hi", model="mine")
        assert (answer.started.model, answer.started.alias) == ("mine", "")

        changed = await one.client.models.update(model, aliases=["other"])
        assert await watch.until_told(model.id, changed.etag) == changed
        answer = await two.client.chat.create("hi", model="other")
        assert (answer.started.model, answer.started.alias) == ("mine", "other")

        await one.client.models.unregister("other")
        await watch.until_gone(model.id)
        with pytest.raises(ModelNotFoundError):
            await two.client.chat.create("hi", model="mine")
