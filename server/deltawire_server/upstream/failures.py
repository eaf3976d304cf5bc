"""A provider's error: how its words are read, and which failure it is for the caller.

    bytes of a body or of an error event ──read_error──▶ UpstreamError ──failure_of──▶ DeltawireError

vLLM answers some bad requests with status 200 and an error event. The code of the event is read as a status, so that the
caller cannot see a difference. Proxies and other servers have other shapes of errors; their words reach the caller too, in
an excerpt.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason, Violation
from deltawire_server.upstream import vllm_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_SECONDS = 1.0
"""When to try again, if the provider does not say: about what it takes to notice a restarted or rebalanced replica."""

MAX_RETRY_SECONDS = 3600.0
"""When to try again at the latest, whatever the provider says: no caller waits longer."""

MAX_EXCERPT_BYTES = 512
"""Of words in an unknown shape. A message in vLLM's own shape is passed on whole: the caller can act on it."""

NOT_JSON = (msgspec.DecodeError, UnicodeError, RecursionError)
"""What msgspec raises for bytes that are not JSON, not UTF-8, or nested too deeply."""

REASONS: Mapping[int, Reason] = MappingProxyType(
    {
        400: Reason.UPSTREAM_REJECTED,
        # Of the gateway's own token; a caller's own is UPSTREAM_UNAUTHENTICATED.
        401: Reason.PROVIDER_MISCONFIGURED,
        403: Reason.PROVIDER_MISCONFIGURED,
        # Unless the body says that it is the model.
        404: Reason.PROVIDER_MISCONFIGURED,
        405: Reason.PROVIDER_MISCONFIGURED,
        408: Reason.UPSTREAM_UNAVAILABLE,
        413: Reason.UPSTREAM_REJECTED,
        422: Reason.UPSTREAM_REJECTED,
        429: Reason.UPSTREAM_OVERLOADED,
        502: Reason.UPSTREAM_UNAVAILABLE,
        503: Reason.UPSTREAM_UNAVAILABLE,
        504: Reason.UPSTREAM_UNAVAILABLE,
    }
)
"""By status. Any other 2xx or 3xx is PROVIDER_MISCONFIGURED, another 4xx UPSTREAM_REJECTED, the rest UPSTREAM_ERROR."""

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **vllm_fields.FIELDS,
        # Not fields of a body, but of what vLLM makes of it.
        "input_tokens": "chat.messages",
        "prompt": "chat.messages",
    }
)
"""The request field that vLLM's `param` stands for; it may come as `stop`, `body.stop` or `body.messages.0.content`."""

