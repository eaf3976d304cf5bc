"""Three sources made one: the file, the environment over it, flags over both, and for every key where its value is from.

A wrong value is only useful to hear about together with the place to put it right, so each value's origin is kept beside
it until everything has been checked; then all problems are told at once.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deltawire_server.settings.fields import KeyPath, expectation, field_at, is_secret, is_table
from deltawire_server.settings.lines import LinesError
from deltawire_server.settings.model import SECTIONS, ProviderSettings, Settings
from deltawire_server.settings.values import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

PREFIX = "DELTAWIRE_"

SHORT_NAMES: Mapping[str, KeyPath] = {
    "VLLM_URL": ("providers", "vllm", "base_url"),
    "VLLM_MAX_TOKENS": ("providers", "vllm", "max_tokens"),
    "VLLM_API_TOKEN": ("providers", "vllm", "api_token"),
    "VLLM_TLS_VERIFY": ("providers", "vllm", "tls_verify"),
}
"""Variables that describe provider `vllm`, beside their long names."""

# Kubernetes puts these into every container for a service called deltawire or deltawire-server.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")
# Near enough that a misspelling is found, far enough that the client's variables (DELTAWIRE_TARGET) are none.
_MISSPELLED = 0.85
_SHOWN_CHARACTERS = 80


class SettingsError(Exception):
    """The settings cannot be served with. Print it and exit 2.

    Attributes:
        problems: One line each: key, source, what is wrong and what to do. No secrets.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True)
class Sources:
    """What the sources said so far; put them in from the lowest to the highest.

    Attributes:
        tree: Values as they came, by section and key.
        origins: Where each value is from, by its path; tables have the origin of their first key.
        read: All origins, in the order they were read.
        problems: What was wrong before any value was looked at.
    """

    tree: dict[str, Any] = field(default_factory=dict, repr=False)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    read: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def file(self, path: Path) -> None:
        """Read a TOML file; the first source, if there is one.

        Raises:
            SettingsError: It cannot be read, or is not TOML. Nothing else can be judged then.
        """
        origin = f"file {path}"
        problem = ""
        try:
            self.tree = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            problem = f"cannot be read ({error.strerror}): see --config and DELTAWIRE_CONFIG"
        except UnicodeDecodeError:
            problem = "is not UTF-8 text: save it as such"
        except tomllib.TOMLDecodeError as error:
            problem = f"is not TOML: {error}; deltawire-server --help shows an example"
        # Outside of the handlers: these exceptions may hold the whole text, and with it a token, and would travel along.
        if problem:
            raise SettingsError([f"{origin}: {problem}"])
        self.read[origin] = None
        for section, table in self.tree.items():
            self._note((section,), table, origin, depth=2 if section == "providers" else 1)

    def environment(self, environ: Mapping[str, str], providers: Iterable[str] = ()) -> None:
        """Read the environment; the second source. An empty variable is one that is not set.

        Args:
            environ: As in `os.environ`.
            providers: Ids, beside those of the file, that a variable may mean: `a-b` for `..._A_B_...`.
        """
        tables = self.tree.get("providers")
        ids = sorted({*providers, *(tables if isinstance(tables, dict) else ())})
        given: list[tuple[str, KeyPath, object]] = []
        for name in sorted(environ):
            if not environ[name]:
                continue
            path = SHORT_NAMES.get(name) or self._variable(name, ids)
            if path:
                given.append((f"environment {name}", path, environ[name]))
        self.put(given)

    def put(self, given: Iterable[tuple[str, KeyPath, object]]) -> None:
        """Put one source's values over those of the sources before it.

        Args:
            given: Origin, path and value of each. Two for one path must be equal.
        """
        mine: dict[KeyPath, tuple[str, object]] = {}
        for origin, path, value in given:
            first, same = mine.setdefault(path, (origin, value))
            if same != value:
                self.problems.append(
                    f"{dotted(path)} (from {first} and {origin}): two different values: keep one of them"
                )
            self.read[origin] = None
            table: object = self.tree
            for depth, part in enumerate(path[:-1], start=1):
                # What is no table though it should be stays, to be reported.
                table = table.setdefault(part, {}) if isinstance(table, dict) else None
                self.origins.setdefault(path[:depth], origin)
            if isinstance(table, dict):
                table[path[-1]] = value
                self.origins[path] = origin

    def settings(self, environ: Mapping[str, str]) -> Settings:
        """Check everything.

        Args:
            environ: For the default of `registry.database_url`.

        Raises:
            SettingsError: With all problems there are.
        """
        checked: Settings | None = None
        try:
            checked = Settings.model_validate(self.tree, context={"environ": environ})
        except ValidationError as error:
            self.problems.extend(line for each in error.errors(include_url=False) for line in self._lines(each))
        # Outside of the handler, as above: pydantic's exception holds the values.
        if checked is None or self.problems:
            raise SettingsError(self.problems)
        return checked

    def _note(self, path: KeyPath, value: object, origin: str, *, depth: int) -> None:
        self.origins[path] = origin
        if depth and isinstance(value, dict):
            for key, inner in value.items():
                self._note((*path, key), inner, origin, depth=depth - 1)

    def _variable(self, name: str, providers: list[str]) -> KeyPath | None:
        """The path that a variable's name means; a name that means none is a problem if it was meant for us."""
        if not name.startswith(PREFIX) or name == f"{PREFIX}CONFIG" or _SERVICE_LINK.search(name):
            return None
        path = _VARIABLES.get(name)
        if path is not None:
            return path
        if name.startswith(f"{PREFIX}PROVIDERS_"):
            return self._provider_variable(name, providers)
        near = difflib.get_close_matches(name, [*_VARIABLES], n=1, cutoff=_MISSPELLED)
        if near or name.removeprefix(PREFIX).partition("_")[0].lower() in SECTIONS:
            near = near or difflib.get_close_matches(name, [*_VARIABLES], n=1)
            self.problems.append(
                f"environment {name}: no such setting{f'; did you mean {near[0]}?' if near else ': unset it'}"
            )
        return None

    def _provider_variable(self, name: str, providers: list[str]) -> KeyPath | None:
        rest = name.removeprefix(f"{PREFIX}PROVIDERS_")
        for key in ProviderSettings.model_fields:
            middle = rest.removesuffix(f"_{key.upper()}")
            if middle in {rest, ""}:
                continue
            meant = [each for each in providers if _shouted(each) == middle] or [middle.lower()]
            if is_table(ProviderSettings.model_fields[key]):
                self.problems.append(f"environment {name}: {in_file_only(('providers', meant[0], key))}")
                return None
            if len(meant) > 1:
                self.problems.append(
                    f"environment {name}: may mean provider {' or '.join(meant)}: set it in the file, or rename one"
                )
                return None
            return ("providers", meant[0], key)
        keys = ", ".join(key.upper() for key, field in ProviderSettings.model_fields.items() if not is_table(field))
        self.problems.append(
            f"environment {name}: no such setting: write {PREFIX}PROVIDERS_<ID>_<KEY>, KEY one of {keys}"
        )
        return None

    def _lines(self, error: ErrorDetails) -> list[str]:
        """What pydantic found, as a line; or as one for each wrong line of those that say who may call."""
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, LinesError):
            section = str(error["loc"][0])
            return [self._said((section, setting), message) for setting, message in cause.problems]
        return [self._line(error)]

    def _line(self, error: ErrorDetails) -> str:
        """One problem that pydantic found, as a line."""
        location = tuple(str(part) for part in error["loc"])
        path = location[: 3 if location[0] == "providers" else 2]
        if error["type"] == "extra_forbidden":
            return self._said(path, _unknown(path))
        if error["type"] == "value_error":
            cause = error["ctx"]["error"]
            asking = (*path[:-1], cause.because) if isinstance(cause, DependencyError) else path
            return self._said(path, str(cause), origin=self.origins.get(asking))
        if location[-1] == "[key]":
            return self._said(
                path[:2], "no provider id: use lower-case letters, digits, -, _ and ., first a letter or digit"
            )
        if error["type"] == "missing":
            return self._said(path, f"is missing: {_ways(path)}", origin=self.origins.get(path[:-1]))
        known = field_at(path)
        if known is None:
            return self._said(path, f"must be a table: write [{dotted(path)}] and the keys under it")
        shown = "" if is_secret(known) else f", not {_shown(error['input'])}"
        return self._said(path, f"must be {expectation(known)}{shown}")

    def _said(self, path: KeyPath, message: str, *, origin: str | None = None) -> str:
        origin = origin or self.origins.get(path)
        return f"{dotted(path)}{f' (from {origin})' if origin else ''}: {message}"


