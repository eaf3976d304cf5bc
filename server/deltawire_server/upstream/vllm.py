"""A vLLM server over HTTP, or several alike: one pooled client for as long as the provider is configured.

httpx over a transport of our own, whose exceptions say who broke what: a provider that cannot be reached is unavailable
unless someone has to change a setting, one that violates HTTP is malformed, and a body that ends early just ends, since
what is missing shows in its events.

Until the first event of the answer has come, one other replica may be asked; `policy` says after which failures. The first
one may have taken the request all the same and generate for no reader: calls are at-least-once on the engine, as they are
for callers that try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from fnmatch import fnmatchcase
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import httpx
import msgspec

from deltawire_server.errors import DeltawireError, ProviderError, Reason, Violation, invalid_request
from deltawire_server.pacing import give_way
from deltawire_server.sansio.events import Fault, Notice, NoticeKind
from deltawire_server.secret import Secret
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream import vllm_fields
from deltawire_server.upstream.base import (
    BrokenBodyError,
    CallContext,
    Health,
    HealthStatus,
    OpenStream,
    ServedModel,
    Timeouts,
    TokenCount,
)
from deltawire_server.upstream.engine import Document, Engine, EngineKind, EngineReader, joined
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.failures import NOT_JSON, RETRY_SECONDS, UpstreamError, excerpt, failure_of, read_error
from deltawire_server.upstream.opening import read_opening
from deltawire_server.upstream.policy import ACTIONS, MAX_ATTEMPTS
from deltawire_server.upstream.replicas import Attempt, Replica, Replicas
from deltawire_server.upstream.transport.client import Transport
from deltawire_server.upstream.transport.errors import ProtocolViolationError
from deltawire_server.upstream.unreachable import reason_of
from deltawire_server.upstream.vllm_request import chat_body, count_body, encode_body

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.upstream.vllm_request import Body

CONTROL_SECONDS = 5.0
"""For listings and health: an engine's API server answers them without the engine, so a slow one is not well."""

COUNT_SECONDS = 60.0
"""For a count of tokens: the API server renders and counts by itself, for a long prompt and between others' for seconds."""

COUNTS_AT_ONCE = 16
"""More wait for these: of the connections, most are for answers."""

MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
"""Of what a server says of itself; vLLM's OpenAPI document has a quarter of that."""

MAX_SERVED_NAME = 1024
"""Characters of a served model's name; one that is longer is left out. It is far beyond the names of files and repositories, and
with all else that a listing holds, a model stays below the 4 MiB of a message."""

TOKENIZE = "/tokenize"

MAX_ERROR_BYTES = 1024 * 1024
"""Of an error's body: vLLM quotes the request in some, and a cut one cannot be read; a wrong URL may answer with anything."""

MAX_PIECE = 16 * 1024
"""Of an answer's body that is taken in one step: up to 8 ms if it consists of short events."""

T = TypeVar("T")
D = TypeVar("D")

_log = get_logger(__name__)

