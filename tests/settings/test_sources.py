from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from deltawire_server.settings import SettingsError, parse
from deltawire_server.settings.fields import KeyPath, is_table
from deltawire_server.settings.model import SECTIONS
from deltawire_server.settings.sources import variable
from tests.settings.conftest import URL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.settings.conftest import Parse, Problems

SCALARS: list[KeyPath] = [
    (section, "gpu-1.a", key) if section == "providers" else (section, key)
    for section, model in SECTIONS.items()
    for key, field in model.model_fields.items()
    if not is_table(field)
]
# A value that is not the default, as text; for each key that takes more than a number.
SAMPLES = {
    "max_memory_bytes": "100000000",
    "listen": "127.0.0.1:1,127.0.0.1:2",
    "workers": "2",
    "tls_cert_file": "PEM",
    "tls_key_file": "PEM",
    "tls_client_ca_file": "PEM",
    "allow_plaintext": "true",
    "accept_caller_tokens": "true",
    "keys_file": "KEYS",
    "keys": "ci call 0123456789abcdef",
    "reflection": "false",
    "load_reports": "false",
    "urls": "pass",
    "open": "true",
    "revoke": "finish",
    "trusted_proxies": "unix",
    "caller_header": "x-caller",
    "health_listen": "0.0.0.0:2",
    "folder": "/",
    "required": "true",
    "allowed_hosts": "a.example,*.b.example:8443",
    "schemes": "https,http",
    "engine": "proxy",
    "max_images": "2",
    "max_redirects": "2",
    "max_adaptive_delay": "0.05",
    "base_url": "https://elsewhere/v1",
    "api_token": "12345678",
    "allowed_models": "llama,team-a/*",
    "tls_verify": "PEM",
    "database_url": "sqlite:////r.db",
    "level": "DEBUG",
    "format": "json",
}


@pytest.mark.parametrize("path", SCALARS, ids=".".join)
def test_every_key_has_its_variable(path: KeyPath, read: Parse, pem: Path, keys_file: Path) -> None:
    """Set alone, it changes that key and is named as its origin."""
    sample = (
        "off"
        if path == ("metrics", "listen")
        else SAMPLES.get(path[-1], "2048").replace("PEM", str(pem)).replace("KEYS", str(keys_file))
    )
    other = {f"DELTAWIRE_SERVER_TLS_{which}_FILE": str(pem) for which in ("CERT", "KEY") if "tls_" in path[1]}
    if path[1] == "trusted_proxies":
        other["DELTAWIRE_SERVER_LISTEN"] = "unix:/x"
    if path == ("usage", "required"):
        other["DELTAWIRE_USAGE_FOLDER"] = str(pem.parent)
    file = f'[providers."gpu-1.a"]\nbase_url = "{URL}"'
    before = read(file=file)
    after = read(file=file, **{**other, variable(path): sample})
    section, default = (getattr(each.settings, path[0]) for each in (after, before))
    if path[0] == "providers":
        section, default = section["gpu-1.a"], default["gpu-1.a"]
    assert getattr(section, path[-1]) != getattr(default, path[-1])
    assert after.origins[".".join(path)] == f"environment {variable(path)}"


def test_flags_over_environment_over_file(read: Parse) -> None:
    """Each source covers those before it, key by key."""
    file = f'server = {{max_streams = 1}}\nproviders.vllm = {{base_url = "{URL}"}}'
    assert read(file=file).settings.server.max_streams == 1
    assert read(file=file, DELTAWIRE_SERVER_MAX_STREAMS="2").settings.server.max_streams == 2
    invocation = read("--max-streams", "3", file=file, DELTAWIRE_SERVER_MAX_STREAMS="2")
    assert invocation.settings.server.max_streams == 3
    assert invocation.origins["server.max_streams"] == "flag --max-streams"
    assert [source.split()[0] for source in invocation.sources] == ["file", "environment", "flag"]
    assert read("--set", "server.max_streams=4", file=file).settings.server.max_streams == 4


def test_the_environment_covers_a_provider_key_by_key(read: Parse) -> None:
    """VLLM_* change what they name and leave the rest of [providers.vllm]."""
    file = f'[providers.vllm]\nbase_url = "{URL}"\nmax_tokens = 7\napi_token = "from-file"'
    vllm = read(file=file, VLLM_MAX_TOKENS="9", VLLM_API_TOKEN="").settings.providers["vllm"]
    assert (vllm.base_url, vllm.max_tokens) == ((URL,), 9)
    assert vllm.api_token == SecretStr("from-file")


