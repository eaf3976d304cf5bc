"""The pages of reference are current, complete, and agree with the code."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

import deltawire
from deltawire.v1 import chat_completion_pb2, error_reason_pb2, message_pb2, model_registry_pb2, tool_pb2
from deltawire_server.errors import Reason
from deltawire_server.settings.model import SECTIONS
from tests.support.pages import PAGES, ROOT
from tests.support.pages.errors import REPEAT
from tests.support.pages.text import cell

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = (chat_completion_pb2, error_reason_pb2, message_pb2, model_registry_pb2, tool_pb2)


def page(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name: str) -> None:
    """If not: `make docs`, and commit the page with the change that caused it."""
    assert PAGES[name]() == page(name), f"{name} is stale: run `make docs`"


def test_the_api_is_complete() -> None:
    """Every method, message, field and value, as the stubs have them, has a comment."""
    text = page("protos/docs/reference.md")
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            assert all(f"#### {service.name}.{method.name}\n" in text for method in service.methods)
        for message in file.DESCRIPTOR.message_types_by_name.values():
            section = text.split(f"### {message.name}\n")[1].split("\n### ")[0]
            for field in message.fields:
                assert re.search(rf"^\| {field.number} \| `{field.name}` \| .+ \| \S.+ \|$", section, re.MULTILINE), (
                    field
                )
        for enum in file.DESCRIPTOR.enum_types_by_name.values():
            for value in enum.values:
                assert re.search(rf"^\| {value.number} \| `{value.name}` \| \S.+ \|$", text, re.MULTILINE), value


def test_the_settings_are_complete() -> None:
    """Every key is in the table of its section."""
    text = page("server/docs/settings.md")
    for name, section in SECTIONS.items():
        table = text.split(f"\n## {name}")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == [*section.model_fields]


def test_the_client_is_complete() -> None:
    """Every public name."""
    text = page("client/docs/reference.md")
    names = [name for name in deltawire.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"(^### |^\| `|^- \[){name}\b", text, re.MULTILINE)] == []


def _reasons_with_a_delay() -> Iterator[Reason]:
    """Those in a call that names the reason and passes a delay."""
    for path in (ROOT / "server/deltawire_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and any(keyword.arg == "retry_after" for keyword in node.keywords):
                for argument in node.args:
                    for name in re.findall(r"Reason\.([A-Z_]+)", ast.unparse(argument)):
                        yield Reason[name]


def test_no_reason_that_is_sent_with_a_delay_says_not_to_repeat() -> None:
    """All that the code names; the others are computed, and tested where they are."""
    found = set(_reasons_with_a_delay())
    assert {Reason.TOO_MANY_STREAMS, Reason.DRAINING, Reason.STORE_UNAVAILABLE} <= found
    assert found - REPEAT.keys() == set()


def test_characters_of_markdown_mean_themselves() -> None:
    """But in backticks, where they do anyway."""
    assert cell("a*b [c] <d>\n\n`x*y` | z") == r"a\*b \[c\] &lt;d><br>`x*y` \| z"
