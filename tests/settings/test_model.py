from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_core import PydanticUndefined

from deltawire_server.settings import (
    ImageSettings,
    ProviderSettings,
    RegistrySettings,
    ServerSettings,
    Settings,
    UsageSettings,
    is_local,
    shown_database_url,
)
from deltawire_server.settings.fields import expectation, field_at, is_secret
from deltawire_server.settings.model import SECTIONS
from tests.settings.conftest import URL

FIELDS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def refusal(
    model: type[ServerSettings | ProviderSettings | RegistrySettings | ImageSettings | UsageSettings], **values: object
) -> str:
    """The message of the single error that these values give."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    (error,) = caught.value.errors()
    return error["msg"]


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_every_field_is_described_in_sentences(section: str, key: str) -> None:
    """The descriptions are the help, the example and the reference: none may be missing, none without a word on defaults."""
    field = SECTIONS[section].model_fields[key]
    assert field.description
    assert field.description[0].isupper()
    assert field.description.endswith(".")
    if field.default is PydanticUndefined or field.default in {None, ""}:
        assert field.examples


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_times_say_seconds_and_sizes_say_bytes(section: str, key: str) -> None:
    """A field's unit stands at the start of its description."""
    field = SECTIONS[section].model_fields[key]
    description = field.description or ""
    if "seconds" in expectation(field):
        assert description.startswith("Seconds")
    if key.endswith("_bytes"):
        assert description.startswith("Bytes")


def test_every_section_has_its_model() -> None:
    """The table of sections and the tree are the same."""
    assert list(SECTIONS) == list(Settings.model_fields)
    for section, model in SECTIONS.items():
        if section != "providers":
            assert Settings.model_fields[section].annotation is model


def test_only_tokens_keys_and_headers_are_secret() -> None:
    """A new secret must be of the type that is masked."""
    assert [key for section, key in FIELDS if is_secret(SECTIONS[section].model_fields[key])] == [
        "keys",
        "api_token",
        "headers",
    ]


def test_paths_that_lead_nowhere() -> None:
    """A path to no field gives none."""
    assert field_at(("server",)) is None
    assert field_at(("nowhere", "key")) is None
    assert field_at(("providers", "vllm")) is None
    assert field_at(("server", "nothing")) is None


def test_settings_are_frozen() -> None:
    """What was checked stays as it was."""
    settings = Settings.model_validate({"providers": {"vllm": {"base_url": URL}}})
    with pytest.raises(ValidationError):
        settings.server.max_streams = 3


def test_built_directly_it_is_checked_as_well() -> None:
    """Every valid settings object can be served."""
    with pytest.raises(ValidationError, match="no provider is configured"):
        Settings()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("127.0.0.1:50051", ("127.0.0.1:50051",)),
        ("localhost:0", ("localhost:0",)),
        (["[::1]:50051", " unix:/run/d.sock "], ("[::1]:50051", "unix:/run/d.sock")),
        ("127.0.0.1:1, 127.0.0.2:2", ("127.0.0.1:1", "127.0.0.2:2")),
        ("[::ffff:127.0.0.1]:5", ("[::ffff:127.0.0.1]:5",)),
    ],
)
def test_addresses(given: object, kept: tuple[str, ...]) -> None:
    """One, a list, or several with commas."""
    assert ServerSettings.model_validate({"listen": given}).listen == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unix:", "has no path: write unix:/path"),
        ("unix://", "has no path"),
        ("127.0.0.1", "has no port from 0 to 65535: write host:port"),
        ("127.0.0.1:65536", "has no port from 0 to 65535"),
        ("127.0.0.1:http", "has no port"),
        ("127.0.0.1:²", "has no port"),
        (":50051", "has no host: write 127.0.0.1:50051"),
        ("::1:50051", "needs brackets: write [::1]:50051"),
        ("[127.0.0.1]:50051", "is not a valid address"),
        ("http://127.0.0.1:50051", "is not a valid address: write host:port"),
        ("", "has no port"),
        ([], "at least 1"),
    ],
)
def test_addresses_that_are_none(given: object, message: str) -> None:
    """Each says what to write instead."""
    assert message in refusal(ServerSettings, listen=given)


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("unix:/run/d.sock", True),
        ("localhost:1", True),
        ("127.3.4.5:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("[::ffff:10.0.0.1]:1", False),
        ("[::]:1", False),
        ("0.0.0.0:1", False),
        ("gateway.example:1", False),
    ],
)
def test_what_other_machines_can_reach(listen: str, *, local: bool) -> None:
    """A name counts as reachable unless it is localhost: what it resolves to may change."""
    assert is_local(listen) is local