def test_the_original_variables(read: Parse, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_* alone make a provider; a token of digits is a token, and a CA path is kept expanded."""
    monkeypatch.setenv("HOME", str(pem.parent))
    vllm = read(
        VLLM_URL=f"{URL}/", VLLM_MAX_TOKENS="4096", VLLM_API_TOKEN="0012345", VLLM_TLS_VERIFY=f"~/{pem.name}"
    ).settings.providers["vllm"]
    assert (vllm.base_url, vllm.max_tokens, vllm.tls_verify) == ((URL,), 4096, pem)
    assert vllm.api_token == SecretStr("0012345")


def test_lists_in_the_environment(read: Parse) -> None:
    """With commas between the values, which white space may surround."""
    vllm = read(VLLM_URL="http://a/v1, http://b", DELTAWIRE_PROVIDERS_VLLM_ALLOWED_MODELS="x , y/*").settings.providers[
        "vllm"
    ]
    assert vllm.base_url == ("http://a/v1", "http://b")
    assert vllm.allowed_models == ("x", "y/*")


def test_headers_are_in_the_file_only(read: Parse, problems: Problems) -> None:
    """As a table of their own or in one line; they go with what the environment says of the provider."""
    table = '[providers.vllm.headers]\nx-team = " search "\nX-Cell = "7"'
    line = "[providers.vllm]\nheaders = {x-team = 'search', X-Cell = '7'}"
    for file in (table, line):
        vllm = read(file=file, VLLM_URL=URL).settings.providers["vllm"]
        assert {name: value.get_secret_value() for name, value in vllm.headers.items()} == {
            "x-team": "search",
            "X-Cell": "7",
        }
    assert problems(VLLM_URL=URL, DELTAWIRE_PROVIDERS_VLLM_HEADERS="x=geheim") == (
        "environment DELTAWIRE_PROVIDERS_VLLM_HEADERS: only the settings file can set these: write [providers.vllm.headers] there",
    )


def test_only_the_address_is_needed(read: Parse) -> None:
    """Unset or empty, there is no limit and no made-up token."""
    vllm = read(VLLM_URL=URL, VLLM_MAX_TOKENS="", VLLM_API_TOKEN="", VLLM_TLS_VERIFY="").settings.providers["vllm"]
    assert (vllm.max_tokens, vllm.api_token, vllm.tls_verify) == (None, None, True)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("FALSE", False), ("0", False)])
def test_vllm_tls_verify_words(text: str, *, value: bool, read: Parse) -> None:
    """The original refused all but paths."""
    assert read(VLLM_URL=URL, VLLM_TLS_VERIFY=text).settings.providers["vllm"].tls_verify is value


def test_no_provider_names_all_ways(problems: Problems) -> None:
    """Flag, environment and file."""
    (line,) = problems()
    for way in ("--vllm-url", "VLLM_URL", "[providers.vllm]"):
        assert way in line
    assert problems(VLLM_URL="") == (line,)


def test_a_provider_without_address(problems: Problems) -> None:
    """It names what speaks of that provider, and how to complete it."""
    (line,) = problems(VLLM_MAX_TOKENS="5")
    assert line.startswith(
        "providers.vllm.base_url (from environment VLLM_MAX_TOKENS): is missing: set it by --vllm-url"
    )
    (line,) = problems(file="[providers.gpu]")
    assert line.startswith("providers.gpu.base_url (from file ")
    assert "DELTAWIRE_PROVIDERS_GPU_BASE_URL" in line
    assert "VLLM_URL" not in line


def test_providers_by_environment_alone(read: Parse) -> None:
    """An id that no other source knows is the name's in lower case."""
    settings = read(DELTAWIRE_PROVIDERS_GPU_2_BASE_URL=URL).settings
    assert list(settings.providers) == ["gpu_2"]


def test_a_variable_finds_the_provider_of_a_flag(read: Parse) -> None:
    """`--set` introduces ids too, with dots and dashes in them."""
    invocation = read("--set", f"providers.a-b.c.base_url={URL}", DELTAWIRE_PROVIDERS_A_B_C_MAX_TOKENS="3")
    assert invocation.settings.providers["a-b.c"].max_tokens == 3


def test_a_variable_that_may_mean_two_providers(problems: Problems) -> None:
    """It is not guessed."""
    file = f'providers = {{a-b = {{base_url = "{URL}"}}, a_b = {{base_url = "{URL}"}}}}'
    (line,) = problems(file=file, DELTAWIRE_PROVIDERS_A_B_MAX_TOKENS="3")
    assert line.startswith("environment DELTAWIRE_PROVIDERS_A_B_MAX_TOKENS: may refer to provider a-b or a_b")


def test_two_names_for_one_key(read: Parse, problems: Problems) -> None:
    """The same value twice is fine; different ones are not chosen between, and a token is not shown."""
    assert read(VLLM_URL=URL, DELTAWIRE_PROVIDERS_VLLM_BASE_URL=URL).settings.providers["vllm"].base_url == (URL,)
    (line,) = problems(VLLM_URL=URL, VLLM_API_TOKEN="geheim", DELTAWIRE_PROVIDERS_VLLM_API_TOKEN="geheimer")
    assert line == (
        "providers.vllm.api_token (from environment DELTAWIRE_PROVIDERS_VLLM_API_TOKEN and environment VLLM_API_TOKEN): "
        "two different values: keep one of them"
    )
    (line,) = problems("--vllm-url", URL, "--max-streams", "2", "--set", "server.max_streams=3")
    assert line.startswith(
        "server.max_streams (from flag --max-streams and flag --set server.max_streams): two different"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[servr]", "servr (from FILE): no such section; did you mean server?"),
        (
            "[zzz]",
            (
                "zzz (from FILE): no such section; valid ones are server, access, stream, retention, limits, images,"
                " providers, registry, usage, metrics, log"
            ),
        ),
        ("[server]\nmax_stream = 1", "server.max_stream (from FILE): no such key; did you mean server.max_streams?"),
        ("[log]\nzzz = 1", "log.zzz (from FILE): no such key; valid ones are level, format"),
        ("log = 3", "log (from FILE): must be a table: write [log] and the keys under it"),
        (
            "providers.gpu = 3",
            "providers.gpu (from FILE): must be a table: write [providers.gpu] and the keys under it",
        ),
        (
            "[server]\nmax_streams = 'lots'",
            "server.max_streams (from FILE): must be a whole number from 1 to 100000, not 'lots'",
        ),
        (
            "[server]\nmax_streams = true",
            "server.max_streams (from FILE): must be a whole number from 1 to 100000, not True",
        ),
        ("[server]\nreflection = 'maybe'", "server.reflection (from FILE): must be true or false, not 'maybe'"),
        ("[server]\nlisten = 5", "server.listen (from FILE): must be an address or a list of addresses, not 5"),
        ("[server]\nlisten = []", "server.listen (from FILE): must be an address or a list of addresses, not []"),
        (
            "[server]\ntls_cert_file = 5",
            "server.tls_cert_file (from FILE): must be the path of a file, in quotes, not 5",
        ),
        ("[log]\nlevel = 'loud'", "log.level (from FILE): must be one of debug, info, warning, error, not 'loud'"),
        ("[log]\nlevel = 5", "log.level (from FILE): must be one of debug, info, warning, error, not 5"),
        ("[registry]\ndatabase_url = 5", "registry.database_url (from FILE): must be a string, in quotes, not 5"),
        (
            "[stream]\nslow_caller_timeout = 0",
            "stream.slow_caller_timeout (from FILE): must be a number of seconds above 0 and up to 604800, not 0",
        ),
        (
            "[server]\ndrain_delay = -1",
            "server.drain_delay (from FILE): must be a number of seconds from 0 to 604800, not -1",
        ),
        (
            "[providers.vllm]\nbase_url = []",
            "providers.vllm.base_url (from FILE): must be an address or a list of addresses, not []",
        ),
        (
            "[providers.vllm]\nbase_url = ['http://h', 'http://h/v1/']",
            "providers.vllm.base_url (from FILE): contains the same server twice, as http://h and http://h/v1: remove one of them",
        ),
        (
            "[providers.vllm]\nallowed_models = [5]",
            "providers.vllm.allowed_models (from FILE): must be a name or a list of names, not 5",
        ),
        (
            "[providers.vllm]\nheaders = 'geheim'",
            "providers.vllm.headers (from FILE): must be a table of names and values, in quotes",
        ),
        (
            "[providers.vllm.headers]\nx-number = 5",
            "providers.vllm.headers (from FILE): must be a table of names and values, in quotes",
        ),
        (
            "[providers.GPU]\nbase_url = 'http://h'",
            (
                "providers.GPU (from FILE): not a valid provider id: use lower-case letters, digits, -, _ and ., "
                "starting with a letter or digit"
            ),
        ),
    ],
)
def test_what_is_wrong_in_a_file(text: str, line: str, problems: Problems, settings_file: Path) -> None:
    """Key, file, what is wrong and what to write: one line."""
    flags = () if "base_url = [" in text else ("--vllm-url", URL)
    assert problems(*flags, file=text) == (line.replace("FILE", f"file {settings_file}"),)


