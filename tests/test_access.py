"""Access: the table of permissions, the decision, and the access lines."""

from __future__ import annotations

import hashlib
import traceback

import pytest

from deltawire.v1 import chat_completion_pb2, model_registry_pb2
from deltawire_server.access import (
    ALL,
    NEEDS,
    Access,
    AssertedName,
    Identity,
    Key,
    NameKind,
    Permission,
    Principal,
    Trust,
    parse_line,
    parse_proxy,
    sent_key,
)
from deltawire_server.errors import Code, GatewayError, Reason

CHAT = "/deltawire.v1.ChatCompletion/StreamChatCompletion"
LIST = "/deltawire.v1.ModelRegistry/ListModels"
REGISTER = "/deltawire.v1.ModelRegistry/RegisterModel"
SECRET = "geheim-geheim-geheim"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
MESH = "spiffe://mesh/ns/frontend"
FRONTEND = Identity(NameKind.URI, MESH)
BATCH = Identity(NameKind.DNS, "batch.mesh")


def principal(line: str) -> Principal:
    """The principal of a line that has one."""
    parsed = parse_line(line)
    assert parsed is not None
    return parsed


def admitted(access: Access, method: str, key: str | None = None, *identities: Identity) -> str:
    """As whom a call is let in."""
    found = access.authorize(method, key, identities)
    assert found is not None
    return found.name


def refusal(access: Access, method: str, key: str | None = None, *identities: Identity) -> GatewayError:
    """How a call is refused; without the key, whatever else is said."""
    with pytest.raises(GatewayError) as caught:
        access.authorize(method, key, identities)
    if key:
        assert key not in "".join(traceback.format_exception_only(caught.value)) + str(caught.value.metadata)
    return caught.value


