from __future__ import annotations

from dataclasses import replace

from deltawire_server.registry.model import Model


def test_a_model_is_a_value() -> None:
    """Two of the same fields are equal, and names begin with the id."""
    model = Model("id", "vllm", "m", aliases=("a", "b"))
    assert model == replace(model)
    assert model.names == ("id", "a", "b")