def test_a_section_that_is_no_table_is_reported_under_a_variable_too(problems: Problems) -> None:
    """The variable for a key inside it neither hides the error nor fails."""
    (line,) = problems("--vllm-url", URL, file="log = 3", DELTAWIRE_LOG_LEVEL="info")
    assert line.startswith("log (from file ")
    (line,) = problems(file="providers = 3", VLLM_URL=URL, DELTAWIRE_PROVIDERS_A_MAX_TOKENS="1")
    assert line.startswith("providers (from file ")


def test_long_values_are_cut(problems: Problems) -> None:
    """One line stays one line that can be read."""
    (line,) = problems("--vllm-url", URL, DELTAWIRE_SERVER_MAX_STREAMS="x" * 10_000)
    assert line.endswith("x…")
    assert len(line) < 300


def test_all_problems_at_once(problems: Problems, pem: Path) -> None:
    """From every source, and those between keys too."""
    lines = problems(
        *("--log-level", "loud", "--set", "server.listen=0.0.0.0:1", "--tls-key-file", str(pem)),
        file="[server]\nmax_streams = 0\n[stream]\nqueue = 5",
        VLLM_MAX_TOKENS="-1",
        DELTAWIRE_SERVER_REFLEXION="true",
    )
    assert [line.split()[0] for line in lines] == [
        "environment",
        "server.tls_key_file",
        "server.allow_plaintext",
        "server.max_streams",
        "stream.queue",
        "providers.vllm.base_url",
        "providers.vllm.max_tokens",
        "log.level",
    ]
    assert "server.allow_plaintext (from flag --set server.listen): is false, but 0.0.0.0:1 can be reached" in lines[2]
    assert lines[-1].startswith("log.level (from flag --log-level): must be one of debug")


