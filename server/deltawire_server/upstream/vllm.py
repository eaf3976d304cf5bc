"""A provider of one or more vLLM replicas: selects a replica for each call and retries at another one after a failure.

A call may be retried at one other replica until the first event of the answer is received; `policy` lists the failures that
allow it. The first replica may still process the request and generate without a reader: requests reach the engine
at least once, as they do if a caller retries.
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
from deltawire_server.metrics.table import ATTEMPT_FAILURES, ATTEMPTS, EJECTIONS
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.telemetry import get_logger
from deltawire_server.tracing import tracer
from deltawire_server.tracing.tracer import CANCELED
from deltawire_server.upstream import vllm_fields
from deltawire_server.upstream.base import (
    Attempts,
    CallContext,
    Health,
    HealthStatus,
    OpenStream,
    ReplicaStatus,
    ServedModel,
    Timeouts,
    TokenCount,
)
from deltawire_server.upstream.engine import Engine, EngineKind, EngineReader, check_fields, joined
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.policy import ACTIONS, MAX_ATTEMPTS
from deltawire_server.upstream.replicas import Attempt, Replica, Replicas
from deltawire_server.upstream.transport.client import Transport
from deltawire_server.upstream.vllm_api import COUNT_SECONDS, VllmApi
from deltawire_server.upstream.vllm_request import chat_body, count_body, encode_body

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from deltawire_server.tracing.tracer import AttemptSpan
    from deltawire_server.upstream.body import AnswerBody
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.upstream.transport.exchange import Exchange

COUNTS_AT_ONCE = 16
"""Concurrent token counts; further ones wait. Most connections are for answers."""

T = TypeVar("T")

_log = get_logger(__name__)


def root_url(base_url: str) -> str:
    """The prefix of all paths of a vLLM: the base URL without trailing slashes and without `/v1`, which not all paths have.

    Args:
        base_url: As in the operator's configuration: with or without `/v1`, with a prefix, with trailing slashes.
    """
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


class VllmProvider:
    """One or more vLLM servers (replicas) that serve the same models.

    Args:
        provider_id: The operator's name for it.
        base_urls: At least one, one for each replica: http or https; with or without `/v1`.
        api_token: The operator's token; `None` sends none.
        headers: Further headers of every request, except those that this class sets; their values are secrets.
        allowed_models: Names, or shell patterns of names, of the models that may be used; empty for all.
        allowed_extra_fields: Names, or shell patterns of names, of the fields that `extra_body` may set; empty for none.
        tls: For https: a context that verifies certificates as the operator configured.
        default_max_tokens: `max_tokens` of requests that set none; `None` leaves the limit to the model's context.
        max_connections: Must exceed the number of concurrent calls: with a full pool, calls would wait for each other.
        connect_timeout: Seconds for connecting.
        timeouts: Limits for answers.
        refresh_interval: Seconds between two listings.
        user_agent: The User-Agent header of every request.
        engine: The kind of engine that the operator configured for the addresses; `None` to detect it.
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
        transport = Transport(tls, max_connections)
        client = httpx.AsyncClient(
            transport=transport,
            headers={**(headers or {}), "user-agent": user_agent, "accept-encoding": "identity"},
            # One caller's cookies must not be sent with another's request. A policy, because the client copies other jars.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
            trust_env=False,
        )
        self._api = VllmApi(provider_id, api_token, client, transport, connect_timeout)
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
        """Without the token, because the result is logged."""
        return f"VllmProvider({', '.join(map(repr, (self.id, *self.base_urls)))})"

    @property
    def engine(self) -> Engine:
        """The detected engine; see `Provider.engine`."""
        return joined({replica.base_url: reader.engine for replica, reader in self._engines.items()})

    @property
    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """The current state of each replica; see `Provider.replicas`."""
        return tuple(
            ReplicaStatus(
                each.base_url,
                each.state,
                self._engines[each].engine,
                each.streams,
                each.ejected_for,
                each.last_failure,
                each.last_failure_time,
            )
            for each in self._replicas.all
        )

    @contextlib.asynccontextmanager
    async def stream_chat(
        self, request: ChatRequest, model: str, call: CallContext, attempts: Attempts | None = None
    ) -> AsyncIterator[OpenStream]:
        """Request a completion; see `Provider.stream_chat`."""
        self._require_allowed(model)
        body = chat_body(request, model, allowed_extra(request.extra_body, self._allowed_extra_fields, self.id))
        to_check = vllm_fields.fields_to_check(body, request)
        content = await encode_body(body, request.messages)
        name, form, sampling = request.model, vllm_fields.format_field(request), request.sampling
        del body, request  # `content` now has the only copy
        attempts = attempts or Attempts()
        start_span = functools.partial(
            tracer.current.start_attempt,
            "chat",
            model,
            provider_id=self.id,
            completion_id=attempts.completion_id,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )

        async def send(replica: Replica, call: CallContext) -> tuple[Exchange, AnswerBody, tuple[Notice, ...]]:
            unchecked = await self._check_fields(replica, to_check)
            return (*await self._api.open(replica, content, name, call, form), unchecked)

        try:
            seconds = self.timeouts.first_event
            attempt, answer, failures = await self._first_answer(send, seconds, call, attempts, start_span)
            attempts.span.receive_first_chunk()
        finally:
            content.clear()  # no further attempt
        response, answer_body, unchecked = answer
        with attempt:
            try:
                notices = (*self._passed_over(failures), *unchecked)
                failed = functools.partial(self._failed_after_start, attempt)
                yield OpenStream(answer_body, notices, failed)
            finally:
                answer_body.close()
                response.close()  # vLLM stops generating when the socket is closed

    async def count_tokens(self, request: ChatRequest, model: str, call: CallContext) -> TokenCount:
        """Count the tokens of a prompt; see `Provider.count_tokens`."""
        self._require_allowed(model)
        _require_text(request)
        extra = allowed_extra(request.extra_body, self._allowed_extra_fields, self.id)
        content = await encode_body(count_body(request, model, extra), request.messages)
        async with self._counting:
            send = functools.partial(self._api.count, content=content, name=request.model)
            attempts = Attempts()
            start_span = functools.partial(
                tracer.current.start_attempt, "count_tokens", model, provider_id=self.id, completion_id=""
            )
            attempt, count, _ = await self._first_answer(send, COUNT_SECONDS, call, attempts, start_span)
            attempt.end()
            attempts.span.end(input_tokens=count.prompt_tokens)
            return count

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """List the served models; see `Provider.list_models`. Entries without an id, or with a very long one, are left out."""
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
        """Check every replica; see `Provider.check_health`. An engine that sleeps is unhealthy although `/health` is 200."""
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
        """Close all connections; calls in progress fail."""
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
        self,
        send: Callable[[Replica, CallContext], Awaitable[T]],
        seconds: float,
        call: CallContext,
        attempts: Attempts,
        start_span: Callable[..., AttemptSpan],
    ) -> tuple[Attempt, T, list[DeltawireError]]:
        """Send a request to a replica; if that fails and `policy` allows a retry, to one other.

        Args:
            send: Sends the request to a replica, with this metadata.
            seconds: Time limit of all attempts together.
            call: The caller's metadata.
            attempts: Takes the attempts.
            start_span: Starts the span of an attempt, given its replica and its parent.

        Returns:
            The attempt that succeeded, which the caller must `end`, the result of `send`, and the failures before it.

        Raises:
            DeltawireError: Every attempt failed.
        """
        failures: dict[Replica, DeltawireError] = {}
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            replica = self._replicas.choose(tuple(failures))
            attempt = self._replicas.attempt(replica)
            ATTEMPTS.labels(self.id, replica.base_url).inc()
            attempts.count += 1
            attempts.base_url = replica.base_url
            span = attempts.span = start_span(
                base_url=replica.base_url, traceparent=call.traceparent, tracestate=call.tracestate
            )
            try:
                async with asyncio.timeout_at(deadline):
                    answer = await send(replica, call.within(span.context))
            except TimeoutError:
                failures[replica] = self._silence(seconds)
            except DeltawireError as error:
                failures[replica] = error.with_traceback(None)
            except BaseException as error:
                attempt.end()
                span.end(CANCELED if isinstance(error, asyncio.CancelledError) else Reason.INTERNAL.name)
                raise
            else:
                attempt.answered()
                return attempt, answer, list(failures.values())
            self._failed(attempt, failures[replica])
            attempt.end()
            span.end(failures[replica].reason.name)
            most = min(MAX_ATTEMPTS, len(self._replicas.all))
            if not ACTIONS[failures[replica].reason].repeat or len(failures) == most:
                raise self._failure_of_all(list(failures.values()))

    def _failed(self, attempt: Attempt, error: DeltawireError) -> None:
        ATTEMPT_FAILURES.labels(self.id, attempt.replica.base_url, error.reason.name).inc()
        if ACTIONS[error.reason].eject:
            self._eject(attempt, error.reason, error.message)
        elif ACTIONS[error.reason].answer:
            attempt.answered()

    def _failed_after_start(self, attempt: Attempt, reason: Reason) -> None:
        ATTEMPT_FAILURES.labels(self.id, attempt.replica.base_url, reason.name).inc()
        if ACTIONS[reason].eject_after_start:
            self._eject(attempt, reason, "an answer failed after its first event")

    def _eject(self, attempt: Attempt, reason: Reason, message: str) -> None:
        seconds = attempt.failed(reason)
        if seconds:
            replica = attempt.replica
            EJECTIONS.labels(self.id, replica.base_url).inc()
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
            f"provider {self.id!r} sent no event within {seconds:g} seconds",
            metadata={"provider": self.id, "limit_seconds": f"{seconds:g}"},
        )

    def _failure_of_all(self, failures: Sequence[DeltawireError]) -> DeltawireError:
        """The error of a call: the last failure, or if all of them allow a retry, one with the most temporary reason."""
        *_, last = failures
        if len(failures) == 1 or not ACTIONS[last.reason].repeat:
            return last
        waits = [failure.retry_after for failure in failures if failure.retry_after is not None]
        return ProviderError(
            min((failure.reason for failure in failures), key=_MOST_TEMPORARY.index),
            f"all {len(failures)} replicas that the request was sent to failed: "
            + "; ".join(failure.message for failure in failures),
            metadata={name: value for failure in failures for name, value in failure.metadata.items()},
            retry_after=min(waits, default=None),
        )

    async def _check_fields(self, replica: Replica, to_check: Mapping[str, str]) -> tuple[Notice, ...]:
        """Refuse fields that a replica would ignore; return a notice for each field that could not be checked."""
        if not to_check:
            return ()
        return check_fields(to_check, await self._engines[replica].known(), self.id)

    def _log_engine(self, replica: Replica, engine: Engine) -> None:
        context = {"provider": self.id, "base_url": replica.base_url, "engine": engine.kind.name.lower()}
        if engine.fields is None:
            _log.warning("request fields are not checked", **context, version=engine.version, detail=engine.detail)
        else:
            _log.info("request fields are checked", **context, version=engine.version)

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
"""The reasons that allow a retry at another replica, the most temporary first."""


def _require_text(request: ChatRequest) -> None:
    violations = [
        Violation(
            f"chat.messages[{turn}].{message.role.value}.content[{place}].image",
            "the tokens of an image cannot be counted without running the model: leave it out",
        )
        for turn, message in enumerate(request.messages)
        for place, part in enumerate(message.content)
        if not isinstance(part, str)
    ]
    if violations:
        raise invalid_request(violations)
