"""A real Prometheus with the shipped configuration, in which only the address of the gateway and the intervals are others."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from tests.deploy.files import PROMETHEUS
from tests.polyglot.programs import LIMIT, started, tool
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHANGED = {"[127.0.0.1:9464]": "[{gateway}]", "scrape_interval: 15s": "scrape_interval: 500ms",
           "evaluation_interval: 15s": "evaluation_interval: 500ms"}  # fmt: skip


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    _client: httpx.AsyncClient

    async def get(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 (JSON)
        """The data of an answer of its API. The request must not fail."""
        answer = await self._client.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body['error']}"
        return body["data"]

    async def values(self, query: str) -> list[float]:
        """The values of a query's series now, without those that are not a number."""
        data = await self.get("query", query=query)
        found = (float(series["value"][1]) for series in data["result"])
        return [value for value in found if not math.isnan(value)]


@contextlib.asynccontextmanager
async def prometheus(folder: Path, gateway: str) -> AsyncIterator[Prometheus]:
    """Run one that scrapes a gateway."""
    shutil.copytree(PROMETHEUS, folder / "prometheus")
    file = folder / "prometheus" / "prometheus.yaml"
    text = file.read_text()
    for shipped, used in CHANGED.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, used.format(gateway=gateway))
    file.write_text(text)
    address = f"127.0.0.1:{free_port()}"
    flags = (f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}")
    with (folder / "prometheus.log").open("wb") as log:
        async with (
            started(tool("prometheus"), *flags, home=folder, out=log, err=log) as process,
            httpx.AsyncClient(base_url=f"http://{address}", timeout=LIMIT, trust_env=False) as client,
            asyncio.timeout(LIMIT),
        ):
            while not await _ready(client):
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                await asyncio.sleep(0.05)
            yield Prometheus(client)


async def _ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/-/ready")).is_success
    return False
