"""Validates `extra_body`: fields of vLLM's request body that this API lacks and the operator allows."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.errors import Violation, invalid_request
from deltawire_server.upstream.vllm_fields import FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

_GATEWAYS = frozenset({"stream", "stream_options", "request_id"})
"""Fields that only the gateway sets: it needs them to read the answer and to find the request in the engine's log."""


NAMED_ONLY = ("*template*", "*processor*", "mm_*", "*_kwargs", "*_xargs", "*transfer*")
"""Patterns of fields with effects beyond their request: templates and code that the engine runs, the destination of its cache,
the decoding of media, arguments of plugins. The operator must allow each by its exact name; a pattern does not match them,
because a later version of vLLM may have more fields that it matches."""


def allowed_extra(text: str, allowed: Sequence[str], provider_id: str) -> dict[str, msgspec.Raw]:
    """Decode and validate the extra fields of a request's body.

    Args:
        text: JSON text of an object; empty for none.
        allowed: Names of fields, or shell patterns of names, that the operator allows; `NAMED_ONLY` fields only by name.
        provider_id: The provider's id.

    Returns:
        The value of each field, verbatim.

    Raises:
        CallerError: INVALID_REQUEST with each field that is not allowed, or that the request sets in another way.
    """
    if not text:
        return {}
    extra = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    violations = []
    for name in extra:
        if name in FIELDS:
            violation = f"is set by a field of its own: use {FIELDS[name]}"
        elif name in _GATEWAYS:
            violation = "is set by the gateway: leave it out"
        elif name in allowed or (_matches(name, allowed) and not _matches(name, NAMED_ONLY)):
            continue
        else:
            violation = (
                f"is not allowed: the operator can add it to allowed_extra_fields, under [providers.{provider_id}] in the"
                " gateway's settings"
            )
            if _matches(name, allowed):
                violation += ", by its exact name, because patterns do not match fields with effects beyond the request"
        violations.append(Violation(f"chat.extra_body.{name}", violation))
    if violations:
        raise invalid_request(violations)
    return extra


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
