"""The table of errors: the protos' reasons, the gateway's status codes, and what the client's exceptions advise."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire._errors import PREFIX, REASONS
from deltawire.v1.error_reason_pb2 import ErrorReason
from deltawire_server.errors import FOR_OPERATORS, Reason
from tests.support.pages.protos import comments, files
from tests.support.pages.text import MADE, cell, table

if TYPE_CHECKING:
    from collections.abc import Mapping

_START = """\
Every failed call has a `google.rpc.Status` with an `ErrorInfo`; its `reason` is a value of
[ErrorReason](../../protos/docs/reference.md#errorreason) without the prefix, and the trailer `deltawire-reason` repeats it.
*Status* is the status code before the answer has begun; the meaning says if it differs after that. *Repeat* says whether
the same request may succeed later:

- **after the delay**: the status has a RetryInfo with the delay. gRPC's own retries obey it if the status is UNAVAILABLE.
- **maybe**: the cause may be temporary, but the engine may have worked on the request, or the repetition may fail again:
  decide by what the work costs. If the status has a RetryInfo, a repetition after its delay is safe.
- **no**: the request, the caller or the configuration must change first.

*Next* is what the Python client's exception advises; its arguments have the same names in other languages, or similar ones.
*Operator* marks the reasons that the gateway logs as warnings because an operator should look at them.
"""

DELAY, MAYBE, NO = "after the delay", "maybe", "no"

REPEAT: Mapping[Reason, str] = MappingProxyType(
    dict.fromkeys(
        (
            Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_OVERLOADED, Reason.TOO_MANY_STREAMS, Reason.STORE_UNAVAILABLE,
            Reason.DRAINING, Reason.MEMORY_LIMIT_EXCEEDED, Reason.CALLER_LIMIT_EXCEEDED,
        ),
        DELAY,
    )
    | dict.fromkeys(
        (
            Reason.UPSTREAM_TIMEOUT, Reason.UPSTREAM_ERROR, Reason.UPSTREAM_INCOMPLETE, Reason.UPSTREAM_ABORTED,
            Reason.INTERNAL, Reason.IMAGE_UNAVAILABLE, Reason.WRONG_REPLICA, Reason.COMPLETION_GONE, Reason.SLOW_CALLER,
            Reason.SLOW_WATCHER, Reason.ACCESS_CHANGED, Reason.REVISION_GONE, Reason.DURATION_LIMIT_EXCEEDED,
        ),
        MAYBE,
    )
)  # fmt: skip
"""Whether the same request may succeed later; `NO` for the other reasons."""


def page() -> str:
    """The page."""
    rows = [
        (
            f"`{reason.name}`",
            reason.code.name,
            cell(_meaning(reason)),
            REPEAT.get(reason, NO),
            f"`{_exception(reason).__name__}`: {cell(_exception(reason).__doc__ or '')}",
            "yes" if reason in FOR_OPERATORS else "",
        )
        for reason in Reason
    ]
    head = ("reason", "status", "meaning", "repeat", "next", "operator")
    return "\n".join(["# Errors\n", MADE, _START, table(head, rows)])


def _exception(reason: Reason) -> type:
    return REASONS[ErrorReason.Value(PREFIX + reason.name)]


def _meaning(reason: Reason) -> str:
    """The proto's comment; its status code has a column if nothing else is said of it."""
    [file] = [file for file in files() if file.name.endswith("/error_reason.proto")]
    [index] = [index for index, value in enumerate(file.enum_type[0].value) if value.number == reason.value]
    text = comments(file)[(5, 0, 2, index)].removeprefix(f"{reason.code.name}. ")
    return re.sub(r"Metadata: (\{[^}]*\})", r"Metadata: `\1`", text.replace("\n", " "))