def test_certificate_and_key_go_together(pem: Path) -> None:
    """Either alone is an error, both are TLS, and a client CA needs them."""
    assert "needs its private key" in refusal(ServerSettings, tls_cert_file=pem)
    assert "needs a certificate" in refusal(ServerSettings, tls_key_file=pem)
    assert "needs TLS" in refusal(ServerSettings, tls_client_ca_file=pem)
    server = ServerSettings(tls_cert_file=pem, tls_key_file=pem, tls_client_ca_file=pem, listen=("0.0.0.0:1",))
    assert server.tls
    assert not ServerSettings().tls


def test_plaintext_beyond_this_machine_is_chosen(pem: Path) -> None:
    """The message names the address, and both ways out."""
    message = refusal(ServerSettings, listen=["127.0.0.1:1", "0.0.0.0:2", "[::]:3"])
    assert "0.0.0.0:2, [::]:3 can be reached" in message
    assert "--tls-cert-file" in message
    assert "--allow-plaintext" in message
    assert ServerSettings(listen=("0.0.0.0:2",), allow_plaintext=True).allow_plaintext
    assert not ServerSettings(listen=("0.0.0.0:2",), tls_cert_file=pem, tls_key_file=pem).allow_plaintext


def test_a_wrong_certificate_is_the_only_error(tmp_path: Path) -> None:
    """Settings that depend on it are not validated."""
    missing = str(tmp_path / "missing")
    assert f"{missing} does not exist" in refusal(ServerSettings, tls_cert_file=missing, listen=["0.0.0.0:1"])


def test_files_are_looked_at(tmp_path: Path, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a directory, not allowed: named at start-up."""
    assert "is not a file" in refusal(ServerSettings, tls_cert_file=tmp_path)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert f"{pem} cannot be read (Permission denied)" in refusal(ServerSettings, tls_cert_file=pem)


def test_required_usage_records_need_a_folder() -> None:
    """Otherwise completions would run without a record, and without a word."""
    with pytest.raises(ValidationError, match=r"set usage\.folder too"):
        UsageSettings(required=True)


def test_the_folder_of_usage_records(tmp_path: Path, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It exists and can be written to; an empty name means no records."""
    assert UsageSettings.model_validate({"folder": ""}).folder is None
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert UsageSettings(folder=Path("~") / tmp_path.name).folder == tmp_path
    for path in (pem, tmp_path / "absent"):
        assert f"{path} is not a folder: create it" in refusal(UsageSettings, folder=path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert "cannot be written to" in refusal(UsageSettings, folder=tmp_path)


def test_an_empty_file_name_is_none() -> None:
    """`tls_cert_file = ""` is a template's way to leave it out."""
    assert ServerSettings.model_validate({"tls_cert_file": ""}).tls_cert_file is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (True, True),
        (False, False),
        ("true", True),
        ("True", True),
        ("1", True),
        (1, True),
        ("0", False),
        ("false", False),
    ],
)
def test_tls_verify_takes_every_spelling(given: object, *, kept: bool) -> None:
    """The original took the words "true" and "1" for paths."""
    assert ProviderSettings.model_validate({"base_url": URL, "tls_verify": given}).tls_verify is kept


