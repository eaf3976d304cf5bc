"""Pages of a list by ascending id: what may be asked for, and where a page begins and ends.

A page begins after the last id of the previous one, so its token holds that id: whatever was added or removed in between, what
stays is listed exactly once. The token also holds a digest of the filter that it belongs to, since a page of another filter
would continue at a place that the caller never saw.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from deltawire_server.errors import Violation, invalid_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
"""Entries in a page: plenty for one call, and made within milliseconds."""
MAX_PAGE_BYTES = 1024 * 1024
"""Text in a page, give or take its last entry: well within the 4 MiB that clients receive by default."""

_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A page that may be asked for.

    Attributes:
        size: The most entries.
        after: The id that it begins after; empty for the first page.
        digest: Of the filter.
    """

    size: int
    after: str
    digest: bytes


def asked_for(page_size: int, page_token: str, query: str) -> PageRequest:
    """Check what a caller asks for; then `page_of` makes the page.

    Args:
        page_size: As requested; 0 for the default.
        page_token: As requested; empty for the first page.
        query: Which list this is a page of and its filter, as any text; a token belongs to one of them.

    Raises:
        CallerError: INVALID_REQUEST: a negative page size, or a token that no page of this query returned.
    """
    violations: list[Violation] = []
    if page_size < 0:
        violations.append(Violation("page_size", f"must not be negative, is {page_size}"))
    digest = hashlib.sha256(query.encode()).digest()[:_DIGEST_BYTES]
    token = _decoded(page_token)
    if token[:_DIGEST_BYTES] not in (b"", digest) or (page_token and not token):
        violations.append(
            Violation(
                "page_token", "is not a next_page_token of this call with these filters: leave it out to begin anew"
            )
        )
    if violations:
        raise invalid_request(violations)
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    return PageRequest(size, token[_DIGEST_BYTES:].decode(), digest)


def page_of(entries: Mapping[str, T], page: PageRequest, bytes_of: Callable[[T], int]) -> tuple[list[T], str]:
    """The entries of a page by ascending id, and the token of the next page, empty on the last.

    Args:
        entries: All there are, by id.
        page: As `asked_for` returned it.
        bytes_of: How much text an entry holds.
    """
    # No id is empty, so the first page begins after the empty one.
    ids = sorted(entry_id for entry_id in entries if entry_id > page.after)
    shown: list[T] = []
    room = MAX_PAGE_BYTES
    for entry_id in ids[: page.size]:
        shown.append(entries[entry_id])
        room -= bytes_of(entries[entry_id])
        if room < 0:
            break
    if len(ids) == len(shown):
        return shown, ""
    return shown, base64.urlsafe_b64encode(page.digest + ids[len(shown) - 1].encode()).decode()


def _decoded(page_token: str) -> bytes:
    """The bytes of a page token; empty if it does not hold an id."""
    try:
        token = base64.b64decode(page_token, altchars=b"-_", validate=True)
        token[_DIGEST_BYTES:].decode()
    except (binascii.Error, ValueError):
        return b""
    return token
