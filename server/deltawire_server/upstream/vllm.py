"""A vLLM server over HTTP, or several alike: one pooled client for as long as the provider is configured.

httpx over aiohttp's transport: aiohttp's C parser hands over all that has arrived at once, where httpx's own gives one
chunk at a time. What its mapping of exceptions calls a timeout may be a refused connection, so nothing here decides by
the exception's type: only by whether the answer had begun.

As long as it had not, the next replica may be asked. The one before may have taken the request all the same, and generate
for nobody: calls are at-least-once on the engine, as they are for callers that try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from fnmatch import fnmatchcase
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Annotated, Any

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from deltawire_server.errors import DeltawireError, ProviderError, Reason, Violation, invalid_request
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream import vllm_fields
from deltawire_server.upstream.base import (
    Answering,
    CallContext,
    Health,
    HealthStatus,
    Patience,
    ServedModel,
    TokenCount,
)
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.refusals import RETRY_SECONDS, Refusal, error_of
from deltawire_server.upstream.replicas import Replica, Replicas
from deltawire_server.upstream.vllm_request import chat_body, count_body

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from deltawire_server.upstream.request import ChatRequest

KEEPALIVE_SECONDS = 4.0
"""uvicorn, which serves vLLM, closes idle connections after five; ours go first, or a request may meet a closing one."""

CONTROL_SECONDS = 5.0
"""For listings and health: an engine's API server answers them without the engine, so a slow one is not well."""

READ_BUFFER_BYTES = 128 * 1024
"""Of each connection, half of what may wait in it: with less, a busy stream stops and starts its socket all the time."""

COUNT_SECONDS = 60.0
"""For a count of tokens: the API server renders and counts by itself, for a long prompt and between others' for seconds."""

COUNTS_AT_ONCE = 16
"""More wait for these: of the connections, most are for answers."""

MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
"""Of what a server says of itself; vLLM's OpenAPI document has a quarter of that."""

TOKENIZE = "/tokenize"

MAX_ERROR_BYTES = 1024 * 1024
"""Of an error's body: vLLM quotes the request in some, and a cut one cannot be read; a wrong URL may answer with anything."""

_log = get_logger(__name__)

_BROKEN = (httpx.TransportError, aiohttp.ClientError, OSError)
"""What the transport may raise; not all of aiohttp's errors come translated."""


def root_url(base_url: str) -> str:
    """Where a vLLM's paths begin: the base URL without trailing slashes and without `/v1`, which not all paths have.

    Args:
        base_url: As operators write it: with or without `/v1`, with a prefix, with trailing slashes.
    """
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