def test_a_certificate_without_key_names_where_the_certificate_is_from(problems: Problems, pem: Path) -> None:
    """The missing key has no source; the certificate has."""
    (line,) = problems(VLLM_URL=URL, DELTAWIRE_SERVER_TLS_CERT_FILE=str(pem))
    assert line.startswith("server.tls_key_file (from environment DELTAWIRE_SERVER_TLS_CERT_FILE): is missing")
    assert "--tls-key-file" in line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("DELTAWIRE_SERVER_MAX_STREEMS", "no such setting; did you mean DELTAWIRE_SERVER_MAX_STREAMS?"),
        ("DELTAWIRE_SERVR_LISTEN", "no such setting; did you mean DELTAWIRE_SERVER_LISTEN?"),
        ("DELTAWIRE_LOG_Q_____________________", "no such setting: unset it"),
        (
            "DELTAWIRE_PROVIDERS_VLLM_TOKEN",
            "no such setting: write DELTAWIRE_PROVIDERS_<ID>_<KEY>, KEY one of BASE_URL",
        ),
        ("DELTAWIRE_PROVIDERS_MAX_TOKENS", "no such setting: write DELTAWIRE_PROVIDERS_<ID>_<KEY>"),
    ],
)
def test_variables_that_set_nothing(name: str, line: str, problems: Problems) -> None:
    """A misspelt variable would otherwise be silence."""
    (said,) = problems(VLLM_URL=URL, **{name: "1"})
    assert said.startswith(f"environment {name}: {line}")