def test_every_rpc_needs_a_permission() -> None:
    """The table is whole, and has nothing that there is not: every method of both services, as gRPC names it."""
    services = [
        service
        for file in (chat_completion_pb2.DESCRIPTOR, model_registry_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    ]
    assert {f"/{service.full_name}/{method.name}" for service in services for method in service.methods} == set(NEEDS)


def test_chats_need_call_and_the_registry_read_or_change() -> None:
    """What only looks needs READ, what leaves something changed CHANGE."""
    for method, needs in NEEDS.items():
        _, service, name = method.split("/")
        if service.endswith("ChatCompletion"):
            assert needs is Permission.CALL
        else:
            assert (needs is Permission.READ) == name.startswith(("Get", "List", "Watch", "Check"))


def test_without_principals_every_caller_may_do_everything() -> None:
    """An open gateway accepts every call, even with an invalid key."""
    access = Access()
    assert access.open
    assert access.summary == "every caller may do everything"
    assert {access.authorize(method, None, []) for method in NEEDS} == {None}
    assert access.authorize("/deltawire.v1.Test/Echo", SECRET, [FRONTEND]) is None


@pytest.mark.parametrize("line", [f"ci all {SECRET}", f"ci all sha256:{DIGEST}", f"ci all sha256:{DIGEST.upper()}"])
def test_a_key_is_known_by_its_digest(line: str) -> None:
    """Whether its line had the key or the digest, which are the same credential."""
    access = Access([principal(line)])
    assert not access.open
    assert access.summary == "keys: 1, mTLS identities: 0"
    assert admitted(access, REGISTER, SECRET) == "ci"
    assert refusal(access, REGISTER, SECRET + "x").reason is Reason.UNAUTHENTICATED
    assert refusal(access, REGISTER, DIGEST).reason is Reason.UNAUTHENTICATED
    assert principal(line).credential == Key.of(SECRET)


@pytest.mark.parametrize("method", NEEDS)
@pytest.mark.parametrize("permission", Permission)
def test_a_principal_may_do_what_it_has_the_permission_for(method: str, permission: Permission) -> None:
    """And nothing else: the refusal names the caller and what is missing."""
    access = Access([Principal("ci", frozenset({permission}), Key.of(SECRET))])
    needs = NEEDS[method]
    if needs is permission:
        assert admitted(access, method, SECRET) == "ci"
        return
    error = refusal(access, method, SECRET)
    assert (error.reason, error.code) == (Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED)
    assert error.metadata == {"caller": "ci", "needs": needs.value}
    assert f"ci lacks the permission {needs.value}" in error.message
    assert method.rpartition("/")[2] in error.message


def test_nobody_may_call_what_is_not_in_the_table() -> None:
    """A method that was forgotten is closed, not open."""
    with pytest.raises(KeyError):
        Access([principal(f"ops all {SECRET}")]).authorize("/deltawire.v1.Test/Echo", SECRET, [])


def test_an_identity() -> None:
    """The first of the certificate's names that is known counts."""
    access = Access([principal(f"frontend call mtls:uri:{MESH}"), principal("batch read mtls:dns:batch.mesh")])
    assert access.summary == "keys: 0, mTLS identities: 2"
    assert admitted(access, CHAT, None, Identity(NameKind.DNS, "other.mesh"), FRONTEND) == "frontend"
    assert admitted(access, CHAT, None, FRONTEND, BATCH) == "frontend"
    assert refusal(access, CHAT, None, BATCH, FRONTEND).metadata == {"caller": "batch", "needs": "call"}


def test_a_key_and_an_identity() -> None:
    """The key alone decides: neither a wrong key nor a missing permission is made up for by the certificate."""
    access = Access([principal(f"ci read {SECRET}"), principal(f"frontend all mtls:uri:{MESH}")])
    assert access.summary == "keys: 1, mTLS identities: 1"
    assert admitted(access, LIST, SECRET, FRONTEND) == "ci"
    assert refusal(access, CHAT, SECRET, FRONTEND).reason is Reason.PERMISSION_DENIED
    assert refusal(access, LIST, "revoked-revoked-revoked", FRONTEND).reason is Reason.UNAUTHENTICATED


def test_an_identity_is_no_key() -> None:
    """The name of a certificate is not accepted as a key, and a key is not accepted as a name."""
    access = Access([principal(f"frontend all mtls:uri:{MESH}"), principal(f"ci all {SECRET}")])
    assert refusal(access, CHAT, MESH).reason is Reason.UNAUTHENTICATED
    names = [Identity(kind, name) for kind in NameKind for name in (SECRET, DIGEST)]
    assert refusal(access, CHAT, None, *names).reason is Reason.UNAUTHENTICATED


@pytest.mark.parametrize("known", NameKind)
@pytest.mark.parametrize("shown", NameKind)
def test_names_of_different_kinds_never_match(known: NameKind, shown: NameKind) -> None:
    """Whatever they look like."""
    access = Access([Principal("frontend", ALL, Identity(known, MESH))])
    if shown is known:
        assert admitted(access, CHAT, None, Identity(shown, MESH)) == "frontend"
    else:
        assert refusal(access, CHAT, None, Identity(shown, MESH)).reason is Reason.UNAUTHENTICATED


def test_refusals_say_the_remedy() -> None:
    """What to send; and certificates only where some are known."""
    keys = Access([principal(f"ci all {SECRET}")])
    both = Access([principal(f"ci all {SECRET}"), principal(f"frontend all mtls:uri:{MESH}")])
    missing = refusal(keys, CHAT)
    assert (missing.code, missing.metadata) == (Code.UNAUTHENTICATED, {})
    assert "send a key as `authorization: Bearer …`" in missing.message
    assert "certificate" not in missing.message
    assert "connect with an authorized client certificate" in refusal(both, CHAT).message
    assert "the key is not valid, or was revoked" in refusal(both, CHAT, "wrong-wrong-wrong").message
    stranger = refusal(both, CHAT, None, Identity(NameKind.URI, "a:b"), BATCH).message
    assert "no name of the caller (mtls:uri:a:b, mtls:dns:batch.mesh)" in stranger


def test_replaced_principals_count_at_once() -> None:
    """A revoked key is refused, a new one known; none at all opens it."""
    access = Access([principal("old all old-old-old-old-old"), principal(f"ci all {SECRET}")])
    access.replace([principal("new all new-new-new-new-new"), principal(f"ci read {SECRET}")])
    assert refusal(access, CHAT, "old-old-old-old-old").reason is Reason.UNAUTHENTICATED
    assert admitted(access, CHAT, "new-new-new-new-new") == "new"
    assert refusal(access, CHAT, SECRET).reason is Reason.PERMISSION_DENIED
    access.replace([])
    assert access.open


def test_an_owner_is_a_name_with_its_credential() -> None:
    """The permissions may change; a name that goes to another credential, and a credential under another name, do not own."""
    lines = [
        f"ci all {SECRET}",
        f"cj all {SECRET}",
        "ci all other-other-other",
        f"ci all mtls:uri:{MESH}",
        "ci all mtls:dns:a",
    ]
    owners = [principal(line).owner for line in lines]
    assert len({*owners, FRONTEND.owner, BATCH.owner, ""}) == len(lines) + 3
    assert principal(f"ci read sha256:{DIGEST}").owner == owners[0]
    assert not any(DIGEST in owner or owner == "ci" for owner in owners)


def test_what_was_let_in_and_is_no_longer_admitted() -> None:
    """By the line's name and credential and the permission that the method needs; every caller is, if there are no principals."""
    before = principal(f"ci all {SECRET}")
    access = Access([before])
    assert access.admits(before.owner, CHAT)
    assert not access.admits("", CHAT)
    for line, admits in [
        (f"ci call {SECRET}", True),
        (f"ci read {SECRET}", False),
        (f"cj all {SECRET}", False),
        ("ci all other-other-other", False),
    ]:
        access.replace([principal(line)])
        assert access.admits(before.owner, CHAT) is admits
    access.replace([])
    assert access.admits(before.owner, CHAT)
    assert access.admits("", CHAT)


def test_no_key_is_kept() -> None:
    """Neither the key nor its digest shows in what is printed, and the key is nowhere in the object."""
    made = principal(f"ci all {SECRET}")
    for shown in (repr(made), str(made), made.line(masked=True)):
        assert SECRET not in shown
        assert DIGEST not in shown
    assert made.line(masked=True) == "ci all sha256:***"
    assert made.line() == f"ci all sha256:{DIGEST}"
    assert isinstance(made.credential, Key)
    assert made.credential.clear
    assert (made.credential.digest, SECRET.encode() in made.credential.digest) == (bytes.fromhex(DIGEST), False)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([], None),
        ([f"Bearer {SECRET}"], SECRET),
        ([f"bearer  {SECRET} "], SECRET),
        ([f"Bearer {SECRET}", f"Bearer {SECRET}"], SECRET),
    ],
)
def test_bearer_keys(values: list[str], key: str | None) -> None:
    """The scheme's case does not matter, as HTTP has it."""
    assert sent_key([], values) == key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([SECRET], "is not the word Bearer, a space and a key: send a key as `authorization: Bearer …`"),
        ([f"Basic {SECRET}"], "is not the word Bearer"),
        (["Bearer"], "is not the word Bearer"),
        (["Bearer "], "is not the word Bearer"),
        ([""], "is not the word Bearer"),
        ([f"Bearer {SECRET}", "Bearer other"], "several authorization headers that differ: send one"),
    ],
)
def test_authorization_headers_that_are_no_bearer_key(values: list[str], message: str) -> None:
    """They are refused and not passed over, and nothing of them is repeated."""
    with pytest.raises(GatewayError) as caught:
        sent_key([], values)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert message in caught.value.message
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    ("own", "authorization", "key"),
    [
        ([SECRET], [], SECRET),
        ([f" {SECRET} "], ["Bearer other"], SECRET),
        ([SECRET, SECRET], ["Basic x", "Bearer a.b.c"], SECRET),
    ],
)
def test_keys_in_their_own_header(own: list[str], authorization: list[str], key: str) -> None:
    """They count alone; what is in the other header is not even looked at."""
    assert sent_key(own, authorization) == key


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([""], "the header x-deltawire-key is empty: send a key"),
        ([" "], "is empty"),
        ([SECRET, "other"], "several x-deltawire-key headers that differ: send one"),
    ],
)
def test_own_headers_that_have_no_key(own: list[str], message: str) -> None:
    """They are refused, whatever is in the other header, and nothing of them is repeated."""
    with pytest.raises(GatewayError) as caught:
        sent_key(own, [f"Bearer {SECRET}"])
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert message in caught.value.message
    assert SECRET not in caught.value.message


