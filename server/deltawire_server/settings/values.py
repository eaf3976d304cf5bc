"""Validators of single values: addresses, URLs, files and tokens.

Every function takes a value from a source and returns the value that the settings store. It raises `ValueError` with a message
that says what to write instead; pydantic adds the key. No message contains a secret. These functions open files, and have no
other side effects.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_plus, urlsplit

from pydantic import SecretStr
from pydantic_core import PydanticCustomError
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from deltawire_server.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationInfo
    from sqlalchemy import URL

MASK = "***"
"""Replaces each secret in printed settings."""

OFF = "off"
"""The value of an address for no listener."""

_PORT_FORMS = "write host:port or [IPv6 address]:port"
_ADDRESS_FORMS = f"{_PORT_FORMS}, or unix:/path"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
_IMAGE_HOST = re.compile(r"(\*\.)?(\*|\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_.])?)(?::([0-9]{1,5}))?")
_IMAGE_HOST_FORMS = "write images.example.com, *.example.com for all below it, or * for any, each optionally with :port"
_SECRET_OPTION = re.compile(r"pass|secret|scram", re.IGNORECASE)
"""In the names of libpq's options: password, passfile, sslpassword, oauth_client_secret, scram_client_key and the like."""
_HIGHEST_PORT = 65535
_PORTS = {"http": 80, "https": 443}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token, as RFC 9110 has it
_OWN_HEADERS = frozenset(
    {
        *("accept", "accept-encoding", "authorization", "content-type", "user-agent"),
        *("traceparent", "tracestate", "x-request-id"),
        # Headers about the connection and the framing are set by the HTTP client.
        *("connection", "content-encoding", "content-length", "expect", "host", "keep-alive", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_METADATA_NAME = re.compile(r"[a-z0-9_.-]+")
# gRPC keeps only one of several X-Forwarded-Host headers, so a second one would not be noticed.
_OWN_METADATA = frozenset({"x-deltawire-key", "x-vllm-api-token", "x-forwarded-for", "x-forwarded-host"})
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


class DependencyError(ValueError):
    """A value is wrong because of another one.

    Attributes:
        because: The key, in the same section, that causes the error: the message names its source.
    """

    def __init__(self, message: str, *, because: str) -> None:
        super().__init__(message)
        self.because = because


def number(value: object) -> object:
    """Refuse booleans as numbers: Python would accept `true` as 1."""
    if isinstance(value, bool):
        # The caller replaces this message with one that has the field's range.
        raise PydanticCustomError("not_a_number", "must be a number")
    return value


def workers(value: object) -> object:
    """Replace `auto` by the number of cores that the process may use."""
    if lower(value) != "auto":
        return number(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def lower(value: object) -> object:
    """Convert text to lower case, so that `INFO` is accepted as `info`; return other values unchanged."""
    return value.strip().lower() if isinstance(value, str) else value


def listed(value: object) -> object:
    """Split a string at its commas: environment variables and flags separate values by commas."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def address(value: str) -> str:
    """Validate an address to listen on, in the form that gRPC accepts.

    Args:
        value: "host:port", "[::1]:port" or "unix:/path". Port 0 selects any free port.

    Raises:
        ValueError: It has none of these forms.
    """
    text = value.strip()
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").strip("/"):
            raise ValueError(f"{text!r} has no path: write unix:/path")
        return text
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= _HIGHEST_PORT):
        raise ValueError(f"{text!r} has no port from 0 to {_HIGHEST_PORT}: {_ADDRESS_FORMS}")
    if not host:
        raise ValueError(
            f"{text!r} has no host: write 127.0.0.1:{port} for this machine, [::]:{port} for all interfaces"
        )
    if host.startswith("[") and host.endswith("]") and _is_ipv6(host[1:-1]):
        return text
    if _is_ipv6(host):
        raise ValueError(f"{text!r} needs brackets: write [{host}]:{port}")
    if not _HOST.fullmatch(host):
        raise ValueError(f"{text!r} is not a valid address: {_ADDRESS_FORMS}")
    return text


def port_or_off(value: str) -> str:
    """Validate the address of a listener that may be off.

    Args:
        value: "host:port", "[::1]:port" or "off". Port 0 selects any free port.

    Raises:
        ValueError: It has none of these forms.
    """
    if value.strip() == OFF:
        return OFF
    if value.strip().startswith("unix:"):
        raise ValueError(f"{value.strip()!r} is a unix socket: write host:port, or off")
    try:
        return address(value)
    except ValueError as error:
        raise ValueError(f"{str(error).replace(_ADDRESS_FORMS, _PORT_FORMS)}; or off") from None


def is_local(listen: str) -> bool:
    """Whether an address is reachable only from this machine: a unix socket, `localhost` or a loopback address.

    Args:
        listen: An address that `address` returned.
    """
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped.is_loopback
    return ip.is_loopback


def readable_file(value: Path, what: str = "a PEM file") -> Path:
    """Expand `~` and check that the file is readable, so that startup fails instead of the first handshake.

    Args:
        value: The path.
        what: The kind of file, for errors.

    Raises:
        ValueError: It does not exist, is not a file, or cannot be read.
    """
    path = _expanded(value)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the path of {what}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of {what}")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): make it readable for the user of this process"
        ) from None
    return path


def writable_folder(value: Path) -> Path:
    """Expand `~` and check that the folder can be written to, so that startup fails instead of the first write.

    Args:
        value: The path.

    Raises:
        ValueError: It does not exist, is not a folder, or cannot be written to.
    """
    path = _expanded(value)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: create it, for the user of this process")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written to: make it writable for the user of this process")
    return path


def tls_verify(value: object) -> bool | Path:
    """Parse the certificate verification of a provider: a boolean in any spelling, or the path of a CA file.

    Raises:
        ValueError: It is neither a boolean nor the path of a readable file.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, Path):
        return readable_file(value)
    text = str(value).strip()
    if text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    if not isinstance(value, str) or not text:
        raise ValueError("must be true, false or the path of a CA file")
    return readable_file(Path(text))


def base_url(value: str) -> str:
    """Validate the URL of a provider and remove trailing slashes; it may have a path, with or without `/v1`.

    Raises:
        ValueError: It is not an http or https URL, or it has credentials, a query or a fragment.
    """
    text = value.strip()
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("must not contain white space or control characters")
    # Must come before any message that contains the value.
    if "@" in re.split(r"[/?#]", text.partition("://")[2] or text, maxsplit=1)[0]:
        raise ValueError(
            "must not contain credentials, because URLs are logged: remove them, and give the token as api_token "
            "of the same provider (for provider vllm: environment VLLM_API_TOKEN)"
        )
    if not re.match(r"(?i)https?://", text):
        hint = f"; did you mean http://{text}?" if text and "://" not in text else ""
        raise ValueError(f"must begin with http:// or https://{hint}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is not a valid URL ({error}): write for example http://127.0.0.1:8000/v1") from None
    if not host:
        raise ValueError("has no host: write for example http://127.0.0.1:8000/v1")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query (?) or a fragment (#), because paths are appended to it")
    return text.rstrip("/")


def replicas(value: tuple[str, ...]) -> tuple[str, ...]:
    """Check that the URLs of a provider, each returned by `base_url`, are those of different servers.

    Raises:
        ValueError: Two URLs are equivalent, even if they are written differently.
    """
    seen: dict[tuple[object, ...], str] = {}
    for url in value:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        server = (parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1").rstrip("/"))
        if server in seen:
            raise ValueError(f"contains the same server twice, as {seen[server]} and {url}: remove one of them")
        seen[server] = url
    return value


def image_host(value: str) -> str:
    """Validate a host that images may be fetched from, and normalize it: lower case, canonical IP addresses.

    Args:
        value: "images.example.com", "*.example.com", "*", "192.0.2.1" or "[2001:db8::1]", with or without ":port".

    Raises:
        ValueError: It has none of these forms.
    """
    text = value.strip().lower()
    if not text.isascii():
        raise ValueError(f"{text!r} must be written in Punycode, as in the DNS: xn--…")
    parts = _IMAGE_HOST.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is not a valid host: {_IMAGE_HOST_FORMS}")
    wild, host, port = parts[1] or "", parts[2].removesuffix("."), parts[3]
    if port is not None and not 1 <= int(port) <= _HIGHEST_PORT:
        raise ValueError(f"{text!r} has no port from 1 to {_HIGHEST_PORT}: {_IMAGE_HOST_FORMS}")
    if host.startswith("[") or host.rpartition(".")[2].isdecimal():
        try:
            ip = ip_address(host.strip("[]"))
        except ValueError:
            raise ValueError(f"{text!r} is not a valid IP address: {_IMAGE_HOST_FORMS}") from None
        host = f"[{ip}]" if isinstance(ip, IPv6Address) else str(ip)
    return f"{wild}{host}" if port is None else f"{wild}{host}:{int(port)}"


def caller_header(value: str) -> str:
    """Validate the name of a header that names the caller, and convert it to lower case, as HTTP/2 has it.

    Raises:
        ValueError: It is no name of a text header, or the header has another meaning.
    """
    name = value.strip().lower()
    if not _METADATA_NAME.fullmatch(name):
        raise ValueError(f"{value!r} is not the name of a header: write letters, digits, hyphens, underscores and dots")
    if name in _OWN_HEADERS | _OWN_METADATA or name.startswith(("grpc-", "deltawire-")) or name.endswith("-bin"):
        raise ValueError(f"{name} has another meaning: let the proxy send the caller in a header of its own")
    return name


def headers(value: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
    """Validate additional HTTP headers and strip white space from their values.

    Raises:
        ValueError: A name or a value is not valid in HTTP, two names differ only in case, the gateway sets a header itself,
            or a value is the mask of printed settings.
    """
    kept: dict[str, SecretStr] = {}
    for name, secret in value.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid header name: write letters, digits and hyphens")
        if name.lower() in _OWN_HEADERS:
            remedy = "give the token as api_token" if name.lower() == "authorization" else "remove it"
            raise ValueError(f"must not set {name}, which the gateway sets itself: {remedy}")
        if name.lower() in {other.lower() for other in kept}:
            raise ValueError(f"sets {name} twice, because header names are case-insensitive: keep one of them")
        text = secret.get_secret_value().strip()
        if text == MASK:
            raise ValueError(
                f'sets {name} to "{MASK}", which is only the mask of a value in printed settings: give the value itself'
            )
        if not text or not all(" " <= character <= "~" for character in text):
            raise ValueError(f"must set {name} to one line of printable ASCII, or omit it")
        kept[name] = SecretStr(text)
    return kept


def pattern(value: str) -> str:
    """Strip white space from a name, or a pattern of names.

    Raises:
        ValueError: It is empty.
    """
    text = value.strip()
    if not text:
        raise ValueError('contains an empty name: remove it, or write "*" for all')
    return text


def token(value: SecretStr | None) -> SecretStr | None:
    """Validate a bearer token and strip white space, such as the final newline of a file.

    Returns:
        `None` if it is empty.

    Raises:
        ValueError: It is not valid in an HTTP header, or is the mask of printed settings.
    """
    text = value.get_secret_value().strip() if value is not None else ""
    if not text:
        return None
    if text == MASK:
        raise ValueError(f'is "{MASK}", which is only the mask of a token in printed settings: give the token itself')
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("must be printable ASCII without spaces, because it is sent in an HTTP header")
    return SecretStr(text)


def database_url(value: str, info: ValidationInfo) -> str:
    """Validate the URL of the registry's database and add its asynchronous driver.

    Args:
        value: "sqlite:///path" or "sqlite+aiosqlite:///path": three slashes and a relative path, or four slashes and an
            absolute path; `~/` is the home directory. Without a path the database is in memory. Or
            "postgresql://user@host/name". If empty, the default file.
        info: Its context may contain "environ", the environment for the default.

    Raises:
        ValueError: It is not a URL, the database is not supported, or the default needs a home directory and there is none. The
            message contains no password.
    """
    text = value.strip()
    if not text:
        return (
            f"sqlite+aiosqlite:///{_state_home((info.context or {}).get('environ', os.environ))}/deltawire/registry.db"
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise ValueError(
            "is not a database URL: write sqlite:////absolute/path/registry.db or postgresql://user@host/name"
        )
    if scheme.lower() in {"postgresql", "postgres", "postgresql+psycopg"}:
        return Secret(f"postgresql+psycopg://{_postgres(rest)}")
    if scheme.lower() not in {"sqlite", "sqlite+aiosqlite"}:
        raise ValueError(
            f"{scheme!r} is not supported: write sqlite:////absolute/path/registry.db or postgresql://user@host/name"
        )
    if rest and not rest.startswith("/"):
        raise ValueError("has a host, which SQLite does not support: write sqlite:////absolute/path/registry.db")
    if rest.startswith("/~"):
        rest = f"/{_expanded(Path(rest[1:]))}"
    return f"sqlite+aiosqlite://{rest}"


def is_in_memory(url: str | URL) -> bool:
    """Whether a database is in the memory of its process, which no other process can access.

    Args:
        url: A URL that `database_url` returned.
    """
    parsed = make_url(url)
    return parsed.get_backend_name() == "sqlite" and (
        parsed.database in (None, "", ":memory:", "file::memory:") or parsed.query.get("mode") == "memory"
    )


def shown_database_url(url: str) -> str:
    """The URL of a database with its password and the secret options of its query masked.

    Args:
        url: Any text. If it is not a URL, the result is only the mask, because any part may belong to a password.
    """
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        return MASK
    secret = [name for name in parsed.query if _SECRET_OPTION.search(name)]
    if parsed.password is None and not secret:
        return url
    masked = parsed.update_query_dict(dict.fromkeys(secret, MASK)).render_as_string(hide_password=True)
    return masked.replace(quote_plus(MASK), MASK)


def _postgres(rest: str) -> str:
    """Validate the part of a PostgreSQL URL after the scheme."""
    before, _, query = rest.partition("?")
    if f":{MASK}@" in before or f"={MASK}" in query:
        raise ValueError(
            f'has "{MASK}" as a secret, which is only the mask of a secret in printed settings: give the secret itself'
        )
    if before.count("@") > 1 or "/" in before[: max(before.find("@"), 0)].partition(":")[0]:
        # Otherwise the text after the first @ or / would be parsed as the host or the database, and be printed.
        raise ValueError(
            "has an @ or / in its user name or password: write %40 for @ and %2F for /, or use $PGPASSWORD"
        )
    parsed: URL | None = None
    with contextlib.suppress(SQLAlchemyError, ValueError):  # their messages may contain a part of the password
        parsed = make_url(f"postgresql://{rest}")
    if parsed is None:
        raise ValueError(
            "is not a database URL: write postgresql://user@host:5432/name, with %40 for @, %3A for : and %2F for / in a "
            "password"
        )
    if not parsed.database:
        raise ValueError("has no database name: write postgresql://user@host/name")
    if importlib.util.find_spec("psycopg") is None:
        raise ValueError("needs the PostgreSQL client library: pip install 'deltawire[postgres]'")
    return rest


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ip_address(text), IPv6Address)
    except ValueError:
        return False


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} starts with a home directory that cannot be found: write the absolute path") from None


def _state_home(environ: Mapping[str, str]) -> Path:
    configured = Path(environ.get("XDG_STATE_HOME", ""))
    # The XDG specification requires relative paths to be ignored.
    if configured.is_absolute():
        return configured
    try:
        return Path(environ.get("HOME") or "~").expanduser() / ".local" / "state"
    except RuntimeError:
        raise ValueError(
            "has no default, because this user has no home directory: set it (--database-url), or set XDG_STATE_HOME"
        ) from None
