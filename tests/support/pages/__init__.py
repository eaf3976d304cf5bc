"""The pages of reference: made from the protos, the settings, the reasons of errors and the Python client.

`make docs` writes them; a test checks that they are current.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tests.support.pages import client, errors, protos, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[3]

PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "protos/docs/reference.md": protos.page,
        "server/docs/settings.md": settings.page,
        "server/docs/errors.md": errors.page,
        "client/docs/reference.md": client.page,
    }
)
"""What makes each page, by its path from the root."""
