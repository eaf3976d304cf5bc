"""What answers at a provider's address: a vLLM itself, or a proxy in front of it. And which fields a vLLM knows.

Some proxies pass vLLM's `/openapi.json` on, but drop fields of the requests; others have a document of their own. So the
document counts only if nothing stands between: `/version`, `/openapi.json` and `/health` all have to look as vLLM's do.

    start ──▶ look ──known──▶ look again after FRESH_SECONDS, and after each failure of the replica
               ▲ │
               └─┘ not known: again after 1, 2, 4 … 60 seconds

Looking again costs two small requests as long as `/version` is the same.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.errors import CallerError, Reason, Violation
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.upstream.failures import NOT_JSON, excerpt
from deltawire_server.upstream.vllm_fields import at, field_names

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

FRESH_SECONDS = 300.0
"""How long what was read is used: an upgrade takes about as long."""

RETRY_SECONDS = 1.0
"""Until the next look if nothing is known; each time twice as long."""

MAX_RETRY_SECONDS = 60.0
"""How long at most."""

VERSION, OPENAPI, HEALTH = "/version", "/openapi.json", "/health"

_PROXY_HEADERS = (
    *("via", "x-envoy-", "x-litellm-", "x-kong-", "x-served-by", "x-cache", "x-amz", "x-azure-", "x-goog-"),
    *("cf-ray", "x-powered-by", "x-proxy", "x-nginx", "x-vllm-router"),
)
"""How the names of headers begin that proxies add and vLLM never sends."""

_OWN_FIELD = "add_generation_prompt"
"""A field that every vLLM with chat has, and no other API."""


class EngineKind(enum.Enum):
    """What answers; the values are those of `deltawire.v1.Engine.Kind`."""

    UNKNOWN = 1
    VLLM = 2
    PROXY = 3


@dataclass(frozen=True, slots=True)
class Engine:
    """What is known of what answers at an address.

    Attributes:
        kind: A vLLM itself, a proxy, or not known (yet).
        version: vLLM's, in its own words; empty if it is not known. Of several replicas each one's, joined by commas.
        detail: For people: why the kind is PROXY or UNKNOWN, or why fields cannot be checked; empty if all is known.
        fields: The names of the fields of a chat request that it knows, and `vllm_fields.STRICT` if a tool may have that;
            `None` if they are not known. Always `None` for a proxy.
    """

    kind: EngineKind
    version: str = ""
    detail: str = ""
    fields: frozenset[str] | None = None

    @property
    def strict_is_enforced(self) -> bool:
        """Whether `strict` of a tool reaches a vLLM that knows it. If not, check the arguments in the gateway."""
        return self.kind is EngineKind.VLLM


@dataclass(frozen=True, slots=True)
class Document:
    """What an address answered.

    Attributes:
        status: The HTTP status.
        headers: By lower-case name.
        body: The whole body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def recognize(answers: Mapping[str, Document | str], before: Engine | None = None) -> Engine:
    """Decide what answers.

    Args:
        answers: By path; instead of a document, why there is none.
        before: What answered before: its fields are kept if the version is the same and `/openapi.json` was not read.
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
    """What a vLLM says of itself, where it is known that nothing stands between; see `recognize`."""
    version = _version(answers.get(VERSION))
    openapi = answers.get(OPENAPI)
    if openapi is None and before is not None and version == before.version:
        return before
    if not isinstance(openapi, Document):
        return Engine(EngineKind.VLLM, version, f"{OPENAPI}: {openapi}")
    names = field_names(openapi.body) if openapi.status == 200 else frozenset()
    if names:
        return Engine(EngineKind.VLLM, version, fields=names)
    why = "it lists no fields of chat requests" if openapi.status == 200 else f"HTTP {openapi.status}"
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
        yield f"{VERSION} is not as vLLM's"
    health = documents.get(HEALTH)
    if health is not None and health.body and health.status < 500:
        yield f"{HEALTH} has a body, vLLM's has none"
    openapi = documents.get(OPENAPI)
    if openapi is not None and openapi.status == 200:
        title = at(_decoded(openapi.body), "info", "title")
        title = title if isinstance(title, str) else ""
        if title != "FastAPI" and "vllm" not in title.lower():
            yield f"{OPENAPI} has the title {excerpt(repr(title))}, vLLM's is 'FastAPI'"
        if _OWN_FIELD not in field_names(openapi.body):
            yield f"{OPENAPI} does not describe vLLM's chat requests"


def _version(answer: Document | str | None) -> str:
    """The version in vLLM's `/version`, which has nothing else; empty if it is not that."""
    said = _decoded(answer.body) if isinstance(answer, Document) and answer.status == 200 else None
    version = at(said, "version")
    return excerpt(version) if isinstance(version, str) and isinstance(said, dict) and len(said) == 1 else ""


