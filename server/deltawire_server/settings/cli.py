"""The command line of `deltawire-server`: flags, `--help` with the complete reference, and the printed settings."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from deltawire_server.settings.fields import KeyPath, expectation, field_at, is_secret, is_table
from deltawire_server.settings.model import SECTIONS, Section, Settings
from deltawire_server.settings.sources import SHORT_NAMES, SettingsError, Sources, dotted, in_file_only, variable
from deltawire_server.settings.values import MASK, shown_database_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

FLAGS: Mapping[str, KeyPath] = MappingProxyType(
    {
        "--listen": ("server", "listen"),
        "--allow-plaintext": ("server", "allow_plaintext"),
        "--tls-cert-file": ("server", "tls_cert_file"),
        "--tls-key-file": ("server", "tls_key_file"),
        "--tls-client-ca-file": ("server", "tls_client_ca_file"),
        "--access-keys-file": ("access", "keys_file"),
        "--workers": ("server", "workers"),
        "--max-streams": ("server", "max_streams"),
        "--vllm-url": ("providers", "vllm", "base_url"),
        "--vllm-max-tokens": ("providers", "vllm", "max_tokens"),
        "--database-url": ("registry", "database_url"),
        "--health-listen": ("server", "health_listen"),
        "--metrics-listen": ("metrics", "listen"),
        "--log-level": ("log", "level"),
        "--log-format": ("log", "format"),
    }
)
"""The keys that have their own flag; `--set` sets the others."""

_WIDTH = 100
_DESCRIPTION = """\
A gRPC gateway with a typed streaming API for chat models served by vLLM.

Settings come from one TOML file, from environment variables, which override the file, and from flags, which override
both. At least one provider is required: --vllm-url or VLLM_URL is the shortest way to set it. On SIGHUP the settings are
read again; changes in [providers], [access] and [limits] take effect, other changes require a restart.
"""
_EPILOG = """\
environment:
  DELTAWIRE_CONFIG               the settings file, unless --config names one
  DELTAWIRE_<SECTION>_<KEY>      any key below; DELTAWIRE_PROVIDERS_<ID>_<KEY> for the key of a provider, with its id in
                                 capitals and _ for - and .
  VLLM_URL, VLLM_MAX_TOKENS,     provider vllm's base_url, max_tokens, api_token and tls_verify
  VLLM_API_TOKEN, VLLM_TLS_VERIFY
  An empty variable counts as not set. The items of a list are separated by commas.

examples:
  VLLM_URL=http://127.0.0.1:8000/v1 deltawire-server
  deltawire-server --vllm-url https://vllm.example/v1 --listen 0.0.0.0:50051 \\
      --tls-cert-file tls.crt --tls-key-file tls.key
  deltawire-server --config deltawire.toml --set providers.vllm.silence_timeout=60 --check-config

settings file, with every key and its default:

