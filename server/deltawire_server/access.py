"""Who may call, and what each may do: principals, the permission that every RPC needs, and the judgement. Pure.

A principal is one line, `NAME PERMISSIONS CREDENTIAL`:

    ci        call,read  sha256:9f86d0…                  known by its key, of which only the digest is written down
    ops       all        Zm9vYmFyYmF6cXV4                 known by its key, which is hashed here and forgotten
    frontend  call       mtls:uri:spiffe://mesh/frontend  known by a name in its client certificate

A key that comes is hashed and its digest looked up: no key is kept, and none is compared with another by its content.
Without any principal everybody may do everything.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MIN_KEY = 16
"""Characters of a key. Its digest is quick to compute, so what protects a key is that it cannot be guessed."""

FORM = "NAME PERMISSIONS CREDENTIAL, like `ci call,read sha256:…`"
"""What a line looks like, to follow "write"."""

REVOKED = "the access of this caller was revoked or changed during the call: call again with a valid credential"
"""The message of ACCESS_CHANGED."""

_HOW = "send a key as `authorization: Bearer …`"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_MTLS = "mtls:uri:spiffe://mesh/ns/frontend, mtls:dns:frontend.mesh or mtls:cn:frontend"
_WORDS = 3


class Permission(enum.Enum):
    """What a principal may do; the values are the words of a line.

    `CHANGE` lets it register models, and change and unregister those that it registered. `OPERATE` extends that to models that
    others registered, or that have no known owner. No RPC needs it alone, and without `CHANGE` it has no effect.
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
"""What every RPC needs, by its method as gRPC names it. A test holds it whole: what is not in it nobody could call."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, of which only the digest is known.

    Attributes:
        digest: SHA-256 of the key's UTF-8 bytes, 32 bytes.
        clear: Whether its line held the key itself, which is then as secret as the key.
    """

    digest: bytes = field(repr=False)
    clear: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, key: str, *, clear: bool = False) -> Self:
        """Hash a key."""
        return cls(hashlib.sha256(key.encode()).digest(), clear)


class NameKind(enum.Enum):
    """Which kind of name in a certificate; the values are the words of a line. Names of different kinds never match.

    There is no kind for e-mail and IP addresses: authorities issue those by other rules than names of services.
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
        kind: Where in the certificate the name is.
        name: Compared byte by byte.
    """

    kind: NameKind
    name: str

    def __str__(self) -> str:
        """As a line has it after `mtls:`."""
        return f"{self.kind.value}:{self.name}"

    @property
    def owner(self) -> str:
        """What marks the data of a caller with this certificate where there are no principals."""
        return _owner("certificate", str(self))


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who may call.

    Attributes:
        name: For logs and refusals; unique among those of an `Access`.
        permissions: What it may do, at least one.
        credential: By what it is known; unique as well.
    """

    name: str
    permissions: frozenset[Permission]
    credential: Key | Identity

    @property
    def owner(self) -> str:
        """What marks this principal's data: the same for the same name with the same credential, and for nothing else.

        A later principal of the same name with another credential is another owner.
        """
        return _owner("principal", self.name, self._credential(exact=True))

    def line(self) -> str:
        """The line that `parse_line` makes this principal from; with the digest where there was a key."""
        return self._line(exact=True)

    def masked(self) -> str:
        """The line as it may be shown to anybody."""
        return self._line(exact=False)

    def _line(self, *, exact: bool) -> str:
        words = [permission.value for permission in Permission if permission in self.permissions]
        permissions = "all" if self.permissions == ALL else ",".join(words)
        return f"{self.name} {permissions} {self._credential(exact=exact)}"

    def _credential(self, *, exact: bool) -> str:
        if isinstance(self.credential, Identity):
            return f"mtls:{self.credential}"
        return f"sha256:{self.credential.digest.hex() if exact else '***'}"


class Access:
    """Judges calls. One for the process; `replace` its principals when they change.

    Args:
        principals: Names and credentials unique; none lets everybody do everything.
    """

    def __init__(self, principals: Iterable[Principal] = ()) -> None:
        self._known: Mapping[Key | Identity, Principal] = {}
        self._owners: Mapping[str, Principal] = {}
        self.replace(principals)

    def replace(self, principals: Iterable[Principal]) -> None:
        """Check calls against these principals from now on. For calls that were let in before, ask `admits`.

        Args:
            principals: As for the constructor.
        """
        # One assignment: a call is judged by the old ones or by the new ones, never by some of each.
        self._known = {principal.credential: principal for principal in principals}
        self._owners = {principal.owner: principal for principal in self._known.values()}

    @property
    def open(self) -> bool:
        """Whether everybody may do everything."""
        return not self._known

    @property
    def summary(self) -> str:
        """Who may call, in a few words for the log."""
        if self.open:
            return "everybody may do everything"
        keys = sum(isinstance(credential, Key) for credential in self._known)
        return f"keys: {keys}, mTLS identities: {len(self._known) - keys}"

    def admits(self, owner: str, method: str) -> bool:
        """Whether a call that was let in earlier would be let in now, as the same caller.

        Args:
            owner: The `owner` of the principal that it was let in as; empty or an identity's if there were no principals.
            method: As for `authorize`.
        """
        if self.open:
            return True
        principal = self._owners.get(owner)
        return principal is not None and NEEDS[method] in principal.permissions

    def authorize(self, method: str, bearer_key: str | None, identities: Iterable[Identity]) -> Principal | None:
        """Let a call in, or refuse it. A key alone decides if there is one: no certificate makes up for a wrong key.

        Args:
            method: As gRPC names it, `/deltawire.v1.ModelRegistry/GetModel`; one of `NEEDS`.
            bearer_key: From `bearer_key`.
            identities: The names in the caller's verified certificate; the first that is known counts.

        Returns:
            The principal; `None` if everybody may do everything.

        Raises:
            GatewayError: UNAUTHENTICATED, there is no credential that is known; PERMISSION_DENIED, its principal may not
                do this. Tell the caller; neither holds a key.
        """
        if self.open:
            return None
        principal = self._principal(bearer_key, identities)
        needs = NEEDS[method]
        if needs not in principal.permissions:
            raise GatewayError(
                Reason.PERMISSION_DENIED,
                f"{principal.name} lacks the permission {needs.value}, which {method.rpartition('/')[2]} needs: "
                "let the gateway's operator grant it, or call as somebody who has it",
                metadata={"caller": principal.name, "needs": needs.value},
            )
        return principal

    def knows(self, authorization: Sequence[str], identities: Iterable[Identity]) -> bool:
        """Whether a caller is a principal, whatever it may do; true of every caller if everybody may do everything.

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
            principal = self._known.get(Key.of(bearer_key))
            if principal is None:
                raise _unauthenticated(f"this gateway does not know the key, or does no longer: {_HOW} that it knows")
            return principal
        shown = [*identities]
        for identity in shown:
            principal = self._known.get(identity)
            if principal is not None:
                return principal
        if shown:
            raise _unauthenticated(
                f"this gateway knows none of the client certificate's names ({', '.join(map(str, shown))}): let its "
                f"operator add one, or {_HOW}"
            )
        certificates = any(isinstance(credential, Identity) for credential in self._known)
        other = ", or connect with a client certificate that it knows" if certificates else ""
        raise _unauthenticated(f"this gateway has to know its callers: {_HOW}{other}")