def test_a_ca_file_is_kept_expanded(pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original checked the expanded path and kept the other."""
    monkeypatch.setenv("HOME", str(pem.parent))
    for given in (f"~/{pem.name}", pem):
        assert ProviderSettings.model_validate({"base_url": URL, "tls_verify": given}).tls_verify == pem


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/nowhere/ca.pem", "/nowhere/ca.pem does not exist"),
        ("", "true, false or the path"),
        (2, "true, false or the path"),
        ("~no-such-user/ca.pem", "write the absolute path"),
    ],
)
def test_tls_verify_that_is_neither(given: object, message: str) -> None:
    """A typing error must not switch checking off."""
    assert message in refusal(ProviderSettings, base_url=URL, tls_verify=given)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://vllm.example/v1/", "https://vllm.example/v1"),
        (" HTTP://[::1]:8000/team/a/v1// ", "HTTP://[::1]:8000/team/a/v1"),
        ("http://host/p@th", "http://host/p@th"),
    ],
)
def test_base_urls(given: str, kept: str) -> None:
    """With and without /v1, prefix, trailing slash."""
    assert ProviderSettings.model_validate({"base_url": given}).base_url == (kept,)


@pytest.mark.parametrize("given", [["http://a", "https://a/v1"], "http://a,https://a/v1", " http://a , https://a/v1/ "])
def test_replicas(given: object) -> None:
    """A list, or several addresses with commas between them; what differs in any part is another server."""
    assert ProviderSettings.model_validate({"base_url": given}).base_url == ("http://a", "https://a/v1")


@pytest.mark.parametrize(
    "again", ["http://Host:80/v1", "HTTP://host", "http://host//v1/", "http://host:80/", "http://host"]
)
def test_one_server_twice(again: str) -> None:
    """However it is written; a path, a port or a scheme of its own makes another."""
    text = refusal(ProviderSettings, base_url=["http://other", "http://host/v1", again])
    assert f"contains the same server twice, as http://host/v1 and {again.rstrip('/')}: remove one of them" in text
    different = ["http://host", "https://host", "http://host:8000", "http://host/v2", "http://host/a/v1"]
    assert ProviderSettings.model_validate({"base_url": different}).base_url == tuple(different)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x team": "geheim"}, "'x team' is not a valid header name"),
        ({"x\r\ny": "geheim"}, "is not a valid header name"),
        ({"": "geheim"}, "'' is not a valid header name"),
        (
            {"Authorization": "Bearer geheim"},
            "must not set Authorization, which the gateway sets itself: give the token",
        ),
        ({"X-Request-Id": "geheim"}, "must not set X-Request-Id, which the gateway sets itself: remove it"),
        ({"content-length": "geheim"}, "must not set content-length"),
        ({"x-team": "geheim", "X-Team": "geheim"}, "sets X-Team twice"),
        ({"x-team": "geheim\r\nx: y"}, "must set x-team to one line of printable ASCII"),
        ({"x-team": "geheim\x7f"}, "must set x-team to one line of printable ASCII"),
        ({"x-team": "geheimä"}, "must set x-team to one line of printable ASCII"),
        ({"x-team": " "}, "must set x-team to one line"),
        ({"x-team": "***"}, "only the mask of a value in printed settings"),
    ],
)
def test_headers_that_cannot_be_sent(given: object, message: str) -> None:
    """Each message names the header and the remedy, and never a value."""
    text = refusal(ProviderSettings, base_url=URL, headers=given)
    assert message in text
    assert "geheim" not in text


@pytest.mark.parametrize("name", ["allowed_models", "allowed_extra_fields"])
def test_allowed_names(name: str) -> None:
    """One name, several, or none; an empty name is a mistake."""
    for given, kept in (("m", ("m",)), (["a", " b/* "], ("a", "b/*")), ("a,b", ("a", "b")), ([], ())):
        provider = ProviderSettings.model_validate({"base_url": URL, name: given})
        assert getattr(provider, name) == kept
    assert "contains an empty name" in refusal(ProviderSettings, base_url=URL, **{name: "a,"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "must begin with http:// or https://"),
        ("localhost:8000", "did you mean http://localhost:8000?"),
        ("ftp://host", "must begin with http:// or https://"),
        ("http://", "has no host"),
        ("http:///v1", "has no host"),
        ("http://host:port", "is not a valid URL"),
        ("http://[::1", "is not a valid URL"),
        ("http://host/v1?x=1", "query (?) or a fragment (#)"),
        ("http://host/v1#x", "query (?) or a fragment (#)"),
        ("http://ho st", "white space"),
        ("http://host/\x7f", "control characters"),
        ("http://user:geheim@host", "give the token as api_token"),
        ("user:geheim@host:8000", "give the token as api_token"),
    ],
)
def test_base_urls_that_are_none(given: str, message: str) -> None:
    """Each says what to write; none repeats a password."""
    text = refusal(ProviderSettings, base_url=given)
    assert message in text
    assert "geheim" not in text


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space around a token is a file's last newline; nothing is no token."""
    monkeypatch.delenv("VLLM_API_TOKEN", raising=False)
    assert ProviderSettings(base_url=(URL,), api_token=SecretStr("s3cret\n")).api_token == SecretStr("s3cret")
    assert ProviderSettings(base_url=(URL,), api_token=SecretStr(" ")).api_token is None
    assert ProviderSettings(base_url=(URL,)).api_token is None
    assert "printable ASCII" in refusal(ProviderSettings, base_url=URL, api_token="two\r\nlines")
    assert "only the mask of a token" in refusal(ProviderSettings, base_url=URL, api_token="***")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("sqlite:///rel.db", "sqlite+aiosqlite:///rel.db"),
        ("sqlite:////abs/r.db?timeout=3", "sqlite+aiosqlite:////abs/r.db?timeout=3"),
        ("sqlite+aiosqlite:////abs/r.db", "sqlite+aiosqlite:////abs/r.db"),
        ("sqlite://", "sqlite+aiosqlite://"),
        ("sqlite:///~/r.db", "sqlite+aiosqlite:////home/op/r.db"),
        ("postgresql://u:geheim@h:5433/d?sslmode=require", "postgresql+psycopg://u:geheim@h:5433/d?sslmode=require"),
        ("postgres:///d", "postgresql+psycopg:///d"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
    ],
)
def test_database_urls(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always with the asynchronous driver."""
    monkeypatch.setenv("HOME", "/home/op")
    assert RegistrySettings(database_url=given).database_url == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/var/lib/r.db", "is not a database URL: write sqlite:////"),
        ("postgresql+asyncpg://u:geheim@h/d", "'postgresql+asyncpg' is not supported: write"),
        ("postgresql://u:geheim@h", "has no database name: write postgresql://"),
        ("postgresql://u:***@h/d", "give the secret itself"),
        ("postgresql://u@h/d?password=***", "give the secret itself"),
        ("postgresql://u:geheim@geheim/geheim@h/d", "write %40 for @ and %2F for /"),
        ("postgresql://u:geheim@geheim@h/d", "write %40 for @"),
        ("postgresql://u/geheim:x@h/d", "write %40 for @ and %2F for /"),
        ("postgresql://u:geheim/x@h", "has no database name"),
        ("postgresql://u:1@geheim:geheim/d", "is not a database URL: write postgresql://user@host:5432/name"),
        ("sqlite://r.db", "has a host"),
        ("sqlite:///~no-such-user/r.db", "write the absolute path"),
    ],
)
def test_database_urls_that_are_none(given: str, message: str) -> None:
    """Each says what to write; none repeats a password."""
    text = refusal(RegistrySettings, database_url=given)
    assert message in text
    assert "geheim" not in text


def test_a_database_whose_client_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to install, before anything is started."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'deltawire[postgres]'" in refusal(RegistrySettings, database_url="postgresql://h/d")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:ge:heim@h:5/d", "postgresql+psycopg://u:***@h:5/d"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("sqlite+aiosqlite:////a@b.db", "sqlite+aiosqlite:////a@b.db"),
        ("postgresql+psycopg://u:ge%40he%2Fim@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql+psycopg://u:geh/eim@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql+psycopg://u@h/d?password=geheim&a=b", "postgresql+psycopg://u@h/d?a=b&password=***"),
        ("postgresql+psycopg://u@h/d?PassFile=geheim", "postgresql+psycopg://u@h/d?PassFile=***"),
        ("postgresql+psycopg://u@h/d?sslpassword=geheim", "postgresql+psycopg://u@h/d?sslpassword=***"),
        ("postgresql+psycopg://u@h/d?oauth_client_secret=geheim", "postgresql+psycopg://u@h/d?oauth_client_secret=***"),
        ("postgresql+psycopg://u@h/d?password=geheim&password=geheim", "postgresql+psycopg://u@h/d?password=***"),
        ("postgresql://u:geheim@geheim:geheim/d", "***"),
        ("geheim", "***"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    """Wherever a URL is printed: neither before the host nor in the query; of what is no URL, nothing."""
    assert shown_database_url(url) == shown
    with contextlib.suppress(ValidationError):
        settings = RegistrySettings(database_url=url)
        assert "geheim" not in repr(settings) + repr(settings.database_url) + repr(settings.model_dump())


def test_default_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under XDG_STATE_HOME if that is absolute, else under the home directory, else there is none."""
    monkeypatch.setenv("HOME", "/home/op")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert RegistrySettings().database_url == "sqlite+aiosqlite:////state/deltawire/registry.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert RegistrySettings().database_url == "sqlite+aiosqlite:////home/op/.local/state/deltawire/registry.db"

    def homeless(_: Path) -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert "--database-url" in refusal(RegistrySettings)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "many", 2**31])