def dotted(path: KeyPath) -> str:
    """A path as people write it: `server.listen`."""
    return ".".join(path)


def variable(path: KeyPath) -> str:
    """The environment variable of a key: `DELTAWIRE_SERVER_LISTEN`."""
    return PREFIX + "_".join(_shouted(part) for part in path)


def in_file_only(path: KeyPath) -> str:
    """How to set a table's values, for whoever tried another way."""
    return f"only the settings file sets these: write [{dotted(path)}] there"


def _shouted(part: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", part.upper())


def _unknown(path: KeyPath) -> str:
    """That a key or section does not exist, and which may be meant."""
    if len(path) == 1:
        known, what = [*SECTIONS], "section"
    else:
        known, what = [*SECTIONS[path[0]].model_fields], "key"
    # Low, so that `url` finds `base_url`.
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {dotted((*path[:-1], near[0]))}?" if near else f"there are {', '.join(known)}"
    return f"no such {what}; {hint}"


def _ways(path: KeyPath) -> str:
    """How to set a key that must be set."""
    short = [f"environment {name}" for name, meant in SHORT_NAMES.items() if meant == path]
    flags = ["--vllm-url"] if path == SHORT_NAMES["VLLM_URL"] else []
    ways = [
        *flags,
        *short,
        f"environment {variable(path)}",
        f"{path[-1]} under [{dotted(path[:-1])}] in the settings file",
    ]
    return f"set it by {', '.join(ways[:-1])}, or {ways[-1]}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


_VARIABLES: Mapping[str, KeyPath] = {
    variable((section, key)): (section, key)
    for section, model in SECTIONS.items()
    if section != "providers"
    for key in model.model_fields
}
