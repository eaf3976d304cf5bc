"""Access control: principals, the permission that each RPC requires, and the authorization of calls. No I/O.

A principal is one access line, `NAME PERMISSIONS CREDENTIAL`, with its limits as further words:

    ci        call,read  sha256:9f86d0…                  authenticated by its key; the line has only the digest
    ops       all        Zm9vYmFyYmF6cXV4                 authenticated by its key; only the digest is kept in memory
    frontend  call       mtls:uri:spiffe://mesh/frontend  authenticated by a name in its client certificate
    alice     call       proxy:alice                      authenticated by a proxy that the gateway trusts
    team-a    call,read  sha256:ab30e1…  streams=20 models=team-a/*,shared/*

The key of a call is hashed and its digest looked up. No key is stored, and keys are never compared directly. Without any
principal, every caller may do everything.

A trusted proxy asserts the names of callers, see `Trust`. `rpc.caller` reads what it asserts from the headers of a call.
"""

from __future__ import annotations

import enum
import fnmatch
import functools
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.limits import LIMITS, MAX_LIMIT
from deltawire_server.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MIN_KEY = 16
"""Characters of a key, at least. The digest is fast to compute, so a key must be too long to guess."""

FORM = "NAME PERMISSIONS CREDENTIAL, like `ci call,read sha256:…`"
"""The form of a line, to follow "write"."""

REVOKED = "the access of this caller was revoked or changed during the call: call again with a valid credential"
"""The message of ACCESS_CHANGED."""

KEY_HEADER = "x-deltawire-key"
"""The header of a key alone. With it in a call, `authorization` may be for a proxy."""

CERTIFICATE_HEADER = "x-forwarded-client-cert"
"""The header in which Envoy describes the certificate of its client."""

UNIX = "unix"
"""In `Trust.proxies`: every caller of a unix socket."""