def test_max_tokens_is_a_count(value: object) -> None:
    """The original took 0, negatives and booleans."""
    refusal(ProviderSettings, base_url=URL, max_tokens=value)


@pytest.mark.parametrize("value", [0, -1, True, "nan", "inf", 700_000])
def test_times_are_finite_and_below_a_week(value: object) -> None:
    """A longer one was meant as milliseconds."""
    refusal(ProviderSettings, base_url=URL, silence_timeout=value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("images.example.com", ("images.example.com",)),
        ("Images.EXAMPLE.com.", ("images.example.com",)),
        ("*.example.com, b.example:8443", ("*.example.com", "b.example:8443")),
        (["*"], ("*",)),
        ("*:0443", ("*:443",)),
        ("8.8.8.8", ("8.8.8.8",)),
        ("[2600:0::1]:8443", ("[2600::1]:8443",)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example",)),
    ],
)
def test_hosts_of_images(given: object, kept: tuple[str, ...]) -> None:
    """In the form in which addresses are compared with them."""
    assert ImageSettings.model_validate({"urls": "fetch", "allowed_hosts": given}).allowed_hosts == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://images.example.com", "is not a valid host: write images.example.com"),
        ("images.example.com/a", "is not a valid host"),
        ("user@images.example.com", "is not a valid host"),
        ("images.*.com", "is not a valid host"),
        ("*example.com", "is not a valid host"),
        ("", "is not a valid host"),
        ("2600::1", "is not a valid host"),
        ("bücher.example", "must be written in Punycode, as in the DNS: xn--…"),
        ("images.example.com:0", "has no port from 1 to 65535"),
        ("images.example.com:65536", "has no port from 1 to 65535"),
        ("127.1", "is not a valid IP address"),
        ("[::1::]", "is not a valid IP address"),
        ((), "is empty, so nothing could be fetched: list hosts, or write * for any"),
    ],
)
def test_hosts_of_images_that_are_none(given: object, message: str) -> None:
    """Each says what to write instead; none at all is an error where images are to be fetched."""
    assert message in refusal(ImageSettings, urls="fetch", allowed_hosts=given)


