"""The lines that say who may call, from their file and from the environment, with the place of each that is wrong."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import SecretStr

from deltawire_server.access import Identity, Key, Principal, parse_line
from deltawire_server.settings.values import MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FILE = "keys_file"
TEXT = "keys"
"""The two settings that hold lines."""

_SEPARATED = re.compile(r"[^;\n]*")


class LinesError(ValueError):
    """Lines that are wrong.

    Attributes:
        problems: Of each, the setting that it is from, and the place, what is wrong and what to do. No line is repeated.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(message for _, message in self.problems))


@dataclass(frozen=True, slots=True)
class Entry:
    """A principal, and where its line stands.

    Attributes:
        setting: `FILE` or `TEXT`.
        place: For people: "/etc/deltawire/keys line 3".
        principal: Whom the line is about.
    """

    setting: str
    place: str
    principal: Principal


def hashed(value: SecretStr | None) -> SecretStr | None:
    """Replace the keys in `access.keys` by their digests, so that no settings hold one; wrong lines stay, to be reported.

    Raises:
        ValueError: It is the mask that stands for the lines in printed settings.
    """
    text = value.get_secret_value() if value is not None else ""
    if value is None or not text:
        return None
    if text.strip() == MASK:
        raise ValueError(f'is "{MASK}", which only stands for the lines in printed settings: give the lines themselves')
    return SecretStr(_SEPARATED.sub(lambda line: _hashed(line[0]), text))


def _hashed(line: str) -> str:
    try:
        principal = parse_line(line)
    except ValueError:
        return line
    return principal.line() if principal is not None else ""


def read(path: Path | None, text: SecretStr | None) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Read all lines there are.

    Args:
        path: A file of lines; it can be read.
        text: Lines with `;` or line ends between them.

    Returns:
        The entries, file first; and warnings about how the file is kept, for the log.

    Raises:
        LinesError: With every line that is wrong, and every name or credential that is there twice; or nobody is named.
    """
    lines: list[tuple[str, str, str]] = []
    mode = 0
    if path is not None:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # A byte that is no UTF-8 may be in a comment; anywhere else it makes its line wrong, which then is reported.
            content = file.read().decode(errors="replace")
        lines += [(FILE, f"{path} line {number}", line) for number, line in enumerate(content.split("\n"), start=1)]
    if text is not None:
        lines += [
            (TEXT, f"line {number}", line)
            for number, line in enumerate(re.split("[;\n]", text.get_secret_value()), start=1)
        ]
    entries, problems = _judged(lines)
    if lines and not entries and not problems:
        problems.append((lines[0][0], _NOBODY))
    if problems:
        raise LinesError(problems)
    return tuple(entries), tuple(_warnings(path, mode, entries)) if path is not None else ()


# A file that was emptied by mistake, or to revoke the last key, must not open the gateway to everybody.
_NOBODY = (
    "names nobody, so nobody could call: add a line, or start without access settings, and everybody may do everything"
)


def _judged(lines: Iterable[tuple[str, str, str]]) -> tuple[list[Entry], list[tuple[str, str]]]:
    entries: list[Entry] = []
    problems: list[tuple[str, str]] = []
    places: dict[object, str] = {}
    for setting, place, line in lines:
        try:
            principal = parse_line(line)
        except ValueError as error:
            problems.append((setting, f"{place}: {error}"))
            continue
        if principal is None:
            continue
        entries.append(Entry(setting, place, principal))
        for what, unique in (("name", principal.name), ("credential", principal.credential)):
            first = places.setdefault(unique, place)
            if first != place:
                problems.append((setting, f"{place}: the {what} is that of {first} again: give each its own"))
    return entries, problems


def _warnings(path: Path, mode: int, entries: Iterable[Entry]) -> Iterator[str]:
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield f"others than its owner can write {path} and let themselves in: chmod go-w"
    clear = any(
        isinstance(entry.principal.credential, Key) and entry.principal.credential.clear
        for entry in entries
        if entry.setting == FILE
    )
    if clear and mode & stat.S_IROTH:
        yield f"everybody on this machine can read the keys in {path}: chmod o-r, or write their digests, sha256:…"


def certificates_needed(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """The lines by identity, as problems of `LinesError`'s form: where no client certificate is asked for."""
    remedy = "set server.tls_client_ca_file (--tls-client-ca-file), or give the caller a key"
    return [
        (entry.setting, f"{entry.place}: mtls: needs a listener that asks for client certificates: {remedy}")
        for entry in entries
        if isinstance(entry.principal.credential, Identity)
    ]
