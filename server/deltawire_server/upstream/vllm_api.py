"""The HTTP API of one vLLM server: each method sends one request and reads the response.

httpx over the gateway's own transport. An unreachable server is UPSTREAM_UNAVAILABLE, or PROVIDER_MISCONFIGURED if a setting
must change. A violation of HTTP is UPSTREAM_MALFORMED. A body that ends early ends without an error, because its events show
what is missing. `vllm` selects the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import httpx
import msgspec

from deltawire_server.errors import DeltawireError, ProviderError, Reason
from deltawire_server.secret import Secret
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.base import CallContext, ServedModel, TokenCount
from deltawire_server.upstream.body import AnswerBody
from deltawire_server.upstream.engine import Document
from deltawire_server.upstream.failures import RETRY_SECONDS, UpstreamError, excerpt, failure_of, read_error
from deltawire_server.upstream.opening import read_opening
from deltawire_server.upstream.transport.errors import ProtocolViolationError
from deltawire_server.upstream.unreachable import reason_of
from deltawire_server.upstream.vllm_fields import NOT_JSON, at, decoded, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Mapping

    from deltawire_server.upstream.replicas import Replica
    from deltawire_server.upstream.transport.client import Prepared, Transport
    from deltawire_server.upstream.transport.exchange import Exchange
    from deltawire_server.upstream.vllm_request import Body as Content

CONTROL_SECONDS = 5.0
"""Time limit for listings and health checks: vLLM's API server answers them without the engine, so a slow one is unhealthy."""

COUNT_SECONDS = 60.0
"""Time limit for a token count: the API server renders and counts itself, which takes seconds for long or concurrent prompts."""

MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
"""Limit for a response that is read as a whole; vLLM's OpenAPI document has a quarter of it."""

MAX_SERVED_NAME = 1024
"""Limit for the characters of a served model's name; a model with a longer one is left out. File and repository names are far
shorter, and with it a model in a listing stays below the 4 MiB of a message."""

TOKENIZE = "/tokenize"

MAX_ERROR_BYTES = 1024 * 1024
"""Limit for an error's body. Large, because vLLM quotes the request in some errors and a truncated one cannot be decoded."""

D = TypeVar("D")

_log = get_logger(__name__)

_BROKEN = (httpx.TransportError, httpx.InvalidURL)
"""What the transport raises, and what httpx raises for an invalid address such as 256.1.1.1."""


_NOT_OFFERED = frozenset({403, 404, 405, 501})
"""The statuses of an endpoint that does not exist or that the gateway may not use."""