HOW = f"send a key as `authorization: Bearer …` or, if a proxy uses that header, as `{KEY_HEADER}: …`"
"""The remedy of a missing or invalid key."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_MTLS = "mtls:uri:spiffe://mesh/ns/frontend, mtls:dns:frontend.mesh or mtls:cn:frontend"
# A list of values that was joined, as HTTP permits, has a comma.
_ASSERTED = re.compile(r"[!-+\--~]{1,256}")
_ASSERTED_FORM = "1 to 256 printable ASCII characters without spaces and commas"
_JWT_DOTS = 2
_WORDS = 3
_PRIORITY = re.compile(r"-?[0-9]{1,10}")
_MAX_PRIORITY = 2**31
_SALT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TERMS = (*LIMITS, "models", "priority", "cache_salt")


class Permission(enum.Enum):
    """What a principal may do; the values are the words of an access line.

    `CHANGE` allows a principal to register models, and to change and unregister models that it registered. `OPERATE` extends
    this to models that others registered, or that have no known owner. `OPERATE` together with `CALL` allows a principal to list,
    look up and cancel the completions of every caller, but not to read their content.
    """

    CALL = "call"
    READ = "read"
    CHANGE = "change"
    OPERATE = "operate"


ALL = frozenset(Permission)

NEEDS: Mapping[str, Permission] = MappingProxyType(
    {
        "/deltawire.v1.ChatCompletion/CreateChatCompletion": Permission.CALL,
        "/deltawire.v1.ChatCompletion/StreamChatCompletion": Permission.CALL,
        "/deltawire.v1.ChatCompletion/CancelChatCompletion": Permission.CALL,
        "/deltawire.v1.ChatCompletion/GetChatCompletion": Permission.CALL,
        "/deltawire.v1.ChatCompletion/ListChatCompletions": Permission.CALL,
        "/deltawire.v1.ChatCompletion/CountTokens": Permission.CALL,
        "/deltawire.v1.ModelRegistry/GetModel": Permission.READ,
        "/deltawire.v1.ModelRegistry/ListModels": Permission.READ,
        "/deltawire.v1.ModelRegistry/WatchModels": Permission.READ,
        "/deltawire.v1.ModelRegistry/ListProviders": Permission.READ,
        "/deltawire.v1.ModelRegistry/CheckProviderHealth": Permission.READ,
        "/deltawire.v1.ModelRegistry/RegisterModel": Permission.CHANGE,
        "/deltawire.v1.ModelRegistry/UpdateModel": Permission.CHANGE,
        "/deltawire.v1.ModelRegistry/UnregisterModel": Permission.CHANGE,
        "/deltawire.v1.ModelRegistry/RefreshModels": Permission.CHANGE,
    }
)
"""The permission that each RPC requires, by the gRPC method path. A test checks that it contains every RPC."""


@dataclass(frozen=True, slots=True)
class Key:
    """The digest of a key.

    Attributes:
        digest: SHA-256 of the key's UTF-8 bytes, 32 bytes.
        clear: Whether the access line contained the key itself; then the line is as secret as the key.
    """

    digest: bytes = field(repr=False)
    clear: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, key: str, *, clear: bool = False) -> Self:
        """Hash a key."""
        return cls(hashlib.sha256(key.encode()).digest(), clear)


class NameKind(enum.Enum):
    """The kinds of names in a certificate; the values are the words of an access line. Names of different kinds never match.

    E-mail and IP addresses are not supported, because certificate authorities verify them by other rules than service names.
    """

    URI = "uri"
    """A subject alternative name that is a URI, such as a SPIFFE id."""
    DNS = "dns"
    """A subject alternative name that is a DNS name."""
    COMMON_NAME = "cn"
    """The subject's common name."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A name in a client certificate that the listener, or a trusted proxy, has verified.

    Attributes:
        kind: The field of the certificate.
        name: The name, compared byte by byte.
    """

    kind: NameKind
    name: str

    def __str__(self) -> str:
        """The form in an access line."""
        return f"mtls:{self.kind.value}:{self.name}"

    @property
    def owner(self) -> str:
        """The owner of data from a caller with this certificate, if there are no principals."""
        return _owner("certificate", f"{self.kind.value}:{self.name}")


@dataclass(frozen=True, slots=True)
class AssertedName:
    """A name that a trusted proxy gives its caller in a header of the operator's choice. It never matches a certificate's name.

    Attributes:
        name: 1 to 256 printable ASCII characters without spaces and commas, compared byte by byte.

    Raises:
        ValueError: It is not. The message says so and does not repeat it.
    """

    name: str

    def __post_init__(self) -> None:
        if not _ASSERTED.fullmatch(self.name):
            raise ValueError(f"the name of a caller must be {_ASSERTED_FORM}")

    def __str__(self) -> str:
        """The form in an access line."""
        return f"proxy:{self.name}"

    @property
    def owner(self) -> str:
        """The owner of data from a caller with this name, if there are no principals."""
        return _owner("proxy", self.name)


@dataclass(frozen=True, slots=True)
class Trust:
    """The proxies that may assert who their callers are; by default none.

    An assertion is written as the proxy, a space and the header, so that it is known later whether it still counts.

    Attributes:
        proxies: From `parse_proxy`.
        header: The header with the caller: `CERTIFICATE_HEADER`, or another one, whose value is an `AssertedName`. In lower case.
    """

    proxies: frozenset[str] = frozenset()
    header: str = CERTIFICATE_HEADER

    def assertion(self, names: Iterable[Identity], *, unix: bool) -> str:
        """The assertion that a connection may make; empty if it is not that of a trusted proxy.

        Args:
            names: The names in the verified certificate.
            unix: Whether it is a connection to a unix socket.
        """
        shown = [UNIX] if unix else map(str, names)
        return next((f"{proxy} {self.header}" for proxy in shown if proxy in self.proxies), "")

    def accepts(self, assertion: str) -> bool:
        """Whether an assertion counts. The absence of one, an empty text, does."""
        proxy, _, header = assertion.rpartition(" ")
        return not assertion or (proxy in self.proxies and header == self.header)


@dataclass(frozen=True, slots=True)
class Terms:
    """The words of an access line after the credential.

    Attributes:
        limits: The caller's own limits, which replace the defaults; the names are in `limits.LIMITS`.
        models: Patterns of the ids of the models that exist for the caller; empty for all.
        priority: Sent to the engine instead of the caller's; `None` for the caller's.
        cache_salt: Separates the caller's prefix cache from those of others; empty for none.
    """

    limits: tuple[tuple[str, int], ...] = ()
    models: tuple[str, ...] = ()
    priority: int | None = None
    cache_salt: str = ""

    def permits(self, model_id: str) -> bool:
        """Whether a model exists for the caller."""
        return not self.models or _compiled(self.models).fullmatch(model_id) is not None

    @property
    def scope(self) -> str:
        """Identifies the patterns of the models, as hexadecimal digits; empty without any."""
        return hashlib.blake2b(",".join(self.models).encode(), digest_size=4).hexdigest() if self.models else ""

    def words(self, *, masked: bool = False) -> list[str]:
        """The words, for `parse_line`; with a mask instead of the salt if requested."""
        words = [f"{name}={value}" for name, value in self.limits]
        if self.models:
            words.append(f"models={','.join(self.models)}")
        if self.priority is not None:
            words.append(f"priority={self.priority}")
        if self.cache_salt:
            words.append(f"cache_salt={'***' if masked else self.cache_salt}")
        return words


@functools.lru_cache(maxsize=4096)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all patterns: lists ask for tens of thousands of ids. Those of fnmatch do not backtrack."""
    return re.compile("|".join(map(fnmatch.translate, patterns)))


