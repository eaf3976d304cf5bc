from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deltawire_server.settings import Settings, effective, example, parse
from deltawire_server.settings.cli import FLAGS
from deltawire_server.settings.model import SECTIONS
from deltawire_server.settings.sources import SHORT_NAMES, variable
from tests.settings.conftest import URL

if TYPE_CHECKING:
    from tests.settings.conftest import Parse, Problems


def defaults() -> Settings:
    """What the example must be."""
    return Settings.model_validate({"providers": {"vllm": {"base_url": URL}}})


def test_the_example_is_the_defaults() -> None:
    """The printed file has no effect if it is copied unchanged."""
    assert Settings.model_validate(tomllib.loads(example())) == defaults()


def test_the_example_has_every_key() -> None:
    """With those that have no default as comments, which are TOML as well."""
    whole = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", example(), flags=re.MULTILINE))
    whole["providers"] = whole["providers"]["vllm"]
    assert {section: list(table) for section, table in whole.items()} == {
        section: list(model.model_fields) for section, model in SECTIONS.items()
    }
    assert max(map(len, example().splitlines())) <= 100


def test_the_example_in_the_readme(monkeypatch: pytest.MonkeyPatch, pem: Path) -> None:
    """The example can be used unchanged, except for the token and the CA file."""
    monkeypatch.setenv("HOME", str(pem.parent))
    readme = (Path(__file__).parents[2] / "server" / "README.md").read_text("utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    settings = Settings.model_validate(tomllib.loads(text.replace("…", "t").replace("ca.pem", pem.name)))
    assert len(settings.providers["llama"].base_url) == 2
    assert settings.providers["llama"].headers.keys() == {"x-cell"}
    assert settings.providers["small"].refresh_interval == 10


def test_help_explains_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Flags, variables, and the whole example, to be cut out and used."""
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert example() in text
    names = [
        variable((section, key))
        for section, model in SECTIONS.items()
        if section != "providers"
        for key in model.model_fields
    ]
    for word in [*FLAGS, *SHORT_NAMES, *names, "--config", "--set", "--check-config", "--version", "DELTAWIRE_CONFIG"]:
        assert word in text, word
    printed = tomllib.loads(text[text.index("# The listener") :])
    assert Settings.model_validate(printed) == defaults()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The distribution's."""
    with pytest.raises(SystemExit) as caught:
        parse(["--version"], {})
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"deltawire-server {version('deltawire')}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--nonsense"],
        ["--vllm-ur", URL],
        ["--listen"],
        ["--set", "server.max_streams"],
        ["--set", "max_streams=geheim"],
        ["--set", "providers.api_token=geheim"],
        ["--set", "=geheim"],
    ],
)
def test_usage_errors_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And no value given to --set is repeated."""
    with pytest.raises(SystemExit) as caught:
        parse(argv, {})
    assert caught.value.code == 2
    assert "geheim" not in capsys.readouterr().err


def test_every_flag(read: Parse, pem: Path, keys_file: Path) -> None:
    """Each reaches its key and is named as the origin."""
    invocation = read(
        *("--listen", "0.0.0.0:1", "--listen", "unix:/run/d.sock", "--allow-plaintext", "--max-streams", "7"),
        *("--workers", "1"),
        *("--tls-cert-file", str(pem), "--tls-key-file", str(pem), "--tls-client-ca-file", str(pem)),
        *("--access-keys-file", str(keys_file)),
        *("--vllm-url", "https://h/v1, https://i", "--vllm-url", "https://j", "--vllm-max-tokens", "9"),
        *("--database-url", "sqlite:////r.db"),
        *("--health-listen", "0.0.0.0:2", "--metrics-listen", "off"),
        *("--log-level", "warning", "--log-format", "json", "--check-config"),
    )
    server, vllm = invocation.settings.server, invocation.settings.providers["vllm"]
    assert server.listen == ("0.0.0.0:1", "unix:/run/d.sock")
    assert (server.allow_plaintext, server.max_streams) == (True, 7)
    assert {server.tls_cert_file, server.tls_key_file, server.tls_client_ca_file} == {pem}
    assert invocation.settings.access.keys_file == keys_file
    assert server.health_address == "0.0.0.0:2"
    assert (vllm.base_url, vllm.max_tokens) == (("https://h/v1", "https://i", "https://j"), 9)
    assert invocation.settings.registry.database_url == "sqlite+aiosqlite:////r.db"
    assert (invocation.settings.log.level, invocation.settings.log.format) == ("warning", "json")
    assert invocation.check_only
    assert dict(invocation.origins) == {".".join(path): f"flag {flag}" for flag, path in FLAGS.items()}


def test_serving_is_what_is_asked_for_otherwise(read: Parse) -> None:
    """Without --check-config."""
    assert not read(VLLM_URL=URL).check_only


def test_a_secret_is_not_taken_from_a_flag(problems: Problems) -> None:
    """It would show in ps; the message says where it belongs."""
    (line,) = problems("--vllm-url", URL, "--set", "providers.vllm.api_token=geheim")
    assert "visible in ps" in line
    assert "DELTAWIRE_PROVIDERS_VLLM_API_TOKEN" in line
    assert "geheim" not in line


def test_a_table_is_not_taken_from_a_flag(problems: Problems) -> None:
    """Its values are secrets too; the message says where they belong."""
    assert problems("--vllm-url", URL, "--set", 'providers.vllm.headers={x = "geheim"}') == (
        "providers.vllm.headers (from flag --set): only the settings file can set these: write [providers.vllm.headers] there",
    )


def test_effective_is_toml_without_secrets(read: Parse) -> None:
    """Everything in it, secrets masked, each value's source beside it; nor are the secrets in any repr."""
    file = (
        f'[providers."a.b"]\nbase_url = ["{URL}", "http://b"]\napi_token = "geheim"\ntls_verify = false\n'
        'allowed_models = "m*"\n[providers."a.b".headers]\nx-team = "geheim"\n"x.y" = "geheim"\n'
    )
    invocation = read(
        *("--max-streams", "7"),
        file=file,
        VLLM_URL=URL,
        VLLM_API_TOKEN="geheim",
        DELTAWIRE_REGISTRY_DATABASE_URL="postgresql://u:geheim@h/d",
    )
    text = effective(invocation.settings, invocation.origins)
    tables = tomllib.loads(text)
    assert tables["providers"]["vllm"]["api_token"] == "***"
    assert tables["providers"]["a.b"] == {
        "base_url": [URL, "http://b"],
        "api_token": "***",
        "headers": {"x-team": "***", "x.y": "***"},
        "allowed_models": ["m*"],
        "allowed_extra_fields": [],
        "accept_caller_tokens": False,
        "tls_verify": False,
        "connect_timeout": 5.0,
        "first_event_timeout": 600.0,
        "silence_timeout": 300.0,
        "engine": "auto",
        "refresh_interval": 30.0,
    }
    assert tables["registry"]["database_url"] == "postgresql+psycopg://u:***@h/d"
    assert "max_streams = 7  # flag --max-streams" in text
    assert f'base_url = ["{URL}"]  # environment VLLM_URL' in text
    assert "headers = {}  # default" in text
    assert "queue_bytes = 262144  # default" in text
    assert "# max_tokens is not set" in text
    for shown in (text, effective(invocation.settings), repr(invocation), str(invocation.settings)):
        assert "geheim" not in shown


def test_effective_reads_back_as_it_was(read: Parse) -> None:
    """Without secrets, the printed settings are a settings file."""
    settings = read("--set", 'server.listen=unix:/tmp/\x7f"ü😀\\,127.0.0.1:2', VLLM_URL=URL).settings
    text = effective(settings)
    remarks = ("tls_", "max_", "api_", "keys", "folder", "retained_streams", "every caller may do everything")
    assert not [
        line
        for line in text.splitlines()
        if "#" in line and not line.startswith(tuple(f"# {each}" for each in remarks))
    ]
    assert Settings.model_validate(tomllib.loads(text)) == settings


def test_a_file_name_cannot_break_the_comment(tmp_path: Path) -> None:
    """It may hold a line's end."""
    path = tmp_path / "two\nlines.toml"
    path.write_text(f'[providers.vllm]\nbase_url = "{URL}"')
    invocation = parse(["--config", str(path)], {"HOME": "/home/op"})
    assert tomllib.loads(effective(invocation.settings, invocation.origins))["providers"]["vllm"]["base_url"] == [URL]