"""


@dataclass(frozen=True, slots=True)
class Invocation:
    """A parsed command line.

    Attributes:
        settings: The settings to serve with.
        check_only: Print `effective(settings, origins)` and exit 0 instead of serving.
        sources: All sources that were read, lowest precedence first: "file …", "environment …", "flag …".
        origins: The source of each key that does not have its default, by its dotted name.
    """

    settings: Settings
    check_only: bool
    sources: tuple[str, ...]
    origins: Mapping[str, str]


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Invocation:
    """Read flags, environment and file. The caller then prints or serves the result.

    Args:
        argv: The arguments, without the program's name.
        environ: The environment, such as `os.environ`.

    Raises:
        SettingsError: A source is invalid; the message has one line per problem. Print it and exit 2.
        SystemExit: 2 for an unknown flag or a missing value, 0 after --help and --version.
    """
    arguments = vars(_parser().parse_args(argv))
    assignments: list[tuple[KeyPath, str]] = arguments["set"] or []
    sources = Sources()
    path = arguments["config"] or environ.get("DELTAWIRE_CONFIG")
    if path:
        sources.file(Path(path))
    sources.environment(environ, providers=(key[1] for key, _ in assignments if key[0] == "providers"))
    given: list[tuple[str, KeyPath, object]] = [
        (f"flag {flag}", key, arguments[flag]) for flag, key in FLAGS.items() if arguments[flag] is not None
    ]
    for key, value in assignments:
        known = field_at(key)
        if known is not None and is_table(known):
            sources.problems.append(f"{dotted(key)} (from flag --set): {in_file_only(key)}")
        elif known is not None and is_secret(known):
            sources.problems.append(
                f"{dotted(key)} (from flag --set): a secret on the command line is visible in ps: set it by environment "
                f"{variable(key)}, or in the settings file"
            )
        else:
            given.append((f"flag --set {dotted(key)}", key, value))
    sources.put(given)
    return Invocation(
        settings=sources.settings(environ),
        check_only=arguments["check_config"],
        sources=tuple(sources.read),
        origins=MappingProxyType({dotted(key): origin for key, origin in sources.origins.items() if field_at(key)}),
    )


def effective(settings: Settings, origins: Mapping[str, str] | None = None) -> str:
    """All settings as TOML, with secrets as `"***"`. Print it.

    Args:
        settings: The settings.
        origins: From `Invocation`. If given, each line ends with a comment that names the source of its value.
    """
    lines: list[str] = []
    for path, section in _tables(settings):
        lines.append(f"[{_header(path)}]")
        for key in type(section).model_fields:
            value = getattr(section, key)
            if value is None:
                lines.append(f"# {key} is not set")
                continue
            origin = f"  # {_one_line(origins.get(dotted((*path, key)), 'default'))}" if origins is not None else ""
            shown = shown_database_url(value) if key == "database_url" else value
            lines.append(f"{key} = {_toml(shown)}{origin}")
        lines += [f"# {_one_line(remark)}" for remark in section.remarks()]
        lines.append("")
    return "\n".join(lines)


def example() -> str:
    """A settings file with every key, its description and its default. It is valid TOML, and part of `--help`.

    Keys whose default is unset or empty are commented out, with a sample value.
    """
    lines: list[str] = []
    for name, model in SECTIONS.items():
        path = (name, "vllm") if name == "providers" else (name,)
        lines += [*_comment(model.__doc__ or ""), f"[{_header(path)}]"]
        for key, field in model.model_fields.items():
            lines += ["", *_comment(field.description or ""), *_comment(_ways(field, (*path, key)))]
            default = field.get_default(call_default_factory=True)
            if field.is_required():
                lines.append(f"{key} = {_toml(_sample(field))}")
            elif default in (None, "", (), {}):
                lines.append(f"# {key} = {_toml(_sample(field))}")
            else:
                lines.append(f"{key} = {_toml(default)}")
        lines.append("")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deltawire-server",
        description=_DESCRIPTION,
        epilog=_EPILOG + example(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="The settings file (TOML). Environment: DELTAWIRE_CONFIG.")
    for flag, path in FLAGS.items():
        field = field_at(path)
        assert field is not None, flag  # noqa: S101 -- a flag for a key that does not exist is a defect of this table.
        # The example contains the sentences after the first one.
        text = re.split(r"(?<=\.) ", field.description or "", maxsplit=1)[0].replace("%", "%%")
        if flag == "--allow-plaintext":
            parser.add_argument(flag, dest=flag, action="store_const", const=True, help=text)
        elif flag == "--listen":
            parser.add_argument(flag, dest=flag, action="append", metavar="ADDRESS", help=f"{text} Repeatable.")
        elif flag == "--vllm-url":
            parser.add_argument(
                flag, dest=flag, action="extend", type=_parts, metavar="URL", help=f"{text} Repeatable, for replicas."
            )
        else:
            parser.add_argument(flag, dest=flag, metavar=path[-1].rpartition("_")[2].upper(), help=text)
    parser.add_argument(
        "--set",
        action="append",
        type=_assignment,
        metavar="SECTION.KEY=VALUE",
        help="Set any other key, with a value as for the environment; providers.ID.KEY for a provider. Repeatable.",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="Validate and print the effective settings, then exit."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('deltawire')}")
    return parser


def _assignment(text: str) -> tuple[KeyPath, str]:
    """Parse `SECTION.KEY=VALUE`. Messages omit the value, which may be a secret."""
    name, separator, value = text.partition("=")
    section, _, key = name.strip().partition(".")
    path: KeyPath = (section, key)
    if section == "providers":
        # An id may contain dots.
        identifier, _, key = key.rpartition(".")
        path = (section, identifier, key)
    if not separator or not all(path):
        raise argparse.ArgumentTypeError("write SECTION.KEY=VALUE, or providers.ID.KEY=VALUE")
    return path, value


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _tables(settings: Settings) -> Iterator[tuple[KeyPath, Section]]:
    for name in SECTIONS:
        if name == "providers":
            yield from (((name, identifier), provider) for identifier, provider in settings.providers.items())
        else:
            yield (name,), getattr(settings, name)


def _ways(field: FieldInfo, path: KeyPath) -> str:
    """The values that a key accepts and its other names, for the example."""
    if is_table(field):
        return f"({expectation(field)})"
    flags = [flag for flag, key in FLAGS.items() if key == path]
    names = [name for name, key in SHORT_NAMES.items() if key == path]
    return f"({expectation(field)}; {', '.join([*flags, *names, variable(path)])})"


def _comment(text: str) -> list[str]:
    prose = " ".join(text.split())
    return textwrap.wrap(
        prose, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _sample(field: FieldInfo) -> Any:  # noqa: ANN401 -- whatever the field takes.
    return (field.examples or [""])[0]


def _header(path: KeyPath) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else _toml(part) for part in path)


def _one_line(text: str) -> str:
    """Text for a comment: a file's name may contain characters that a comment must not."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _toml(value: object) -> str:
    """A value in TOML syntax; a secret as the mask."""
    if isinstance(value, SecretStr):
        return f'"{MASK}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_header((key,))} = {_toml(item)}' for key, item in value.items())}}}"
    # JSON strings are valid in TOML, except for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


__all__ = ["FLAGS", "Invocation", "SettingsError", "effective", "example", "parse"]
