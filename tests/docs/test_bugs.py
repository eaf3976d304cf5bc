"""Every row of tests/transcripts/bugs.md names an input, and that input gives what the row says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deltawire_server.sansio.events import Completed
from tests.support import recordings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltawire_server.sansio.events import FinishedChoice

PAGE = Path(__file__).parents[1] / "transcripts/bugs.md"
LINES = PAGE.read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES if line.startswith("| [")]


def outcome(name: str) -> str:
    """What callers get, in the words of the page."""
    *_, completed = recordings.load(name).read()
    assert isinstance(completed, Completed)
    [choice] = completed.choices
    end = f"ends with {completed.fault.reason.name}" if completed.fault else f"{choice.stop_reason.name}"
    usage = f"usage {completed.usage.provenance.name}"
    # A row is one line.
    return " ".join("; ".join([end, *_content(choice), usage]).split())


def _content(choice: FinishedChoice) -> Iterator[str]:
    if choice.text:
        yield f"text `{choice.text!r}`"
    for call in choice.tool_calls:
        yield f"SUCCEEDED `{call.arguments}`"
    for failed in choice.failed_tool_calls:
        yield f"FAILED, {failed.reason.name} `{failed.raw_arguments}`"
    if choice.tool_calls or choice.failed_tool_calls:
        yield f"executable: {'yes' if choice.tool_calls_executable else 'no'}"


def test_the_page_has_rows() -> None:
    """With the four columns, and each input once."""
    assert {len(row) for row in ROWS} == {4}
    assert len(ROWS) == len({row[0] for row in ROWS}) > 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split("]")[0].strip("["))
def test_a_row_is_what_its_input_gives(row: list[str]) -> None:
    """The file exists, callers get what the row says, and each report is a link to an issue or a pull request."""
    link, _, callers_get, reports = row
    name = re.fullmatch(r"\[([\w.-]+)\]\(\1\.sse\)", link)
    assert name, link
    assert callers_get == outcome(name[1])
    for report in reports.split(", "):
        shown = re.fullmatch(
            r"\[([\w.-]+)#(\d+)\]\(https://github\.com/[\w.-]+/([\w.-]+)/(issues|pull)/(\d+)\)", report
        )
        assert shown, report
        assert (shown[1], shown[2]) == (shown[3], shown[5])


def test_every_input_written_after_a_report_has_a_row() -> None:
    """Those are the files `w-*`."""
    written = {name for name in recordings.names() if name.startswith("w-")}
    assert written <= {row[0].split("]")[0].strip("[") for row in ROWS}
