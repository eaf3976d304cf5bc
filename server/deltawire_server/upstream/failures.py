"""Decodes a provider's error and maps it to the error of the call.

    bytes of a body or of an error event ──read_error──▶ UpstreamError ──failure_of──▶ DeltawireError

vLLM answers some invalid requests with status 200 and an error event. The event's `code` is used as the HTTP status, so both
cases give the caller the same error. Proxies and other servers use other error formats; the caller receives an excerpt of
those.
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
"""Retry delay if the provider sends no Retry-After: about the time until a restarted or rebalanced replica is noticed."""

MAX_RETRY_SECONDS = 3600.0
"""Upper limit of the retry delay, whatever Retry-After the provider sends."""

MAX_EXCERPT_BYTES = 512
"""Limit for an error text in an unknown format. A message in vLLM's own format is passed on whole."""

REASONS: Mapping[int, Reason] = MappingProxyType(
    {
        400: Reason.UPSTREAM_REJECTED,
        # For the operator's token; for the caller's token it is UPSTREAM_UNAUTHENTICATED.
        401: Reason.PROVIDER_MISCONFIGURED,
        403: Reason.PROVIDER_MISCONFIGURED,
        # Unless the error is about the model.
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
"""By HTTP status. Any other 2xx or 3xx is PROVIDER_MISCONFIGURED, any other 4xx UPSTREAM_REJECTED, the rest UPSTREAM_ERROR."""

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **vllm_fields.FIELDS,
        # Not fields of the body: vLLM derives them from it.
        "input_tokens": "chat.messages",
        "prompt": "chat.messages",
        # Of a model that accepts fewer images.
        "image": "chat.messages",
    }
)
"""The request field for the first name of vLLM's `param`, which has forms such as `stop`, `body.stop` and
`body.messages.0.content`."""

_LITELLM = re.compile(r"(litellm\.BadRequestError: |\w+Exception - )+")
"""What LiteLLM puts before vLLM's message."""

