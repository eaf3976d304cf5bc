"""A real Envoy with a shipped configuration, in which only the ports are others."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.polyglot.programs import (
    ENVOY_CONFIG,
    JWT_CONFIG,
    LIMIT,
    LOAD_CONFIG,
    MTLS_CONFIG,
    RATE_LIMIT_CONFIG,
    WEB_CONFIG,
    started,
    tool,
)
from tests.polyglot.stubs import DESCRIPTORS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Certificates

# In the file, in this order: Envoy's own administration, the listener, and the two gateways.
ADMIN, LISTENER, FIRST, SECOND = "9901", "50050", "50051", "50052"
WEB_LISTENER = "50080"
ORIGIN = r"https://(chat|admin)\.example\.com"
EXEMPT = "/grpc.health.v1.Health/"
CLUSTERS = ("gateways", "routed", "registry")
SECOND_ENDPOINT = """\
              - endpoint:
                  address:
                    socket_address: { address: 127.0.0.1, port_value: 50052 }
"""


def configuration(shipped: Path, first: str, second: str | None) -> str:
    """A shipped file for gateways at these addresses; Envoy takes free ports for itself."""
    text = shipped.read_text(encoding="utf-8")
    if second is None:
        assert text.count(SECOND_ENDPOINT) == 1
        text = text.replace(SECOND_ENDPOINT, "")
    ports = {ADMIN: "0", LISTENER: "0", FIRST: _port(first)} | ({SECOND: _port(second)} if second else {})
    return _with_ports(text, ports)


def _with_ports(text: str, ports: dict[str, str]) -> str:
    """The configuration with other ports than the shipped ones."""
    for shipped, used in ports.items():
        written = f"127.0.0.1, port_value: {shipped} }}"
        assert text.count(written) == 1, written
        text = text.replace(written, f"127.0.0.1, port_value: {used} }}")
    return text


def _port(address: str) -> str:
    return address.rpartition(":")[2]


@dataclass(frozen=True)
class Envoy:
    """One that runs: where it listens, for gRPC and for other callers, and what it counts."""

    target: str
    _admin: httpx.AsyncClient
    web: str = ""

    async def count(self, name: str) -> int:
        """One of the statistics of the gateways together, for example `upstream_rq_retry`."""
        name = f"cluster.gateways.{name}"
        answer = await self._admin.get("/stats", params={"format": "json", "filter": f"^{name}$"})
        (found,) = answer.json()["stats"]
        value: int = found["value"]
        return value

    async def weights(self) -> dict[str, int]:
        """The weight of each gateway, by its address."""
        return {address: host["weight"] for address, host in (await self._hosts("gateways")).items()}

    async def health(self, name: str = "gateways") -> dict[str, dict[str, Any]]:
        """By gateway's address, what a cluster holds of it: empty of faults is healthy."""
        return {
            address: {key: value for key, value in host["health_status"].items() if value is True}
            for address, host in (await self._hosts(name)).items()
        }

    async def _hosts(self, name: str) -> dict[str, dict[str, Any]]:
        answer = await self._admin.get("/clusters", params={"format": "json"})
        (cluster,) = [each for each in answer.json()["cluster_statuses"] if each["name"] == name]
        hosts = {}
        for host in cluster.get("host_statuses", ()):
            address = host["address"]["socket_address"]
            hosts[f"{address['address']}:{address['port_value']}"] = host
        return hosts

    async def until(self, address: str, fault: str | None) -> None:
        """Wait until a gateway has this fault, or none at all, in every cluster."""
        async with asyncio.timeout(LIMIT):
            for name in CLUSTERS:
                while True:
                    faults = (await self.health(name)).get(address)
                    if faults is not None and (fault in faults if fault else not faults):
                        break
                    await asyncio.sleep(0.05)


def web_configuration(origin: str) -> str:
    """The shipped file for callers without gRPC, with the shipped descriptor set and this origin of pages."""
    text = _with_ports(WEB_CONFIG.read_text(encoding="utf-8"), {WEB_LISTENER: "0"})
    for shipped, used in (
        (f"proto_descriptor: {DESCRIPTORS.name}", f"proto_descriptor: {DESCRIPTORS}"),
        (ORIGIN, origin),
    ):
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, used)
    return text


@contextlib.asynccontextmanager
async def envoy(folder: Path, first: str, second: str | None = None, *, web: str = "") -> AsyncIterator[Envoy]:
    """An Envoy in front of one or two gateways, once it finds all of them healthy; `web` is added to its configuration."""
    async with _process(folder, configuration(ENVOY_CONFIG, first, second), web) as running:
        async with asyncio.timeout(LIMIT):
            for address in filter(None, (first, second)):
                await running.until(address, None)
        yield running


