"""Detects the engine at a replica's address (vLLM or a proxy in front of it) and the request fields that it supports.

Some proxies forward vLLM's `/openapi.json` but drop fields of requests; others serve their own document. So the document is
used only without a proxy: `/version`, `/openapi.json` and `/health` must all look like vLLM's.

    start ──▶ probe ──detected──▶ probe again after FRESH_SECONDS, and after each failure of the replica
               ▲ │
               └─┘ not detected: probe again after 1, 2, 4 … 60 seconds

A repeated probe takes two small requests if `/version` is unchanged.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Reason, Violation
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.upstream.failures import excerpt
from deltawire_server.upstream.vllm_fields import at, decoded, field_names, text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

FRESH_SECONDS = 300.0
"""How long the result of a probe is used: about the time that an upgrade takes."""

RETRY_SECONDS = 1.0
"""Delay until the next probe if the engine was not detected; it doubles each time."""

MAX_RETRY_SECONDS = 60.0
"""Upper limit of that delay."""

VERSION, OPENAPI, HEALTH = "/version", "/openapi.json", "/health"

_PROXY_HEADERS = (
    *("via", "x-envoy-", "x-litellm-", "x-kong-", "x-served-by", "x-cache", "x-amz", "x-azure-", "x-goog-"),
    *("cf-ray", "x-powered-by", "x-proxy", "x-nginx", "x-vllm-router"),
)
"""Prefixes of the headers that proxies add and vLLM never sends."""

_OWN_FIELD = "add_generation_prompt"
"""A field of chat requests that every vLLM has and no other API."""


class EngineKind(enum.Enum):
    """The kind of an engine; the values are those of `deltawire.v1.Engine.Kind`."""

    UNKNOWN = 1
    VLLM = 2
    PROXY = 3


@dataclass(frozen=True, slots=True)
class Engine:
    """The result of a probe of an address.

    Attributes:
        kind: vLLM, a proxy, or unknown (also before the first probe).
        version: vLLM's version string; empty if unknown. For several replicas, the different versions, joined by commas.
        detail: Why the kind is PROXY or UNKNOWN, or why fields cannot be checked; empty if `fields` is set.
        fields: The names of the supported fields of a chat request, with `vllm_fields.STRICT` if tools support it; `None` if
            unknown. Always `None` for a proxy.
    """

    kind: EngineKind
    version: str = ""
    detail: str = ""
    fields: frozenset[str] | None = None

    @property
    def strict_is_enforced(self) -> bool:
        """Whether `strict` of a tool reaches a vLLM. If not, check the arguments in the gateway."""
        return self.kind is EngineKind.VLLM


@dataclass(frozen=True, slots=True)
class Document:
    """An HTTP response.

    Attributes:
        status: The HTTP status.
        headers: The headers by lower-case name.
        body: The whole body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def recognize(answers: Mapping[str, Document | str], before: Engine | None = None) -> Engine:
    """Determine the engine from the responses to a probe.

    Args:
        answers: The response for each path, or an error message if there is none.
        before: The previous result: its fields are kept if the version is the same and `/openapi.json` was not fetched.
    """
    documents = {path: answer for path, answer in answers.items() if isinstance(answer, Document)}
    sign = next(_signs_of_proxy(documents), "")
    if sign:
        return Engine(EngineKind.PROXY, detail=f"a proxy is in front of it: {sign}")
    if len(documents) < len(answers):
        why = (f"{path}: {answer}" for path, answer in answers.items() if isinstance(answer, str))
        return Engine(EngineKind.UNKNOWN, detail="; ".join(why))
    return described(answers, before)


def described(answers: Mapping[str, Document | str], before: Engine | None = None) -> Engine:
    """The result for an address that is known to be a vLLM without a proxy; see `recognize` for the arguments."""
    version = _version(answers.get(VERSION))
    openapi = answers.get(OPENAPI)
    if openapi is None and before is not None and version == before.version:
        return before
    if not isinstance(openapi, Document):
        return Engine(EngineKind.VLLM, version, f"{OPENAPI}: {openapi}")
    names = field_names(openapi.body) if openapi.status == 200 else frozenset()
    if names:
        return Engine(EngineKind.VLLM, version, fields=names)
    why = "it does not list the fields of chat requests" if openapi.status == 200 else f"HTTP {openapi.status}"
    return Engine(EngineKind.VLLM, version, f"{OPENAPI}: {why}")


def _signs_of_proxy(documents: Mapping[str, Document]) -> Iterator[str]:
    for path, document in documents.items():
        server = document.headers.get("server", "")
        if server != "uvicorn":
            yield f"{path} comes from {excerpt(repr(server)) if server else 'a server without a name'}, vLLM's is 'uvicorn'"
        for name in document.headers:
            if name.startswith(_PROXY_HEADERS):
                yield f"{path} has the header {excerpt(name)}"
    version = documents.get(VERSION)
    if version is not None and version.status < 500 and not _version(version):
        yield f"{VERSION} differs from vLLM's"
    health = documents.get(HEALTH)
    if health is not None and health.body and health.status < 500:
        yield f"{HEALTH} has a body, vLLM's has none"
    openapi = documents.get(OPENAPI)
    if openapi is not None and openapi.status == 200:
        title = text_of(at(decoded(openapi.body), "info", "title"))
        if title != "FastAPI" and "vllm" not in title.lower():
            yield f"{OPENAPI} has the title {excerpt(repr(title))}, vLLM's is 'FastAPI'"
        if _OWN_FIELD not in field_names(openapi.body):
            yield f"{OPENAPI} does not describe vLLM's chat requests"


