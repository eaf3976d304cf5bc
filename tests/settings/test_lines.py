"""The lines that say who may call: their two sources, what is wrong in them, how their file is kept, and what is printed."""

from __future__ import annotations

import hashlib
import tomllib
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr, ValidationError

from deltawire_server.access import Identity, Key, NameKind, Trust
from deltawire_server.settings import AccessSettings, effective
from tests.settings.conftest import URL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.settings.conftest import Parse, Problems

SECRET = "geheim-geheim-geheim"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


@pytest.fixture
def mutual(pem: Path) -> dict[str, str]:
    """The environment of a listener that asks for client certificates."""
    return {f"DELTAWIRE_SERVER_TLS_{which}_FILE": str(pem) for which in ("CERT", "KEY", "CLIENT_CA")}


def test_without_lines_nobody_is_named(read: Parse) -> None:
    """Every caller may do everything then; empty settings are a template's way to leave them out."""
    for file in ("", '[access]\nkeys = ""\nkeys_file = ""'):
        access = read("--vllm-url", URL, file=file).settings.access
        assert (access.principals, access.warnings, access.keys, access.keys_file) == ((), (), None, None)


def test_both_sources(read: Parse, keys_file: Path, mutual: dict[str, str]) -> None:
    """The file's principals and then the environment's, `;` and line ends alike between them, comments anywhere."""
    keys_file.write_text(f"# who may call\r\n\r\nops all {SECRET}  # since May\r\nci call,read sha256:{'1' * 64}")
    keys = "mesh call mtls:uri:spiffe://mesh/ns/frontend;; # none\nother read 0123456789abcdef;"
    access = read(
        VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS_FILE=str(keys_file), DELTAWIRE_ACCESS_KEYS=keys, **mutual
    ).settings.access
    assert [principal.line(masked=True) for principal in access.principals] == [
        "ops all sha256:***",
        "ci call,read sha256:***",
        "mesh call mtls:uri:spiffe://mesh/ns/frontend",
        "other read sha256:***",
    ]
    assert [principal.credential for principal in access.principals] == [
        Key.of(SECRET),
        Key(bytes.fromhex("1" * 64)),
        Identity(NameKind.URI, "spiffe://mesh/ns/frontend"),
        Key.of("0123456789abcdef"),
    ]


def test_settings_hold_no_key(read: Parse) -> None:
    """A key is hashed as soon as it is read, commented-out ones are dropped, and nothing printed has a digest either."""
    invocation = read(
        VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS=f"ci call {SECRET};# old call {SECRET}\nb read sha256:{'2' * 64}"
    )
    assert invocation.settings.access.keys == SecretStr(f"ci call sha256:{DIGEST};\nb read sha256:{'2' * 64}")
    for shown in (repr(invocation), str(invocation.settings), repr(invocation.settings.access.principals)):
        assert SECRET not in shown
        assert DIGEST not in shown


def test_all_wrong_lines_at_once(problems: Problems, keys_file: Path) -> None:
    """Each with its setting, source, file, line number, reason and remedy, and without a word of the line."""
    keys_file.write_text(f"# comment\nci {SECRET}\n\nops all geheim\n")
    lines = problems(
        "--access-keys-file",
        str(keys_file),
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_KEYS=f"a call sha256:{DIGEST}; b any {SECRET}",
    )
    assert [line.partition(": ")[0] for line in lines] == [
        "access.keys_file (from flag --access-keys-file)",
        "access.keys_file (from flag --access-keys-file)",
        "access.keys (from environment DELTAWIRE_ACCESS_KEYS)",
    ]
    assert f": {keys_file} line 2: must be at least three words, not 2: write NAME PERMISSIONS CREDENTIAL" in lines[0]
    assert f": {keys_file} line 4: the key must have at least 16 characters" in lines[1]
    assert ": line 2: the permissions must be some of call, read, change" in lines[2]
    assert not [line for line in lines if "geheim" in line or DIGEST in line]