def test_a_token_for_a_proxy_is_recognized() -> None:
    """A JSON Web Token is not called revoked alone; the refusal says where the key can be sent beside it."""
    access = Access([principal(f"ci all {SECRET}")])
    error = refusal(access, CHAT, "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl")
    assert "looks like a JSON Web Token" in error.message
    assert "as `x-deltawire-key: …`" in error.message
    assert "JSON" not in refusal(access, CHAT, "wrong-wrong.wrong").message


def test_an_asserted_name_is_of_its_own_kind() -> None:
    """It matches neither a name in a certificate that is spelled the same nor a key, and owns other data."""
    names: list[Identity | AssertedName] = [AssertedName(MESH), FRONTEND, Identity(NameKind.COMMON_NAME, MESH)]
    assert len({name.owner for name in names}) == len(names)
    access = Access([principal(f"alice call proxy:{MESH}"), principal(f"frontend call mtls:uri:{MESH}")])
    assert access.summary == "keys: 0, mTLS identities: 1, asserted names: 1"
    assert access.authorize(CHAT, None, names[:1]) == principal(f"alice call proxy:{MESH}")
    assert admitted(access, CHAT, None, FRONTEND) == "frontend"
    assert refusal(access, CHAT, MESH).reason is Reason.UNAUTHENTICATED
    assert len({each.owner for each in map(principal, [f"a call proxy:{MESH}", f"a call mtls:uri:{MESH}"])}) == 2


