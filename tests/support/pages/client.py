"""The reference of the Python client: its public names with their signatures and docstrings.

griffe reads them from the source, as mkdocstrings does: annotations stay as written, and docstrings become sections.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import griffe

from tests.support.pages.text import MADE, anchor, cell, escaped, table

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = Path(__file__).parents[3] / "client"

# What the attributes `chat`, `models` and `providers` of a client are. Programs do not make them, so they have no public name.
SERVICES = (
    ("_client.chat", "Chat"),
    ("_client.models", "Models"),
    ("_client.models", "Providers"),
    ("_aio.chat", "AsyncChat"),
    ("_aio.models", "AsyncModels"),
    ("_aio.models", "AsyncProviders"),
)

_START = """\
Everything that `from deltawire import …` gives, and the methods of `client.chat`, `client.models` and `client.providers`.
[README.md](../README.md) introduces it, [cookbook.md](cookbook.md) has complete programs.
"""


def page() -> str:
    """The page."""
    package = cast("griffe.Module", griffe.load("deltawire", search_paths=[CLIENT], docstring_parser="google"))
    public = {name: _target(package[name]) for name in _names(package)}
    messages = sorted(name for name, item in public.items() if ".v1." in item.path)
    errors = {name: item for name, item in public.items() if _is_error(item)}
    services = {name: package[f"{module}.{name}"] for module, name in SERVICES}
    shown = {name: item for name, item in public.items() if name not in errors and name not in messages} | services
    classes = {name: item for name, item in shown.items() if item.is_class}
    parts = ["# Reference of the Python client\n", MADE, _START, "## Classes\n"]
    for name in sorted(classes):
        parts += _class(name, cast("griffe.Class", classes[name]))
    parts.append("## Functions\n")
    for name in sorted(shown):
        if shown[name].is_function:
            parts += _function(name, cast("griffe.Function", shown[name]), "###")
    parts.append("## Types of arguments\n")
    rows = [
        (f"`{name}`", f"`{cast('griffe.Attribute', item).value}`".replace("|", "\\|"))
        for name, item in sorted(shown.items())
        if item.is_attribute and not name.startswith("__")
    ]
    parts += [table(("name", "is"), rows), "## Errors\n", "The group, which is the base class, says what to do.\n"]
    parts.append(table(("error", "base", "meaning"), [_error(name, errors[name]) for name in sorted(errors)]))
    parts += _docstring(errors["CallError"], heading="Attributes of `CallError`, and so of every error of a call:\n")
    parts += ["## Messages\n", "The messages and enums of the API that have a short name here:\n"]
    parts.append(
        "".join(f"- [{name}](../../protos/docs/reference.md#{anchor(name)})\n" for name in messages),
    )
    return "\n".join(parts)


def _names(package: griffe.Module) -> list[str]:
    return [str(name) for name in package.exports or ()]


def _target(item: griffe.Object | griffe.Alias) -> griffe.Object | griffe.Alias:
    return item.final_target if item.is_alias else item  # type: ignore[union-attr] # only an alias has one


def _is_error(item: griffe.Object | griffe.Alias) -> bool:
    return item.is_class and item.path.startswith("deltawire._errors.")


def _class(name: str, item: griffe.Class) -> Iterator[str]:
    yield f"### {name}\n"
    yield from _docstring(item)
    fields = [member for member in item.attributes.values() if member.is_public]
    documented = [member for member in fields if member.docstring]
    if documented:
        rows = [
            (f"`{member.name}`", _annotation(member), cell(member.docstring.value if member.docstring else ""))
            for member in documented
        ]
        yield table(("attribute", "type", "meaning"), rows)
    for member in item.functions.values():
        if member.is_public and not member.name.startswith("_"):
            yield from _function(f"{name}.{member.name}", member, "####")


def _annotation(member: griffe.Attribute) -> str:
    return f"`{member.annotation}`".replace("|", "\\|") if member.annotation else ""


def _function(name: str, item: griffe.Function, level: str) -> Iterator[str]:
    yield f"{level} {name}\n"
    prefix = "async " if "async" in item.labels else ""
    yield f"```text\n{prefix}{item.signature()}\n```\n"
    yield from _docstring(item)


def _error(name: str, item: griffe.Object | griffe.Alias) -> tuple[str, str, str]:
    [base] = cast("griffe.Class", item).bases
    return f"`{name}`", f"`{base}`", cell(item.docstring.parsed[0].value if item.docstring else "")


def _docstring(item: griffe.Object | griffe.Alias, heading: str = "") -> Iterator[str]:
    """The sections of a docstring. With a heading: only its lists."""
    for section in item.docstring.parsed if item.docstring else ():
        if isinstance(section, griffe.DocstringSectionText):
            if not heading:
                yield escaped(section.value) + "\n"
            continue
        yield heading or f"{section.kind.value.capitalize()}:\n"
        lines = []
        for entry in cast("list[griffe.DocstringElement]", section.value):
            name = getattr(entry, "name", None) or entry.annotation or ""
            lines.append(f"- `{name}`: {cell(entry.description)}\n")
        yield "".join(lines)