def _decoded(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except NOT_JSON:
        return None


class EngineReader:
    """Finds out what answers at one address, and keeps it up to date.

    Args:
        fetch: Reads the document at a path; returns why not if it cannot. It does not raise.
        failures: How often the address has failed so far: after another failure another version may answer.
        kind: What the operator says that it is; `None` to find out.
        changed: Called with what is known when that has changed, for the log.
        retry_seconds: Until the second look if the first finds nothing.
        fresh_seconds: Until the next look if something is known.

    Attributes:
        engine: What is known now.
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
            self.engine = Engine(kind, detail="the gateway's settings say that a proxy is in front of it")
        else:
            self.engine = Engine(kind or EngineKind.UNKNOWN, detail="it was not asked yet")
        self._fetch = fetch
        self._failures = failures
        self._kind = kind
        self._changed = changed
        self._retry_seconds = retry_seconds
        self._fresh_seconds = fresh_seconds
        self._looked_after: int | None = None  # so many failures; `None` before the first look
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look now and on, until `close`; nothing if that has begun. Needs a running loop."""
        if self._task is None and self._kind is not EngineKind.PROXY:
            self._task = asyncio.create_task(self._keep_looking(), name="look at an engine")

    async def known(self) -> Engine:
        """What answers. Waits for the first look, and for a new look after a failure; never for a repeated one."""
        if self._kind is not EngineKind.PROXY:
            async with self._lock:
                if self._looked_after != self._failures():
                    await self._look()
        return self.engine

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep_looking(self) -> None:
        delay = self._retry_seconds
        while True:
            async with self._lock:
                await self._look()
            if self.engine.fields is not None or self.engine.kind is EngineKind.PROXY:
                delay = self._retry_seconds
                await asyncio.sleep(self._fresh_seconds)
            else:
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_SECONDS)

    async def _look(self) -> None:
        before, failures = self.engine, self._failures()
        paths = [VERSION] if before.fields is not None else [VERSION, OPENAPI]
        if self._kind is None:
            paths.append(HEALTH)
        answers = await self._read(paths)
        if before.fields is not None and _version(answers[VERSION]) != before.version:
            answers |= await self._read([OPENAPI])
        # What is known stays if it cannot be read once more; but not after a failure, which may be a restart.
        unread = any(isinstance(answer, str) for answer in answers.values())
        if not (unread and before.fields is not None and failures == self._looked_after):
            self.engine = recognize(answers, before) if self._kind is None else described(answers, before)
        self._looked_after = failures
        if self.engine != before:
            self._changed(self.engine)

    async def _read(self, paths: Sequence[str]) -> dict[str, Document | str]:
        return dict(zip(paths, await asyncio.gather(*map(self._fetch, paths)), strict=True))


def joined(engines: Mapping[str, Engine]) -> Engine:
    """What is known of a provider from what is known of each of its replicas.

    Args:
        engines: By the address of the replica; at least one.
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


def check_fields(asked: Mapping[str, str], engine: Engine, provider_id: str) -> tuple[Notice, ...]:
    """Refuse a request with fields that its vLLM does not know.

    Args:
        asked: From `vllm_fields.fields_to_check`.
        engine: What answers. Only if it is known to be a vLLM, and to know certain fields, is anything refused.
        provider_id: Whose it is.

    Returns:
        A notice for each field that could not be checked.

    Raises:
        CallerError: FIELD_NOT_SUPPORTED, with each field that is not known.
    """
    if engine.fields is None:
        return tuple(
            Notice(
                NoticeKind.FIELDS_NOT_CHECKED,
                f"it is not known which fields provider {provider_id!r} knows ({engine.detail}); if it does not know {name},"
                " it ignores it",
                path,
            )
            for name, path in sorted(asked.items())
        )
    unknown = sorted(asked.keys() - engine.fields)
    if not unknown:
        return ()
    version = f"vLLM {engine.version}" if engine.version else "a vLLM"
    raise CallerError(
        Reason.FIELD_NOT_SUPPORTED,
        f"provider {provider_id!r} is {version}, which does not know {', '.join(unknown)} and would ignore it: leave out "
        + ", ".join(asked[name] for name in unknown),
        metadata={"field": asked[unknown[0]], "provider": provider_id, "version": engine.version},
        violations=[Violation(asked[name], f"{version} does not know {name}: leave it out") for name in unknown],
    )