@pytest.mark.parametrize(
    "name",
    [
        *("DELTAWIRE_TARGET", "DELTAWIRE_TOKEN", "VLLM_PORT", "VLLM_API_KEY"),
        *("DELTAWIRE_SERVER_SERVICE_HOST", "DELTAWIRE_SERVER_SERVICE_PORT_GRPC", "DELTAWIRE_SERVER_PORT"),
        *("DELTAWIRE_SERVER_PORT_50051_TCP", "DELTAWIRE_SERVER_PORT_50051_TCP_ADDR", "DELTAWIRE_PORT"),
    ],
)
def test_variables_of_others(name: str, read: Parse) -> None:
    """The client's, vLLM's own, and those Kubernetes makes for a service called deltawire-server."""
    assert read(VLLM_URL=URL, **{name: "tcp://10.0.0.1:50051"}).sources == ("environment VLLM_URL",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[server\n", "is not TOML: "),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_understood(content: bytes, message: str, problems: Problems, settings_file: Path) -> None:
    """The error names the file, and nothing else is validated."""
    (line,) = problems(file=content)
    assert line.startswith(f"file {settings_file}: {message}")


def test_files_that_cannot_be_read(tmp_path: Path, problems: Problems) -> None:
    """Missing, or a directory."""
    assert problems("--config", str(tmp_path / "no.toml"))[0].endswith(
        "no.toml: cannot be read (No such file or directory): see --config and DELTAWIRE_CONFIG"
    )
    assert "cannot be read (Is a directory)" in problems(DELTAWIRE_CONFIG=str(tmp_path))[0]


def test_the_flag_names_the_file_over_the_environment(tmp_path: Path, read: Parse) -> None:
    """One file, never two."""
    other = tmp_path / "other.toml"
    other.write_text(f'[providers.other]\nbase_url = "{URL}"')
    invocation = read("--config", str(other), file="[nonsense]")
    assert list(invocation.settings.providers) == ["other"]
    assert invocation.sources == (f"file {other}",)


@pytest.mark.parametrize(
    "environ",
    [
        {"VLLM_URL": URL, "VLLM_API_TOKEN": "geheim\x01", "DELTAWIRE_LOG_LEVEL": "loud"},
        {"VLLM_URL": "http://me:geheim@host"},
        {"VLLM_URL": "me:geheim@host:8000/v1"},
        {"VLLM_URL": URL, "DELTAWIRE_REGISTRY_DATABASE_URL": "postgresql://u:geheim@h"},
        {"VLLM_URL": URL, "VLLM_API_TOKEN": "geheim", "DELTAWIRE_PROVIDERS_VLLM_API_TOKEN": "geheim2"},
        {"VLLM_URL": URL, "DELTAWIRE_ACCESS_KEYS": "ci call geheim"},
        {"VLLM_URL": URL, "DELTAWIRE_ACCESS_KEYS": "a call geheimgeheimgeheim; b geheimgeheimgeheim call"},
        {"VLLM_URL": URL, "DELTAWIRE_ACCESS_KEYS": "a call geheimgeheimgeheim; b read geheimgeheimgeheim"},
    ],
)
def test_no_secret_in_errors(environ: dict[str, str]) -> None:
    """Neither in the message, nor in the traceback, nor on any exception it hangs on."""
    with pytest.raises(SettingsError) as caught:
        parse([], environ)
    assert "geheim" not in "".join(traceback.format_exception(caught.value, chain=True))
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [
        'api_token = "geheim',
        "[providers.vllm]\napi_token = 'geheim'\nbase_url = 5",
        "[providers.vllm]\napi_token = ['geheim']",
        "[providers.vllm]\nheaders = 'geheim'",
        "[providers.vllm]\nheaders = {x = ['geheim']}",
        "[providers.vllm]\nheaders = {x = 'geheim\u00e4'}",
        "[providers.vllm]\nheaders = {authorization = 'Bearer geheim'}",
    ],
)
def test_no_secret_in_errors_about_a_file(content: str, settings_file: Path) -> None:
    """A token in a file that is wrong elsewhere, or right there."""
    settings_file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        parse(["--config", str(settings_file)], {})
    assert "geheim" not in "".join(traceback.format_exception(caught.value, chain=True))
    assert caught.value.__context__ is None
