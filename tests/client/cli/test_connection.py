"""How the command connects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire.v1 import model_registry_pb2 as registry

if TYPE_CHECKING:
    import pytest

    from tests.client.cli.support import Run
    from tests.client.scripted import Gateway


def test_the_token_of_the_environment(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is in no list of processes; the option comes before it."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "from-env")
    for arguments, expected in ([], "Bearer from-env"), (["--token", "given"], "Bearer given"):
        gateway.will(registry.ListProvidersResponse())
        run("providers", *arguments)
        assert gateway.last.metadata["authorization"] == expected


def test_a_token_of_the_environment_that_is_no_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage, as if it were an option."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "\udcff")
    assert run("providers") == (2, "", "error: --token: not UTF-8 text\n")


def test_tls_is_used_if_asked_for(gateway: Gateway, run: Run) -> None:
    """A gateway that speaks plaintext is not talked to."""
    status, _, err = run("providers", "--tls", "--timeout", "5")
    assert status == 1
    assert err.startswith("error: UNAVAILABLE: ")
    assert gateway.calls == []
