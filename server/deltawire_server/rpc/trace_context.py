"""W3C Trace Context of a call: forwarded if it is valid, otherwise dropped, as the recommendation requires."""

from __future__ import annotations

import re

MAX_MEMBERS = 32
"""Entries of a `tracestate`, the recommendation's own limit."""

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-[!-~]{1,256})?"
)
# Keys begin with a letter or, for systems with many tenants, a digit; values are printable ASCII but , and =.
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


def trace_context(traceparent: str, tracestate: str) -> tuple[str | None, str | None]:
    """Validate a caller's trace context.

    Args:
        traceparent: The value of the header; empty if it is missing.
        tracestate: The value of the header; empty if it is missing.

    Returns:
        Both headers to send to the provider; `None` for one that is missing or invalid. Without a valid `traceparent`,
        `tracestate` is `None` too.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found["version"] == "00" and found["more"]):
        return None, None
    members = [member.strip(" \t") for member in tracestate.split(",", MAX_MEMBERS)]
    valid = len(members) <= MAX_MEMBERS and all(not member or _MEMBER.fullmatch(member) for member in members)
    return traceparent, tracestate if tracestate and valid and tracestate.isprintable() else None