def bearer_key(values: Sequence[str]) -> str | None:
    """The key in a call's `authorization` headers, for `Access.authorize`.

    Args:
        values: Of all headers of that name.

    Returns:
        `None` without any.

    Raises:
        GatewayError: UNAUTHENTICATED: not `Bearer KEY`, or two that differ. Nothing of them is repeated: it may be a key.
    """
    if not values:
        return None
    if len(set(values)) > 1:
        # Whoever looked at the call on its way may have judged another one than we would.
        raise _unauthenticated("the call has several authorization headers that differ: send one, `Bearer …`")
    scheme, _, key = values[0].strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise _unauthenticated(f"the authorization header is not the word Bearer, a space and a key: {_HOW}")
    return Secret(key)


def parse_line(text: str) -> Principal | None:
    """Read one line.

    Args:
        text: `NAME PERMISSIONS CREDENTIAL`, and a comment from a `#` on that begins a word.

    Returns:
        `None` if nothing is on it, or only a comment.

    Raises:
        ValueError: It is wrong. The message says in what and what to write, and repeats no word of the line, since any of
            them may be a key in the wrong place.
    """
    words = _COMMENT.sub("", text).split()
    if not words:
        return None
    if len(words) != _WORDS:
        raise ValueError(f"must be three words, not {len(words)}: write {FORM}")
    name, permissions, credential = words
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name must be letters, digits and . _ - @ /, first a letter or digit, at most 64 in all: write {FORM}"
        )
    return Principal(name, _permissions(permissions), _credential(credential))


def _permissions(text: str) -> frozenset[Permission]:
    if text == "all":
        return ALL
    try:
        return frozenset(map(Permission, text.split(",")))
    except ValueError:
        known = ", ".join(permission.value for permission in Permission)
        problem = (
            f"the permissions must be some of {known}, with commas and no spaces between them, or all: write {FORM}"
        )
    # Outside of the handler: the exception there repeats the word.
    raise ValueError(problem)


def _credential(text: str) -> Key | Identity:
    kind, colon, rest = text.partition(":")
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("the credential must be printable ASCII: a key has to fit into a header")
    if not colon:
        if len(text) < MIN_KEY:
            raise ValueError(
                f"the key must have at least {MIN_KEY} characters: make one by `openssl rand -hex 32`, or write its digest "
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
    # A misspelt kind would else be a key that can be guessed.
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
    # A digest, so that neither a credential nor a name can be read from it; NUL separates, as no part has it.
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _unauthenticated(message: str) -> GatewayError:
    return GatewayError(Reason.UNAUTHENTICATED, message)