def test_images_by_default() -> None:
    """Nothing is fetched, and nothing needs to be said."""
    images = ImageSettings()
    assert (images.urls, images.allowed_hosts, images.schemes) == ("refuse", (), ("https",))
    assert ImageSettings.model_validate({"urls": " Refuse ", "schemes": "HTTPS, http"}).schemes == ("https", "http")
    assert "input" not in refusal(ImageSettings, schemes=[])
    assert "https" in refusal(ImageSettings, schemes=["ftp"])


@pytest.mark.parametrize("key", ["allowed_hosts", "schemes"])
def test_limits_that_passing_would_ignore(key: str) -> None:
    """Who lists hosts expects them to count; the defaults, as printed settings have them, are no such list."""
    samples = {"allowed_hosts": "a.example", "schemes": "https,http"}
    message = refusal(ImageSettings, urls="pass", **{key: samples[key]})
    assert "has no effect with images.urls = pass" in message
    assert "remove it, or set images.urls = fetch" in message
    assert ImageSettings(urls="pass", allowed_hosts=(), schemes=("https",)).urls == "pass"


def test_workers_share_ports_and_a_database() -> None:
    """Several cannot share a unix socket or a database in memory; `auto` is the number of cores."""
    assert ServerSettings.model_validate({"workers": "auto"}).workers == len(os.sched_getaffinity(0))
    assert "only ports can be shared" in refusal(ServerSettings, listen="127.0.0.1:1,unix:/run/d.sock", workers=2)
    for database in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"):
        values = {"providers": {"vllm": {"base_url": URL}}, "registry": {"database_url": database}}
        Settings.model_validate(values)
        with pytest.raises(ValidationError, match="a database in memory cannot be shared"):
            Settings.model_validate({**values, "server": {"workers": 2}})
