"""One value at a time: what an address, a URL, a file or a token must look like, and the form in which it is kept.

Every function takes what a source gave, returns what the settings keep, and raises `ValueError` with the remedy as its
message; pydantic adds which key it was. No message repeats a secret. Files are opened, nothing else is touched.
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
"""What stands for a secret wherever settings are printed."""

_ADDRESS_FORMS = "write host:port, [IPv6 address]:port or unix:/path"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
_IMAGE_HOST = re.compile(r"(\*\.)?(\*|\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_.])?)(?::([0-9]{1,5}))?")
_IMAGE_HOST_FORMS = "write images.example.com, *.example.com for all below it, or * for any, each with :port if need be"
_SECRET_OPTION = re.compile(r"pass|secret|scram", re.IGNORECASE)
"""In the names of libpq's options: password, passfile, sslpassword, oauth_client_secret, scram_client_key and the like."""
_HIGHEST_PORT = 65535
_PORTS = {"http": 80, "https": 443}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token, as RFC 9110 has it
_OWN_HEADERS = frozenset(
    {
        *("accept", "accept-encoding", "authorization", "content-type", "user-agent"),
        *("traceparent", "tracestate", "x-request-id"),
        # What says how a message travels is for whoever sends it.
        *("connection", "content-encoding", "content-length", "expect", "host", "keep-alive", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


class DependencyError(ValueError):
    """A value is wrong because of another one.

    Attributes:
        because: The key, in the same section, that asks for it: its source is the one to name.
    """

    def __init__(self, message: str, *, because: str) -> None:
        super().__init__(message)
        self.because = because


def number(value: object) -> object:
    """Refuse booleans where a number belongs: Python takes `true` for 1, an operator does not mean that."""
    if isinstance(value, bool):
        # Which number is wanted, the field says; whoever prints the error takes it from there.
        raise PydanticCustomError("not_a_number", "must be a number")
    return value


def lower(value: object) -> object:
    """Make text lower case, so that `INFO` is `info`; leave the rest to the type."""
    return value.strip().lower() if isinstance(value, str) else value


def listed(value: object) -> object:
    """Make one string a list: environment variables and flags hold several values with commas between them."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def address(value: str) -> str:
    """Check an address to listen on; gRPC takes it as it is.

    Args:
        value: "host:port", "[::1]:port" or "unix:/path". Port 0 is any free one.

    Raises:
        ValueError: It is none of these.
    """
    text = value.strip()
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").strip("/"):
            raise ValueError(f"{text!r} names no socket: write unix:/path")
        return text
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= _HIGHEST_PORT):
        raise ValueError(f"{text!r} has no port from 0 to {_HIGHEST_PORT}: {_ADDRESS_FORMS}")
    if not host:
        raise ValueError(f"{text!r} has no host: write 127.0.0.1:{port} for this machine, [::]:{port} for all networks")
    if host.startswith("[") and host.endswith("]") and _is_ipv6(host[1:-1]):
        return text
    if _is_ipv6(host):
        raise ValueError(f"{text!r} needs brackets: write [{host}]:{port}")
    if not _HOST.fullmatch(host):
        raise ValueError(f"{text!r} is no address: {_ADDRESS_FORMS}")
    return text


def is_local(listen: str) -> bool:
    """Whether only this machine can reach an address: a unix socket, `localhost` or a loopback address.

    Args:
        listen: As `address` returned it.
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


def readable_file(value: Path) -> Path:
    """Expand `~` and see that the file is there and may be read, so that start-up names it and not the first handshake.

    Raises:
        ValueError: It is missing, no file, or may not be read.
    """
    return _readable(value, "a PEM file")


def lines_file(value: Path) -> Path:
    """Do as `readable_file` does, for the file that says who may call."""
    return _readable(value, "a text file with lines of access keys")


def _readable(value: Path, what: str) -> Path:
    path = _expanded(value)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the path of {what}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of {what}")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): let this process's user read it") from None
    return path


def tls_verify(value: object) -> bool | Path:
    """Read how a provider's certificate is checked: a boolean in any of its spellings, or a CA file.

    Raises:
        ValueError: A path that leads to no readable file, or neither boolean nor path.
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
    """Check a provider's address; trailing slashes go, a path stays, `/v1` may be there or not.

    Raises:
        ValueError: No http or https URL, or one with credentials, query or fragment.
    """
    text = value.strip()
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("must not hold white space or control characters")
    # Before anything that might print the value.
    if "@" in re.split(r"[/?#]", text.partition("://")[2] or text, maxsplit=1)[0]:
        raise ValueError(
            "must not carry credentials, since addresses are logged: take them out, and give the token as api_token "
            "of the same provider (for provider vllm: environment VLLM_API_TOKEN)"
        )
    if not re.match(r"(?i)https?://", text):
        hint = f"; did you mean http://{text}?" if text and "://" not in text else ""
        raise ValueError(f"must begin with http:// or https://{hint}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is no URL ({error}): write it like http://127.0.0.1:8000/v1") from None
    if not host:
        raise ValueError("names no host: write it like http://127.0.0.1:8000/v1")
    if parts.query or parts.fragment:
        raise ValueError("must end before any ? or #: paths are appended to it")
    return text.rstrip("/")


def replicas(value: tuple[str, ...]) -> tuple[str, ...]:
    """Check that a provider's addresses, each of which `base_url` returned, lead to different servers.

    Raises:
        ValueError: Two of them are one, however they are written.
    """
    seen: dict[tuple[object, ...], str] = {}
    for url in value:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        server = (parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1").rstrip("/"))
        if server in seen:
            raise ValueError(f"names one server twice, by {seen[server]} and {url}: take one of them out")
        seen[server] = url
    return value


def image_host(value: str) -> str:
    """Check a host that images may be fetched from, and bring it into lower case and the usual form of its address.

    Args:
        value: "images.example.com", "*.example.com", "*", "192.0.2.1" or "[2001:db8::1]", with ":port" or without.

    Raises:
        ValueError: It is none of these.
    """
    text = value.strip().lower()
    if not text.isascii():
        raise ValueError(f"{text!r} must be written as the DNS has it: xn--…")
    parts = _IMAGE_HOST.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is no host: {_IMAGE_HOST_FORMS}")
    wild, host, port = parts[1] or "", parts[2].removesuffix("."), parts[3]
    if port is not None and not 1 <= int(port) <= _HIGHEST_PORT:
        raise ValueError(f"{text!r} has no port from 1 to {_HIGHEST_PORT}: {_IMAGE_HOST_FORMS}")
    if host.startswith("[") or host.rpartition(".")[2].isdecimal():
        try:
            ip = ip_address(host.strip("[]"))
        except ValueError:
            raise ValueError(f"{text!r} is no address: {_IMAGE_HOST_FORMS}") from None
        host = f"[{ip}]" if isinstance(ip, IPv6Address) else str(ip)
    return f"{wild}{host}" if port is None else f"{wild}{host}:{int(port)}"


def headers(value: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
    """Check further HTTP headers; white space around values goes.

    Raises:
        ValueError: A name or a value cannot stand in an HTTP header, two names are one, a header is one that the gateway
            sets itself, or a value is the mask that stands for it in printed settings.
    """
    kept: dict[str, SecretStr] = {}
    for name, secret in value.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header's name: write letters, digits and hyphens")
        if name.lower() in _OWN_HEADERS:
            remedy = "give the token as api_token" if name.lower() == "authorization" else "take it out"
            raise ValueError(f"must not set {name}, which the gateway sets itself: {remedy}")
        if name.lower() in {other.lower() for other in kept}:
            raise ValueError(f"sets {name} twice, as upper and lower case are one: keep one of them")
        text = secret.get_secret_value().strip()
        if text == MASK:
            raise ValueError(
                f'gives {name} as "{MASK}", which only stands for a value in printed settings: give its own'
            )
        if not text or not all(" " <= character <= "~" for character in text):
            raise ValueError(f"must give {name} a value of printable ASCII on one line, or leave it out")
        kept[name] = SecretStr(text)
    return kept


def model_pattern(value: str) -> str:
    """Check the name of a model, or the pattern of names; white space around it goes.

    Raises:
        ValueError: Nothing is left.
    """
    text = value.strip()
    if not text:
        raise ValueError('holds an empty name: take it out, or write "*" for every model')
    return text


def field_pattern(value: str) -> str:
    """Check the name of a request field, or the pattern of names; white space around it goes.

    Raises:
        ValueError: Nothing is left.
    """
    text = value.strip()
    if not text:
        raise ValueError('holds an empty name: take it out, or write "*" for every field')
    return text


def token(value: SecretStr | None) -> SecretStr | None:
    """Check a bearer token; white space around it goes (a file's last newline), and nothing left is no token.

    Raises:
        ValueError: It cannot stand in an HTTP header, or is the mask that stands for a token in printed settings.
    """
    text = value.get_secret_value().strip() if value is not None else ""
    if not text:
        return None
    if text == MASK:
        raise ValueError(f'is "{MASK}", which only stands for a token in printed settings: give the token itself')
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("must be printable ASCII without spaces, to be sent in an HTTP header")
    return SecretStr(text)


def database_url(value: str, info: ValidationInfo) -> str:
    """Check the registry's database and name its asynchronous driver; empty is the default file.

    Args:
        value: "sqlite:///path" or "sqlite+aiosqlite:///path": three slashes and a relative path, or four and an
            absolute one; `~/` is the home directory. No path is a database in memory. Or "postgresql://user@host/name".
        info: Its context may hold "environ", the environment to take the default from.

    Raises:
        ValueError: Another database, no URL, or no home directory for the default. What it says holds no password.
    """
    text = value.strip()
    if not text:
        return (
            f"sqlite+aiosqlite:///{_state_home((info.context or {}).get('environ', os.environ))}/deltawire/registry.db"
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise ValueError(
            "is no database URL: write sqlite:////absolute/path/registry.db or postgresql://user@host/name"
        )
    if scheme.lower() in {"postgresql", "postgres", "postgresql+psycopg"}:
        return Secret(f"postgresql+psycopg://{_postgres(rest)}")
    if scheme.lower() not in {"sqlite", "sqlite+aiosqlite"}:
        raise ValueError(
            f"{scheme!r} is not supported: write sqlite:////absolute/path/registry.db or postgresql://user@host/name"
        )
    if rest and not rest.startswith("/"):
        raise ValueError("names a host, which SQLite has not: write sqlite:////absolute/path/registry.db")
    if rest.startswith("/~"):
        rest = f"/{_expanded(Path(rest[1:]))}"
    return f"sqlite+aiosqlite://{rest}"


def shown_database_url(url: str) -> str:
    """A database's URL as it may be printed: with the mask for its password and for secret options in its query.

    Args:
        url: Any text. If it is no URL, nothing of it is shown: any part may be of a password.
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
    """Check what follows the scheme of a PostgreSQL URL."""
    before, _, query = rest.partition("?")
    if f":{MASK}@" in before or f"={MASK}" in query:
        raise ValueError(f'has "{MASK}" as a secret, which only stands for one in printed settings: give its own')
    if before.count("@") > 1 or "/" in before[: max(before.find("@"), 0)].partition(":")[0]:
        # Else what follows the first @ or / would be taken for the host or the database, and be shown as such.
        raise ValueError(
            "has an @ or / in its user name or password: write %40 for @ and %2F for /, or use $PGPASSWORD"
        )
    parsed: URL | None = None
    with contextlib.suppress(SQLAlchemyError, ValueError):  # what they say may repeat a part of the password
        parsed = make_url(f"postgresql://{rest}")
    if parsed is None:
        raise ValueError(
            "is no database URL: write postgresql://user@host:5432/name, and %40, %3A and %2F in a password"
        )
    if not parsed.database:
        raise ValueError("names no database: write postgresql://user@host/name")
    if importlib.util.find_spec("psycopg") is None:
        raise ValueError("needs PostgreSQL's client library: pip install 'deltawire[postgres]'")
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
        raise ValueError(f"{path} starts in a home directory that is not known: write the whole path") from None


def _state_home(environ: Mapping[str, str]) -> Path:
    configured = Path(environ.get("XDG_STATE_HOME", ""))
    # A relative one is to be ignored, says the XDG specification.
    if configured.is_absolute():
        return configured
    try:
        return Path(environ.get("HOME") or "~").expanduser() / ".local" / "state"
    except RuntimeError:
        raise ValueError(
            "has no default, as this user has no home directory: set it (--database-url), or XDG_STATE_HOME"
        ) from None
