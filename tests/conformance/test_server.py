"""The checks of servers: a gateway keeps them all, and a server that does not is noticed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm
from tests.conformance import cases, scripted_server, server_checks
from tests.conformance.__main__ import SLOW, gateway_process
from tests.conformance.case_pb2 import Case, ServerCall
from tests.support.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot


@pytest.mark.parametrize("key", ["", "a-key-that-only-tests-know"], ids=["open", "with a key"])
async def test_a_gateway(tmp_path: Path, key: str) -> None:
    """Every check, by its address alone."""
    keys = f"checker call,read {key}" if key else ""
    async with FakeVllm(SLOW) as vllm, gateway_process(vllm, tmp_path, keys) as address:
        outcomes = await server_checks.run(address, key)
    assert [outcome.case for outcome in outcomes] == server_checks.names()
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""


@pytest.mark.parametrize("name", ["interrupted/without-completed", "fault/status-ok-by-a-proxy", "unknown/enum-values"])
async def test_a_server_that_breaks_the_contract_is_noticed(name: str) -> None:
    """It sends OK after a stream without `completed`, or with an error in it; or a verdict that there is not."""
    (case,) = [each for each in cases.load() if each.name == name]
    played = Case(calls=[ServerCall(steps=call.steps) for call in case.calls])
    async with scripted_server.serving() as server:
        server.play(played)
        (outcome,) = await server_checks.run(server.target, prefix="stream/contract")
    assert "contract" in outcome.difference


def test_no_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence with the address; and a prefix that no check has is refused before."""
    monkeypatch.setattr(server_checks, "CONNECT_LIMIT", 0.2)
    target = f"127.0.0.1:{free_port()}"
    assert server_checks.main(["--target", target]) == 1
    assert capsys.readouterr().err.startswith(f"no gRPC server answers at {target} ")
    with pytest.raises(SystemExit):
        server_checks.main(["--target", target, "--case", "nosuch"])
    assert "no check begins with 'nosuch'" in capsys.readouterr().err