@pytest.mark.parametrize("name", ["", " ", "a b", "a,b", "é", "a\x7f", "a" * 257, "a\n"])
def test_texts_that_are_no_asserted_name(name: str) -> None:
    """Lists of several names among them."""
    with pytest.raises(ValueError, match=r"must be 1 to 256 printable ASCII characters without spaces and commas$"):
        AssertedName(name)


def test_whose_assertions_count() -> None:
    """Those of a proxy by a name of its certificate, or by its unix socket, with the header of the settings."""
    trust = Trust(frozenset({f"mtls:uri:{MESH}", "unix"}), "x-caller")
    assert trust.assertion([BATCH, FRONTEND], unix=False) == f"mtls:uri:{MESH} x-caller"
    assert trust.assertion([], unix=True) == "unix x-caller"
    assert (
        trust.assertion([BATCH, Identity(NameKind.COMMON_NAME, "unix"), Identity(NameKind.DNS, MESH)], unix=False) == ""
    )
    assert Trust().assertion([FRONTEND], unix=True) == ""
    for made, counts in [(f"mtls:uri:{MESH} x-caller", True), ("unix x-caller", True), ("", True), ("unix", False)]:
        assert trust.accepts(made) is counts
    assert not Trust(trust.proxies).accepts("unix x-caller")
    assert not Trust(frozenset({"unix"}), "x-caller").accepts(f"mtls:uri:{MESH} x-caller")


@pytest.mark.parametrize("lines", [[], [f"ci all mtls:uri:{MESH}"]])
def test_who_was_let_in_by_a_proxy(lines: list[str]) -> None:
    """Is admitted as long as the proxy is trusted, with access lines and without; the same caller without a proxy is always."""
    access = Access(map(principal, lines), Trust(frozenset({"unix"})))
    owner = principal(lines[0]).owner if lines else FRONTEND.owner
    made = access.trust.assertion([], unix=True)
    assert access.admits(owner, CHAT, made)
    access.replace(map(principal, lines))
    assert not access.admits(owner, CHAT, made)
    assert access.admits(owner, CHAT)


@pytest.mark.parametrize("text", ["unix", f"mtls:uri:{MESH}", "mtls:dns:envoy.mesh", "mtls:cn:envoy"])
def test_trusted_proxies(text: str) -> None:
    """As written."""
    assert parse_proxy(f" {text} ") == text


@pytest.mark.parametrize(
    "text", ["", "envoy", "Unix", "unix:/x", "proxy:a", "mtls:", "mtls:envoy", "mtls:uri:a", SECRET]
)
def test_proxies_that_are_none(text: str) -> None:
    """The message says what to write."""
    with pytest.raises(ValueError, match=r"write mtls:uri:spiffe://mesh/ns/frontend"):
        parse_proxy(text)


@pytest.mark.parametrize("line", ["", "  \t", "# nothing", f"  # ci all {SECRET}", "#ci"])
def test_lines_without_a_principal(line: str) -> None:
    """Blank ones and comments."""
    assert parse_line(line) is None


@pytest.mark.parametrize(
    ("line", "made"),
    [
        (f"ci call,read {SECRET}", Principal("ci", frozenset({Permission.CALL, Permission.READ}), Key.of(SECRET))),
        (f"ci call,read,change,operate {SECRET}", Principal("ci", ALL, Key.of(SECRET))),
        (f" ci\tread   sha256:{DIGEST}\r", Principal("ci", frozenset({Permission.READ}), Key.of(SECRET))),
        (f"frontend call mtls:uri:{MESH}", Principal("frontend", frozenset({Permission.CALL}), FRONTEND)),
        ("a.b_c-d@e/f all mtls:cn:x  # since May", Principal("a.b_c-d@e/f", ALL, Identity(NameKind.COMMON_NAME, "x"))),
        ("b all mtls:dns:batch.mesh", Principal("b", ALL, BATCH)),
        ("alice all proxy:auth0|a:b@c", Principal("alice", ALL, AssertedName("auth0|a:b@c"))),
        ("ci all has#in-the-middle", Principal("ci", ALL, Key.of("has#in-the-middle"))),
        ("n" * 64 + " all 0123456789abcdef", Principal("n" * 64, ALL, Key.of("0123456789abcdef"))),
    ],
)
def test_lines(line: str, made: Principal) -> None:
    """What each means, and that it is written down again without loss and without a key."""
    assert parse_line(line) == made
    assert parse_line(made.line()) == made
    assert SECRET not in made.line()


