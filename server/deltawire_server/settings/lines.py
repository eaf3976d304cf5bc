"""Access lines: reads them from their file and from the environment, and reports the position of each invalid line."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import SecretStr

from deltawire_server.access import CERTIFICATE_HEADER, UNIX, AssertedName, Identity, Key, Principal, Trust, parse_line
from deltawire_server.settings.values import MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FILE = "keys_file"
TEXT = "keys"
"""The two settings that contain lines."""

PROXIES = "trusted_proxies"

_SEPARATED = re.compile(r"[^;\n]*")


class LinesError(ValueError):
    """Some lines are invalid.

    Attributes:
        problems: For each problem, the setting, and a message with the line's position, what is wrong and what to do. No message
            contains the line.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(message for _, message in self.problems))


@dataclass(frozen=True, slots=True)
class Entry:
    """A principal and the position of its line.

    Attributes:
        setting: `FILE` or `TEXT`.
        place: The position in words: "/etc/deltawire/keys line 3".
        principal: The principal that the line describes.
    """

    setting: str
    place: str
    principal: Principal


def hashed(value: SecretStr | None) -> SecretStr | None:
    """Replace the keys in `access.keys` by their digests, so that settings contain no key. `read` reports invalid lines.

    Raises:
        ValueError: It is the mask of printed settings.
    """
    text = value.get_secret_value() if value is not None else ""
    if value is None or not text:
        return None
    if text.strip() == MASK:
        raise ValueError(
            f'is "{MASK}", which is only the mask of the lines in printed settings: give the lines themselves'
        )
    return SecretStr(_SEPARATED.sub(lambda line: _hashed(line[0]), text))


def _hashed(line: str) -> str:
    try:
        principal = parse_line(line)
    except ValueError:
        return line
    return principal.line() if principal is not None else ""


def read(path: Path | None, text: SecretStr | None) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Read all access lines.

    Args:
        path: A readable file of lines.
        text: Lines separated by `;` or newlines.

    Returns:
        The entries, those of the file first; and warnings about the file's permissions, for the log.

    Raises:
        LinesError: Lines are invalid, a name or a credential is used twice, or there are only comments and empty lines.
    """
    lines: list[tuple[str, str, str]] = []
    mode = 0
    if path is not None:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # Bytes that are not UTF-8 are allowed in comments; anywhere else they make their line invalid.
            content = file.read().decode(errors="replace")
        lines += [(FILE, f"{path} line {number}", line) for number, line in enumerate(content.split("\n"), start=1)]
    if text is not None:
        lines += [
            (TEXT, f"line {number}", line)
            for number, line in enumerate(re.split("[;\n]", text.get_secret_value()), start=1)
        ]
    entries, problems = _validated(lines)
    if lines and not entries and not problems:
        problems.append((lines[0][0], _NO_CALLER))
    if problems:
        raise LinesError(problems)
    return tuple(entries), tuple(_warnings(path, mode, entries)) if path is not None else ()


# A file that was emptied by mistake, or to revoke the last key, must not open the gateway to every caller.
_NO_CALLER = (
    "has no access line, so no caller could call: add a line; to allow every caller to do everything, remove the access "
    "settings"
)


def _validated(lines: Iterable[tuple[str, str, str]]) -> tuple[list[Entry], list[tuple[str, str]]]:
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
                problems.append(
                    (setting, f"{place}: the {what} is the same as that of {first}: give each line its own")
                )
    return entries, problems


def _warnings(path: Path, mode: int, entries: Iterable[Entry]) -> Iterator[str]:
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield f"users other than the owner can write {path} and add themselves: chmod go-w"
    clear = any(
        isinstance(entry.principal.credential, Key) and entry.principal.credential.clear
        for entry in entries
        if entry.setting == FILE
    )
    if clear and mode & stat.S_IROTH:
        yield f"all users of this machine can read the keys in {path}: chmod o-r, or write their digests, sha256:…"


def unusable(entries: Iterable[Entry], trust: Trust, *, certificates: bool, unix: bool) -> Iterator[tuple[str, str]]:
    """The lines and trusted proxies that no connection can ever match, as problems for `LinesError`.

    Args:
        entries: The lines.
        trust: The trusted proxies.
        certificates: Whether the listener requests client certificates.
        unix: Whether the gateway listens on a unix socket.
    """
    remedy = "set server.tls_client_ca_file (--tls-client-ca-file)"
    if not certificates and trust.proxies - {UNIX}:
        yield PROXIES, f"mtls: needs a listener that requests client certificates: {remedy}"
    if not unix and UNIX in trust.proxies:
        yield PROXIES, f"{UNIX} needs a unix socket: add unix:/path to server.listen (--listen)"
    forwarded = trust.header == CERTIFICATE_HEADER
    certificates = certificates or (forwarded and bool(trust.proxies))
    for entry in entries:
        if isinstance(entry.principal.credential, Identity) and not certificates:
            problem = f"mtls: needs a listener that requests client certificates: {remedy}, or give the caller a key"
            yield entry.setting, f"{entry.place}: {problem}"
        if isinstance(entry.principal.credential, AssertedName) and (forwarded or not trust.proxies):
            problem = f"proxy: needs a proxy that names its callers: set access.{PROXIES} and access.caller_header"
            yield entry.setting, f"{entry.place}: {problem}"
