"""What comes beside a call's result: gRPC metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


@dataclass(slots=True)
class CallInfo:
    """The request id and the metadata of a call whose result is a plain message.

    Attributes:
        request_id: The call's id in the gateway's log.
        initial_metadata: The headers.
        trailing_metadata: The trailers.

    Pass an empty one as `info=`, and read it after the call.
    """

    request_id: str = ""
    initial_metadata: Metadata = ()
    trailing_metadata: Metadata = ()


def metadata_of(pairs: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """Metadata of either kind of call as plain pairs of name and value."""
    return tuple((name, value) for name, value in pairs or ())


def metadata_text(metadata: Metadata, name: str) -> str:
    """The first value of this name as text; "" if there is none."""
    return next((value for key, value in metadata if key == name and isinstance(value, str)), "")