NO_TERMS = Terms()
"""The terms of a caller without any of its own."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller with permissions.

    Attributes:
        name: For logs and error messages; unique within an `Access`.
        permissions: At least one.
        credential: What authenticates it; unique within an `Access`.
        terms: Its limits, and the models that exist for it.
    """

    name: str
    permissions: frozenset[Permission]
    credential: Key | Identity | AssertedName
    terms: Terms = NO_TERMS

    @property
    def owner(self) -> str:
        """The owner of this principal's data. It is equal only for the same name with the same credential.

        A later principal with the same name and another credential is another owner.
        """
        return _owner("principal", self.name, self._credential())

    def line(self, *, masked: bool = False) -> str:
        """The access line of this principal, for `parse_line`; with the digest instead of a key, or with its mask."""
        words = [permission.value for permission in Permission if permission in self.permissions]
        permissions = "all" if self.permissions == ALL else ",".join(words)
        terms = self.terms.words(masked=masked)
        return " ".join((self.name, permissions, self._credential(masked=masked), *terms))

    def _credential(self, *, masked: bool = False) -> str:
        if isinstance(self.credential, Key):
            return f"sha256:{'***' if masked else self.credential.digest.hex()}"
        return str(self.credential)


class Access:
    """Authorizes calls. There is one per process; call `replace` when the principals change.

    Args:
        principals: With unique names and credentials. If empty, every caller may do everything.
        trust: The proxies that may assert who the caller is.

    Attributes:
        trust: The current one.
    """

    def __init__(self, principals: Iterable[Principal] = (), trust: Trust | None = None) -> None:
        self._principals: Mapping[Key | Identity | AssertedName, Principal] = {}
        self._owners: Mapping[str, Principal] = {}
        self.replace(principals, trust)

    def replace(self, principals: Iterable[Principal], trust: Trust | None = None) -> None:
        """Authorize calls by these principals and proxies from now on. For calls that were admitted before, see `admits`.

        Args:
            principals: As for the constructor.
            trust: As for the constructor.
        """
        self.trust = trust or Trust()
        # A single assignment, so that a call is authorized by the old set or by the new set, never by a mixture.
        self._principals = {principal.credential: principal for principal in principals}
        self._owners = {principal.owner: principal for principal in self._principals.values()}

    @property
    def open(self) -> bool:
        """Whether every caller may do everything."""
        return not self._principals

    @property
    def summary(self) -> str:
        """A summary of the principals for the log."""
        proxies = f", trusted proxies: {len(self.trust.proxies)}" if self.trust.proxies else ""
        if self.open:
            return f"every caller may do everything{proxies}"
        kinds = Counter(map(type, self._principals))
        asserted = f", asserted names: {kinds[AssertedName]}" if kinds[AssertedName] else ""
        return f"keys: {kinds[Key]}, mTLS identities: {kinds[Identity]}{asserted}{proxies}"

    def admits(self, owner: str, method: str, assertion: str = "") -> bool:
        """Whether a call that was admitted earlier would be admitted now, as the same caller.

        Args:
            owner: The `owner` of the principal that was admitted; empty, or that of a name, if there were no principals.
            method: As for `authorize`.
            assertion: The assertion of the caller's name, from `Trust`; empty if the caller authenticated itself.
        """
        if not self.trust.accepts(assertion):
            return False
        if self.open:
            return True
        principal = self._owners.get(owner)
        return principal is not None and NEEDS[method] in principal.permissions

    def terms(self, owner: str) -> Terms:
        """The current terms of a caller.

        Args:
            owner: The `owner` of its principal; any other text for a caller without one.
        """
        principal = self._owners.get(owner)
        return NO_TERMS if principal is None else principal.terms

    def operates(self, owner: str) -> bool:
        """Whether the principal with this owner has the permission `OPERATE`; false for every caller without principals.

        Without principals no caller is an operator, because callers are then distinguished only by their certificates, if at all.
        """
        principal = self._owners.get(owner)
        return principal is not None and Permission.OPERATE in principal.permissions

    def authorize(self, method: str, key: str | None, names: Iterable[Identity | AssertedName]) -> Principal | None:
        """Authorize a call. If it has a key, only the key counts: a valid certificate does not compensate for an invalid key.

        Args:
            method: The gRPC method path, `/deltawire.v1.ModelRegistry/GetModel`; one of `NEEDS`.
            key: From `sent_key`.
            names: The names in the caller's verified certificate, or those that a trusted proxy asserts; the first name of a
                principal counts.

        Returns:
            The principal; `None` if every caller may do everything.

        Raises:
            GatewayError: UNAUTHENTICATED: there is no valid credential. PERMISSION_DENIED: the principal lacks the permission.
                Send the error to the caller; it contains no key.
        """
        if self.open:
            return None
        principal = self._principal(key, names)
        needs = NEEDS[method]
        if needs not in principal.permissions:
            raise GatewayError(
                Reason.PERMISSION_DENIED,
                f"{principal.name} lacks the permission {needs.value}, which {method.rpartition('/')[2]} needs: "
                "ask the gateway's operator to grant it, or use a credential that has it",
                metadata={"caller": principal.name, "needs": needs.value},
            )
        return principal

    def is_principal(self, key: str | None, names: Iterable[Identity | AssertedName]) -> bool:
        """Whether a caller is a principal, with any permission. True for every caller if every caller may do everything.

        Args:
            key: As for `authorize`.
            names: As for `authorize`.
        """
        try:
            return self.open or self._principal(key, names) is not None
        except GatewayError:
            return False

    def _principal(self, key: str | None, names: Iterable[Identity | AssertedName]) -> Principal:
        if key is not None:
            principal = self._principals.get(Key.of(key))
            if principal is None:
                token = ", and looks like a JSON Web Token" if key.count(".") == _JWT_DOTS else ""
                raise unauthenticated(f"the key is not valid, or was revoked{token}: use a valid one; {HOW}")
            return principal
        shown = [*names]
        for name in shown:
            principal = self._principals.get(name)
            if principal is not None:
                return principal
        if shown:
            raise unauthenticated(
                f"no name of the caller ({', '.join(map(str, shown))}) is authorized on this gateway: ask its operator to add "
                f"one, or {HOW}"
            )
        certificates = any(isinstance(credential, Identity) for credential in self._principals)
        other = "; or connect with an authorized client certificate" if certificates else ""
        raise unauthenticated(f"this gateway requires authentication: {HOW}{other}")


