"""Access control: principals, the permission that each RPC requires, and the authorization of calls. No I/O.

A principal is one access line, `NAME PERMISSIONS CREDENTIAL`, with its limits as further words:

    ci        call,read  sha256:9f86d0…                  authenticated by its key; the line has only the digest
    ops       all        Zm9vYmFyYmF6cXV4                 authenticated by its key; only the digest is kept in memory
    frontend  call       mtls:uri:spiffe://mesh/frontend  authenticated by a name in its client certificate
    team-a    call,read  sha256:ab30e1…  streams=20 models=team-a/*,shared/*

The key of a call is hashed and its digest looked up. No key is stored, and keys are never compared directly. Without any
principal, every caller may do everything.
"""

from __future__ import annotations

import enum
import fnmatch
import hashlib
import re
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

_HOW = "send a key as `authorization: Bearer …`"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_MTLS = "mtls:uri:spiffe://mesh/ns/frontend, mtls:dns:frontend.mesh or mtls:cn:frontend"
_WORDS = 3
_PRIORITY = re.compile(r"-?[0-9]{1,10}")
_MAX_PRIORITY = 2**31
_SALT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TERMS = (*LIMITS, "models", "priority", "cache_salt")


class Permission(enum.Enum):
    """What a principal may do; the values are the words of an access line.

    `CHANGE` allows a principal to register models, and to change and unregister models that it registered. `OPERATE` extends
    this to models that others registered, or that have no known owner. `OPERATE` has no effect without `CHANGE`.
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
    """A name in a client certificate that the listener has verified.

    Attributes:
        kind: The field of the certificate.
        name: The name, compared byte by byte.
    """

    kind: NameKind
    name: str

    def __str__(self) -> str:
        """The form in an access line, after `mtls:`."""
        return f"{self.kind.value}:{self.name}"

    @property
    def owner(self) -> str:
        """The owner of data from a caller with this certificate, if there are no principals."""
        return _owner("certificate", str(self))


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
        return not self.models or any(fnmatch.fnmatchcase(model_id, pattern) for pattern in self.models)

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
    credential: Key | Identity
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
        if isinstance(self.credential, Identity):
            return f"mtls:{self.credential}"
        return f"sha256:{'***' if masked else self.credential.digest.hex()}"


class Access:
    """Authorizes calls. There is one per process; call `replace` when the principals change.

    Args:
        principals: With unique names and credentials. If empty, every caller may do everything.
    """

    def __init__(self, principals: Iterable[Principal] = ()) -> None:
        self._principals: Mapping[Key | Identity, Principal] = {}
        self._owners: Mapping[str, Principal] = {}
        self.replace(principals)

    def replace(self, principals: Iterable[Principal]) -> None:
        """Authorize calls by these principals from now on. For calls that were admitted before, see `admits`.

        Args:
            principals: As for the constructor.
        """
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
        if self.open:
            return "every caller may do everything"
        keys = sum(isinstance(credential, Key) for credential in self._principals)
        return f"keys: {keys}, mTLS identities: {len(self._principals) - keys}"

    def admits(self, owner: str, method: str) -> bool:
        """Whether a call that was admitted earlier would be admitted now, as the same caller.

        Args:
            owner: The `owner` of the principal that was admitted; empty, or that of an `Identity`, if there were no principals.
            method: As for `authorize`.
        """
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

    def authorize(self, method: str, bearer_key: str | None, identities: Iterable[Identity]) -> Principal | None:
        """Authorize a call. If it has a key, only the key counts: a valid certificate does not compensate for an invalid key.

        Args:
            method: The gRPC method path, `/deltawire.v1.ModelRegistry/GetModel`; one of `NEEDS`.
            bearer_key: From `bearer_key`.
            identities: The names in the caller's verified certificate; the first name of a principal counts.

        Returns:
            The principal; `None` if every caller may do everything.

        Raises:
            GatewayError: UNAUTHENTICATED: there is no valid credential. PERMISSION_DENIED: the principal lacks the permission.
                Send the error to the caller; it contains no key.
        """
        if self.open:
            return None
        principal = self._principal(bearer_key, identities)
        needs = NEEDS[method]
        if needs not in principal.permissions:
            raise GatewayError(
                Reason.PERMISSION_DENIED,
                f"{principal.name} lacks the permission {needs.value}, which {method.rpartition('/')[2]} needs: "
                "ask the gateway's operator to grant it, or use a credential that has it",
                metadata={"caller": principal.name, "needs": needs.value},
            )
        return principal

    def is_principal(self, authorization: Sequence[str], identities: Iterable[Identity]) -> bool:
        """Whether a caller is a principal, with any permission. True for every caller if every caller may do everything.

        Args:
            authorization: As for `bearer_key`.
            identities: As for `authorize`.
        """
        try:
            return self.open or self._principal(bearer_key(authorization), identities) is not None
        except GatewayError:
            return False

    def _principal(self, bearer_key: str | None, identities: Iterable[Identity]) -> Principal:
        if bearer_key is not None:
            principal = self._principals.get(Key.of(bearer_key))
            if principal is None:
                raise _unauthenticated(f"the key is not valid, or was revoked: {_HOW} that is valid")
            return principal
        shown = [*identities]
        for identity in shown:
            principal = self._principals.get(identity)
            if principal is not None:
                return principal
        if shown:
            raise _unauthenticated(
                f"no name of the client certificate ({', '.join(map(str, shown))}) is authorized on this gateway: ask its "
                f"operator to add one, or {_HOW}"
            )
        certificates = any(isinstance(credential, Identity) for credential in self._principals)
        other = ", or connect with an authorized client certificate" if certificates else ""
        raise _unauthenticated(f"this gateway requires authentication: {_HOW}{other}")


def bearer_key(values: Sequence[str]) -> str | None:
    """The key in a call's `authorization` headers, for `Access.authorize`.

    Args:
        values: The values of all headers of that name.

    Returns:
        The key; `None` if there is no header.

    Raises:
        GatewayError: UNAUTHENTICATED: a header is not `Bearer KEY`, or two headers differ. The message does not quote them,
            because they may contain a key.
    """
    if not values:
        return None
    if len(set(values)) > 1:
        # A proxy may have checked another header than the gateway would use.
        raise _unauthenticated("the call has several authorization headers that differ: send one, `Bearer …`")
    scheme, _, key = values[0].strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise _unauthenticated(f"the authorization header is not the word Bearer, a space and a key: {_HOW}")
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


def _credential(text: str) -> Key | Identity:
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
    # Otherwise a misspelled kind would become a guessable key.
    raise ValueError("the credential must begin with sha256: or mtls:, or be a key, which has no colon")


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


def _unauthenticated(message: str) -> GatewayError:
    return GatewayError(Reason.UNAUTHENTICATED, message)
