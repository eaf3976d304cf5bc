"""Fields of the engine's request body for which this API has none: only those that the operator allows."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.errors import Violation, invalid_request
from deltawire_server.upstream.vllm_fields import FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

_GATEWAYS = frozenset({"stream", "stream_options", "request_id"})
"""What the gateway says by itself: without it, it could not read the answer, or not find it in the engine's log."""


NAMED_ONLY = ("*template*", "*processor*", "mm_*", "*_kwargs", "*_xargs", "*transfer*")
"""Patterns of fields that reach outside of their request or change the engine: templates and code that the engine runs, where it
sends its cache, how it decodes media, what its plugins get. No pattern of the operator's covers one, only its name: a
pattern is written for what a version has, and the next version has more."""


def allowed_extra(text: str, allowed: Sequence[str], provider_id: str) -> dict[str, msgspec.Raw]:
    """The further fields of a request's body, each value to the letter.

    Args:
        text: JSON text of an object; empty for none.
        allowed: Names of fields, or shell patterns of names, that the operator allows; of `NAMED_ONLY` fields, only names.
        provider_id: Whose fields they are.

    Raises:
        CallerError: INVALID_REQUEST with each field that is not allowed, or that is said otherwise.
    """
    if not text:
        return {}
    extra = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    violations = []
    for name in extra:
        if name in FIELDS:
            violation = f"has a field of its own: use {FIELDS[name]}"
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
                violation += ", by its name, since no pattern covers what reaches outside of the request"
        violations.append(Violation(f"chat.extra_body.{name}", violation))
    if violations:
        raise invalid_request(violations)
    return extra


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