_CONTEXT = re.compile(
    r"""
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
"""How the versions of vLLM begin the message for a prompt or answer that is too long. Matched at the beginning only: further
on, a message may quote the request."""

_FORMAT = re.compile(
    r"""
    (   grammar\ error:                             # llguidance
    |   invalid\ (grammar|regex|structural\ tag|json\ schema)
    |   failed\ to\ (transform|convert|compile|parse)\ .{0,40}\b(grammar|regex|schema|structural\ tag)
    |   error\ parsing\ regex                        # outlines
    |   regex\ (uses|does\ not)\b
    |   the\ (provided\ )?json\ schema\ (is\ nested|contains)\b
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""How vLLM's backends for structured outputs begin the message for a regular expression, grammar or schema that they cannot
compile. vLLM sets no `param` for these."""

_NAMED_FIRST = re.compile(r"(\w+) (must|cannot)\b")
"""How vLLM begins a message about one of its fields, such as "n must be 1 when using greedy sampling", without a `param`."""

_OTHERS: Mapping[re.Pattern[str], str] = MappingProxyType(
    {
        re.compile(r"\S+ is not a multimodal model"): "chat.messages",
        re.compile(r"Found unexpected chat template kwargs"): "chat.chat_template_kwargs",
    }
)
"""The request field of other messages without a `param`, by their beginning."""

_CONTEXT_CODES = frozenset({"context_length_exceeded", "context_window_exceeded"})
"""The error codes or types that OpenAI and proxies use for a context that is too long."""

_STATUS = re.compile(r"[1-5]\d\d")
_HTML = re.compile(r"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>\s*([^<]{1,200}?)\s*</title", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tabs and line feeds, which vLLM uses to lay out its messages."""


@dataclass(frozen=True, slots=True)
class UpstreamError:
    """A decoded error of a provider.

    Attributes:
        status: The HTTP status, or the code of an error event; 0 if there is none.
        message: The error's message, or an excerpt of at most `MAX_EXCERPT_BYTES` of the body; empty if there is neither.
        type: The error's type, such as "NotFoundError".
        param: The field that the error is about.
        retry_after: Seconds, from a Retry-After header; `None` without one.
    """

    status: int
    message: str = ""
    type: str = ""
    param: str = ""
    retry_after: float | None = None


def read_error(body: bytes, status: int = 0, retry_after: str = "") -> UpstreamError:
    """Decode an error in any format. Never raises.

    Formats: vLLM's `{"error": {…}}`, `{"error": "…"}` and, before 0.10, its fields at the top level; FastAPI's `{"detail": …}` with
    a string or a list of objects; `{"message": …}` and `{"details": …}` of proxies; other JSON; HTML; text.

    Args:
        body: The body of a response with an error status, or the data of an event.
        status: The HTTP status; 0 for an event, whose `code` is used instead.
        retry_after: The Retry-After header. A number of seconds is used; a date is ignored.

    Returns:
        The error; pass it to `failure_of`.
    """
    wait = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else None
    try:
        document: Any = msgspec.json.decode(body)
    except vllm_fields.NOT_JSON:
        return UpstreamError(status, _plain(body.decode(errors="replace")), retry_after=wait)
    if not isinstance(document, dict):
        return UpstreamError(status, excerpt(_json(document)) if document else "", retry_after=wait)
    error = document.get("error") or document
    fields = error if isinstance(error, dict) else {"message": error, "code": document.get("code")}
    message, param = _message_and_param(fields)
    if fields is document and document.get("object") != "error":
        message = excerpt(message)
    code = str(fields.get("code"))
    return UpstreamError(
        status or (int(code) if _STATUS.fullmatch(code) else 0),
        message or (excerpt(_json(error)) if error else ""),
        code if code in _CONTEXT_CODES else vllm_fields.text_of(fields.get("type")),
        vllm_fields.text_of(fields.get("param")) or param,
        wait,
    )


def is_error(payload: bytes) -> bool:
    """Whether the data of an event is an error, in any format that `read_error` decodes, and not a chunk."""
    document = vllm_fields.decoded(payload)
    if not isinstance(document, dict):
        return False
    if document.get("error") or document.get("object") == "error":
        return True
    return "choices" not in document and not document.keys().isdisjoint({"detail", "details", "message"})


def excerpt(text: str) -> str:
    """The beginning of a text on one line without control characters, in at most `MAX_EXCERPT_BYTES` of UTF-8."""
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
    format_field: str = "",
    begun: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> DeltawireError:
    """Map a provider's error, from an HTTP response or an error event, to the error of the call.

    Args:
        error: The provider's error.
        provider_id: The provider's id.
        callers_token: Whether the token that was sent is the caller's; if so, 401 and 403 are the caller's error.
        token_withheld: Whether the call had a token that was not sent to this provider; if so, the error explains that.
        model: The model name in the call; empty if the request has none.
        format_field: From `vllm_fields.format_field`, for errors about what vLLM compiles.
        begun: Whether the first event of the answer was received; if so, the code is always ABORTED (UPSTREAM_ERROR).
        metadata: More values for the error's metadata.

    Returns:
        A `CallerError` if the caller must change the request, else a `ProviderError`; raise it.
    """
    status = error.status
    detail = error.message or (f"HTTP {status}" if status else "no reason given")
    values = {**(metadata or {}), "provider": provider_id}
    if begun:
        if status:
            values["upstream_code"] = str(status)
        message = f"provider {provider_id!r} ended the answer with an error: {detail}"
        return ProviderError(Reason.UPSTREAM_ERROR, message, code=Code.ABORTED, metadata=values)
    reason = _reason(status)
    values["upstream_code" if reason is Reason.UPSTREAM_ERROR else "http_status"] = str(status)
    if status in (401, 403) and callers_token:
        message = f"provider {provider_id!r} rejects the token in x-vllm-api-token: {detail}"
        return CallerError(Reason.UPSTREAM_UNAUTHENTICATED, message, metadata=values)
    if status in (401, 403) and token_withheld:
        return token_not_sent(provider_id, values)
    if status == 404 and error.type == "NotFoundError" and error.param == "model":
        return CallerError(Reason.MODEL_NOT_FOUND, detail, metadata={**values, "model": model})
    if reason is Reason.UPSTREAM_REJECTED:
        return _rejection(error, detail, values, format_field)
    if reason is Reason.PROVIDER_MISCONFIGURED:
        remedy = "check its token" if status in (401, 403) else "check its base URL"
        message = f"provider {provider_id!r} answered HTTP {status}: {remedy} in the gateway's settings"
        return ProviderError(reason, f"{message}; its error: {detail}" if error.message else message, metadata=values)
    if reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED):
        wait = RETRY_SECONDS if error.retry_after is None else min(error.retry_after, MAX_RETRY_SECONDS)
        message = f"provider {provider_id!r} cannot accept the request now: {detail}"
        return ProviderError(reason, message, metadata=values, retry_after=wait)
    return ProviderError(reason, f"provider {provider_id!r} failed: {detail}", metadata=values)


def token_not_sent(provider_id: str, metadata: Mapping[str, str]) -> CallerError:
    """The error if a provider rejects the token of a call and the caller's own token was not sent to it.

    Args:
        provider_id: The provider's id.
        metadata: The error's metadata.

    Returns:
        UPSTREAM_UNAUTHENTICATED, with a message that says how to send the token; raise it.
    """
    return CallerError(
        Reason.UPSTREAM_UNAUTHENTICATED,
        f"provider {provider_id!r} rejects the call because of its token; the one in x-vllm-api-token was not sent, because"
        f" the call does not name the provider: name the model as '{provider_id}/…', or set the request's provider field,"
        f" or ask the operator to set providers.{provider_id}.accept_caller_tokens",
        metadata=metadata,
    )


def field_of(param: str) -> str:
    """The path of the request field for vLLM's `param`; empty if this API has no such field."""
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


def _rejection(error: UpstreamError, detail: str, metadata: dict[str, str], format_field: str) -> CallerError:
    field = field_of(error.param)
    message = detail
    text = _LITELLM.sub("", detail, count=1) if _LITELLM.match(detail) else detail
    named = format_field if field == FIELDS["response_format"] else "" if field else _field_in(text, format_field)
    if named:
        field, message = named, f"{named}: {detail}"
    violations = (Violation(field, detail),) if field else ()
    if field:
        metadata["field"] = field
    too_long = error.param == "input_tokens" or error.type in _CONTEXT_CODES or _CONTEXT.match(text) is not None
    reason = Reason.CONTEXT_LENGTH_EXCEEDED if too_long else Reason.UPSTREAM_REJECTED
    return CallerError(reason, message, metadata=metadata, violations=violations)


def _field_in(message: str, format_field: str) -> str:
    """The request field that a message of vLLM is about; empty if unknown."""
    if _FORMAT.match(message):
        return format_field
    if (first := _NAMED_FIRST.match(message)) is not None:
        return FIELDS.get(first[1], "")
    return next((field for pattern, field in _OTHERS.items() if pattern.match(message)), "")


def _message_and_param(fields: dict[str, Any]) -> tuple[str, str]:
    """The message of an error and the field that it is about; each empty if there is none."""
    for name in ("message", "detail", "details"):
        value = fields.get(name)
        if isinstance(value, str) and value:
            return _UNPRINTABLE.sub("\ufffd", value) if name == "message" else excerpt(value), ""
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            places = [".".join(map(str, place)) if isinstance(place := item.get("loc"), list) else "" for item in value]
            sentences = [
                f"{place}: {item.get('msg', '')}" if place else vllm_fields.text_of(item.get("msg")) or _json(item)
                for place, item in zip(places, value, strict=True)
            ]
            return excerpt("; ".join(sentences)), places[0]
        if value:
            return excerpt(_json(value)), ""
    return "", ""


def _plain(text: str) -> str:
    """An excerpt of a text; only the title of an HTML page."""
    if _HTML.match(text):
        title = _TITLE.search(text)
        return excerpt(f"an HTML page: {html.unescape(title[1])}" if title else "an HTML page")
    return excerpt(text)


def _json(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