def test_the_permissions_of_a_line_are_written_in_order() -> None:
    """And all of them as all."""
    assert principal(f"ci change,call {SECRET}").line(masked=True) == "ci call,change sha256:***"
    assert principal("ci operate,change,call,read mtls:dns:a").line(masked=True) == "ci all mtls:dns:a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SECRET, "must be at least three words, not 1: write NAME PERMISSIONS CREDENTIAL, like `ci call,read sha256:"),
        (f"ci {SECRET}", "must be at least three words, not 2"),
        (f"ci call read {SECRET}", "the key must have at least 16 characters"),
        (f"ci all {SECRET} x", "must be of the form name=value"),
        (f"geheim:x all {SECRET}", "the name must be at most 64 letters, digits and . _ - @ /"),
        (f"{'geheim' * 11} all {SECRET}", "at most 64"),
        (f"-geheim all {SECRET}", "starting with a letter or digit"),
        (f"gehéim all {SECRET}", "the name must be"),
        (f"ci {SECRET} call", "some of call, read, change, operate, separated by commas without spaces, or all"),
        (f"ci call,geheim {SECRET}", "some of call, read, change, operate"),
        (f"ci call, {SECRET}", "some of call, read, change, operate"),
        (f"ci all,call {SECRET}", "some of call, read, change, operate"),
        (f"ci CALL {SECRET}", "some of call, read, change, operate"),
        ("ci call geheim-geheim-x", "at least 16 characters: generate one by `openssl rand -hex 32`"),
        ("ci call geheim-geheim-geheïm", "printable ASCII, because a key is sent in a header"),
        ("ci call geheim-geheim-\x7f-geheim", "printable ASCII"),
        ("ci call sha256:geheim", 'followed by 64 hexadecimal digits: `printf %s "$KEY" | sha256sum`'),
        (f"ci call sha256:{DIGEST}0", "followed by 64 hexadecimal digits"),
        ("ci call proxy:", "the name of a caller must be 1 to 256 printable ASCII characters"),
        ("ci call proxy:geheim,geheim", "without spaces and commas"),
        ("ci call mtls:", "followed by the kind of a name in the certificate, and the name: write mtls:uri:spiffe://"),
        (
            "ci call mtls:spiffe://geheim/geheim",
            "followed by the kind of a name in the certificate, and the name: write",
        ),
        (
            "ci call mtls:geheim.mesh",
            "write mtls:uri:spiffe://mesh/ns/frontend, mtls:dns:frontend.mesh or mtls:cn:front",
        ),
        ("ci call mtls:email:geheim@mesh", "followed by the kind of a name"),
        ("ci call mtls:URI:spiffe://geheim", "followed by the kind of a name"),
        ("ci call mtls:uri:", "mtls:uri: must be followed by a name in the certificate"),
        ("ci call mtls:uri:geheim.mesh", "mtls:uri: must be followed by a URI with its scheme"),
        ("ci call mtls:dns:spiffe://geheim", "mtls:dns: by a name without colon or slash"),
        ("ci call mtls:dns:geheim/x", "mtls:dns: by a name without colon or slash"),
        (
            "ci call mtsl:spiffe://geheim/geheim",
            "must begin with sha256:, mtls: or proxy:, or be a key, which has no colon",
        ),
        (f"ci call SHA256:{DIGEST}", "must begin with sha256:, mtls: or proxy:"),
    ],
)
def test_lines_that_are_wrong(line: str, message: str) -> None:
    """Each says in what and what to write; no word of it is repeated, nor kept by any exception behind it."""
    with pytest.raises(ValueError, match=r"must") as caught:
        parse_line(line)
    assert message in str(caught.value)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert "geh" not in shown
    assert DIGEST not in shown
    assert caught.value.__context__ is None
