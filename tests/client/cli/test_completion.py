"""`--print-completion`: a real bash completes with the script."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deltawire._cli import main

if TYPE_CHECKING:
    from pathlib import Path

# What bash does at Tab: the words, the number of the last one, the word before it; then the function fills COMPREPLY.
_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_deltawire deltawire "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def printed(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The script for a shell."""
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mod"], ["models"]),
        (["models", "re"], ["refresh", "register"]),
        (["models", "list", "--st"], ["--state"]),
        (["completions", "list", "--state", "run"], ["running"]),
        (["chat", "--tool-s"], []),
        (["chat", "--token-"], ["--token-header"]),
        (["chat", "--request", "weather"], ["weather.json"]),
        (["--print-completion", "z"], ["zsh"]),
    ],
    ids=" ".join,
)
def test_bash_completes(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, options, values, and files where a file is expected."""
    (tmp_path / "script").write_text(printed("bash", capsys))
    (tmp_path / "weather.json").touch()
    command = ["bash", "--norc", "-c", _TAB, "tab", "./script", "deltawire", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "beginning"), [("zsh", "#compdef deltawire"), ("tcsh", "# AUTOMATICALLY GENERATED")])
def test_other_shells_get_a_script(shell: str, beginning: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the commands in it."""
    script = printed(shell, capsys)
    assert script.startswith(beginning)
    assert "count-tokens" in script


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, as for any wrong usage."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 2
    assert "pip install 'deltawire[completion]'" in capsys.readouterr().err
