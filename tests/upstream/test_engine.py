"""What answers at an address: how it is recognized, how long that is used, and how it is looked for."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm.described import CHAT_FIELDS, openapi
from deltawire_server.upstream.engine import (
    HEALTH,
    OPENAPI,
    VERSION,
    Document,
    Engine,
    EngineKind,
    EngineReader,
    described,
    joined,
    recognize,
)
from deltawire_server.upstream.vllm_fields import STRICT

if TYPE_CHECKING:
    from collections.abc import Mapping

UVICORN = {"server": "uvicorn", "content-type": "application/json", "vary": "Origin"}
ALL = Engine(EngineKind.VLLM, "0.32.0", fields=frozenset({*CHAT_FIELDS, STRICT}))


def document(body: object, status: int = 200, **headers: str) -> Document:
    """A document as vLLM's server sends it, with other headers where given."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Document(status, {**UVICORN, **{name.replace("_", "-"): value for name, value in headers.items()}}, encoded)


def answers(**changes: Document | str) -> dict[str, Document | str]:
    """What a vLLM answers, changed by name of the path."""
    vllm: dict[str, Document | str] = {
        VERSION: document({"version": "0.32.0"}),
        OPENAPI: document(openapi("0.32.0")),
        HEALTH: document(b""),
    }
    return vllm | {f"/{name}.json" if name == "openapi" else f"/{name}": change for name, change in changes.items()}


def test_a_vllm() -> None:
    """Its version and its fields are known; it may be unhealthy."""
    assert recognize(answers()) == ALL
    assert recognize(answers(health=document(b"", 503))) == ALL
    assert ALL.strict_is_enforced


def titled(title: object) -> Document:
    """A document with another title."""
    return document({**openapi("1"), "info": {"title": title}})


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        # vllm-router passes documents on with their headers, but answers /health itself.
        ({"health": Document(200, {}, b"")}, "/health comes from a server without a name"),
        ({"health": document(b"OK")}, "/health has a body"),
        ({"health": document({"status": "healthy"})}, "/health has a body"),
        ({"version": document({"version": "0.32.0"}, server="nginx/1.27")}, "/version comes from 'nginx/1.27'"),
        ({"openapi": document(openapi("1"), server="envoy")}, "/openapi.json comes from 'envoy'"),
        ({"version": document({"version": "0.32.0"}, via="1.1 varnish")}, "/version has the header via"),
        ({"health": document(b"", x_envoy_upstream_service_time="1")}, "/health has the header x-envoy-upstream"),
        ({"openapi": document(openapi("1"), x_litellm_version="1")}, "/openapi.json has the header x-litellm-version"),
        ({"openapi": titled("LiteLLM API")}, "/openapi.json has the title 'LiteLLM API'"),
        ({"openapi": titled([])}, "/openapi.json has the title ''"),
        ({"openapi": document(openapi("1", ["add_generation_prompt"]))}, "/openapi.json does not describe vLLM's chat"),
        ({"openapi": document({"info": {"title": "FastAPI"}})}, "/openapi.json does not describe vLLM's chat"),
        ({"openapi": document(b"[" * 100_000)}, "/openapi.json has the title ''"),
        ({"version": document({"version": "1", "router": True})}, "/version differs from vLLM's"),
        ({"version": document({"detail": "Not Found"}, 404)}, "/version differs from vLLM's"),
        ({"version": document(b"<html>")}, "/version differs from vLLM's"),
        ({"version": document({"version": 5})}, "/version differs from vLLM's"),
        (
            {"version": Document(503, {"server": "nginx"}, b""), "openapi": "did not answer"},
            "/version comes from 'nginx'",
        ),
    ],
)
def test_signs_of_a_proxy(changes: Mapping[str, Document | str], sign: str) -> None:
    """Any of them; then what the documents list counts for nothing."""
    engine = recognize(answers(**changes), ALL)
    assert (engine.kind, engine.version, engine.fields) == (EngineKind.PROXY, "", None)
    assert sign in engine.detail
    assert not engine.strict_is_enforced


def test_a_vllm_of_its_own_title() -> None:
    """It may give itself one."""
    assert recognize(answers(openapi=titled("vLLM API server"))).kind is EngineKind.VLLM


def test_what_cannot_be_read_is_not_known() -> None:
    """With the reason of each."""
    engine = recognize(answers(version="is away", health="is slow"), ALL)
    assert engine == Engine(EngineKind.UNKNOWN, detail="/version: is away; /health: is slow")
    assert not engine.strict_is_enforced


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (document({"detail": "Not Found"}, 404), "/openapi.json: HTTP 404"),
        (document(b"", 503), "/openapi.json: HTTP 503"),
    ],
)
def test_a_vllm_without_its_document(answer: Document, why: str) -> None:
    """It was started without, or is starting."""
    assert recognize(answers(openapi=answer)) == Engine(EngineKind.VLLM, "0.32.0", why)


def test_what_the_operator_says_is_a_vllm() -> None:
    """Then no sign counts, and what is missing is said."""
    proxied = answers(version=document({"version": "0.32.0"}, server="nginx"))
    assert described(proxied) == ALL
    assert described(answers(openapi="is away")) == Engine(EngineKind.VLLM, "0.32.0", "/openapi.json: is away")
    unlisted = described(answers(openapi=document({})))
    assert (unlisted.kind, unlisted.fields) == (EngineKind.VLLM, None)
    assert "does not list the fields" in unlisted.detail


