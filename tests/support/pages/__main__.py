"""Writes the pages of reference."""

from __future__ import annotations

from tests.support.pages import PAGES, ROOT

for name, made in PAGES.items():
    path = ROOT / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(made(), encoding="utf-8")