def sent_key(own: Sequence[str], authorization: Sequence[str]) -> str | None:
    """The key in a call's headers, for `Access.authorize`.

    Args:
        own: The values of all `KEY_HEADER`s. With any, the other header is not considered: it may be for a proxy.
        authorization: The values of all `authorization` headers.

    Returns:
        The key; `None` if there is no header.

    Raises:
        GatewayError: UNAUTHENTICATED: a header is not `Bearer KEY`, or two headers of a name differ. The message does not quote
            them, because they may contain a key.
    """
    if len({*(own or authorization)}) > 1:
        # A proxy may have checked another header than the gateway would use.
        name = KEY_HEADER if own else "authorization"
        raise unauthenticated(f"the call has several {name} headers that differ: send one")
    if own:
        key = own[0].strip()
        if not key:
            raise unauthenticated(f"the header {KEY_HEADER} is empty: {HOW}")
        return Secret(key)
    if not authorization:
        return None
    scheme, _, key = authorization[0].strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise unauthenticated(f"the authorization header is not the word Bearer, a space and a key: {HOW}")
    return Secret(key)


def parse_line(text: str) -> Principal | None:
    """Parse one access line.

    Args:
        text: `NAME PERMISSIONS CREDENTIAL`, and any of the words of `Terms` as `name=value`. A `#` at the start of a word begins
            a comment.

    Returns:
        The principal; `None` for an empty line or a comment.

    Raises:
        ValueError: The line is invalid. The message says what is wrong and what to write. It quotes no word of the line,
            because any word may be a misplaced key.
    """
    words = _COMMENT.sub("", text).split()
    if not words:
        return None
    if len(words) < _WORDS:
        raise ValueError(f"must be at least three words, not {len(words)}: write {FORM}")
    name, permissions, credential, *terms = words
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name must be at most 64 letters, digits and . _ - @ /, starting with a letter or digit: write {FORM}"
        )
    return Principal(name, _permissions(permissions), _credential(credential), _terms(terms))