_BROKEN = (httpx.TransportError, httpx.InvalidURL)
"""What the transport raises, and httpx for an address that cannot be one, such as 256.1.1.1."""


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
        timeouts: How long its answers may take.
        refresh_interval: Seconds between two listings.
        user_agent: The User-Agent header of every request.
        engine: What the operator says that answers at the addresses; `None` to find out.
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
        accepts_caller_tokens: bool = False,
        tls: ssl.SSLContext | bool = True,
        default_max_tokens: int | None = None,
        max_connections: int = 1032,
        connect_timeout: float = 5.0,
        timeouts: Timeouts | None = None,
        refresh_interval: float = 30.0,
        user_agent: str = "deltawire",
        engine: EngineKind | None = None,
    ) -> None:
        self.id = provider_id
        self._replicas = Replicas([root_url(base_url) for base_url in base_urls])
        self.base_urls = tuple(replica.base_url for replica in self._replicas.all)
        self._api_token = None if api_token is None else Secret(api_token)
        self._allowed_models = tuple(allowed_models)
        self._allowed_extra_fields = tuple(allowed_extra_fields)
        self._engines = {
            replica: EngineReader(
                functools.partial(self._engine_document, replica),
                functools.partial(getattr, replica, "failures"),
                engine,
                functools.partial(self._log_engine, replica),
            )
            for replica in self._replicas.all
        }
        self._counting = asyncio.Semaphore(COUNTS_AT_ONCE)
        self.accepts_caller_tokens = accepts_caller_tokens
        self.default_max_tokens = default_max_tokens
        self.timeouts = timeouts or Timeouts()
        self.refresh_interval = refresh_interval
        # No time limit on reads: those of answers are counted from events, and those of documents over all of it.
        self._timeout = httpx.Timeout(None, connect=connect_timeout)
        self._client = httpx.AsyncClient(
            transport=Transport(tls, max_connections),
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

    @property
    def engine(self) -> Engine:
        """What answers; see `Provider.engine`."""
        return joined({replica.base_url: reader.engine for replica, reader in self._engines.items()})

    @contextlib.asynccontextmanager
    async def stream_chat(self, request: ChatRequest, model: str, call: CallContext) -> AsyncIterator[OpenStream]:
        """Ask for a completion; see `Provider.stream_chat`."""
        self._require_allowed(model)
        body = chat_body(request, model, allowed_extra(request.extra_body, self._allowed_extra_fields, self.id))
        to_check = vllm_fields.fields_to_check(body, request)
        content = await encode_body(body, request.messages)
        name = request.model
        del body, request  # from here on `content` has the only copy

        async def ask(replica: Replica) -> tuple[httpx.Response, AsyncGenerator[bytes], tuple[Notice, ...]]:
            unchecked = await self._check_fields(replica, to_check)
            return (*await self._open(replica, content, name, call), unchecked)

        with contextlib.ExitStack() as held:
            try:
                attempt, answer, failures = await self._first_answer(held, ask, self.timeouts.first_event)
            finally:
                content.clear()  # no other replica is asked any more
            response, pieces, unchecked = answer
            try:
                async with contextlib.aclosing(pieces):
                    notices = (*self._passed_over(failures), *unchecked)
                    failed = functools.partial(self._failed_after_start, attempt)
                    yield OpenStream(pieces, notices, len(failures) + 1, failed)
            finally:
                # Closing the socket is what makes vLLM stop; a cancelled call must not return before that is done.
                await asyncio.shield(_close(response))

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """How many tokens a prompt has; see `Provider.count_tokens`."""
        self._require_allowed(model)
        _require_text(request)
        extra = allowed_extra(request.extra_body, self._allowed_extra_fields, self.id)
        content = await encode_body(count_body(request, model, extra), request.messages)
        async with self._counting:
            with contextlib.ExitStack() as held:
                ask = functools.partial(self._count, content=content, name=request.model, call=call)
                _, count, _ = await self._first_answer(held, ask, COUNT_SECONDS)
                return count

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves now; see `Provider.list_models`. An entry without an id, or with a very long one, is left out."""
        for reader in self._engines.values():
            reader.start()
        failures: list[DeltawireError] = []
        for replica in self._replicas.in_order():
            try:
                served = await self._listing(replica, token)
            except ProviderError as error:
                failures.append(error.with_traceback(None))
            else:
                return tuple(model for model in served if self._allows(model.id))
        raise self._failure_of_all(failures)

    async def check_health(self) -> Health:
        """How it is; see `Provider.check_health`. An engine that is asleep is unhealthy, though its `/health` is 200."""
        problems = await asyncio.gather(*map(self._problem, self._replicas.all))
        unhealthy = {base_url: problem for base_url, problem in zip(self.base_urls, problems, strict=True) if problem}
        if not unhealthy:
            return Health(HealthStatus.OK)
        if len(problems) == 1:
            return Health(HealthStatus.ERROR, f"Health check failed: {problems[0]}")
        each = "; ".join(f"{base_url}: {problem}" for base_url, problem in unhealthy.items())
        message = f"Health check failed at {len(unhealthy)} of {len(problems)} addresses: {each}"
        return Health(HealthStatus.ERROR, message)

    async def close(self) -> None:
        """Close its connections; calls under way fail."""
        await asyncio.gather(*(reader.close() for reader in self._engines.values()))
        await self._client.aclose()

    def _headers(self, token: str | None) -> dict[str, str]:
        chosen = token or self._api_token
        return {"authorization": Secret(f"Bearer {chosen}")} if chosen else {}

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

    async def _first_answer(
        self, held: contextlib.ExitStack, ask: Callable[[Replica], Awaitable[T]], seconds: float
    ) -> tuple[Attempt, T, list[DeltawireError]]:
        """Have a replica answer; if it fails, and `policy` allows it, one other.

        Args:
            held: What the replica that answers is counted in, as busy with a call.
            ask: Asks a replica.
            seconds: How long it may take, all together.

        Returns:
            The attempt that succeeded, what `ask` returned, and the failures before it.

        Raises:
            DeltawireError: No replica that was asked answered.
        """
        failures: dict[Replica, DeltawireError] = {}
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            replica = self._replicas.choose(tuple(failures))
            with contextlib.ExitStack() as holding:
                attempt = holding.enter_context(self._replicas.attempt(replica))
                try:
                    async with asyncio.timeout_at(deadline):
                        answer = await ask(replica)
                except TimeoutError:
                    failures[replica] = self._silence(seconds)
                except DeltawireError as error:
                    failures[replica] = error.with_traceback(None)
                else:
                    attempt.answered()
                    held.push(holding.pop_all())
                    return attempt, answer, list(failures.values())
                self._failed(attempt, failures[replica])
            asked = len(failures)
            if not ACTIONS[failures[replica].reason].repeat or asked == min(MAX_ATTEMPTS, len(self._replicas.all)):
                raise self._failure_of_all(list(failures.values()))

    def _failed(self, attempt: Attempt, error: DeltawireError) -> None:
        if ACTIONS[error.reason].eject:
            self._eject(attempt, error.reason, error.message)
        elif ACTIONS[error.reason].answer:
            attempt.answered()

    def _failed_after_start(self, attempt: Attempt, reason: Reason) -> None:
        if ACTIONS[reason].eject_after_start:
            self._eject(attempt, reason, "an answer that had begun failed")

    def _eject(self, attempt: Attempt, reason: Reason, message: str) -> None:
        seconds = attempt.failed()
        if seconds:
            replica = attempt.replica
            _log.warning(
                "replica ejected",
                provider=self.id,
                base_url=replica.base_url,
                seconds=seconds,
                reason=reason.name,
                error=message,
            )

    def _silence(self, seconds: float) -> ProviderError:
        return ProviderError(
            Reason.UPSTREAM_TIMEOUT,
            f"provider {self.id!r} did not begin its answer within {seconds:g} seconds",
            metadata={"provider": self.id, "limit_seconds": f"{seconds:g}"},
        )

    def _failure_of_all(self, failures: Sequence[DeltawireError]) -> DeltawireError:
        """The failure of a call: the last one's; but if all of them could be repeated, what a later call helps most."""
        *_, last = failures
        if len(failures) == 1 or not ACTIONS[last.reason].repeat:
            return last
        waits = [failure.retry_after for failure in failures if failure.retry_after is not None]
        return ProviderError(
            min((failure.reason for failure in failures), key=_MOST_TEMPORARY.index),
            f"none of the {len(failures)} replicas that were asked took the request: "
            + "; ".join(failure.message for failure in failures),
            metadata={name: value for failure in failures for name, value in failure.metadata.items()},
            retry_after=min(waits, default=None),
        )

    async def _check_fields(self, replica: Replica, to_check: Mapping[str, str]) -> tuple[Notice, ...]:
        """Refuse fields that a replica would ignore; a notice for each that could not be checked."""
        if not to_check:
            return ()
        return vllm_fields.check(to_check, await self._engines[replica].known(), self.id)

    async def _engine_document(self, replica: Replica, path: str) -> Document | str:
        """What a replica says of itself at a path that needs no key; why not, if that cannot be read."""
        try:
            return await self._get(replica, f"{replica.root}{path}", self._headers(None))
        except DeltawireError as error:
            return error.message

    def _log_engine(self, replica: Replica, engine: Engine) -> None:
        known = {"provider": self.id, "base_url": replica.base_url, "engine": engine.kind.name.lower()}
        if engine.fields is None:
            _log.warning("request fields are not checked", **known, version=engine.version, detail=engine.detail)
        else:
            _log.info("request fields are checked", **known, version=engine.version)

    def _passed_over(self, failures: Sequence[DeltawireError]) -> tuple[Notice, ...]:
        if not failures:
            return ()
        message = f"another replica of provider {self.id!r} answers: " + "; ".join(error.message for error in failures)
        return (Notice(NoticeKind.ANOTHER_REPLICA, message),)

    async def _count(self, replica: Replica, *, content: Body, name: str, call: CallContext) -> TokenCount:
        """Have a replica count; `name` is what the caller calls the model."""
        url = f"{replica.root}{TOKENIZE}"
        headers = self._call_headers(call)
        document = await self._document(replica, "POST", url, headers, COUNT_SECONDS, content)
        if document.status != httpx.codes.OK:
            raise self._not_counted(document, name, call)
        counted = self._decoded(document, _Counted, f"{TOKENIZE} with something else than a count")
        return TokenCount(counted.count, counted.max_model_len)

    def _not_counted(self, document: Document, name: str, call: CallContext) -> DeltawireError:
        error = failure_of(
            _error_in(document),
            self.id,
            callers_token=call.token is not None,
            token_withheld=call.token_withheld,
            model=name,
        )
        # The key of `/v1` is not asked for here: who forbids it forbids the endpoint.
        if document.status not in _NOT_OFFERED or error.reason is Reason.MODEL_NOT_FOUND:
            return error
        return ProviderError(
            Reason.ENDPOINT_NOT_SUPPORTED,
            f"provider {self.id!r} does not count tokens: it answered HTTP {document.status} at {TOKENIZE}, which is beside"
            " /v1; the operator can let it through to vLLM",
            metadata={"provider": self.id, "endpoint": TOKENIZE},
        )

    async def _open(
        self, replica: Replica, content: Body, name: str, call: CallContext
    ) -> tuple[httpx.Response, AsyncGenerator[bytes]]:
        """Send a chat request, and read up to the first event of the answer.

        Args:
            replica: Which one to ask.
            content: The request's body.
            name: What the caller calls the model.
            call: The caller's metadata.

        Returns:
            The response, which the caller has to close, and its whole body.
        """
        headers = {**self._call_headers(call), "accept": "text/event-stream"}
        url = f"{replica.base_url}/chat/completions"
        fail = functools.partial(
            failure_of,
            provider_id=self.id,
            callers_token=call.token is not None,
            token_withheld=call.token_withheld,
            model=name,
        )
        response = await self._send(replica, "POST", url, headers, content)
        try:
            if response.status_code != httpx.codes.OK:
                raise fail(await _read_error(response))
            content_type = response.headers.get("content-type", "")
            if not content_type.startswith("text/event-stream"):
                message = (
                    f"provider {self.id!r} answered with {content_type or 'no content type'} instead of an event stream"
                )
                said = (await _read_error(response)).message
                raise ProviderError(
                    Reason.UPSTREAM_MALFORMED,
                    f"{message}: {excerpt(said)}" if said else message,
                    metadata={"provider": self.id},
                )
            pieces = response.aiter_raw()
            opening = await read_opening(functools.partial(_next, pieces), self.id, fail)
        except ProtocolViolationError as error:
            await asyncio.shield(_close(response))
            raise self._unreachable(replica, error) from error
        except BaseException:
            await asyncio.shield(_close(response))
            raise
        return response, _body(opening, pieces)

    async def _listing(self, replica: Replica, token: str | None) -> tuple[ServedModel, ...]:
        headers = self._headers(None if self._api_token else token)
        document = await self._get(replica, f"{replica.base_url}/models", headers)
        if document.status != httpx.codes.OK:
            callers_token = token is not None and not self._api_token
            raise failure_of(_error_in(document), self.id, callers_token=callers_token)
        cards = self._decoded(document, _Listing, "its list of models with something else").data
        models = (_served_model(card) for card in cards if isinstance(card, dict) and card.get("id"))
        return tuple(model for model in models if len(model.id) <= MAX_SERVED_NAME)

    async def _problem(self, replica: Replica) -> str:
        """What is wrong with a replica; empty if it is healthy."""
        headers = self._headers(None)
        try:
            document = await self._get(replica, f"{replica.root}/health", headers)
            if not 200 <= document.status < 300:
                return f"HTTP {document.status}"
            document = await self._get(replica, f"{replica.root}/is_sleeping", headers)
            if document.status == httpx.codes.OK and _says_asleep(document.body):
                return "the engine is asleep"
            # vLLM's /health asks for no key: a wrong one would seem healthy, and every call would fail.
            if self.has_token and (await self._get(replica, f"{replica.base_url}/models", headers)).status in (
                401,
                403,
            ):
                return "it refuses the token in the gateway's settings"
        except DeltawireError as error:
            said = error.message.removeprefix(f"provider {self.id!r} ")
            return said.removeprefix("cannot be reached: ")
        return ""

    async def _get(self, replica: Replica, url: str, headers: Mapping[str, str]) -> Document:
        return await self._document(replica, "GET", url, headers, CONTROL_SECONDS)

    async def _document(
        self,
        replica: Replica,
        method: str,
        url: str,
        headers: Mapping[str, str],
        seconds: float,
        content: Body | None = None,
    ) -> Document:
        """Send a request and read all of the answer, whatever its status.

        Raises:
            ProviderError: UPSTREAM_UNAVAILABLE: it is away, or all of it took longer than `seconds`; PROVIDER_MISCONFIGURED: its
                certificate or its name is wrong; UPSTREAM_MALFORMED: it violates HTTP, or has more than `MAX_DOCUMENT_BYTES`.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                response = await self._send(replica, method, url, headers, content)
                try:
                    await _read(response, body, MAX_DOCUMENT_BYTES)
                finally:
                    await asyncio.shield(_close(response))
        except TimeoutError as error:
            raise self._unavailable(replica, f"did not answer within {seconds:g} seconds") from error
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error
        if len(body) > MAX_DOCUMENT_BYTES:
            what = f"sent more than {MAX_DOCUMENT_BYTES} bytes at {url.removeprefix(replica.root)}"
            raise self._unavailable(replica, what, Reason.UPSTREAM_MALFORMED)
        return Document(response.status_code, dict(response.headers), bytes(body))

    def _decoded(self, document: Document, kind: type[D], instead: str) -> D:
        try:
            return msgspec.json.decode(document.body, type=kind)
        except NOT_JSON as error:
            message = f"provider {self.id!r} answered {instead}: is its base URL right?"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": self.id}) from error

    async def _send(
        self, replica: Replica, method: str, url: str, headers: Mapping[str, str], content: Body | None = None
    ) -> httpx.Response:
        """Send a request; the response has begun, and is the caller's to close."""
        try:
            if content is not None:
                headers = {**headers, "content-length": str(content.size)}
            request = self._client.build_request(method, url, content=content, headers=headers, timeout=self._timeout)
            return await self._client.send(request, stream=True)
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error

    def _unreachable(self, replica: Replica, error: Exception) -> ProviderError:
        reason, said = reason_of(error)
        problem = "sent a broken response" if reason is Reason.UPSTREAM_MALFORMED else "cannot be reached"
        return self._unavailable(replica, f"{problem}: {said}", reason)

    def _unavailable(self, replica: Replica, what: str, reason: Reason = Reason.UPSTREAM_UNAVAILABLE) -> ProviderError:
        # The address is for the operator: callers have no business with it.
        _log.info("replica failed", provider=self.id, base_url=replica.base_url, reason=reason.name, error=what)
        return ProviderError(
            reason,
            f"provider {self.id!r} {what}",
            metadata={"provider": self.id},
            retry_after=RETRY_SECONDS if reason is Reason.UPSTREAM_UNAVAILABLE else None,
        )


class _Listing(msgspec.Struct):
    """The body of a list of models."""

    data: list[Any]


class _Counted(msgspec.Struct):
    """The body of a count. The token ids that come with it are not read."""

    count: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    max_model_len: Annotated[int, msgspec.Meta(gt=0, le=2**31 - 1)] | None = None


_MOST_TEMPORARY = (
    Reason.UPSTREAM_UNAVAILABLE,
    Reason.UPSTREAM_OVERLOADED,
    Reason.UPSTREAM_MALFORMED,
    Reason.PROVIDER_MISCONFIGURED,
)
"""The reasons for which another replica is asked, beginning with what passes soonest."""

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


async def _read(response: httpx.Response, body: bytearray, most: int) -> None:
    """Read a body to its end, or until there is more than `most` bytes of it."""
    async for data in response.aiter_raw():
        body += data
        if len(body) > most:
            break


async def _read_error(response: httpx.Response) -> UpstreamError:
    """What an error response says, as far as it comes in time."""
    body = bytearray()
    with contextlib.suppress(TimeoutError, *_BROKEN):
        async with asyncio.timeout(CONTROL_SECONDS):
            await _read(response, body, MAX_ERROR_BYTES)
    return _error_in(Document(response.status_code, dict(response.headers), bytes(body)))


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    """The next piece of a body; `None` at its end, or where the connection was lost."""
    try:
        return await anext(pieces)
    except ProtocolViolationError:
        raise
    except (StopAsyncIteration, *_BROKEN):
        return None


async def _body(opening: Sequence[bytes], pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The body up to its end or to where the connection was lost: for what the answer is, both are the same.

    Yields:
        At most `MAX_PIECE` bytes at a time; a piece of that size waits for its turn.

    Raises:
        BrokenBodyError: The provider violated HTTP; all bytes before that were yielded.
    """
    data: bytes | None = b"".join(opening)
    try:
        while data is not None:
            for start in range(0, len(data), MAX_PIECE):
                piece = data[start : start + MAX_PIECE]
                if len(piece) == MAX_PIECE:
                    await give_way()
                yield piece
            data = await anext(pieces, None)
    except ProtocolViolationError as error:
        raise BrokenBodyError(Fault(Reason.UPSTREAM_MALFORMED, str(error))) from error
    except _BROKEN:
        return


async def _close(response: httpx.Response) -> None:
    with contextlib.suppress(*_BROKEN):
        await response.aclose()


def _error_in(document: Document) -> UpstreamError:
    return read_error(document.body[:MAX_ERROR_BYTES], document.status, document.headers.get("retry-after", ""))


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
    except NOT_JSON:
        return False
    return isinstance(said, dict) and said.get("is_sleeping") is True
