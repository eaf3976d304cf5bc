"""Pages of a list of models: what may be asked for, and where a page begins and ends.

A page begins after the last id of the one before, so its token is that id: whatever has come or gone meanwhile, what
stays is seen exactly once.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from deltawire_server.errors import Violation, invalid_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.registry.model import Model

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
"""Models in a page: plenty for one call, and made within milliseconds."""
MAX_PAGE_BYTES = 1024 * 1024
"""Text in a page, give or take its last model: well within the 4 MiB that clients receive by default."""


def asked_for(page_size: int, page_token: str) -> tuple[int, str]:
    """How many models a page has at most, and the id it begins after; empty for the first page.

    Raises:
        CallerError: A negative page size, or a token that is none of ours.
    """
    violations = []
    if page_size < 0:
        violations.append(Violation("page_size", f"must not be negative, is {page_size}"))
    after = _decoded(page_token)
    if after is None:
        violations.append(Violation("page_token", "is not a next_page_token of this call"))
    if violations or after is None:
        raise invalid_request(violations)
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE), after


def page_of(models: Mapping[str, Model], size: int, after: str) -> tuple[list[Model], str]:
    """The models of a page by ascending id, and the token of the next one, empty on the last.

    Args:
        models: All there are, by id.
        size: As `asked_for` gave it.
        after: Likewise.
    """
    # No id is empty, so the first page begins after the empty one.
    ids = sorted(model_id for model_id in models if model_id > after)
    page: list[Model] = []
    room = MAX_PAGE_BYTES
    for model_id in ids[:size]:
        page.append(models[model_id])
        room -= _bytes_of(models[model_id])
        if room < 0:
            break
    return page, _encoded(page[-1].id) if len(ids) > len(page) else ""


def _bytes_of(model: Model) -> int:
    texts = (*model.names, *model.target, model.root, model.parent, *model.metadata, *model.metadata.values())
    return sum(len(text.encode()) for text in texts)


def _encoded(model_id: str) -> str:
    return base64.urlsafe_b64encode(model_id.encode()).decode()


def _decoded(page_token: str) -> str | None:
    """The id in a page token; `None` if it holds none."""
    try:
        return base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
