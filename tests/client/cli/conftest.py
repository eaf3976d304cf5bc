"""The command, run in this process against the scripted gateway."""

from __future__ import annotations

import builtins
import io
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deltawire._cli import main
from tests.client.cli.support import Run, Terminal, typed

if TYPE_CHECKING:
    from tests.client.scripted import Gateway


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings stay out."""
    monkeypatch.delenv("DELTAWIRE_TARGET", raising=False)
    monkeypatch.delenv("DELTAWIRE_TOKEN", raising=False)
    monkeypatch.delenv("DELTAWIRE_TOKEN_HEADER", raising=False)


@pytest.fixture
def run(gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command against the gateway; `stdin` is text, or a list of lines typed at a terminal."""

    def run(*arguments: str, stdin: str | list[Any] = "") -> tuple[int, str, str]:
        if isinstance(stdin, str):
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        else:
            monkeypatch.setattr(sys, "stdin", Terminal())
            monkeypatch.setattr(builtins, "input", typed(iter(stdin)))
        monkeypatch.setenv("DELTAWIRE_TARGET", gateway.target)
        try:
            status = main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run
