"""The reference of the API: services, messages and enums with the comments of the protos.

buf compiles the protos with their comments; the descriptor set that is shipped has none.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet

from tests.support.pages.text import MADE, anchor, cell, escaped, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.descriptor_pb2 import EnumDescriptorProto, FileDescriptorProto, MethodDescriptorProto

PROTOS = Path(__file__).parents[3] / "protos"
PACKAGE = ".deltawire.v1."
WELL_KNOWN = ".google.protobuf."

# Numbers of fields in descriptor.proto, of which the paths of comments consist.
_MESSAGES, _ENUMS, _SERVICES = (4, 5, 6)
_FIELDS, _NESTED, _NESTED_ENUMS, _ONEOFS = (2, 3, 4, 8)
_MEMBERS = 2

_START = """\
Every service, message and enum of package `deltawire.v1`, with the comments of the protos. A field that is *optional*
distinguishes absence from the default of its type. Of the fields of a oneof, at most one is set.
"""

Path_ = tuple[int, ...]
Comments = dict[Path_, str]


@functools.cache
def files() -> tuple[FileDescriptorProto, ...]:
    """The project's own files, with comments."""
    with tempfile.TemporaryDirectory() as home:
        made = subprocess.run(
            [Path(sys.executable).with_name("buf"), "build", "--as-file-descriptor-set", "--output", "-"],
            cwd=PROTOS,
            env=os.environ | {"HOME": home},
            capture_output=True,
            check=True,
        )
    every = FileDescriptorSet.FromString(made.stdout).file
    return tuple(sorted((file for file in every if f".{file.package}." == PACKAGE), key=lambda file: file.name))


def comments(file: FileDescriptorProto) -> Comments:
    """The comment before each declaration, by its path."""
    found: Comments = defaultdict(str)
    for location in file.source_code_info.location:
        text = "\n".join(line.removeprefix(" ") for line in location.leading_comments.split("\n"))
        found[tuple(location.path)] = text.strip()
    return found


def page() -> str:
    """The page."""
    parts = [
        "# Reference of the API\n",
        MADE,
        _START,
    ]
    for file in files():
        said = comments(file)
        parts.append(f"## {file.name.rpartition('/')[2]}\n")
        for index, service in enumerate(file.service):
            path: Path_ = (_SERVICES, index)
            parts += [f"### {service.name}\n", escaped(said[path]) + "\n"]
            for number, method in enumerate(service.method):
                parts += _method(service.name, method, said[(*path, _MEMBERS, number)])
        for index, message in enumerate(file.message_type):
            parts += _message(message, (_MESSAGES, index), "", said)
        for index, enum in enumerate(file.enum_type):
            parts += _enum(enum, (_ENUMS, index), "", said)
    return "\n".join(parts)


def _method(service: str, method: MethodDescriptorProto, comment: str) -> Iterator[str]:
    yield f"#### {service}.{method.name}\n"
    stream = "stream of " if method.server_streaming else ""
    yield f"{_link(method.input_type)} → {stream}{_link(method.output_type)}\n"
    yield escaped(comment) + "\n"


def _message(message: DescriptorProto, path: Path_, outer: str, said: Mapping[Path_, str]) -> Iterator[str]:
    name = f"{outer}{message.name}"
    yield f"### {name}\n"
    yield escaped(said[path]) + "\n"
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    rows = [
        (
            str(field.number),
            f"`{field.name}`",
            _type(field, maps),
            cell(_oneof(message, field) + said[(*path, _FIELDS, index)]),
        )
        for index, field in enumerate(message.field)
    ]
    if rows:
        yield table(("no.", "field", "type", "meaning"), rows)
    for index, oneof in enumerate(message.oneof_decl):
        if comment := said[(*path, _ONEOFS, index)]:
            yield f"oneof `{oneof.name}`: {escaped(comment)}\n"
    for index, nested in enumerate(message.nested_type):
        if nested.name not in maps:
            yield from _message(nested, (*path, _NESTED, index), f"{name}.", said)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, _NESTED_ENUMS, index), f"{name}.", said)


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return f"(oneof `{message.oneof_decl[field.oneof_index].name}`) "


def _enum(enum: EnumDescriptorProto, path: Path_, outer: str, said: Mapping[Path_, str]) -> Iterator[str]:
    yield f"### {outer}{enum.name}\n"
    yield escaped(said[path]) + "\n"
    rows = [
        (str(value.number), f"`{value.name}`", cell(said[(*path, _MEMBERS, index)]))
        for index, value in enumerate(enum.value)
    ]
    yield table(("no.", "value", "meaning"), rows)


def _type(field: FieldDescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else scalar
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    if type_name.startswith(WELL_KNOWN):
        name = type_name.removeprefix(WELL_KNOWN)
        return f"[google.protobuf.{name}](https://protobuf.dev/reference/protobuf/google.protobuf/#{anchor(name)})"
    name = type_name.removeprefix(PACKAGE)
    return f"[{name}](#{anchor(name)})"
