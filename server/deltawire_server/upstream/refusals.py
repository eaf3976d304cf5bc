"""What a provider's error means: one table for HTTP statuses and for the codes in its error events, which are the same.

vLLM answers some bad requests with status 200 and an error event; told by the same table, the caller cannot see a
difference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, DeltawireError, ProviderError, Reason, Violation
from deltawire_server.upstream import vllm_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_SECONDS = 1.0
"""When to try again, where the provider does not say: about what a restarted or rebalanced replica needs to be noticed."""

MAX_RETRY_SECONDS = 3600.0
"""When to try again at the latest, whatever the provider says: more is no advice that a caller waits for."""

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

_CONTEXT = re.compile(r"maximum context length|max_model_len|context window", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A provider's error in its own words.

    Attributes:
        status: The HTTP status, or the code of an error event; 0 if it gave none.
        message: Its sentence; empty if it gave none.
        type: Its kind, such as "NotFoundError".
        param: The field it blames.
        retry_after: Seconds, from a Retry-After header; `None` if there was none.
    """

    status: int
    message: str = ""
    type: str = ""
    param: str = ""
    retry_after: float | None = None


def error_of(refusal: Refusal, provider_id: str, *, callers_token: bool, model: str = "") -> DeltawireError:
    """The failure that a provider's error is for the caller, as long as the answer has not begun.

    Args:
        refusal: What it said.
        provider_id: Who said it.
        callers_token: Whether the token came with the call: then a wrong one is the caller's.
        model: The name that the caller asked for; empty if the request was about none.

    Returns:
        A `CallerError` if the request has to change, else a `ProviderError`; raise it.
    """
    status = refusal.status
    said = refusal.message or f"HTTP {status}"
    metadata = {"provider": provider_id, "http_status": str(status)}
    if status in (401, 403) and callers_token:
        message = f"provider {provider_id!r} refuses the token in x-vllm-api-token: {said}"
        return CallerError(Reason.UPSTREAM_UNAUTHENTICATED, message, metadata=metadata)
    if status == 404 and refusal.type == "NotFoundError" and refusal.param == "model":
        return CallerError(Reason.MODEL_NOT_FOUND, said, metadata={**metadata, "model": model})
    reason = _reason(status)
    if reason is Reason.UPSTREAM_REJECTED:
        return _rejection(refusal, said, metadata)
    if reason is Reason.PROVIDER_MISCONFIGURED:
        remedy = "check its token" if status in (401, 403) else "check its base URL"
        message = f"provider {provider_id!r} answered HTTP {status}: {remedy} in the gateway's settings"
        return ProviderError(reason, message, metadata=metadata)
    if reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED):
        wait = RETRY_SECONDS if refusal.retry_after is None else min(refusal.retry_after, MAX_RETRY_SECONDS)
        message = f"provider {provider_id!r} cannot take the request now: {said}"
        return ProviderError(reason, message, metadata=metadata, retry_after=wait)
    metadata["upstream_code"] = metadata.pop("http_status")
    return ProviderError(reason, f"provider {provider_id!r} failed: {said}", metadata=metadata)


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


def _rejection(refusal: Refusal, said: str, metadata: dict[str, str]) -> CallerError:
    field = field_of(refusal.param)
    violations = (Violation(field, said),) if field else ()
    if field:
        metadata["field"] = field
    too_long = refusal.param == "input_tokens" or _CONTEXT.search(said) is not None
    reason = Reason.CONTEXT_LENGTH_EXCEEDED if too_long else Reason.UPSTREAM_REJECTED
    return CallerError(reason, said, metadata=metadata, violations=violations)