def test_wrong_lines_beside_other_problems(problems: Problems) -> None:
    """Neither hides the other."""
    lines = problems("--log-level", "loud", VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS="nonsense")
    assert [line.split()[0] for line in lines] == ["access.keys", "log.level"]


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (f"ops call sha256:{'1' * 64}", "name"),
        (f"other call sha256:{DIGEST}", "credential"),
        (f"other call {SECRET}", "credential"),
    ],
)
def test_what_is_there_twice(problems: Problems, keys_file: Path, second: str, what: str) -> None:
    """In one source or over both; whether as a key or as its digest."""
    keys_file.write_text(f"ops all {SECRET}\n")
    (line,) = problems("--access-keys-file", str(keys_file), VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS=second)
    assert line == (
        f"access.keys (from environment DELTAWIRE_ACCESS_KEYS): line 1: the {what} is the same as that of {keys_file} line "
        "1: give each line its own"
    )
    keys_file.write_text(f"ops all {SECRET}\n{second}\n")
    (line,) = problems("--access-keys-file", str(keys_file), VLLM_URL=URL)
    assert f"{keys_file} line 2: the {what} is the same as that of {keys_file} line 1" in line


def test_an_identity_twice(problems: Problems, mutual: dict[str, str]) -> None:
    """Is a credential twice as well."""
    (line,) = problems(VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS="a call mtls:dns:x;b read mtls:dns:x", **mutual)
    assert "line 2: the credential is the same as that of line 1" in line


@pytest.mark.parametrize("text", ["", "\n", "# ci all 0123456789abcdef\n"])
def test_a_file_without_lines(problems: Problems, keys_file: Path, text: str) -> None:
    """A file emptied by mistake must not open the gateway to every caller; the message says how to do that on purpose."""
    keys_file.write_text(text)
    (line,) = problems("--access-keys-file", str(keys_file), VLLM_URL=URL)
    assert "has no access line" in line
    assert "remove the access settings" in line
    assert "has no access line" in problems(VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS=" ; # no caller")[0]


def test_identities_need_client_certificates(problems: Problems, keys_file: Path, mutual: dict[str, str]) -> None:
    """Every line is named with its place, and the setting that is missing."""
    keys_file.write_text("frontend call mtls:dns:frontend.mesh\n")
    without_client_ca = {name: value for name, value in mutual.items() if "CLIENT" not in name}
    lines = problems(
        "--access-keys-file",
        str(keys_file),
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_KEYS="a all mtls:dns:a; b all 0123456789abcdef",
        **without_client_ca,
    )
    assert len(lines) == 2
    assert lines[0].startswith(f"access.keys_file (from flag --access-keys-file): {keys_file} line 1: mtls: needs")
    assert lines[1].startswith("access.keys (from environment DELTAWIRE_ACCESS_KEYS): line 1: mtls: needs")
    assert all("set server.tls_client_ca_file (--tls-client-ca-file)" in line for line in lines)


def test_a_wrong_client_ca_is_the_only_error(problems: Problems, mutual: dict[str, str]) -> None:
    """Settings that depend on it are not validated."""
    mutual["DELTAWIRE_SERVER_TLS_CLIENT_CA_FILE"] = "/nowhere/ca.pem"
    (line,) = problems(VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS="a all mtls:dns:a", **mutual)
    assert line.startswith("server.tls_client_ca_file")


def test_a_file_that_is_not_there(problems: Problems, tmp_path: Path) -> None:
    """Or is none."""
    (line,) = problems("--access-keys-file", str(tmp_path / "no"), VLLM_URL=URL)
    assert "no does not exist: give the path of a text file with access lines" in line
    (line,) = problems("--access-keys-file", str(tmp_path), VLLM_URL=URL)
    assert "is not a file" in line


def test_bytes_that_are_no_text(read: Parse, problems: Problems, keys_file: Path) -> None:
    """Do no harm in a comment; elsewhere their line is wrong, and named."""
    keys_file.write_bytes(b"# M\xfcller\nci all 0123456789abcdef\n")
    assert len(read("--access-keys-file", str(keys_file), VLLM_URL=URL).settings.access.principals) == 1
    keys_file.write_bytes(b"ci all 0123456789abcdef\nM\xfcller all 1123456789abcdef\n")
    (line,) = problems("--access-keys-file", str(keys_file), VLLM_URL=URL)
    assert f"{keys_file} line 2: the name must be" in line


