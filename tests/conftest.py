"""What many tests share: a vLLM look-alike, gateways before it, the log, certificates and a PostgreSQL server."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import structlog

from deltawire_server.completions.completion import CompletionLimits
from deltawire_server.completions.retention import RetentionLimits
from deltawire_server.fake_vllm import FakeVllm
from deltawire_server.lifecycle import Lifecycle
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.rpc import reception
from deltawire_server.telemetry import configure_logging
from deltawire_server.upstream.providers import Providers
from deltawire_server.upstream.vllm import VllmProvider
from deltawire_server.worker import Worker, WorkerLimits
from tests.support.gateway import WAIT, Lines, Running, running, settings_of
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from deltawire_server.lifecycle import Calls
    from deltawire_server.settings import ServerSettings
    from deltawire_server.upstream.base import Provider, Timeouts
    from tests.support.postgres import PostgresServer
    from tests.support.workers import MakeWorker


class StartGateway(Protocol):
    """Runs a gateway before the test's `vllm`, or another address, with some keys of each section changed."""

    def __call__(
        self,
        *,
        base_url: str | None = None,
        server: Mapping[str, Any] | None = None,
        stream: Mapping[str, Any] | None = None,
        provider: Mapping[str, Any] | None = None,
        access: Mapping[str, Any] | None = None,
        retention: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        options: tuple[tuple[str, int], ...] = (),
    ) -> AbstractAsyncContextManager[Running]: ...


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, and what it signed for this machine's loopback address and for a client."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    def sign(self, name: str, alternative_names: str) -> tuple[Path, Path]:
        """Make another client's certificate and key.

        Args:
            name: The common name, and that of the files.
            alternative_names: As openssl writes them: "URI:spiffe://mesh/a,DNS:a.mesh"; none if empty.
        """
        return _signed(self.authority.parent, name, alternative_names)


@pytest.fixture
def late_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A health watch's request may arrive long after its call: on a busy machine, gRPC sends the two apart."""
    monkeypatch.setattr(reception, "ARRIVAL_SECONDS", WAIT)


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _signed(folder: Path, name: str, alternative_names: str) -> tuple[Path, Path]:
    names = f"subjectAltName={alternative_names}\n" if alternative_names else ""
    (folder / f"{name}.extensions").write_text(f"basicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n{names}")
    _openssl(folder, "req", *_CURVE, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.extensions")
    _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder / f"{name}.pem", folder / f"{name}.key"


@pytest.fixture(autouse=True)
def contract_is_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Check every completion of every gateway that a test runs in this process, for any client."""
    recorder, begin = Recorder(), Lifecycle.__init__

    def recorded(self: Lifecycle, settings: ServerSettings, interceptors: Sequence[Any], calls: Calls) -> None:
        begin(self, settings, [recorder, *interceptors], calls)

    monkeypatch.setattr(Lifecycle, "__init__", recorded)
    yield recorder
    assert not recorder.broken, "\n".join(recorder.broken)


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A vLLM look-alike."""
    async with FakeVllm() as vllm:
        yield vllm


@pytest.fixture
def make_worker(vllm: FakeVllm, tmp_path: Path) -> MakeWorker:
    """Makes workers."""

    @asynccontextmanager
    async def make(
        *,
        provider: Provider | None = None,
        timeouts: Timeouts | None = None,
        **limits: Any,  # noqa: ANN401 (max_streams, retention, and those of CompletionLimits)
    ) -> AsyncIterator[Worker]:
        providers = Providers([provider or VllmProvider("vllm", vllm.base_url, tls=False, timeouts=timeouts)])
        registry = ModelRegistry(Store(f"sqlite+aiosqlite:///{tmp_path}/registry.db"), providers)
        await registry.open()
        try:
            async with asyncio.timeout(WAIT):
                max_streams = limits.pop("max_streams", 1000)
                retention = RetentionLimits(**limits.pop("retention", {}))
                yield Worker(registry, providers, WorkerLimits(max_streams, CompletionLimits(**limits), retention))
        finally:
            await registry.close()
            await providers.close()

    return make


@pytest.fixture
def start_gateway(vllm: FakeVllm, tmp_path: Path) -> StartGateway:
    """Runs gateways in this process."""

    @asynccontextmanager
    async def start(
        *,
        base_url: str | None = None,
        server: Mapping[str, Any] | None = None,
        stream: Mapping[str, Any] | None = None,
        provider: Mapping[str, Any] | None = None,
        access: Mapping[str, Any] | None = None,
        retention: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        options: tuple[tuple[str, int], ...] = (),
    ) -> AsyncIterator[Running]:
        settings = settings_of(
            base_url or vllm.base_url,
            tmp_path,
            server=server,
            stream=stream,
            provider=provider,
            access=access,
            retention=retention,
            usage=usage,
            metrics=metrics,
            limits=limits,
        )
        async with running(settings, options=options) as gateway:
            yield gateway

    return start


@pytest.fixture
async def served(start_gateway: StartGateway) -> AsyncIterator[Running]:
    """A gateway with default settings."""
    async with start_gateway() as gateway:
        yield gateway


@pytest.fixture
async def lines() -> AsyncIterator[Lines]:
    """All that is logged from here on, from debug up, as JSON."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    lines = Lines()
    configure_logging("debug", "json", stream=lines)
    try:
        yield lines
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made by the openssl command for this run of the tests."""
    folder = tmp_path_factory.mktemp("certificates")
    _openssl(
        folder,
        "req",
        "-x509",
        *_CURVE,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=authority",
        "-days",
        "2",
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),  # Python requires it from 3.13 on
    )
    local = "DNS:localhost,IP:127.0.0.1"
    return Certificates(folder / "ca.pem", *_signed(folder, "server", local), *_signed(folder, "client", local))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this run of the tests; `create_database` gives a test one of its own. Mark it `postgres`."""
    # Here, since only these tests need a database's client library.
    from tests.support import postgres

    try:
        server = postgres.PostgresServer()
    except postgres.PostgresError as error:
        # Once, rather than for each of the tests that cannot run.
        pytest.exit(str(error), returncode=1)
    with server:
        yield server


@pytest.fixture
def ipv6() -> None:
    """The machine has IPv6, as that of CI."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
