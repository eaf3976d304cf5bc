"""A reader of the status page."""

from __future__ import annotations

from html.parser import HTMLParser


class Document(HTMLParser):
    """A page's text, and the cells of its tables by the heading above them."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self._heading = ""
        self._tag = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 (the library's)
        """A part begins."""
        self._tag = tag
        if tag == "h2":
            self._heading = ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 (the library's)
        """A part ends."""
        self._tag = ""

    def handle_data(self, data: str) -> None:
        """Text."""
        self.text += data
        if self._tag == "h2":
            self._heading += data
        elif self._tag in ("td", "th"):
            self.tables[self._heading][-1][-1] += data

    def rows(self, heading: str) -> list[dict[str, str]]:
        """The rows of a table, by column."""
        columns, *rows = self.tables[heading]
        return [dict(zip(columns, row, strict=True)) for row in rows]