@pytest.mark.parametrize(
    ("mode", "line", "warnings"),
    [
        (0o600, f"ci all {SECRET}", []),
        (0o640, f"ci all {SECRET}", []),
        (0o644, f"ci all {SECRET}", ["all users of this machine can read"]),
        (0o644, f"ci all sha256:{DIGEST}", []),
        (0o660, f"ci all sha256:{DIGEST}", ["users other than the owner can write"]),
        (0o602, f"ci all sha256:{DIGEST}", ["users other than the owner can write"]),
        (0o666, f"ci all {SECRET}", ["users other than the owner can write", "all users of this machine can read"]),
    ],
)
def test_permissions_of_the_file(read: Parse, keys_file: Path, mode: int, line: str, warnings: list[str]) -> None:
    """A file that other users can write, or one with keys that they can read, causes a warning with a remedy, not a failure."""
    keys_file.write_text(line)
    keys_file.chmod(mode)
    access = read("--access-keys-file", str(keys_file), VLLM_URL=URL).settings.access
    assert [warning.partition(f" {keys_file}")[0].partition(" the keys")[0] for warning in access.warnings] == warnings
    assert all("chmod" in warning and "geheim" not in warning for warning in access.warnings)


def test_keys_of_the_environment_do_not_make_the_file_secret(read: Parse, keys_file: Path) -> None:
    """Only the file's own lines count for how it is kept."""
    keys_file.chmod(0o644)
    settings = read(
        "--access-keys-file", str(keys_file), VLLM_URL=URL, DELTAWIRE_ACCESS_KEYS=f"ci all {SECRET}"
    ).settings
    assert settings.access.warnings == ()


def test_printed_settings_say_who_may_call(read: Parse, keys_file: Path, mutual: dict[str, str]) -> None:
    """Names, permissions and places, beside values; neither keys nor digests; and it is still TOML."""
    keys_file.write_text(f"\nops all {SECRET}\n")
    invocation = read(
        "--access-keys-file",
        str(keys_file),
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_KEYS=f"ci call,read sha256:{'1' * 64};mesh call mtls:uri:spiffe://mesh/a",
        **mutual,
    )
    text = effective(invocation.settings, invocation.origins)
    start = text.index("[access]")
    assert text[start : text.index("\n\n", start)].splitlines() == [
        "[access]",
        f'keys_file = "{keys_file}"  # flag --access-keys-file',
        'keys = "***"  # environment DELTAWIRE_ACCESS_KEYS',
        "open = false  # default",
        'revoke = "end"  # default',
        "trusted_proxies = []  # default",
        'caller_header = "x-forwarded-client-cert"  # default',
        f"# ops all sha256:***  # keys_file {keys_file} line 2",
        "# ci call,read sha256:***  # keys line 1",
        "# mesh call mtls:uri:spiffe://mesh/a  # keys line 2",
    ]
    rest = {"open": False, "revoke": "end", "trusted_proxies": [], "caller_header": "x-forwarded-client-cert"}
    assert tomllib.loads(text)["access"] == {"keys_file": str(keys_file), "keys": "***", **rest}
    for secret in (SECRET, DIGEST, "1" * 64):
        assert secret not in text


def test_printed_settings_say_that_every_caller_may_call(read: Parse) -> None:
    """Without access lines."""
    shown = effective(read(VLLM_URL=URL).settings)
    section = shown[shown.index("[access]\n# keys_file is not set\n# keys is not set\nopen = false\n") :]
    assert section[: section.index("\n\n")].endswith("\n# every caller may do everything")


def test_proxies_and_the_names_that_they_assert(read: Parse, mutual: dict[str, str]) -> None:
    """They are read from lists, and the header's name is in lower case, as headers arrive."""
    access = read(
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_TRUSTED_PROXIES="mtls:dns:envoy.mesh, mtls:cn:envoy",
        DELTAWIRE_ACCESS_CALLER_HEADER=" X-Caller ",
        DELTAWIRE_ACCESS_KEYS="a call proxy:alice; b call mtls:dns:b",
        **mutual,
    ).settings.access
    assert access.trust == Trust(frozenset({"mtls:dns:envoy.mesh", "mtls:cn:envoy"}), "x-caller")
    assert [str(each.credential) for each in access.principals] == ["proxy:alice", "mtls:dns:b"]
    assert read(VLLM_URL=URL).settings.access.trust == Trust()