@contextlib.asynccontextmanager
async def rate_limit(folder: Path, first: str, second: str, *, calls: int) -> AsyncIterator[str]:
    """The address of an Envoy that limits the calls of each caller, with the shipped configuration and another limit."""
    text = configuration(RATE_LIMIT_CONFIG, first, second)
    shipped = "max_tokens: 600, tokens_per_fill: 600,"
    assert text.count(shipped) == 1
    async with _process(folder, text.replace(shipped, f"max_tokens: {calls}, tokens_per_fill: {calls},")) as running:
        yield running.target


@contextlib.asynccontextmanager
async def by_load(folder: Path, first: str, second: str) -> AsyncIterator[Envoy]:
    """An Envoy that weighs two gateways by the load that they report, with the shipped configuration."""
    async with _process(folder, configuration(LOAD_CONFIG, first, second)) as running:
        yield running


@contextlib.asynccontextmanager
async def mtls_envoy(
    folder: Path, certificates: Certificates, name: str, first: str, second: str | None = None
) -> AsyncIterator[str]:
    """The address of an Envoy with the shipped configuration, whose own certificate has this URI."""
    proxy, key = certificates.sign("proxy", f"URI:{name}")
    files = {
        "server.pem": certificates.server,
        "server.key": certificates.server_key,
        "proxy.pem": proxy,
        "proxy.key": key,
        "clients-ca.pem": certificates.authority,
        "gateways-ca.pem": certificates.authority,
    }
    text = configuration(MTLS_CONFIG, first, second)
    for shipped, used in files.items():
        assert text.count(f"/etc/envoy/{shipped}") == 1
        text = text.replace(f"/etc/envoy/{shipped}", str(used))
    async with _process(folder, text) as running:
        yield running.target


@contextlib.asynccontextmanager
async def jwt_envoy(folder: Path, socket: Path, keys: Path, origin: str, exempt: str) -> AsyncIterator[Envoy]:
    """An Envoy with the shipped check of tokens, at the port for gRPC and at the one for other callers.

    Args:
        folder: Where it writes.
        socket: The gateway's.
        keys: A JSON Web Key Set.
        origin: Of pages, a regular expression.
        exempt: The paths that need no token.
    """
    text = _with_ports(JWT_CONFIG.read_text(encoding="utf-8"), {ADMIN: "0", LISTENER: "0"})
    others = {"/run/deltawire/gateway.sock }": f"{socket} }}", "/etc/envoy/jwks.json": str(keys), EXEMPT: exempt}
    for shipped, used in others.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, used)
    # As jwt.yaml says: the filter and what belongs to it, in web.yaml too.
    web = re.sub(r"\bcluster: \w+", "cluster: gateway", web_configuration(origin))
    for begin, end, place in (
        ("# Envoy's own refusals", "route_config:", "route_config:"),
        ("- name: envoy.filters.http.jwt_authn", "- name: envoy.filters.http.router", "# A filter such as"),
    ):
        _, begun, rest = text.partition(f" {begin}")
        before, there, after = web.partition(f" {place}")
        assert begun, begin
        assert there, place
        # The indentation of what follows is that of the block.
        web = before + begun + rest.partition(f" {end}")[0] + there + after
    async with _process(folder, text, web) as running:
        yield running


@contextlib.asynccontextmanager
async def _process(folder: Path, text: str, added: str = "") -> AsyncIterator[Envoy]:
    """An Envoy with this configuration, and another one added to it, once it listens."""
    config, admin_file, log = folder / "envoy.yaml", folder / "admin", folder / "envoy.log"
    config.write_text(text, encoding="utf-8")
    # A base id of its own, so that it shares no memory with another Envoy of this machine.
    command = [tool("envoy"), "-c", str(config), "--admin-address-path", str(admin_file), "--use-dynamic-base-id"]
    if added:
        command += ("--config-yaml", added)
    with log.open("wb") as output:
        async with (
            started(
                *command, "--concurrency", "1", "--log-level", "warning", home=folder, out=output, err=output
            ) as run,
            contextlib.AsyncExitStack() as stack,
        ):
            async with asyncio.timeout(LIMIT):
                while not (admin_file.exists() and admin_file.read_text()):
                    if run.returncode is not None:
                        pytest.fail(f"Envoy ended: {log.read_text(errors='replace')}")
                    await asyncio.sleep(0.02)
                client = httpx.AsyncClient(base_url=f"http://{admin_file.read_text()}", trust_env=False)
                admin = await stack.enter_async_context(client)
                try:
                    while (await admin.get("/ready")).status_code != 200:  # noqa: ASYNC110 -- Envoy can only be asked
                        await asyncio.sleep(0.02)
                    listeners = (await admin.get("/listeners", params={"format": "json"})).json()
                except httpx.TransportError:
                    pytest.fail(f"Envoy ended: {log.read_text(errors='replace')}")
            ports = {
                each["name"]: each["local_address"]["socket_address"]["port_value"]
                for each in listeners["listener_statuses"]
            }
            web = f"127.0.0.1:{ports.pop('web')}" if added else ""
            (port,) = ports.values()
            yield Envoy(f"127.0.0.1:{port}", admin, web)
