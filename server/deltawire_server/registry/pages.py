"""Pages of a list by ascending id.

A page begins after the last id of the previous page, so its token contains that id: an entry that exists throughout is listed
exactly once. The token also contains a digest of the filter, because a page with another filter would begin at an id that the
caller never received.
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
"""Limit for the entries of a page."""
MAX_PAGE_BYTES = 1024 * 1024
"""Bytes of text after which a page ends: with its last entry, it is well below the 4 MiB that clients receive by default."""

INVALID_TOKEN = Violation(
    "page_token", "is not a next_page_token of this call with these filters: omit it for the first page"
)

_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A valid request for a page.

    Attributes:
        size: Limit for the entries.
        after: The last id of the previous page; empty for the first page.
        digest: The digest of the filter.
    """

    size: int
    after: str
    digest: bytes

    def token_after(self, last: str) -> str:
        """The token of the page that begins after this id."""
        return base64.urlsafe_b64encode(self.digest + last.encode()).decode()


def asked_for(page_size: int, page_token: str, query: str) -> PageRequest:
    """Validate a request; `page_of` then returns the page.

    Args:
        page_size: The requested size; 0 for the default.
        page_token: The requested token; empty for the first page.
        query: The list and its filter, as any text; a token is valid for one of them.

    Raises:
        CallerError: INVALID_REQUEST: a negative page size, or a token that is not from a page of this query.
    """
    violations: list[Violation] = []
    if page_size < 0:
        violations.append(Violation("page_size", f"must not be negative, is {page_size}"))
    digest = hashlib.sha256(query.encode()).digest()[:_DIGEST_BYTES]
    token = _decoded(page_token)
    if token[:_DIGEST_BYTES] not in (b"", digest) or (page_token and not token):
        violations.append(INVALID_TOKEN)
    if violations:
        raise invalid_request(violations)
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    return PageRequest(size, token[_DIGEST_BYTES:].decode(), digest)


def page_of(entries: Mapping[str, T], page: PageRequest, bytes_of: Callable[[T], int]) -> tuple[list[T], str]:
    """The entries of a page by ascending id, and the token of the next page, empty on the last.

    Args:
        entries: The entries by id; after `page.after`, the first `page.size` and one more are enough.
        page: From `asked_for`.
        bytes_of: The size of an entry.
    """
    shown: list[T] = []
    room, last = MAX_PAGE_BYTES, ""
    # No id is empty, so the first page has all of them.
    for entry_id in sorted(each for each in entries if each > page.after):
        if len(shown) == page.size or room < 0:
            return shown, page.token_after(last)
        shown.append(entries[entry_id])
        room, last = room - bytes_of(entries[entry_id]), entry_id
    return shown, ""


def _decoded(page_token: str) -> bytes:
    """The bytes of a page token; empty if it is invalid."""
    try:
        token = base64.b64decode(page_token, altchars=b"-_", validate=True)
        token[_DIGEST_BYTES:].decode()
    except (binascii.Error, ValueError):
        return b""
    return token
