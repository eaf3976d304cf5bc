"""A provider: a vLLM server, or several alike. Which of them is asked, and what happens if it fails.

Until the first event of the answer has come, one other replica may be asked; `policy` says after which failures. The first
one may have taken the request all the same and generate for no reader: calls are at-least-once on the engine, as they are
for callers that try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from fnmatch import fnmatchcase
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, TypeVar

import httpx

from deltawire_server.errors import DeltawireError, ProviderError, Reason, Violation, invalid_request
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream import vllm_fields
from deltawire_server.upstream.base import (
    CallContext,
    Health,
    HealthStatus,
    OpenStream,
    ServedModel,
    Timeouts,
    TokenCount,
)
from deltawire_server.upstream.engine import Engine, EngineKind, EngineReader, check_fields, joined
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.policy import ACTIONS, MAX_ATTEMPTS
from deltawire_server.upstream.replicas import Attempt, Replica, Replicas
from deltawire_server.upstream.transport.client import Transport
from deltawire_server.upstream.vllm_api import COUNT_SECONDS, VllmApi, close_response
from deltawire_server.upstream.vllm_request import chat_body, count_body, encode_body

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from deltawire_server.upstream.request import ChatRequest

COUNTS_AT_ONCE = 16
"""More wait for these: of the connections, most are for answers."""

T = TypeVar("T")

_log = get_logger(__name__)


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
        client = httpx.AsyncClient(
            transport=Transport(tls, max_connections),
            headers={**(headers or {}), "user-agent": user_agent, "accept-encoding": "identity"},
            # One caller's must not travel with another's request; by its policy, since the client copies other forms.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
            trust_env=False,
        )
        self._api = VllmApi(provider_id, api_token, client, connect_timeout)
        self._allowed_models = tuple(allowed_models)
        self._allowed_extra_fields = tuple(allowed_extra_fields)
        self._engines = {
            replica: EngineReader(
                functools.partial(self._api.engine_document, replica),
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

    @property
    def has_token(self) -> bool:
        """Whether the operator configured a token."""
        return self._api.has_token

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
            return (*await self._api.open(replica, content, name, call), unchecked)

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
                await asyncio.shield(close_response(response))

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """How many tokens a prompt has; see `Provider.count_tokens`."""
        self._require_allowed(model)
        _require_text(request)
        extra = allowed_extra(request.extra_body, self._allowed_extra_fields, self.id)
        content = await encode_body(count_body(request, model, extra), request.messages)
        async with self._counting:
            with contextlib.ExitStack() as held:
                ask = functools.partial(self._api.count, content=content, name=request.model, call=call)
                _, count, _ = await self._first_answer(held, ask, COUNT_SECONDS)
                return count

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves now; see `Provider.list_models`. An entry without an id, or with a very long one, is left out."""
        for reader in self._engines.values():
            reader.start()
        failures: list[DeltawireError] = []
        for replica in self._replicas.in_order():
            try:
                served = await self._api.list_models(replica, token)
            except ProviderError as error:
                failures.append(error.with_traceback(None))
            else:
                return tuple(model for model in served if self._allows(model.id))
        raise self._failure_of_all(failures)

    async def check_health(self) -> Health:
        """How it is; see `Provider.check_health`. An engine that is asleep is unhealthy, though its `/health` is 200."""
        problems = await asyncio.gather(*map(self._api.problem, self._replicas.all))
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
        await self._api.close()

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
        return check_fields(to_check, await self._engines[replica].known(), self.id)

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


_MOST_TEMPORARY = (
    Reason.UPSTREAM_UNAVAILABLE,
    Reason.UPSTREAM_OVERLOADED,
    Reason.UPSTREAM_MALFORMED,
    Reason.PROVIDER_MISCONFIGURED,
)
"""The reasons for which another replica is asked, beginning with what passes soonest."""


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