def _version(answer: Document | str | None) -> str:
    """The version in vLLM's `/version` document, which has no other member; empty if the answer is not such a document."""
    document = decoded(answer.body) if isinstance(answer, Document) and answer.status == 200 else None
    return excerpt(text_of(at(document, "version"))) if isinstance(document, dict) and len(document) == 1 else ""


class EngineReader:
    """Probes one address in the background and keeps the result up to date.

    Args:
        fetch: Fetches the document at a path, or returns an error message. It must not raise.
        failures: Returns the number of failures of the address so far: after a failure, another version may be running.
        kind: The kind that the operator configured; `None` to detect it.
        changed: Called with each new result that differs from the one before, for the log.
        retry_seconds: Delay until the second probe if the first detects nothing.
        fresh_seconds: Delay until the next probe after one that detected the engine.

    Attributes:
        engine: The latest result.
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[Document | str]],
        failures: Callable[[], int] = lambda: 0,
        kind: EngineKind | None = None,
        changed: Callable[[Engine], None] = lambda _: None,
        *,
        retry_seconds: float = RETRY_SECONDS,
        fresh_seconds: float = FRESH_SECONDS,
    ) -> None:
        if kind is EngineKind.PROXY:
            self.engine = Engine(kind, detail="the gateway's settings configure it as a proxy")
        else:
            self.engine = Engine(kind or EngineKind.UNKNOWN, detail="it was not probed yet")
        self._fetch = fetch
        self._failures = failures
        self._kind = kind
        self._changed = changed
        self._retry_seconds = retry_seconds
        self._fresh_seconds = fresh_seconds
        self._probed_at: int | None = None  # the number of failures at the last probe; `None` before the first
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Probe now and repeatedly until `close`. Does nothing if already started. Needs a running event loop."""
        if self._task is None and self._kind is not EngineKind.PROXY:
            self._task = asyncio.create_task(self._keep_probing(), name="probe an engine")

    async def known(self) -> Engine:
        """The latest result. Waits for the first probe, and for a new one after a failure; never for a periodic one."""
        if self._kind is not EngineKind.PROXY:
            async with self._lock:
                if self._probed_at != self._failures():
                    await self._probe()
        return self.engine

    async def close(self) -> None:
        """Stop probing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep_probing(self) -> None:
        delay = self._retry_seconds
        while True:
            async with self._lock:
                await self._probe()
            if self.engine.fields is not None or self.engine.kind is EngineKind.PROXY:
                delay = self._retry_seconds
                await asyncio.sleep(self._fresh_seconds)
            else:
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)

    async def _probe(self) -> None:
        before, failures = self.engine, self._failures()
        paths = [VERSION] if before.fields is not None else [VERSION, OPENAPI]
        if self._kind is None:
            paths.append(HEALTH)
        answers = await self._fetch_all(paths)
        if before.fields is not None and _version(answers[VERSION]) != before.version:
            answers |= await self._fetch_all([OPENAPI])
        # A failed periodic probe keeps the result; after a failure of the replica it does not, since that may be a restart.
        incomplete = any(isinstance(answer, str) for answer in answers.values())
        if not (incomplete and before.fields is not None and failures == self._probed_at):
            self.engine = recognize(answers, before) if self._kind is None else described(answers, before)
        self._probed_at = failures
        if self.engine != before:
            self._changed(self.engine)

    async def _fetch_all(self, paths: Sequence[str]) -> dict[str, Document | str]:
        return dict(zip(paths, await asyncio.gather(*map(self._fetch, paths)), strict=True))


def joined(engines: Mapping[str, Engine]) -> Engine:
    """Combine the results for the replicas of a provider.

    Args:
        engines: The result for the address of each replica; at least one.
    """
    kinds = {engine.kind for engine in engines.values()}
    kind = next(kind for kind in (EngineKind.PROXY, EngineKind.UNKNOWN, EngineKind.VLLM) if kind in kinds)
    versions = dict.fromkeys(engine.version for engine in engines.values() if engine.version)
    details = [
        f"{url}: {engine.detail}" if len(engines) > 1 else engine.detail
        for url, engine in engines.items()
        if engine.detail
    ]
    return Engine(kind, ", ".join(versions), "; ".join(details))


def check_fields(fields: Mapping[str, str], engine: Engine, provider_id: str) -> tuple[Notice, ...]:
    """Refuse a request with fields that the engine does not support.

    Args:
        fields: From `vllm_fields.fields_to_check`.
        engine: The engine. If its fields are unknown, no request is refused.
        provider_id: The provider's id.

    Returns:
        A notice for each field that could not be checked.

    Raises:
        CallerError: FIELD_NOT_SUPPORTED, with each unsupported field.
    """
    if engine.fields is None:
        return tuple(
            Notice(
                NoticeKind.FIELDS_NOT_CHECKED,
                f"the fields that provider {provider_id!r} supports are unknown ({engine.detail}); if it does not support {name},"
                " it ignores it",
                path,
            )
            for name, path in sorted(fields.items())
        )
    unknown = sorted(fields.keys() - engine.fields)
    if not unknown:
        return ()
    version = f"vLLM {engine.version}" if engine.version else "a vLLM"
    raise CallerError(
        Reason.FIELD_NOT_SUPPORTED,
        f"provider {provider_id!r} is {version}, which does not support {', '.join(unknown)} and would ignore it: leave out "
        + ", ".join(fields[name] for name in unknown),
        metadata={"field": fields[unknown[0]], "provider": provider_id, "version": engine.version},
        violations=[Violation(fields[name], f"{version} does not support {name}: leave it out") for name in unknown],
    )
