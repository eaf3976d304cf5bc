"""How the command connects."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire._cli.connection import _has_port
from deltawire.v1 import model_registry_pb2 as registry
from tests.client.scripted import Fail, Gateway

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.cli.support import Run


def test_the_token_of_the_environment(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is in no list of processes; the option comes before it."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "from-env")
    for arguments, expected in ([], "Bearer from-env"), (["--token", "given"], "Bearer given"):
        gateway.will(registry.ListProvidersResponse())
        run("providers", *arguments)
        assert gateway.last.metadata["authorization"] == expected


def test_the_header_of_the_token(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the option, or else from the environment; another header is wrong usage."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "key")
    for given in ("option", "environment"):
        gateway.will(registry.ListProvidersResponse())
        if given == "option":
            run("providers", "--token-header", "x-deltawire-key")
        else:
            monkeypatch.setenv("DELTAWIRE_TOKEN_HEADER", "x-deltawire-key")
            run("providers")
        assert gateway.last.metadata["x-deltawire-key"] == "key"
        assert "authorization" not in gateway.last.metadata
    monkeypatch.setenv("DELTAWIRE_TOKEN_HEADER", "x-key")
    status, _, error = run("providers")
    assert (status, error.startswith("error: --token-header: 'x-key' is neither")) == (2, True)


def test_a_token_of_the_environment_that_is_no_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage, as if it were an option."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "\udcff")
    assert run("providers") == (2, "", "error: --token: not UTF-8 text\n")


def test_tls_is_used_if_asked_for(gateway: Gateway, run: Run) -> None:
    """A gateway without TLS is called by no plaintext call; the message names the option."""
    assert run("providers", "--tls") == (
        1,
        "",
        f"error: {gateway.target} does not use TLS: leave out --tls, or set --target to a port that does\n",
    )
    assert gateway.calls == []


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "hi"),
        ("chat", "--retention", "60", "hi"),
        ("count-tokens", "hi"),
        ("resume", "mine"),
        ("models", "list"),
        ("models", "watch"),
        ("health",),
    ],
)
def test_no_gateway(run: Run, command: tuple[str, ...]) -> None:
    """Each command fails at the first connection that is refused, also those that otherwise try again for a minute."""
    target = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    status, _, err = run(*command, "--target", target)
    assert time.monotonic() - started < 10
    where = "If it is elsewhere, set --target or $DELTAWIRE_TARGET"
    assert (status, err) == (1, f"error: connection refused: is the gateway running at {target}? {where}\n")


def test_no_such_host(run: Run) -> None:
    """The message names the option."""
    status, _, err = run("providers", "--target", "nohost.invalid:1")
    assert (status, err) == (1, "error: the host name in --target nohost.invalid:1 cannot be resolved\n")


def test_a_server_of_http_1(run: Run) -> None:
    """VLLM's own port, for example."""
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = f"127.0.0.1:{server.server_port}"
        status, _, err = run("providers", "--target", target)
        server.shutdown()
    assert (status, err.startswith(f"error: {target} does not use gRPC: set --target")) == (1, True)


def test_a_server_that_never_answers(run: Run) -> None:
    """It is given up on, even without --timeout, by a limit of the command's own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        status, _, err = run("providers", "--target", target, "--timeout", "0.3")
    assert (status, err.startswith(f"error: no answer from {target} within 0.3 s: is the gateway running")) == (1, True)


class Quiet(http.server.BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        """Drop it."""


def test_files_that_are_not_certificates(run: Run, tmp_path: Path) -> None:
    """The message names the option, before anything is sent."""
    path = tmp_path / "ca.pem"
    path.write_text("hello")
    assert run("providers", "--ca-file", str(path)) == (2, "", f"error: --ca-file {path}: not a certificate in PEM\n")
    status, _, err = run("providers", "--cert-file", str(path), "--key-file", str(path))
    assert (status, err) == (
        2,
        f"error: --cert-file {path}, --key-file {path}: not a certificate in PEM and its key, unencrypted\n",
    )


@pytest.mark.parametrize(
    "target",
    [
        "gateway:1",
        "[::1]:1",
        "dns:///gateway:1",
        "unix:/tmp/gateway",
        "ipv4:127.0.0.1:1",
        "a:1,b:2",
        "dns://8.8.8.8/a:1",
    ],
)
def test_targets_with_a_port(target: str) -> None:
    """Or of a kind that has none."""
    assert _has_port(target)


def test_a_key_that_is_missing(gateway: Gateway, run: Run) -> None:
    """The error says where to set it."""
    gateway.will(Fail(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "the call has no key"))
    status, _, err = run("providers", "--request-id", "mine")
    assert status == 1
    assert err.splitlines()[:2] == [
        "error: UNAUTHENTICATED (UNAUTHENTICATED): the call has no key",
        "  set --token or $DELTAWIRE_TOKEN to your key for the gateway",
    ]