def test_certificates_are_forwarded_over_a_unix_socket(read: Parse) -> None:
    """Then lines may have their names, although no listener requests certificates."""
    settings = read(
        *("--listen", "unix:/run/d.sock", "--set", "access.trusted_proxies=unix"),
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_KEYS="a call mtls:dns:a",
    ).settings
    assert settings.access.principals


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ["trusted_proxies=mtls:dns:envoy.mesh"],
            "access.trusted_proxies (from flag --set access.trusted_proxies): mtls: needs",
        ),
        (["trusted_proxies=unix"], "unix needs a unix socket: add unix:/path to server.listen (--listen)"),
        (["trusted_proxies=envoy"], "must be unix, or a name in the proxy's certificate: write mtls:uri:spiffe://"),
        (["keys_file=KEYS"], "line 1: proxy: needs a proxy that names its callers: set access.trusted_proxies and"),
        (["keys_file=KEYS", "caller_header=x-caller"], "line 1: proxy: needs a proxy"),
        *(
            ([f"caller_header={name}"], "has another meaning: let the proxy send the caller in a header of its own")
            for name in (
                *("Authorization", "x-deltawire-key", "x-vllm-api-token", "x-request-id", "x-forwarded-for", "te"),
                *("grpc-timeout", "x-caller-bin", "deltawire-owner-bin", "user-agent", "host", "x-forwarded-host"),
            )
        ),
        *(([f"caller_header={name}"], "is not the name of a header") for name in ("", "x caller", ":path", "é", "a:b")),
    ],
)
def test_names_that_nobody_could_assert(problems: Problems, keys_file: Path, flags: list[str], problem: str) -> None:
    """What can never match, and headers with another meaning, are mistakes."""
    keys_file.write_text("alice call proxy:alice\n")
    given = [f"--set=access.{flag}".replace("KEYS", str(keys_file)) for flag in flags]
    (line,) = problems("--vllm-url", URL, *given)
    assert problem in line


def test_a_proxy_with_envoys_header_asserts_no_other_names(problems: Problems) -> None:
    """A line with proxy: would never match."""
    (line,) = problems(
        *("--listen", "unix:/run/d.sock", "--set", "access.trusted_proxies=unix"),
        VLLM_URL=URL,
        DELTAWIRE_ACCESS_KEYS="a call proxy:a",
    )
    assert line.startswith("access.keys (from environment DELTAWIRE_ACCESS_KEYS): line 1: proxy: needs a proxy")


def test_the_mask_is_not_a_line() -> None:
    """For printed settings that are read again, the message says what is missing."""
    with pytest.raises(ValidationError, match="only the mask of the lines in printed settings"):
        AccessSettings.model_validate({"keys": "***"})


def test_keys_of_the_wrong_type_are_not_shown(problems: Problems) -> None:
    """As for every secret."""
    (line,) = problems("--vllm-url", URL, file=f"[access]\nkeys = ['ci all {SECRET}']")
    assert line.endswith("must be a string, in quotes")


def test_open_contradicts_lines(problems: Problems) -> None:
    """Whichever of the two is a mistake, it is not guessed."""
    (line,) = problems(VLLM_URL=URL, DELTAWIRE_ACCESS_OPEN="true", DELTAWIRE_ACCESS_KEYS=f"a call {SECRET}")
    assert line.startswith("access.open (from environment DELTAWIRE_ACCESS_OPEN): is true, but there are access lines")
    assert "remove either" in line


def test_what_a_revoked_caller_s_calls_do(read: Parse, problems: Problems) -> None:
    """They end, unless the operator says otherwise."""
    assert read(VLLM_URL=URL).settings.access.revoke == "end"
    assert read(VLLM_URL=URL, DELTAWIRE_ACCESS_REVOKE="Finish").settings.access.revoke == "finish"
    (line,) = problems(VLLM_URL=URL, DELTAWIRE_ACCESS_REVOKE="cut")
    assert "must be one of end, finish, not 'cut'" in line