class VllmProvider:
    """A vLLM server, or several that serve the same models.

    Args:
        provider_id: The operator's name for it.
        base_urls: At least one, one for each replica: http or https; with or without `/v1`.
        api_token: The operator's token; `None` sends none.
        headers: Further headers of every request, none that is set here; their values are secrets.
        allowed_models: Names, or shell patterns of names, of the models that may be used; empty for all.
        allowed_extra_fields: Names, or shell patterns of names, of the body's fields that `extra_body` may have; empty for none.
        tls: For https: a context that verifies as the operator asked.
        default_max_tokens: For requests that name none; `None` leaves it to the model's context.
        max_connections: Above what may be in flight at once: a full pool would make calls wait for each other.
        connect_timeout: Seconds to reach it.
        patience: How long its answers may take.
        refresh_interval: Seconds between two listings.
        user_agent: How it is told who asks.
    """

    kind = "vllm"

    def __init__(
        self,
        provider_id: str,
        *base_urls: str,
        api_token: str | None = None,
        headers: Mapping[str, str] | None = None,
        allowed_models: Sequence[str] = (),
        allowed_extra_fields: Sequence[str] = (),
        tls: ssl.SSLContext | bool = True,
        default_max_tokens: int | None = None,
        max_connections: int = 1032,
        connect_timeout: float = 5.0,
        patience: Patience | None = None,
        refresh_interval: float = 30.0,
        user_agent: str = "deltawire",
    ) -> None:
        self.id = provider_id
        self._replicas = Replicas([root_url(base_url) for base_url in base_urls])
        self.base_urls = tuple(replica.base_url for replica in self._replicas.all)
        self._api_token = api_token
        self._allowed_models = tuple(allowed_models)
        self._allowed_extra_fields = tuple(allowed_extra_fields)
        self._field_readers = {
            replica: vllm_fields.FieldReader(functools.partial(self._document, replica))
            for replica in self._replicas.all
        }
        self._counting = asyncio.Semaphore(COUNTS_AT_ONCE)
        self.default_max_tokens = default_max_tokens
        self.patience = patience or Patience()
        self.refresh_interval = refresh_interval
        self._tls = tls
        self._max_connections = max_connections
        # No time limit on reads: silence is counted from the answer's events, by whoever reads them.
        self._chat_timeout = httpx.Timeout(None, connect=connect_timeout)
        self._count_timeout = httpx.Timeout(COUNT_SECONDS, connect=connect_timeout)
        self._control_timeout = httpx.Timeout(CONTROL_SECONDS, connect=connect_timeout)
        self._client = httpx.AsyncClient(
            # Given to the client, `verify` and `limits` would be ignored beside a transport of one's own.
            transport=AiohttpTransport(verify=tls, trust_env=False, client=self._session),
            headers={**(headers or {}), "user-agent": user_agent, "accept-encoding": "identity"},
            # One caller's must not travel with another's request; by its policy, since the client copies other forms.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
            trust_env=False,
        )

    @property
    def has_token(self) -> bool:
        """Whether the operator configured a token."""
        return self._api_token is not None

    def __repr__(self) -> str:
        """Without the token: this lands in logs."""
        return f"VllmProvider({', '.join(map(repr, (self.id, *self.base_urls)))})"

    @contextlib.asynccontextmanager
    async def stream_chat(self, request: ChatRequest, model: str, call: CallContext) -> AsyncIterator[Answering]:
        """Ask for a completion; see `Provider.stream_chat`."""
        self._require_allowed(model)
        body = chat_body(request, model, allowed_extra(request.extra_body, self._allowed_extra_fields, self.id))
        to_check = vllm_fields.fields_to_check(body, request)
        content = msgspec.json.encode(body)
        failures: list[ProviderError] = []
        for replica in self._replicas.by_load():
            with replica.stream():
                unchecked = await self._check_fields(replica, to_check)
                try:
                    response = await self._ask(replica, content, request.model, call)
                except ProviderError as error:
                    self._pass_over(replica, error)
                    failures.append(error)
                    continue
                self._replicas.answered(replica)
                notices = (*self._passed_over(failures), *unchecked)
                try:
                    async with contextlib.aclosing(_body(response)) as pieces:
                        yield Answering(pieces, notices, len(failures) + 1)
                finally:
                    # Closing the socket is what makes vLLM stop; a cancelled call must not get away before that is done.
                    await asyncio.shield(_close(response))
                return
        raise self._none_answers(failures)

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """How many tokens a prompt has; see `Provider.count_tokens`."""
        self._require_allowed(model)
        _require_text(request)
        extra = allowed_extra(request.extra_body, self._allowed_extra_fields, self.id)
        content = msgspec.json.encode(count_body(request, model, extra))
        failures: list[ProviderError] = []
        async with self._counting:
            for replica in self._replicas.by_load():
                try:
                    count = await self._count(replica, content, request.model, call)
                except ProviderError as error:
                    self._pass_over(replica, error)
                    failures.append(error)
                else:
                    self._replicas.answered(replica)
                    return count
        raise self._none_answers(failures)

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves now; see `Provider.list_models`. An entry without an id is passed over."""
        failures: list[ProviderError] = []
        for replica in self._replicas.in_order():
            try:
                served = await self._listing(replica, token)
            except ProviderError as error:
                self._pass_over(replica, error)
                failures.append(error)
            else:
                self._replicas.answered(replica)
                return tuple(model for model in served if self._allows(model.id))
        raise self._none_answers(failures)

    async def check_health(self) -> Health:
        """How it is; see `Provider.check_health`. An engine that is asleep is not well, though its `/health` says so."""
        ailments = await asyncio.gather(*map(self._ailment, self._replicas.all))
        unwell = {base_url: ailment for base_url, ailment in zip(self.base_urls, ailments, strict=True) if ailment}
        if not unwell:
            return Health(HealthStatus.OK)
        if len(ailments) == 1:
            return Health(HealthStatus.ERROR, f"Health check failed: {ailments[0]}")
        each = "; ".join(f"{base_url}: {ailment}" for base_url, ailment in unwell.items())
        message = f"Health check failed at {len(unwell)} of {len(ailments)} addresses: {each}"
        return Health(HealthStatus.ERROR, message)

    async def close(self) -> None:
        """Close its connections; calls under way fail."""
        await self._client.aclose()

    def _session(self) -> aiohttp.ClientSession:
        """The transport's session, made by the first request since it belongs to the running loop."""
        connector = aiohttp.TCPConnector(
            ssl=self._tls, limit=self._max_connections, keepalive_timeout=KEEPALIVE_SECONDS
        )
        # aiohttp keeps cookies too; a load balancer's would tie every caller to one replica.
        return aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=READ_BUFFER_BYTES
        )

    def _headers(self, token: str | None) -> dict[str, str]:
        chosen = token or self._api_token
        return {"authorization": f"Bearer {chosen}"} if chosen else {}

    def _require_allowed(self, model: str) -> None:
        if not self._allows(model):
            raise ProviderError(
                Reason.MODEL_NOT_SERVED,
                f"model {model!r} of provider {self.id!r} may not be used: it is not listed in allowed_models, in the"
                " gateway's settings",
                metadata={"model": model, "provider": self.id},
            )

    def _allows(self, model: str) -> bool:
        allowed = self._allowed_models
        return not allowed or any(fnmatchcase(model, pattern) for pattern in allowed)

    def _call_headers(self, call: CallContext) -> dict[str, str]:
        headers = self._headers(call.token)
        headers["content-type"] = "application/json"
        # vLLM tells the id in every chunk and takes it for its own: each attempt needs another.
        headers["x-request-id"] = f"{call.request_id}-{secrets.token_hex(4)}"
        if call.traceparent:
            headers["traceparent"] = call.traceparent
        if call.tracestate:
            headers["tracestate"] = call.tracestate
        return headers

    async def _check_fields(self, replica: Replica, to_check: Mapping[str, str]) -> tuple[Notice, ...]:
        """Refuse fields that a replica would ignore; what could not be checked is told."""
        if not to_check:
            return ()
        known = await self._field_readers[replica].known(replica.failures)
        return vllm_fields.check(to_check, known, self.id)

    async def _document(self, replica: Replica, path: str) -> bytes | None:
        """What a replica says of itself at a path that needs no key; `None` if that cannot be had."""
        with contextlib.suppress(*_BROKEN):
            async with asyncio.timeout(CONTROL_SECONDS):
                request = self._client.build_request("GET", f"{replica.root}{path}", headers=self._headers(None))
                response = await self._client.send(request, stream=True)
                try:
                    if response.status_code == httpx.codes.OK:
                        return await _read(response, MAX_DOCUMENT_BYTES)
                finally:
                    await asyncio.shield(_close(response))
        return None

    def _passed_over(self, failures: Sequence[ProviderError]) -> tuple[Notice, ...]:
        if not failures:
            return ()
        message = f"another replica of provider {self.id!r} answers: " + "; ".join(error.message for error in failures)
        return (Notice(NoticeKind.ANOTHER_REPLICA, message),)

    async def _count(self, replica: Replica, content: bytes, name: str, call: CallContext) -> TokenCount:
        """Have a replica count; `name` is what the caller calls the model."""
        url = f"{replica.root}{TOKENIZE}"
        headers = self._call_headers(call)
        request = self._client.build_request("POST", url, content=content, headers=headers, timeout=self._count_timeout)
        response = await self._send(replica, request)
        try:
            if response.status_code != httpx.codes.OK:
                raise self._not_counted(await _refusal(response), name, callers_token=call.token is not None)
            counted = msgspec.json.decode(await response.aread(), type=_Counted)
            return TokenCount(counted.count, counted.max_model_len)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = (
                f"provider {self.id!r} answered {TOKENIZE} with something else than a count: is its base URL right?"
            )
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": self.id}) from error
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error
        finally:
            await asyncio.shield(_close(response))

    def _not_counted(self, refusal: Refusal, name: str, *, callers_token: bool) -> DeltawireError:
        error = error_of(refusal, self.id, callers_token=callers_token, model=name)
        # The key of `/v1` is not asked for here: whoever forbids it forbids the endpoint.
        if refusal.status not in _NOT_OFFERED or error.reason is Reason.MODEL_NOT_FOUND:
            return error
        return ProviderError(
            Reason.ENDPOINT_NOT_SUPPORTED,
            f"provider {self.id!r} does not count tokens: it answered HTTP {refusal.status} at {TOKENIZE}, which is beside"
            " /v1; the operator can let it through to vLLM",
            metadata={"provider": self.id, "endpoint": TOKENIZE},
        )

    async def _ask(self, replica: Replica, content: bytes, name: str, call: CallContext) -> httpx.Response:
        """Send a chat request; the response is an event stream that has begun, and the caller's to close.

        Args:
            replica: Whom to ask.
            content: The request's body.
            name: What the caller calls the model.
            call: The caller's metadata.
        """
        headers = {**self._call_headers(call), "accept": "text/event-stream"}
        url = f"{replica.base_url}/chat/completions"
        outgoing = self._client.build_request("POST", url, content=content, headers=headers, timeout=self._chat_timeout)
        response = await self._send(replica, outgoing)
        try:
            if response.status_code != httpx.codes.OK:
                refusal = await _refusal(response)
                raise error_of(refusal, self.id, callers_token=call.token is not None, model=name)
            content_type = response.headers.get("content-type", "")
            if not content_type.startswith("text/event-stream"):
                message = (
                    f"provider {self.id!r} answered with {content_type or 'no content type'} instead of an event stream"
                )
                raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": self.id})
        except BaseException:
            await asyncio.shield(_close(response))
            raise
        return response

    async def _listing(self, replica: Replica, token: str | None) -> tuple[ServedModel, ...]:
        headers = self._headers(None if self._api_token else token)
        url = f"{replica.base_url}/models"
        request = self._client.build_request("GET", url, headers=headers, timeout=self._control_timeout)
        response = await self._send(replica, request)
        try:
            if response.status_code != httpx.codes.OK:
                callers_token = token is not None and not self._api_token
                raise error_of(await _refusal(response), self.id, callers_token=callers_token)
            cards = msgspec.json.decode(await response.aread(), type=_Listing).data
            return tuple(_served_model(card) for card in cards if isinstance(card, dict) and card.get("id"))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"provider {self.id!r} answered its list of models with something else: is its base URL right?"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": self.id}) from error
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error
        finally:
            await asyncio.shield(_close(response))

    async def _ailment(self, replica: Replica) -> str:
        """What ails a replica; empty if it is well."""
        try:
            response = await self._get(replica, "/health")
            if not response.is_success:
                return f"HTTP {response.status_code}"
            response = await self._get(replica, "/is_sleeping")
            if response.is_success and _says_asleep(response.content):
                return "the engine is asleep"
            # vLLM's /health asks for no key: a wrong one would look well, and every call would fail.
            if self.has_token and (await self._get(replica, "/v1/models")).status_code in (401, 403):
                return "it refuses the token in the gateway's settings"
        except _BROKEN as error:
            return _describe(error)
        return ""

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        url = f"{replica.root}{path}"
        return await self._client.get(url, headers=self._headers(None), timeout=self._control_timeout)

    async def _send(self, replica: Replica, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error

    def _pass_over(self, replica: Replica, error: ProviderError) -> None:
        """Set a replica aside that was away or had no room, so that the next is asked; raise what any would answer."""
        said = error.metadata.get("http_status")
        if error.reason is not Reason.UPSTREAM_UNAVAILABLE or said not in (None, "503"):
            raise error
        # Also one that said 503: it has the fewest streams because it takes none, and would be asked first every time.
        self._replicas.failed(replica)
        if len(self._replicas.all) > 1:  # else the caller hears of it, and whoever logs the call
            _log.warning("replica set aside", provider=self.id, base_url=replica.base_url, error=error.message)

    def _none_answers(self, failures: Sequence[ProviderError]) -> ProviderError:
        """The failure of a call for which each replica was passed over: that of a single one is told as it is."""
        if len(failures) == 1:
            return failures[0]
        return ProviderError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"none of the {len(failures)} replicas took the request: "
            + "; ".join(failure.message for failure in failures),
            metadata={name: value for failure in failures for name, value in failure.metadata.items()},
            retry_after=min(failure.retry_after or 0.0 for failure in failures),
        )

    def _unreachable(self, replica: Replica, error: Exception) -> ProviderError:
        return ProviderError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"provider {self.id!r} at {replica.base_url} cannot be reached: {_describe(error)}",
            metadata={"provider": self.id},
            retry_after=RETRY_SECONDS,
        )