_CONTEXT = re.compile(
    r"""
    (litellm\.BadRequestError:\ |\w+Exception\ -\ )*  # LiteLLM's prefixes
    (   (this|the)\ model's\ (maximum\ )?context\ length\ is\ \d
    |   you\ passed\ \d+\ input\ (tokens|characters)\ and\ requested\ \d+\ output\ tokens
    |   '?max_(completion_)?tokens'?(\ or\ '?max_completion_tokens'?)?\ is\ too\ large
    |   max_(completion_)?tokens=\d+\ cannot\ be\ greater\ than\ max_(model_len|total_tokens)
    |   the\ (decoder\ |encoder\ )?prompt\ \((total\ )?length\ \d+\)\ is\ (longer\ than\ the\ maximum\ model\ length|too\ long)
    |   input\ prompt\ \(\d+\ tokens\)\ is\ too\ long
    |   litellm\.ContextWindowExceededError
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""How vLLM's versions begin the message of a prompt or answer that is too long. Matched at the beginning only: later on a
message may quote the request."""

_CONTEXT_CODES = frozenset({"context_length_exceeded", "context_window_exceeded"})
"""What OpenAI and proxies write as the error's code or type."""

_STATUS = re.compile(r"[1-5]\d\d")
_HTML = re.compile(r"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>\s*([^<]{1,200}?)\s*</title", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tabs and line feeds, which vLLM's messages have to be read by people."""


@dataclass(frozen=True, slots=True)
class UpstreamError:
    """A provider's error in its own words.

    Attributes:
        status: The HTTP status, or the code of an error event; 0 if it gave none.
        message: Its sentence, or an excerpt of at most `MAX_EXCERPT_BYTES` of what it said instead; empty if it said nothing.
        type: Its kind, such as "NotFoundError".
        param: The field it blames.
        retry_after: Seconds, from a Retry-After header; `None` if there was none.
    """

    status: int
    message: str = ""
    type: str = ""
    param: str = ""
    retry_after: float | None = None


def read_error(body: bytes, status: int = 0, retry_after: str = "") -> UpstreamError:
    """Read an error in whatever shape it has. Never raises.

    Shapes: vLLM's `{"error": {…}}`, `{"error": "…"}` and, before 0.10, the fields at the top; FastAPI's `{"detail": …}` with
    a string or a list of objects; `{"message": …}` and `{"details": …}` of proxies; other JSON; HTML; text.

    Args:
        body: Of a response with an error status, or the data of an event.
        status: The HTTP status; 0 for an event, which has its status in its `code`.
        retry_after: The Retry-After header. Seconds are read, dates are not.
    """
    wait = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else None
    try:
        document: Any = msgspec.json.decode(body)
    except NOT_JSON:
        return UpstreamError(status, _plain(body.decode(errors="replace")), retry_after=wait)
    if not isinstance(document, dict):
        return UpstreamError(status, excerpt(_json(document)) if document else "", retry_after=wait)
    error = document.get("error") or document
    fields = error if isinstance(error, dict) else {"message": error, "code": document.get("code")}
    message, param = _words(fields)
    if fields is document and document.get("object") != "error":
        message = excerpt(message)
    code = str(fields.get("code"))
    return UpstreamError(
        status or (int(code) if _STATUS.fullmatch(code) else 0),
        message or (excerpt(_json(error)) if error else ""),
        code if code in _CONTEXT_CODES else _text(fields.get("type")),
        _text(fields.get("param")) or param,
        wait,
    )


def is_error(payload: bytes) -> bool:
    """Whether the data of an event is an error, in any of the shapes that `read_error` knows, and not a chunk."""
    try:
        document: Any = msgspec.json.decode(payload)
    except NOT_JSON:
        return False
    if not isinstance(document, dict):
        return False
    if document.get("error") or document.get("object") == "error":
        return True
    return "choices" not in document and not document.keys().isdisjoint({"detail", "details", "message"})


def excerpt(text: str) -> str:
    """Text on one line without control characters, in at most `MAX_EXCERPT_BYTES` of UTF-8."""
    line = _CONTROL.sub(" ", text[: 4 * MAX_EXCERPT_BYTES]).strip()
    encoded = line.encode(errors="replace")
    if len(encoded) <= MAX_EXCERPT_BYTES:
        return encoded.decode()
    return encoded[: MAX_EXCERPT_BYTES - 3].decode(errors="ignore") + "…"


def failure_of(
    error: UpstreamError,
    provider_id: str,
    *,
    callers_token: bool = False,
    token_withheld: bool = False,
    model: str = "",
    begun: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> DeltawireError:
    """The failure that a provider's error is for the caller, from an HTTP status or from an error event.

    Args:
        error: What the provider said.
        provider_id: Which provider.
        callers_token: Whether the token came with the call: then a wrong one is the caller's.
        token_withheld: Whether the call had a token that was not sent: then sending it may help.
        model: The name that the caller asked for; empty if the request was about none.
        begun: Whether the first event of the answer had come: then the failure is ABORTED (UPSTREAM_ERROR), whatever it is.
        metadata: More values for the failure's metadata.

    Returns:
        A `CallerError` if the request has to change, else a `ProviderError`; raise it.
    """
    status = error.status
    said = error.message or (f"HTTP {status}" if status else "it gave no reason")
    values = {**(metadata or {}), "provider": provider_id}
    if begun:
        if status:
            values["upstream_code"] = str(status)
        message = f"provider {provider_id!r} ended the answer with an error: {said}"
        return ProviderError(Reason.UPSTREAM_ERROR, message, code=Code.ABORTED, metadata=values)
    reason = _reason(status)
    values["upstream_code" if reason is Reason.UPSTREAM_ERROR else "http_status"] = str(status)
    if status in (401, 403) and callers_token:
        message = f"provider {provider_id!r} refuses the token in x-vllm-api-token: {said}"
        return CallerError(Reason.UPSTREAM_UNAUTHENTICATED, message, metadata=values)
    if status in (401, 403) and token_withheld:
        return token_not_sent(provider_id, values)
    if status == 404 and error.type == "NotFoundError" and error.param == "model":
        return CallerError(Reason.MODEL_NOT_FOUND, said, metadata={**values, "model": model})
    if reason is Reason.UPSTREAM_REJECTED:
        return _rejection(error, said, values)
    if reason is Reason.PROVIDER_MISCONFIGURED:
        remedy = "check its token" if status in (401, 403) else "check its base URL"
        message = f"provider {provider_id!r} answered HTTP {status}: {remedy} in the gateway's settings"
        return ProviderError(reason, f"{message}; it said: {said}" if error.message else message, metadata=values)
    if reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED):
        wait = RETRY_SECONDS if error.retry_after is None else min(error.retry_after, MAX_RETRY_SECONDS)
        message = f"provider {provider_id!r} cannot take the request now: {said}"
        return ProviderError(reason, message, metadata=values, retry_after=wait)
    return ProviderError(reason, f"provider {provider_id!r} failed: {said}", metadata=values)


def token_not_sent(provider_id: str, metadata: Mapping[str, str]) -> CallerError:
    """The failure of a call that a provider refuses for its token, while the caller's own token was not sent.

    Args:
        provider_id: Which provider.
        metadata: Of the failure.

    Returns:
        UPSTREAM_UNAUTHENTICATED, with the remedy; raise it.
    """
    return CallerError(
        Reason.UPSTREAM_UNAUTHENTICATED,
        f"provider {provider_id!r} refuses the call for its token; the one in x-vllm-api-token was not sent, since the call"
        f" does not name the provider: name the model as '{provider_id}/…', or set the provider in the request's field for"
        f" it, or have the operator set providers.{provider_id}.accept_caller_tokens",
        metadata=metadata,
    )


def field_of(param: str) -> str:
    """The path of the request field that vLLM's `param` names; empty if it names none that this API has."""
    name, *rest = param.removeprefix("body.").replace("[", ".").replace("]", "").split(".")
    path = FIELDS.get(name, "")
    if path and rest and rest[0].isdecimal():
        path += f"[{rest[0]}]"
    return path


def _reason(status: int) -> Reason:
    if status in REASONS:
        return REASONS[status]
    if 200 <= status < 400:
        return Reason.PROVIDER_MISCONFIGURED
    if 400 <= status < 500:
        return Reason.UPSTREAM_REJECTED
    return Reason.UPSTREAM_ERROR


def _rejection(error: UpstreamError, said: str, metadata: dict[str, str]) -> CallerError:
    field = field_of(error.param)
    violations = (Violation(field, said),) if field else ()
    if field:
        metadata["field"] = field
    too_long = error.param == "input_tokens" or error.type in _CONTEXT_CODES or _CONTEXT.match(said) is not None
    reason = Reason.CONTEXT_LENGTH_EXCEEDED if too_long else Reason.UPSTREAM_REJECTED
    return CallerError(reason, said, metadata=metadata, violations=violations)


def _words(fields: dict[str, Any]) -> tuple[str, str]:
    """The message of an error, and the field it blames; each empty if there is none."""
    for name in ("message", "detail", "details"):
        said = fields.get(name)
        if isinstance(said, str) and said:
            return _UNPRINTABLE.sub("\ufffd", said) if name == "message" else excerpt(said), ""
        if isinstance(said, list) and said and all(isinstance(item, dict) for item in said):
            places = [".".join(map(str, place)) if isinstance(place := item.get("loc"), list) else "" for item in said]
            sentences = [
                f"{place}: {item.get('msg', '')}" if place else _text(item.get("msg")) or _json(item)
                for place, item in zip(places, said, strict=True)
            ]
            return excerpt("; ".join(sentences)), places[0]
        if said:
            return excerpt(_json(said)), ""
    return "", ""


def _plain(text: str) -> str:
    """An excerpt of text; of an HTML page no more than its title."""
    if _HTML.match(text):
        title = _TITLE.search(text)
        return excerpt(f"an HTML page: {html.unescape(title[1])}" if title else "an HTML page")
    return excerpt(text)


def _json(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