def test_replicas_are_one_provider() -> None:
    """What is known least of is what is known; each version once."""
    other, proxy = replace(ALL, version="0.31.0"), Engine(EngineKind.PROXY, detail="nginx")
    assert joined({"a": ALL}) == Engine(EngineKind.VLLM, "0.32.0")
    assert joined({"a": proxy}) == proxy
    assert joined({"a": ALL, "b": other, "c": ALL}) == Engine(EngineKind.VLLM, "0.32.0, 0.31.0")
    assert joined({"a": ALL, "b": proxy}) == Engine(EngineKind.PROXY, "0.32.0", "b: nginx")
    assert joined({"a": ALL, "b": Engine(EngineKind.UNKNOWN)}).kind is EngineKind.UNKNOWN


class Said:
    """A vLLM's words, the paths that were read, and what was found."""

    def __init__(self, kind: EngineKind | None = None) -> None:
        self.answers = answers()
        self.asked: list[str] = []
        self.failures = 0
        self.left = 0
        self.enough = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.found: list[Engine] = []
        self.arrived = asyncio.Event()
        self.reader = EngineReader(
            self.read, lambda: self.failures, kind, self.changed, retry_seconds=0.001, fresh_seconds=0.001
        )

    def become(self, version: str, *without: str) -> None:
        """Be this version from now on."""
        self.answers |= {VERSION: document({"version": version}), OPENAPI: document(openapi(version, without))}

    def changed(self, engine: Engine) -> None:
        """Take note of what was found."""
        self.found.append(engine)
        self.arrived.set()

    async def next(self) -> Engine:
        """What is found next."""
        self.arrived.clear()
        await self.arrived.wait()
        return self.found[-1]

    async def read_more(self, count: int) -> None:
        """Wait until so many more paths were read."""
        self.left, self.enough = count, asyncio.Event()
        await self.enough.wait()

    async def read(self, path: str) -> Document | str:
        """What a path says."""
        self.asked.append(path)
        self.left -= 1
        if self.left == 0:
            self.enough.set()
        if self.gate is not None:
            await self.gate.wait()
        return self.answers[path]


FIRST = [VERSION, OPENAPI, HEALTH]
AGAIN = [VERSION, HEALTH]


async def test_it_is_read_once() -> None:
    """And known from then on."""
    said = Said()
    assert said.reader.engine.kind is EngineKind.UNKNOWN
    for _ in range(3):
        assert await said.reader.known() == ALL
    assert said.asked == FIRST
    assert said.found == [ALL]


async def test_calls_that_come_meanwhile_wait_for_one_reading() -> None:
    """And if the one that reads leaves, the next one does."""
    said = Said()
    said.gate = asyncio.Event()
    first, *others = (asyncio.create_task(said.reader.known()) for _ in range(4))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    said.gate.set()
    assert await asyncio.gather(*others) == [ALL] * 3
    assert said.asked == FIRST * 2


async def test_a_failure_is_a_reason_to_look_again() -> None:
    """For what answers then may be another version; the version alone is read, and if it is another, the document."""
    said = Said()
    first = await said.reader.known()
    said.failures = 1
    assert await said.reader.known() is first
    said.become("0.8.5", "priority")
    said.failures = 2
    known = await said.reader.known()
    assert known.fields is not None
    assert (known.version, "priority" in known.fields) == ("0.8.5", False)
    assert await said.reader.known() is known
    assert said.asked == [*FIRST, *AGAIN, *AGAIN, OPENAPI]


async def test_after_a_failure_what_was_known_is_not() -> None:
    """Unless it can be read again."""
    said = Said()
    await said.reader.known()
    said.answers[VERSION] = "is away"
    said.failures = 1
    assert (await said.reader.known()).kind is EngineKind.UNKNOWN


async def test_it_is_looked_for_until_it_is_known() -> None:
    """Without any call, with one report for each change; then on, for upgrades; a reading that fails changes nothing."""
    said = Said()
    said.answers = answers(openapi="is slow")
    said.reader.start()
    said.reader.start()
    assert (await said.next()).kind is EngineKind.UNKNOWN
    await said.read_more(9)
    said.answers = answers(openapi=document(b"", 503))
    assert await said.next() == Engine(EngineKind.VLLM, "0.32.0", "/openapi.json: HTTP 503")
    said.answers = answers()
    assert await said.next() == ALL
    said.answers[VERSION] = "is slow"
    await said.read_more(9)
    assert said.reader.engine == ALL
    said.become("0.33.0")
    assert (await said.next()).version == "0.33.0"
    said.answers[HEALTH] = document(b"OK", server="nginx")
    assert (await said.next()).kind is EngineKind.PROXY
    assert len(said.found) == 5
    await said.reader.close()


async def test_a_call_does_not_wait_for_what_could_not_be_read() -> None:
    """Once it was tried; a slow document must not slow down every call."""
    said = Said()
    said.answers = answers(openapi="is slow")
    await said.reader.known()
    said.gate = asyncio.Event()
    assert (await said.reader.known()).kind is EngineKind.UNKNOWN


async def test_what_the_operator_says_is_not_looked_for() -> None:
    """A proxy is not asked at all; of a vLLM only what it knows is read."""
    proxy = Said(EngineKind.PROXY)
    proxy.reader.start()
    assert (await proxy.reader.known()).kind is EngineKind.PROXY
    assert not proxy.asked
    await proxy.reader.close()
    vllm = Said(EngineKind.VLLM)
    vllm.answers[HEALTH] = document(b"OK", server="nginx")
    assert vllm.reader.engine.kind is EngineKind.VLLM
    assert await vllm.reader.known() == ALL
    assert vllm.asked == [VERSION, OPENAPI]