def _terms(words: Sequence[str]) -> Terms:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _TERMS:
            raise ValueError(
                f"the words after the credential must be of the form name=value, with the names {', '.join(_TERMS)}"
            )
        if name in given:
            raise ValueError(f"{name}= is there twice: remove one of them")
        given[name] = value
    limits: list[tuple[str, int]] = []
    for name in LIMITS:
        if name in given:
            value = given[name]
            if not (value.isascii() and value.isdecimal()) or int(value) > MAX_LIMIT:
                raise ValueError(f"{name}= must be followed by a whole number, 0 for no limit: write {name}=20")
            limits.append((name, int(value)))
    models = tuple(given["models"].split(",")) if "models" in given else ()
    if not all(models):
        raise ValueError(
            "models= must be followed by ids or patterns, separated by commas: write models=team-a/*,shared/*"
        )
    priority = given.get("priority", "0")
    if not _PRIORITY.fullmatch(priority) or not -_MAX_PRIORITY <= int(priority) < _MAX_PRIORITY:
        raise ValueError("priority= must be followed by a whole number of 32 bits: write priority=5")
    salt = given.get("cache_salt")
    if salt is not None and not _SALT.fullmatch(salt):
        raise ValueError(
            "cache_salt= must be followed by 1 to 64 letters, digits and . _ -: write cache_salt=team-a, and not its mask"
        )
    return Terms(tuple(limits), models, int(priority) if "priority" in given else None, salt or "")


def _permissions(text: str) -> frozenset[Permission]:
    if text == "all":
        return ALL
    try:
        return frozenset(map(Permission, text.split(",")))
    except ValueError:
        known = ", ".join(permission.value for permission in Permission)
        problem = f"the permissions must be some of {known}, separated by commas without spaces, or all: write {FORM}"
    # Outside of the handler: the exception there repeats the word.
    raise ValueError(problem)


def parse_proxy(text: str) -> str:
    """Validate a trusted proxy, for `Trust.proxies`.

    Args:
        text: `mtls:` with a name in the proxy's certificate, as in an access line; or `unix` for every caller of a unix socket.

    Raises:
        ValueError: It is neither. The message says what to write.
    """
    text = text.strip()
    if text != UNIX and not text.startswith("mtls:"):
        raise ValueError(f"must be {UNIX}, or a name in the proxy's certificate: write {_MTLS}")
    return text if text == UNIX else str(_credential(text))


def _credential(text: str) -> Key | Identity | AssertedName:
    kind, colon, rest = text.partition(":")
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("the credential must be printable ASCII, because a key is sent in a header")
    if not colon:
        if len(text) < MIN_KEY:
            raise ValueError(
                f"the key must have at least {MIN_KEY} characters: generate one by `openssl rand -hex 32`, or write its digest "
                "as sha256:…"
            )
        return Key.of(text, clear=True)
    if kind == "sha256":
        if not _DIGEST.fullmatch(rest):
            raise ValueError(
                'sha256: must be followed by 64 hexadecimal digits: `printf %s "$KEY" | sha256sum` prints those of a key'
            )
        return Key(bytes.fromhex(rest))
    if kind == "mtls":
        return _identity(rest)
    if kind == "proxy":
        return AssertedName(rest)
    # Otherwise a misspelled kind would become a guessable key.
    raise ValueError("the credential must begin with sha256:, mtls: or proxy:, or be a key, which has no colon")


def _identity(text: str) -> Identity:
    kind, _, name = text.partition(":")
    if kind not in {known.value for known in NameKind}:
        raise ValueError(
            f"mtls: must be followed by the kind of a name in the certificate, and the name: write {_MTLS}"
        )
    if not name:
        raise ValueError(f"mtls:{kind}: must be followed by a name in the certificate: write {_MTLS}")
    if (kind == "uri" and ":" not in name) or (kind == "dns" and (":" in name or "/" in name)):
        raise ValueError(
            f"mtls:uri: must be followed by a URI with its scheme, mtls:dns: by a name without colon or slash: write {_MTLS}"
        )
    return Identity(NameKind(kind), name)


def _owner(*parts: str) -> str:
    # A digest, so that it reveals neither the credential nor the name. NUL is the separator, because no part contains it.
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def unauthenticated(message: str) -> GatewayError:
    """The error of a call without a valid credential; the message says what to send."""
    return GatewayError(Reason.UNAUTHENTICATED, message)