class _Listing(msgspec.Struct):
    """The body of a list of models."""

    data: list[Any]


class _Counted(msgspec.Struct):
    """The body of a count. The token ids that come with it are not read."""

    count: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    max_model_len: Annotated[int, msgspec.Meta(gt=0, le=2**31 - 1)] | None = None


_NOT_OFFERED = frozenset({403, 404, 405, 501})
"""The statuses of an endpoint that is not there, or not for us."""


def _require_text(request: ChatRequest) -> None:
    violations = [
        Violation(
            f"chat.messages[{turn}].{message.role.value}.content[{place}].image",
            "an image cannot be counted without being computed: leave it out",
        )
        for turn, message in enumerate(request.messages)
        for place, part in enumerate(message.content)
        if not isinstance(part, str)
    ]
    if violations:
        raise invalid_request(violations)


async def _read(response: httpx.Response, most: int) -> bytes | None:
    """A whole body; `None` if it has more than `most` bytes."""
    body = bytearray()
    async for data in response.aiter_raw():
        body += data
        if len(body) > most:
            return None
    return bytes(body)


async def _body(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body up to its end or to where the connection broke: for what the answer is, both are the same."""
    with contextlib.suppress(*_BROKEN):
        async for data in response.aiter_raw():
            yield data


async def _close(response: httpx.Response) -> None:
    with contextlib.suppress(*_BROKEN):
        await response.aclose()


async def _refusal(response: httpx.Response) -> Refusal:
    """What an error response says, in any of the four shapes that vLLM gives it, or none."""
    body = bytearray()
    with contextlib.suppress(*_BROKEN):
        async for data in response.aiter_raw():
            body += data[: MAX_ERROR_BYTES - len(body)]
            if len(body) >= MAX_ERROR_BYTES:
                break
    try:
        said: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = None
    error = said.get("error", said.get("detail", said)) if isinstance(said, dict) else None
    fields = error if isinstance(error, dict) else {"message": error}
    retry_after = response.headers.get("retry-after", "")
    return Refusal(
        status=response.status_code,
        message=_text(fields.get("message")),
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
        retry_after=float(retry_after) if retry_after.isdecimal() else None,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _served_model(card: dict[str, Any]) -> ServedModel:
    length = card.get("max_model_len")
    return ServedModel(
        id=str(card["id"]),
        engine_root=_text(card.get("root")),
        base_model=_text(card.get("parent")),
        max_context_tokens=length if isinstance(length, int) and length > 0 else None,
    )


def _says_asleep(body: bytes) -> bool:
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(said, dict) and said.get("is_sleeping") is True


def _describe(error: Exception) -> str:
    # aiohttp says "ssl:default" of plain HTTP too, which leads astray.
    return str(error).replace(" ssl:default", "") or type(error).__name__
