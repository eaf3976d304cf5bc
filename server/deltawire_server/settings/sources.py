"""Merges the three sources: the file, the environment, which overrides it, and flags, which override both.

It keeps the origin of each value until validation, so that every error names the source to correct. All problems are reported
together.
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
"""Short names of variables for provider `vllm`, in addition to the long names."""

# Kubernetes sets these in every container if there is a service named deltawire or deltawire-server.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")
# Low enough to detect misspellings, high enough not to match the client's variables (DELTAWIRE_TARGET).
_MISSPELLED = 0.85
_SHOWN_CHARACTERS = 80


class SettingsError(Exception):
    """The settings are invalid. Print it and exit 2.

    Attributes:
        problems: One line per problem: key, source, what is wrong and what to do. They contain no secrets.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True)
class Sources:
    """The values of the sources read so far. Add sources from the lowest precedence to the highest.

    Attributes:
        tree: Unvalidated values, by section and key.
        origins: The origin of each value, by its path; a table has the origin of its first key.
        read: All origins, in the order in which they were read.
        problems: Problems found before the values are validated.
    """

    tree: dict[str, Any] = field(default_factory=dict, repr=False)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    read: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def file(self, path: Path) -> None:
        """Read a TOML file. If there is one, it must be the first source.

        Raises:
            SettingsError: It cannot be read, or is not TOML. Then nothing else is validated.
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
        # Raised outside of the handlers, because those exceptions may contain the whole file, including secrets, and would be
        # chained.
        if problem:
            raise SettingsError([f"{origin}: {problem}"])
        self.read[origin] = None
        for section, table in self.tree.items():
            self._note((section,), table, origin, depth=2 if section == "providers" else 1)

    def environment(self, environ: Mapping[str, str], providers: Iterable[str] = ()) -> None:
        """Read the environment, the second source. An empty variable counts as not set.

        Args:
            environ: The environment, such as `os.environ`.
            providers: Provider ids, in addition to those of the file, that variables may refer to: `a-b` for `..._A_B_...`.
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
        """Add the values of one source. They override those of earlier sources.

        Args:
            given: Origin, path and value of each. Two values for the same path must be equal.
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
                # A value in the place of a table is kept, and validation reports it.
                table = table.setdefault(part, {}) if isinstance(table, dict) else None
                self.origins.setdefault(path[:depth], origin)
            if isinstance(table, dict):
                table[path[-1]] = value
                self.origins[path] = origin

    def settings(self, environ: Mapping[str, str]) -> Settings:
        """Validate all values.

        Args:
            environ: The environment, for the default of `registry.database_url`.

        Raises:
            SettingsError: Values are invalid. It contains all problems.
        """
        checked: Settings | None = None
        try:
            checked = Settings.model_validate(self.tree, context={"environ": environ})
        except ValidationError as error:
            self.problems.extend(line for each in error.errors(include_url=False) for line in self._lines(each))
        # Raised outside of the handler, as above: pydantic's exception contains the values.
        if checked is None or self.problems:
            raise SettingsError(self.problems)
        return checked

    def _note(self, path: KeyPath, value: object, origin: str, *, depth: int) -> None:
        self.origins[path] = origin
        if depth and isinstance(value, dict):
            for key, inner in value.items():
                self._note((*path, key), inner, origin, depth=depth - 1)

    def _variable(self, name: str, providers: list[str]) -> KeyPath | None:
        """The path that a variable's name refers to. An unknown name is a problem if it resembles a known one."""
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
            ids = [each for each in providers if _capitals(each) == middle] or [middle.lower()]
            if is_table(ProviderSettings.model_fields[key]):
                self.problems.append(f"environment {name}: {in_file_only(('providers', ids[0], key))}")
                return None
            if len(ids) > 1:
                self.problems.append(
                    f"environment {name}: may refer to provider {' or '.join(ids)}: set it in the file, or rename one of them"
                )
                return None
            return ("providers", ids[0], key)
        keys = ", ".join(key.upper() for key, field in ProviderSettings.model_fields.items() if not is_table(field))
        self.problems.append(
            f"environment {name}: no such setting: write {PREFIX}PROVIDERS_<ID>_<KEY>, KEY one of {keys}"
        )
        return None

    def _lines(self, error: ErrorDetails) -> list[str]:
        """The problem lines for an error from pydantic: one, or one per invalid access line."""
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, LinesError):
            section = str(error["loc"][0])
            return [self._problem((section, setting), message) for setting, message in cause.problems]
        return [self._line(error)]

    def _line(self, error: ErrorDetails) -> str:
        """The problem line for an error from pydantic."""
        location = tuple(str(part) for part in error["loc"])
        path = location[: 3 if location[0] == "providers" else 2]
        if error["type"] == "extra_forbidden":
            return self._problem(path, _unknown(path))
        if error["type"] == "value_error":
            cause = error["ctx"]["error"]
            source = (*path[:-1], cause.because) if isinstance(cause, DependencyError) else path
            return self._problem(path, str(cause), origin=self.origins.get(source))
        if location[-1] == "[key]":
            return self._problem(
                path[:2],
                "not a valid provider id: use lower-case letters, digits, -, _ and ., starting with a letter or digit",
            )
        if error["type"] == "missing":
            return self._problem(path, f"is missing: {_ways(path)}", origin=self.origins.get(path[:-1]))
        known = field_at(path)
        if known is None:
            return self._problem(path, f"must be a table: write [{dotted(path)}] and the keys under it")
        shown = "" if is_secret(known) else f", not {_shown(error['input'])}"
        return self._problem(path, f"must be {expectation(known)}{shown}")

    def _problem(self, path: KeyPath, message: str, *, origin: str | None = None) -> str:
        origin = origin or self.origins.get(path)
        return f"{dotted(path)}{f' (from {origin})' if origin else ''}: {message}"


def dotted(path: KeyPath) -> str:
    """A path in dotted form: `server.listen`."""
    return ".".join(path)


def variable(path: KeyPath) -> str:
    """The environment variable of a key: `DELTAWIRE_SERVER_LISTEN`."""
    return PREFIX + "_".join(_capitals(part) for part in path)


def in_file_only(path: KeyPath) -> str:
    """The message for a table that is set in the environment or by a flag."""
    return f"only the settings file can set these: write [{dotted(path)}] there"


def _capitals(part: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", part.upper())


def _unknown(path: KeyPath) -> str:
    """The message for a key or section that does not exist, with a suggestion."""
    if len(path) == 1:
        known, what = [*SECTIONS], "section"
    else:
        known, what = [*SECTIONS[path[0]].model_fields], "key"
    # Low enough that `url` suggests `base_url`.
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {dotted((*path[:-1], near[0]))}?" if near else f"valid ones are {', '.join(known)}"
    return f"no such {what}; {hint}"


def _ways(path: KeyPath) -> str:
    """The ways to set a required key."""
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
