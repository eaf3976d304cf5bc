"""What the tests of settings share: files to point at, and a short way to parse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

from deltawire_server.settings import Invocation, SettingsError, parse

if TYPE_CHECKING:
    from pathlib import Path

URL = "http://127.0.0.1:8000/v1"


class Parse(Protocol):
    """Parse a file's text, an environment and flags."""

    def __call__(self, *argv: str, file: str | bytes | None = None, **environ: str) -> Invocation: ...


class Problems(Protocol):
    """The lines of the error that the same arguments give."""

    def __call__(self, *argv: str, file: str | bytes | None = None, **environ: str) -> tuple[str, ...]: ...


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """Where the settings file is, if a test writes one."""
    return tmp_path / "deltawire.toml"


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A file that can be read, for keys that take one."""
    path = tmp_path / "some.pem"
    path.write_text("-----BEGIN CERTIFICATE-----\n")
    return path


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """An access list with one caller and the required file mode."""
    path = tmp_path / "keys"
    path.write_text(f"from-file call sha256:{'0' * 64}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def read(settings_file: Path) -> Parse:
    """Parse a file's text, variables and flags, as an operator with a home directory."""

    def run(*argv: str, file: str | bytes | None = None, **environ: str) -> Invocation:
        if file is not None:
            settings_file.write_bytes(file if isinstance(file, bytes) else file.encode())
            environ["DELTAWIRE_CONFIG"] = str(settings_file)
        return parse(argv, {"HOME": "/home/op", **environ})

    return run


@pytest.fixture
def problems(read: Parse) -> Problems:
    """The lines of the error that `read` raises."""

    def run(*argv: str, file: str | bytes | None = None, **environ: str) -> tuple[str, ...]:
        with pytest.raises(SettingsError) as caught:
            read(*argv, file=file, **environ)
        assert str(caught.value).splitlines() == list(caught.value.problems)
        return caught.value.problems

    return run