class VllmApi:
    """The requests to the servers of one provider.

    Args:
        provider_id: The operator's name for it.
        api_token: The operator's token; `None` sends none.
        client: The HTTP client.
        transport: Its transport, which sends chat requests without it: the client's own objects take a third of the time of a short
            call, and chat requests use none of its features.
        connect_timeout: Seconds for connecting.
    """

    def __init__(
        self,
        provider_id: str,
        api_token: str | None,
        client: httpx.AsyncClient,
        transport: Transport,
        connect_timeout: float,
    ) -> None:
        self._id = provider_id
        self._transport = transport
        self._chats: dict[Replica, Prepared] = {}
        self._api_token = None if api_token is None else Secret(api_token)
        self._client = client
        # No read timeout: the limits for answers are between events, and those for documents cover the whole document.
        self._timeout = httpx.Timeout(None, connect=connect_timeout)
        self._limits = self._timeout.as_dict()

    @property
    def has_token(self) -> bool:
        """Whether the operator configured a token."""
        return self._api_token is not None

    async def close(self) -> None:
        """Close all connections; requests in progress fail."""
        await self._client.aclose()

    def _headers(self, token: str | None) -> dict[str, str]:
        chosen = token or self._api_token
        return {"authorization": Secret(f"Bearer {chosen}")} if chosen else {}

    def _call_headers(self, call: CallContext) -> dict[str, str]:
        headers = self._headers(call.token)
        headers["content-type"] = "application/json"
        # vLLM uses this as the id of the request, so each attempt needs a different one.
        headers["x-request-id"] = f"{call.request_id}-{random.getrandbits(32):08x}"
        if call.traceparent:
            headers["traceparent"] = call.traceparent
        if call.tracestate:
            headers["tracestate"] = call.tracestate
        return headers

    async def engine_document(self, replica: Replica, path: str) -> Document | str:
        """Fetch a document that needs no API key from a replica; return the error message if that fails."""
        try:
            return await self._get(replica, f"{replica.root}{path}", self._headers(None))
        except DeltawireError as error:
            return error.message

    async def count(self, replica: Replica, call: CallContext, *, content: Content, name: str) -> TokenCount:
        """Have a replica count the tokens of a prompt; `name` is the model name in the call."""
        url = f"{replica.root}{TOKENIZE}"
        headers = self._call_headers(call)
        document = await self._document(replica, "POST", url, headers, COUNT_SECONDS, content)
        if document.status != httpx.codes.OK:
            raise self._not_counted(document, name, call)
        counted = self._decoded(document, _Counted, f"{TOKENIZE} with something other than a token count")
        return TokenCount(counted.count, counted.max_model_len)

    def _not_counted(self, document: Document, name: str, call: CallContext) -> DeltawireError:
        error = failure_of(
            _error_in(document),
            self._id,
            callers_token=call.token is not None,
            token_withheld=call.token_withheld,
            model=name,
        )
        # vLLM does not check the API key here, so 403 is about the endpoint.
        if document.status not in _NOT_OFFERED or error.reason is Reason.MODEL_NOT_FOUND:
            return error
        return ProviderError(
            Reason.ENDPOINT_NOT_SUPPORTED,
            f"provider {self._id!r} does not count tokens: it answered HTTP {document.status} at {TOKENIZE}, which is beside"
            " /v1; the operator can let it through to vLLM",
            metadata={"provider": self._id, "endpoint": TOKENIZE},
        )

    async def open(
        self, replica: Replica, content: Content, name: str, call: CallContext, format_field: str = ""
    ) -> tuple[Exchange, AnswerBody]:
        """Send a chat request and read up to the first event of the answer.

        Args:
            replica: The replica to send it to.
            content: The request's body.
            name: The model name in the call.
            call: The caller's metadata.
            format_field: The path of the response format in the call, for errors about it; empty if there is none.

        Returns:
            The response, which the caller must close, and its whole body.
        """
        fail = functools.partial(
            failure_of,
            provider_id=self._id,
            callers_token=call.token is not None,
            token_withheld=call.token_withheld,
            model=name,
            format_field=format_field,
        )
        headers = (*self._call_headers(call).items(), ("content-length", str(content.size)))
        try:
            response = await self._transport.send(self._prepared(replica), headers, content, self._limits)
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error
        try:
            if response.status != httpx.codes.OK:
                raise fail(await _read_error(response))
            content_type = _header(response, b"content-type")
            if not content_type.startswith("text/event-stream"):
                message = f"provider {self._id!r} answered with {content_type or 'no content type'} instead of an event stream"
                detail = (await _read_error(response)).message
                raise ProviderError(
                    Reason.UPSTREAM_MALFORMED,
                    f"{message}: {excerpt(detail)}" if detail else message,
                    metadata={"provider": self._id},
                )
            opening = await read_opening(functools.partial(_next, response), self._id, fail)
        except ProtocolViolationError as error:
            response.close()
            raise self._unreachable(replica, error) from error
        except BaseException:
            response.close()
            raise
        return response, AnswerBody(b"".join(opening), response)

    def _prepared(self, replica: Replica) -> Prepared:
        """The head of chat requests to a server without the headers of each call."""
        prepared = self._chats.get(replica)
        if prepared is None:
            url = f"{replica.base_url}/chat/completions"
            request = self._client.build_request("POST", url, headers={"accept": "text/event-stream"})
            del request.headers["content-length"]
            prepared = self._chats[replica] = self._transport.prepare(request)
        return prepared

    async def list_models(self, replica: Replica, token: str | None) -> tuple[ServedModel, ...]:
        """List the models of a server. The operator's token has precedence over the caller's."""
        headers = self._headers(None if self._api_token else token)
        document = await self._get(replica, f"{replica.base_url}/models", headers)
        if document.status != httpx.codes.OK:
            callers_token = token is not None and not self._api_token
            raise failure_of(_error_in(document), self._id, callers_token=callers_token)
        cards = self._decoded(document, _Listing, "its list of models with something else").data
        models = (_served_model(card) for card in cards if isinstance(card, dict) and card.get("id"))
        return tuple(model for model in models if len(model.id) <= MAX_SERVED_NAME)

    async def problem(self, replica: Replica) -> str:
        """Check the health of a replica; return the problem in words, empty if it is healthy."""
        headers = self._headers(None)
        try:
            document = await self._get(replica, f"{replica.root}/health", headers)
            if not 200 <= document.status < 300:
                return f"HTTP {document.status}"
            document = await self._get(replica, f"{replica.root}/is_sleeping", headers)
            if document.status == httpx.codes.OK and at(decoded(document.body), "is_sleeping") is True:
                return "the engine is asleep"
            # vLLM's /health needs no API key: with a wrong one the replica would seem healthy while every call fails.
            if self._api_token is not None:
                document = await self._get(replica, f"{replica.base_url}/models", headers)
                if document.status in (401, 403):
                    return "it rejects the token in the gateway's settings"
        except DeltawireError as error:
            problem = error.message.removeprefix(f"provider {self._id!r} ")
            return problem.removeprefix("cannot be reached: ")
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
        content: Content | None = None,
    ) -> Document:
        """Send a request and read the whole response, whatever its status.

        Raises:
            ProviderError: UPSTREAM_UNAVAILABLE: the server cannot be reached, or the response took longer than `seconds`;
                PROVIDER_MISCONFIGURED: its certificate or its name is wrong; UPSTREAM_MALFORMED: it violates HTTP, or the
                response has more than `MAX_DOCUMENT_BYTES`.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                response = await self._send(replica, method, url, headers, content)
                try:
                    await _read(response.aiter_raw(), body, MAX_DOCUMENT_BYTES)
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
            message = f"provider {self._id!r} answered {instead}: check its base URL in the gateway's settings"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": self._id}) from error

    async def _send(
        self, replica: Replica, method: str, url: str, headers: Mapping[str, str], content: Content | None = None
    ) -> httpx.Response:
        """Send a request; return the response, which the caller must close, after its headers."""
        try:
            if content is not None:
                headers = {**headers, "content-length": str(content.size)}
            request = self._client.build_request(method, url, content=content, headers=headers, timeout=self._timeout)
            return await self._client.send(request, stream=True)
        except _BROKEN as error:
            raise self._unreachable(replica, error) from error

    def _unreachable(self, replica: Replica, error: Exception) -> ProviderError:
        reason, detail = reason_of(error)
        problem = "sent a broken response" if reason is Reason.UPSTREAM_MALFORMED else "cannot be reached"
        return self._unavailable(replica, f"{problem}: {detail}", reason)

    def _unavailable(self, replica: Replica, what: str, reason: Reason = Reason.UPSTREAM_UNAVAILABLE) -> ProviderError:
        # The address is logged for the operator and not sent to callers.
        _log.info("replica failed", provider=self._id, base_url=replica.base_url, reason=reason.name, error=what)
        return ProviderError(
            reason,
            f"provider {self._id!r} {what}",
            metadata={"provider": self._id},
            retry_after=RETRY_SECONDS if reason is Reason.UPSTREAM_UNAVAILABLE else None,
        )


class _Listing(msgspec.Struct):
    """The body of a list of models."""

    data: list[Any]


class _Counted(msgspec.Struct):
    """The body of a token count. Its token ids are not decoded."""

    count: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    max_model_len: Annotated[int, msgspec.Meta(gt=0, le=2**31 - 1)] | None = None


async def _read(pieces: AsyncIterable[bytes], body: bytearray, limit: int) -> None:
    """Read a body to its end, or until it has more than `limit` bytes."""
    async for data in pieces:
        body += data
        if len(body) > limit:
            break


async def _read_error(response: Exchange) -> UpstreamError:
    """Decode an error response, from the part of its body that arrives within `CONTROL_SECONDS`."""
    body = bytearray()
    with contextlib.suppress(TimeoutError, *_BROKEN):
        async with asyncio.timeout(CONTROL_SECONDS):
            await _read(response, body, MAX_ERROR_BYTES)
    retry_after = {"retry-after": _header(response, b"retry-after")}
    return _error_in(Document(response.status, retry_after, bytes(body)))


def _header(response: Exchange, name: bytes) -> str:
    """The value of a header, whose name is in lower case; empty without it."""
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


async def _next(response: Exchange) -> bytes | None:
    """The next piece of a body; `None` at its end or if the connection is lost."""
    try:
        return await anext(response)
    except ProtocolViolationError:
        raise
    except (StopAsyncIteration, *_BROKEN):
        return None


async def _close(response: httpx.Response) -> None:
    with contextlib.suppress(*_BROKEN):
        await response.aclose()


def _error_in(document: Document) -> UpstreamError:
    return read_error(document.body[:MAX_ERROR_BYTES], document.status, document.headers.get("retry-after", ""))


def _served_model(card: dict[str, Any]) -> ServedModel:
    length = card.get("max_model_len")
    return ServedModel(
        id=str(card["id"]),
        engine_root=text_of(card.get("root")),
        base_model=text_of(card.get("parent")),
        max_context_tokens=length if isinstance(length, int) and length > 0 else None,
    )
