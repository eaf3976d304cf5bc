"""The files, anchors, modules and Makefile targets that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import anchors, blocks, links, matches

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    "README.md",
    "client/README.md",
    "client/go/README.md",
    "client/java/README.md",
    "client/ruby/README.md",
    "client/typescript/README.md",
    "server/README.md",
    "server/deploy/runbook.md",
    "protos/README.md",
    "tests/conformance/README.md",
    *(
        str(page.relative_to(ROOT))
        for part in ("client", "protos", "server")
        for page in sorted((ROOT / part).glob("docs/*.md"))
    ),
]
SERVER = ROOT / "server/deltawire_server"


@pytest.mark.parametrize("name", PAGES)
def test_links_have_targets(name: str) -> None:
    """Each link to a file of the repository, or to a heading in one, has a target."""
    page = ROOT / name
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_request_flow_names_existing_modules() -> None:
    """The diagram names four to six modules and `sansio/reader`, and each exists."""
    [diagram] = [block.text for block in blocks(README) if not block.language]
    modules = re.findall(r"^ ([\w/]+)  ", diagram, re.MULTILINE)
    assert 4 <= len(modules) <= 6
    for module in [*modules, "sansio/reader"]:
        assert module in diagram
        assert (SERVER / f"{module}.py").exists() or (SERVER / module / "__init__.py").exists(), module


def test_console_blocks_name_makefile_targets() -> None:
    """Every command of a console block is `make` with an existing target, because no test runs these blocks."""
    commands = [line for block in blocks(README) if block.language == "console" for line in block.text.splitlines()]
    named = [re.fullmatch(r"\$ make ([\w-]+)( +# .+)?", command) for command in commands]
    targets = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    assert all(command and command[1] in targets for command in named), commands


def test_the_first_answer_takes_few_commands() -> None:
    """At most five commands come before the first chat request."""
    commands = [
        line
        for block in blocks(README)
        for line in block.text.splitlines()
        if (block.language == "console" and line.startswith("$ ")) or (block.language == "sh" and line)
    ]
    first = next(index for index, command in enumerate(commands) if "deltawire chat" in command)
    assert first < 6


def test_an_ellipsis_matches_any_text_in_a_line() -> None:
    """`…` matches any text within a line, and other lines may come before and after."""
    assert matches('note\nget_weather({"city": "Oslo"})\n', 'get_weather({"city": "…"})\n')
    assert not matches('get_weather({"town": "Oslo"})\n', 'get_weather({"city": "…"})\n')
    assert not matches('get_weather({"city": "Oslo"}) and more\n', 'get_weather({"city": "…"})\n')
